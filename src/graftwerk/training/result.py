"""What a learning stage leaves at `model.nemo_path`: adapters, or a whole model."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.checkpoints import nemo_tokenizer, save_adapters, save_base
from graftwerk.checkpoints.nemo import write_nemo
from graftwerk.checkpoints.nemo_config import from_config
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig
from graftwerk.training.best_of_each import best_of
from graftwerk.training.copies import owner_of
from graftwerk.training.learner import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_nemo(path: Path) -> bool:
    """Whether a result is written in NeMo's form; else it is a folder of ours."""
    return path.suffix == ".nemo"


def check_whole(
    config: TransformerConfig, tokenizer: "PreTrainedTokenizerBase", path: Path
) -> None:
    """Raises a UserError where a whole model cannot be written at the path as its name wants it."""
    if not is_nemo(path):
        return
    advice = "leave out `.nemo` to write a folder in our own layout"
    if config.architecture == "bert":
        raise UserError(f"model.nemo_path={path}: a BERT has no .nemo form: {advice}")
    try:
        from_config(config, mcore=config.architecture == "gpt")
        with _folder_of(tokenizer) as folder:
            nemo_tokenizer.section_for(folder, "")
    except UserError as error:
        raise UserError(f"model.nemo_path={path}: {error}; {advice}") from None


def point_path(path: Path, name: str) -> Path:
    """Where a point of a sweep is written whose best one is written to a path: beside it."""
    if is_nemo(path):
        return path.with_name(f"{path.stem}_{name}{path.suffix}")
    return path.with_name(f"{path.name}_{name}")


def told(
    learner: Learner,
    lr: float,
    found: Mapping[str, tuple[int, float | None]],
    path: Path,
    files: Mapping[Path, int],
) -> list[dict[str, Any]]:
    """The points of a sweep as a summary has them.

    Args:
        lr: of points that have none of their own.
        found: by name the step and the validation loss of the weights that are written.
        path: of the best one.
        files: what `write_points` gave.
    """
    sizes = dict.fromkeys(found, 0)
    for name, parameter in learner.model.named_parameters():
        owner = owner_of(name)
        if parameter.requires_grad and owner in sizes:
            sizes[owner] += parameter.numel()
    return [
        {
            "name": point.name,
            "settings": {k: v for k, v in point.differs.items() if k not in ("lr", "seed")},
            "lr": point.optim.get("lr", lr),
            "seed": point.seed,
            "trainable_parameters": sizes[point.name],
            "step": found[point.name][0],
            "val_loss": found[point.name][1],
            "best": point.name == best_of(found)[0],
            "adapter": str(point_path(path, point.name)),
            "file_bytes": files[point_path(path, point.name)],
        }
        for point in learner.sweep
    ]


def write_points(learner: Learner, path: Path, best: str, extra: dict[str, Any]) -> dict[Path, int]:
    """Writes each adapter of a sweep into a file of its own and the best one at the path too.

    Returns the bytes on disk of each; `extra` is as in `write_result`.
    """
    files = {point_path(path, name): name for name in learner.adapters} | {path: best}
    return {file: save_adapters(learner.model, [n], file, extra) for file, n in files.items()}


def write_result(learner: Learner, path: Path, extra: dict[str, Any]) -> int:
    """Writes what was trained, adapters and fusions or the whole model; returns the bytes on disk.

    `extra` are plain values to keep in an adapter's file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not learner.whole:
        return save_adapters(learner.model, learner.adapters, path, extra, learner.fusions)
    if not is_nemo(path):
        save_base(learner.model, learner.tokenizer, path)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    parameters = {name: p.detach().cpu() for name, p in learner.model.named_parameters()}
    config = learner.model.config
    with _folder_of(learner.tokenizer) as folder:
        write_nemo(config, parameters.__getitem__, path, folder, config.architecture == "gpt")
    return path.stat().st_size


@contextmanager
def _folder_of(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Path]:
    """The tokenizer's files."""
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as folder:
        tokenizer.save_pretrained(folder)
        yield Path(folder)
