"""Stages that keep no checkpoints: a signal ends them at once, with nothing half-written."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from graftwerk.__main__ import guarded, read_config
from graftwerk.checkpoints import adapter_export
from graftwerk.errors import Exit
from graftwerk.models import GPT
from graftwerk.stages import eval as evaluation
from tests.graftwerk.learning_stage import base, elsewhere  # noqa: F401
from tests.graftwerk.ranks import start_stage
from tests.graftwerk.stages.test_eval import cfg, metrics, predictions  # noqa: F401


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def results(cfg):  # noqa: F811
    return Path(cfg.exp_manager.explicit_log_dir)


def scores(cfg):  # noqa: F811
    timed = ("answer_seconds", "seconds")
    return [
        {key: value for key, value in result.items() if key not in timed}
        for result in metrics(cfg)["results"]
    ]


def counted(calls: list[float], at: int | None, number: int = signal.SIGUSR1):
    """A patch of the model's pass: notes when each begins, and sends a signal within one."""
    whole = GPT.forward

    def forward(self, *args, **kwargs):
        calls.append(time.monotonic())
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return whole(self, *args, **kwargs)

    return forward


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_while_answers_are_written_ends_within_the_step(
    number,
    cfg,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    calls: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", counted(calls, None))
        assert evaluation.run(cfg) == 0
    undisturbed, answers, steps = scores(cfg), predictions(cfg, "mine"), len(calls)
    (results(cfg) / "metrics.json").unlink()
    for path in results(cfg).glob("*/predictions.jsonl"):
        path.unlink()
    calls.clear()
    capsys.readouterr()
    last = steps - 1  # the adapter's, which come behind the base's
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", counted(calls, last, number))
        assert evaluation.run(cfg) == Exit.REQUEUE
    assert len(calls) == last
    assert files(results(cfg)) == ["base/predictions.jsonl"]
    name = signal.Signals(number).name
    assert f"stopped by {name}: start again to repeat it\n" in capsys.readouterr().out
    assert evaluation.run(cfg) == 0
    assert (scores(cfg), predictions(cfg, "mine")) == (undisturbed, answers)


def test_a_signal_while_a_file_is_written_leaves_the_one_before(cfg, monkeypatch):  # noqa: F811
    assert evaluation.run(cfg) == 0
    before = (results(cfg) / "base" / "predictions.jsonl").read_bytes()
    whole = evaluation.json.dumps

    def dumps(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.json, "dumps", dumps)
        assert evaluation.run(cfg) == Exit.REQUEUE
    assert (results(cfg) / "base" / "predictions.jsonl").read_bytes() == before
    assert not list(results(cfg).rglob(".*"))


def slow_passes(rank):
    whole = GPT.forward

    def forward(self, *args, **kwargs):
        print("answers", flush=True)
        time.sleep(0.5)
        return whole(self, *args, **kwargs)

    GPT.forward = forward


def test_a_signal_to_one_process_ends_both(cfg, tmp_path):  # noqa: F811
    cfg.trainer.devices = 2
    ranks = start_stage(cfg, tmp_path, 2, slow_passes, "eval")
    ranks[1].wait_for("answers")
    ranks[1].send(signal.SIGUSR1)
    sent = time.monotonic()
    assert [rank.wait() for rank in ranks] == [Exit.REQUEUE] * 2, (
        ranks[0].complained + ranks[1].complained
    )
    assert time.monotonic() - sent < 12
    assert [rank.complained for rank in ranks] == ["", ""]
    assert "stopped by SIGUSR1 of rank 1: start again" in ranks[0].said
    assert not results(cfg).exists() or files(results(cfg)) == []
    assert [rank.wait() for rank in start_stage(cfg, tmp_path, 2, None, "eval")] == [0, 0]
    assert len(metrics(cfg)["results"]) == 2


# ---- export


@pytest.fixture
def export(cfg, tmp_path):  # noqa: F811
    """The job's file of a stage that writes the adapter for another library."""
    model = {key: cfg.model[key] for key in ("language_model_path", "adapters")}
    settings = {"format": "peft", "merge": False, "overwrite": False, "dtype": "keep"}
    place = tmp_path / "exported" / "ia3"
    OmegaConf.save(
        {**settings, "output_path": str(place), "model": OmegaConf.to_container(model_of(model))},
        tmp_path / "job_hydra.yaml",
    )
    return place, str(tmp_path / "job_hydra.yaml")


def model_of(values):
    return OmegaConf.create({"restore_from_path": None, "revision": None, **values})


def killed_in_moving(number, rank):
    whole = adapter_export.replace_path

    def replacing(*args):
        os.kill(os.getpid(), number)
        whole(*args)

    adapter_export.replace_path = replacing


def test_a_signal_ends_an_export_with_75_and_nothing_left(export, monkeypatch, capsys):
    place, config = export
    with monkeypatch.context() as patch:
        patch.setattr(adapter_export, "replace_path", adapter_export.replace_path)
        killed_in_moving(signal.SIGTERM, 0)
        assert guarded(["export", config]) == Exit.REQUEUE
    assert capsys.readouterr().out == "stopped by SIGTERM: start again to repeat it\n"
    assert list(place.parent.iterdir()) == []
    assert guarded(["export", config]) == 0
    assert [path.name for path in place.parent.iterdir()] == ["ia3"]


def test_what_a_killed_export_leaves_goes_with_the_next(export, tmp_path):
    place, config = export
    patch = partial(killed_in_moving, signal.SIGKILL)
    (rank,) = start_stage(read_config(Path(config)), tmp_path / "job", 1, patch, "export")
    assert rank.wait() == 128 + signal.SIGKILL
    assert len(list(place.parent.glob(".ia3.*.partial"))) == 1
    assert guarded(["export", config]) == 0
    assert [path.name for path in place.parent.iterdir()] == ["ia3"]
