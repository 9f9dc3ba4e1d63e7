"""Where the time of steps goes: the table, the trace, and that nothing else changes."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.stages import learning
from graftwerk.training.profile import Clock, Window, exchange_shares, measured_peak, overlap
from graftwerk.training.profile_table import PHASES
from tests.graftwerk.learning_stage import elsewhere, read_metrics
from tests.graftwerk.ranks import start_stage


def profiled(cfg):
    cfg.trainer.profile = True
    return cfg


def table(cfg) -> dict:
    return json.loads((folder(cfg) / "table.json").read_text())


def folder(cfg) -> Path:
    return Path(cfg.exp_manager.explicit_log_dir) / "profile"


def trace(cfg, rank: int = 0) -> list[dict]:
    with gzip.open(folder(cfg) / f"trace_rank{rank}.json.gz") as file:
        return json.load(file)["traceEvents"]


def in_(moment: float, span: list[float]) -> bool:
    return span[0] <= moment <= span[1]


@pytest.mark.parametrize(
    ("left", "timed", "traced"),
    [
        (None, range(2, 7), range(7, 9)),
        (500, range(2, 7), range(7, 9)),
        (9, range(2, 7), range(7, 9)),
        (4, range(1, 3), range(3, 4)),
        (2, range(1), range(1, 2)),
        (1, range(1), range(1)),
    ],
)
def test_a_short_run_profiles_fewer_steps(left, timed, traced):
    assert Window.of(left) == Window(timed, traced)


def test_every_run_has_a_step_that_is_timed_and_one_that_is_traced():
    for left in range(1, 12):
        window = Window.of(left)
        assert window.timed
        assert window.traced
        assert window.traced.stop <= left


def test_a_profile_changes_nothing_that_is_trained(cfg, tmp_path, capsys):
    plain = elsewhere(cfg, tmp_path / "plain")
    assert learning.run("adapter_learning", plain) == 0
    assert not folder(plain).exists()
    assert "profile of steps" not in capsys.readouterr().out
    assert learning.run("adapter_learning", profiled(cfg)) == 0
    assert "profile of steps 3 to 7" in capsys.readouterr().out
    found, expected = (read_adapter(c.model.nemo_path)[1] for c in (cfg, plain))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    keys = ("step", "train_loss", "val_loss", "grad_norm", "lr")
    rows, others = ([{k: r[k] for k in keys} for r in read_metrics(c)] for c in (cfg, plain))
    assert rows == others


def test_the_table_adds_up_and_the_trace_has_its_phases(cfg):
    assert learning.run("adapter_learning", profiled(cfg)) == 0
    found = table(cfg)
    assert (found["first_step"], found["last_step"]) == (3, 7)
    phases = found["phases"]
    assert tuple(phases) == PHASES
    for phase in ("data", "forward", "backward", "optimizer", "rest"):
        assert phases[phase]["seconds_per_step"] > 0, phase
    total = sum(phase["seconds_per_step"] for phase in phases.values())
    assert total == pytest.approx(found["seconds_per_step"])
    assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1)
    # Steps 3 to 5 have four rows, 6 has two, 7 has four, in pairs that are padded.
    rows = found["samples_per_second"] * found["seconds_per_step"] * 5
    assert rows == pytest.approx(18)
    assert 0 < found["useful_tokens_per_second"] < found["tokens_per_second"]
    done = found["forward_flops_per_step"] + found["backward_flops_per_step"]
    reached = done / found["seconds_per_step"]
    assert found["model_flops_per_second"] == pytest.approx(reached)
    assert found["model_flop_utilisation"] == pytest.approx(
        reached / found["peak_flops_per_second"]
    )
    assert 0 < found["useful_flop_utilisation"] < found["model_flop_utilisation"] < 1
    named = [event["name"] for event in trace(cfg) if event.get("cat") == "user_annotation"]
    assert named.count("forward") == named.count("backward") == 4  # two steps of two
    assert named.count("optimizer") == named.count("data") == 2
    text = (folder(cfg) / "table.txt").read_text()
    assert all(phase in text for phase in PHASES)
    assert not [path for path in folder(cfg).iterdir() if path.name.startswith(".")]


def test_a_run_that_goes_on_profiles_its_own_steps(cfg):
    cfg.trainer.max_epochs = 1
    assert learning.run("adapter_learning", cfg) == 0
    cfg.trainer.max_epochs = 2
    assert learning.run("adapter_learning", profiled(cfg)) == 0
    found = table(cfg)
    assert (found["first_step"], found["last_step"]) == (9, 10)  # of 7 to 12; 11 and 12 are traced


@pytest.mark.long
def test_two_processes_profile_the_same_steps_and_tell_what_they_exchange(cfg, tmp_path):
    cfg.trainer.devices = 2
    cfg.model.tensor_model_parallel_size = 2
    first, second = start_stage(profiled(cfg), tmp_path, 2)
    assert (first.wait(), second.wait()) == (0, 0), first.complained + second.complained
    assert "profile of steps 3 to 7, 2 processes" in first.said
    assert second.said == ""
    found = table(cfg)
    assert len(found["ranks"]) == 2
    assert sum(rank["rows"] for rank in found["ranks"]) == pytest.approx(18)
    # What a layer's ranks exchange lies within the forward pass, and counts as communication.
    for rank in range(2):
        spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in trace(cfg, rank) if "dur" in e]
        sent = [start for name, start, _ in spans if name.startswith("gloo:")]
        inside = [s for name, *span in spans if name == "forward" for s in sent if in_(s, span)]
        assert len(inside) >= 2 * 2 * 2  # sublayers of two layers in each of two steps


def test_what_is_exchanged_within_a_phase_is_told_apart_from_it():
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, start, stop, device=cpu):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=stop), device_type=device
        )

    events = [
        event("forward", 0, 10),
        event("gloo:all_reduce", 2, 4),
        event("backward", 10, 30),
        event("nccl:all_reduce", 11, 12),  # its launch, which takes no time of the device
        event("ncclDevKernel_AllReduce", 12, 17, gpu),
        event("forward", 30, 40),
        event("communication", 40, 50),
        event("gloo:all_reduce", 41, 49),
    ]
    assert exchange_shares(events) == {"forward": 0.1, "backward": 0.25}


def test_overlap_counts_what_lies_within_spans_once():
    assert overlap([(0, 10), (20, 30)], [(2, 4), (3, 6), (9, 21), (40, 50)]) == 4 + 1 + 1


def test_a_clock_that_does_not_run_adds_nothing_up():
    clock = Clock(torch.device("cpu"))
    clock.mark("forward")
    clock.mark("backward")
    assert not any(clock.seconds.values())
    clock.running = True
    clock.mark("forward")
    clock.mark("backward")
    clock.mark(None)
    clock.running = False
    assert {phase for phase, seconds in clock.seconds.items() if seconds} == {"forward", "backward"}


def test_measuring_the_peak_draws_from_no_random_state_of_training():
    before = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), torch.float32, seconds=0.0) > 1e8
    assert torch.equal(torch.get_rng_state(), before)
