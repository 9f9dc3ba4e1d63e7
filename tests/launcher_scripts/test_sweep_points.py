"""`peft.sweep` on the command line: what is wrong is one line; eval scores every point."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from graftwerk.errors import UserError
from graftwerk.training.result import point_path as written_at
from graftwerk.training.sweep import points_of
from launcher_scripts.sweep_points import names_of, point_path, points_in
from tests.launcher_scripts.test_compositions import FROZEN, PEFT, call, scored
from tests.launcher_scripts.test_schema import refused

TWO = "[{name: r4, adapter_dim: 4, lr: 1e-4}, {name: r16, adapter_dim: 16, seed: 2}]"


@pytest.mark.parametrize(
    "sweep",
    [
        TWO,
        "[{lr: 0.1}, {name: own, lr: 0.2}]",
        "{adapter_dim: [4, 8], lr: [0.1, 0.2]}",
        "{lr: [0.1]}",
        "[]",
        "[1, 2]",
        "{lr: 0.1}",
    ],
)
def test_the_launcher_sees_the_points_that_the_job_sees(sweep):
    given = OmegaConf.create({"sweep": OmegaConf.create(f"sweep: {sweep}").sweep})
    points = points_in(OmegaConf.to_container(given)["sweep"])  # pyright: ignore
    try:
        found = points_of({"peft": {"peft_scheme": "lora", **given}})
    except UserError:
        assert points is None or len(points) < 2
        return
    assert points is not None
    assert names_of(points, "lora") == [point.name for point in found]
    own = [{k: v for k, v in point.items() if k != "name"} for point in points]
    assert own == [point.differs for point in found]


@pytest.mark.parametrize("path", ["/x/y.nemo", "/x/llama-3.1", "/x/plain"])
def test_the_launcher_knows_where_a_point_is_written(path):
    assert point_path(path, "r4") == str(written_at(Path(path), "r4"))


WRONG = """[
  {rank: 4}, {adapter_dm: 4}, {adapter_dim: 0}, {lr: 0}, {weight_decay: -1}, {seed: -1},
  {name: ../x}, {name: a}, {name: a}, {dora: True, weight_tying: True}]""".replace("\n", "")


def test_each_mistake_in_a_sweep_is_one_line(command):
    refused(
        call(command, sweep=WRONG),
        "sweep: two points are called a: give each another name",
        "sweep.0.rank: no such key",
        "did you mean peft.model.peft.sweep.1.adapter_dim?",
        "sweep.2.adapter_dim: must be a whole number of at least 1, not 0",
        "sweep.3.lr: must be a number above 0, not 0",
        "sweep.4.weight_decay: must be a number of at least 0, not -1",
        "sweep.5.seed: must be a whole number of at least 0, not -1",
        "sweep.6.name: must be a name of letters, digits",
        "lora_tuning.dora: goes with untied layers",
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sweep": "[{lr: 0.1}]"}, "sweep: must have two points or more, not 1"),
        ({"sweep": "1"}, "sweep: must be a list (a mapping of keys to values) or a mapping"),
        ({"adapter_names": "x"}, "adapter_names: peft.model.peft.sweep says it too"),
        ({"composition": "lora_1"}, "composition: peft.model.peft.sweep says it too"),
        ({"peft_scheme": "[lora,ia3]"}, "sweep: varies one method that can stand side by side"),
        ({"peft_scheme": "selective"}, "sweep: varies one method that can stand side by side"),
        (
            {"sweep": "{virtual_tokens: [2, 3]}", "peft_scheme": "prompt"},
            "virtual_tokens must be as many for all points",
        ),
        (
            {"sweep": "[{name: b}, {}]", "adapters": FROZEN},
            "adapters: b must name one adapter, and none that is trained here",
        ),
    ],
)
def test_what_does_not_go_with_a_sweep_is_one_line(command, keys, said):
    refused(call(command, **{"sweep": "{seed: [1, 2]}", **keys}), said)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("peft.model.optim.sched.name=ReduceLROnPlateau", "use another schedule"),
        ("peft.model.data.validation_ds=[]", "needs it to tell its points apart"),
        (
            "peft.exp_manager.checkpoint_callback_params.monitor=train_loss",
            "the best of each point is that of its own val_loss: use val_loss",
        ),
    ],
)
def test_a_stage_that_cannot_tell_points_apart_is_refused(command, word, said):
    refused(call(command, word, sweep=TWO), said)


def test_eval_scores_each_point_and_export_takes_the_best(command):
    names = [("r4", "megatron_gpt_peft_r4.nemo"), ("r16", "megatron_gpt_peft_r16.nemo")]
    answer = call(command, "stages=[peft,eval]", sweep=TWO)
    assert scored(answer) == (names, "Parallel(r4, r16)")
    answer = call(command, "stages=[peft,eval]", sweep=TWO, adapters=FROZEN)
    frozen = [("a", "a"), ("b", "b")]
    assert scored(answer) == ([*frozen, *names], "Stack(a, b, Parallel(r4, r16))")
    answer = call(command, "stages=[peft,export]", "export.format=peft", sweep=TWO)
    assert answer.code == 0, answer.lines
    (taken,) = answer.config("export")["model"]["adapters"]
    assert taken["path"].endswith("megatron_gpt_peft.nemo")


def test_a_point_reaches_the_job_as_it_was_typed(command):
    answer = call(command, sweep=TWO)
    assert answer.code == 0, answer.lines
    assert answer.config("peft")["model"]["peft"]["sweep"] == [
        {"name": "r4", "adapter_dim": 4, "lr": 1e-4},
        {"name": "r16", "adapter_dim": 16, "seed": 2},
    ]
    assert not [line for line in answer.lines if PEFT in line]
