"""Metrics in a CSV file that a resumed run goes on with, and the other loggers asked for."""

import csv
import importlib.util
import io
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from graftwerk.data.jsonl import replacing
from graftwerk.errors import UserError, storing

COLUMNS: tuple[str, ...] = (
    "step",
    "epoch",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "samples/s",
    "tokens/s",
)


class MetricsCSV(Logger):
    """Appends a row to `metrics.csv` for each line of metrics; empty cells where it has none.

    Args:
        folder: where the file lies.
        resumed_at: the step that this run goes on from; later rows of an earlier run go.
    """

    def __init__(self, folder: Path, resumed_at: int):
        super().__init__()
        self.path = folder / "metrics.csv"
        self.resumed_at = resumed_at
        self.columns = list(COLUMNS)
        self._file: IO[str] | None = None

    def add_columns(self, names: list[str]) -> None:
        """Columns behind the usual ones; to be called before the first row."""
        self.columns += [name for name in names if name not in self.columns]

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the job's YAML holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with storing(self.path):
            file = self._file = self._file or self._open()
            row = {"step": step, **metrics}
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)
            file.flush()

    def _open(self) -> IO[str]:
        kept = []
        if self.resumed_at and self.path.is_file():
            with open(self.path, newline="") as file:
                kept = [row for row in csv.DictReader(file) if _step(row) <= self.resumed_at]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        partial.write_text(text.getvalue(), newline="")
        os.replace(partial, self.path)
        return open(self.path, "a", newline="")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what could not be flushed has been told of
                file.close()


def _step(row: dict[str, str]) -> float:
    # A row that a killed run left half-written has no step to speak of.
    return int(row["step"]) if (row["step"] or "").isdigit() else float("inf")


def check_loggers(exp_manager: DictConfig) -> None:
    """Raises a UserError where a logger is asked for that cannot be had."""
    if exp_manager.get("create_wandb_logger") and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "exp_manager.create_wandb_logger=True needs the package wandb: install it "
            "(pip install wandb), or set exp_manager.create_wandb_logger: False"
        )


def build_loggers(exp_manager: DictConfig, folder: Path, resumed_at: int) -> list[Logger]:
    """CSV always, TensorBoard unless switched off, Weights & Biases on request."""
    loggers: list[Logger] = [MetricsCSV(folder, resumed_at)]
    if exp_manager.get("create_tensorboard_logger", True):
        # `purge_step`: TensorBoard forgets what an earlier run wrote past the resumed step.
        purge: dict[str, Any] = {"purge_step": resumed_at + 1} if resumed_at else {}
        loggers.append(TensorBoardLogger(folder, name="", version="", **purge))
    if exp_manager.get("create_wandb_logger"):
        from pytorch_lightning.loggers import WandbLogger

        given: dict[str, Any] = {"save_dir": str(folder), "resume": "allow"}
        given["id"] = wandb_run(folder, fresh=not exp_manager.get("resume_if_exists"))
        own: Any = OmegaConf.to_container(
            exp_manager.get("wandb_logger_kwargs") or OmegaConf.create({}), resolve=True
        )
        loggers.append(WandbLogger(**{**given, **own}))
    return loggers


def wandb_run(folder: Path, fresh: bool) -> str | None:
    """The id of the run's page at Weights & Biases, the same for all that go on in a folder.

    `WANDB_RUN_ID` counts more. Rank zero alone, which talks to the service, makes one and keeps it
    in `wandb_run`; others get None.

    Args:
        folder: of the run.
        fresh: whether a run that starts here is another one than the last.
    """
    if rank_zero_only.rank != 0 or os.environ.get("WANDB_RUN_ID"):
        return os.environ.get("WANDB_RUN_ID")
    path = folder / "wandb_run"
    if path.is_file() and not fresh and (known := path.read_text().strip()):
        return known
    run = secrets.token_hex(8)
    with replacing(path) as file:
        file.write(f"{run}\n".encode())
    return run
