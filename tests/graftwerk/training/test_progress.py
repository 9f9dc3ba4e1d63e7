"""`progress.json`, and one page at Weights & Biases for all that go on in a folder."""

import json
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest

from graftwerk.errors import Exit
from graftwerk.stages import learning
from graftwerk.training import loggers
from graftwerk.training.module import LearningModule
from tests.graftwerk.learning_stage import read_metrics

KEYS = (
    "stage step max_steps epoch train_loss val_loss best_val_loss seconds_per_step seconds_left "
    "updated"
)


def progress(cfg):
    return json.loads((Path(cfg.exp_manager.explicit_log_dir) / "progress.json").read_text())


def stop_at(step, seen, cfg):
    """A patch: notes the file's content before each step, and stops the run at one."""
    whole = LearningModule.training_step

    def stopping(self, batch, batch_idx):
        seen[self.global_step] = progress(cfg)
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, batch, batch_idx)

    return stopping


def test_progress_is_written_at_each_line_of_metrics(cfg, monkeypatch):
    cfg.trainer.log_every_n_steps = 2
    seen = {}
    monkeypatch.setattr(LearningModule, "training_step", stop_at(None, seen, cfg))
    assert learning.run("adapter_learning", cfg) == 0
    assert list(seen[0]) == KEYS.split()
    assert (seen[0]["stage"], seen[0]["step"], seen[0]["max_steps"]) == ("adapter_learning", 0, 12)
    assert (seen[0]["train_loss"], seen[0]["seconds_left"]) == (None, None)
    # After the first step, every second one, and the validation behind the third.
    assert [seen[n]["step"] for n in range(1, 12)] == [1, 2, 3, 4, 4, 6, 6, 8, 9, 10, 10]
    assert [seen[n]["epoch"] for n in (1, 6, 8)] == [1, 1, 2]
    rows = {int(row["step"]): row for row in read_metrics(cfg) if row["train_loss"]}
    assert seen[4]["train_loss"] == pytest.approx(float(rows[4]["train_loss"]))
    losses = [float(row["val_loss"]) for row in read_metrics(cfg) if row["val_loss"]]
    last = progress(cfg)
    assert (last["val_loss"], last["best_val_loss"]) == pytest.approx((losses[-1], min(losses)))
    assert (last["step"], last["epoch"], last["seconds_left"]) == (12, 2, 0)
    half = seen[6]
    assert half["seconds_left"] == pytest.approx(6 * half["seconds_per_step"])
    written = datetime.strptime(last["updated"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)


def test_a_resumed_run_remembers_its_losses(cfg, monkeypatch):
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(LearningModule, "training_step", stop_at(7, seen, cfg))
        assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    before = progress(cfg)
    seen.clear()
    monkeypatch.setattr(LearningModule, "training_step", stop_at(None, seen, cfg))
    assert learning.run("adapter_learning", cfg) == 0
    kept = ("step", "train_loss", "val_loss", "best_val_loss")
    assert {key: seen[8][key] for key in kept} == {key: before[key] for key in kept}
    assert before["step"] == 8


# ---- Weights & Biases


class Service:
    """Stands for the package: notes what `init` was given, and what was logged to which run."""

    def __init__(self, monkeypatch):
        self.runs, self.logged = [], []
        modules = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib")}
        modules["wandb.wandb_run"] = ModuleType("wandb.wandb_run")
        service = self

        class Run:
            def __init__(self, **settings):
                service.runs.append(settings)
                self.id = settings["id"]

            def log(self, metrics, **more):
                service.logged.append((self.id, metrics))

            def define_metric(self, *args, **kwargs):
                """Nothing."""

        modules["wandb"].init = lambda **settings: Run(**settings)  # type: ignore[attr-defined]
        modules["wandb"].run = None  # type: ignore[attr-defined]
        modules["wandb.sdk.lib"].RunDisabled = type("RunDisabled", (), {})  # type: ignore[attr-defined]
        modules["wandb.wandb_run"].Run = Run  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", True)
        monkeypatch.setattr(loggers, "check_loggers", lambda manager: None)
        monkeypatch.setattr(learning, "check_loggers", lambda manager: None)
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)


@pytest.fixture
def service(cfg, monkeypatch):
    cfg.exp_manager.create_wandb_logger = True
    cfg.exp_manager.wandb_logger_kwargs = {"project": "first", "name": "one"}
    cfg.trainer.max_epochs = 1
    return Service(monkeypatch)


def test_a_resumed_run_goes_on_in_its_run_at_wandb(cfg, service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LearningModule, "training_step", stop_at(4, {}, cfg))
        assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    assert learning.run("adapter_learning", cfg) == 0
    first, second = service.runs
    assert first["id"] == second["id"]
    assert len(first["id"]) == 16
    assert (first["resume"], first["project"], first["name"]) == ("allow", "first", "one")
    steps = [metrics["trainer/global_step"] for _, metrics in service.logged]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_starts_anew_is_another_at_wandb(cfg, service):
    assert learning.run("adapter_learning", cfg) == 0
    cfg.exp_manager.resume_if_exists = False
    assert learning.run("adapter_learning", cfg) == 0
    first, second = service.runs
    assert first["id"] != second["id"]


@pytest.mark.parametrize("given", ["environment", "key"])
def test_an_id_that_is_given_counts(given, cfg, service, monkeypatch):
    if given == "environment":
        monkeypatch.setenv("WANDB_RUN_ID", "mine")
    else:
        cfg.exp_manager.wandb_logger_kwargs.id = "mine"
    assert learning.run("adapter_learning", cfg) == 0
    assert [run["id"] for run in service.runs] == ["mine"]
