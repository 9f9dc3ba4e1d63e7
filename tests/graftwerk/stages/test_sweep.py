"""A sweep in one pass: each point is the adapter that is trained alone, kept and written apart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters import Parallel, Stack
from graftwerk.adapters.configs import method_of
from graftwerk.checkpoints import load_base, read_adapters, save_adapter
from graftwerk.errors import UserError
from graftwerk.stages import learning
from graftwerk.stages.eval import learned
from graftwerk.training.goal import Goal
from tests.graftwerk.learning_stage import base, cfg, elsewhere, read_metrics, rows, run_killed
from tests.graftwerk.stages.test_layouts import as_layout, run_on, up_to
from tests.graftwerk.tiny_families import as_family, save_tiny

__all__ = ["base", "cfg", "rows"]

# The middle one begins as the run's seed says; the last one's rate makes its loss rise again.
RANKS = [
    {"name": "r2", "adapter_dim": 2, "lr": 0.1, "seed": 7},
    {"name": "r4", "lr": 0.4, "weight_decay": 0.5},
    {"name": "r8", "adapter_dim": 8, "alpha": 16, "lr": 30.0, "seed": 9},
]
BLOCKS = {"lora": "lora_tuning", "adapter": "adapter_tuning", "prefix": "prefix_tuning"}


@pytest.fixture
def peft(cfg: DictConfig) -> DictConfig:
    """A peft stage of LoRA, one epoch of 6 steps with a validation after 3 and 6."""
    cfg.trainer.update(max_epochs=1, gradient_clip_val=0.2)
    cfg.model.optim.update(eps=1.0, lr=0.2)  # Adam's steps are smooth where eps is large
    cfg.exp_manager.checkpoint_callback_params.save_best_model = True
    del cfg.model["adapter_tuning"]
    block = {"adapter_dim": 4, "adapter_dropout": 0.1}
    return OmegaConf.merge(cfg, {"model": {"peft": {"peft_scheme": "lora", "lora_tuning": block}}})  # pyright: ignore


def wants(cfg: DictConfig, **keys: Any) -> DictConfig:
    return OmegaConf.merge(cfg, {"model": {"peft": keys}})  # pyright: ignore


def told(cfg: DictConfig) -> dict[str, Any]:
    return json.loads((Path(cfg.exp_manager.explicit_log_dir) / "summary.json").read_text())


def point_of(cfg: DictConfig, name: str) -> dict[str, torch.Tensor]:
    """The weights in a point's own file."""
    path = Path(cfg.model.nemo_path)
    (saved,) = read_adapters(path.with_name(f"{path.stem}_{name}{path.suffix}")).adapters
    assert saved.name == name
    return saved.state


def alone(cfg: DictConfig, point: dict[str, Any], folder: Path, head: str | None) -> DictConfig:
    """The stage without a sweep that trains what a point trains, from the same first weights."""
    # Masks of dropout follow from an adapter's name too.
    one = wants(elsewhere(cfg, folder), sweep=None, adapter_names=point["name"])
    own = {k: v for k, v in point.items() if k not in ("name", "seed", "lr", "weight_decay")}
    scheme = str(one.model.peft.peft_scheme)
    block: Any = OmegaConf.merge(one.model.peft.get(BLOCKS[scheme]) or {}, own)
    one.model.peft[BLOCKS[scheme]] = block
    one.model.optim.update({k: point[k] for k in ("lr", "weight_decay") if k in point})
    if "seed" in point:
        model = load_base(one.model.language_model_path, head=head, seed=one.model.seed)
        torch.manual_seed(point["seed"])
        model.add_adapter(point["name"], method_of(scheme, block))
        save_adapter(model, point["name"], folder / "start")
        one.model.restore_path = str(folder / "start")
    return one


@pytest.mark.parametrize("family", ["gpt", "t5", "bert"])
def test_each_point_is_the_adapter_that_is_trained_alone(family, peft, tmp_path):
    """Float32, dropout, clipped gradients, a schedule; the best of each is of its own step."""
    if family != "gpt":
        peft = as_family(peft, save_tiny(family, tmp_path / family), tmp_path, 4)
        peft.trainer.val_check_interval = 2
    head = "question_answering" if family == "bert" else None
    learning.run("peft", wants(peft, sweep=RANKS))
    points = {point["name"]: point for point in told(peft)["sweep"]}
    for point in RANKS:
        one = alone(peft, point, tmp_path / point["name"], head)
        learning.run("peft", one)
        (saved,) = read_adapters(one.model.nemo_path).adapters
        found = point_of(peft, point["name"])
        assert found.keys() == saved.state.keys()
        assert (head is not None) == any(key.startswith("head.") for key in found)
        for key, value in saved.state.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)
        assert points[point["name"]]["val_loss"] == pytest.approx(told(one)["val_loss"], rel=1e-5)
        count = told(one)["trainable_parameters"]
        assert points[point["name"]]["trainable_parameters"] == count


@pytest.mark.parametrize(
    ("scheme", "block", "values"),
    [
        ("adapter", {"adapter_dim": 4}, ("adapter_dim", 2, 6)),
        ("prefix", {"bottleneck_dim": 4}, ("prefix_length", 2, 5)),
    ],
)
def test_points_of_other_methods_differ_in_their_settings(scheme, block, values, peft, tmp_path):
    peft.trainer.max_steps = 3
    key, *each = values
    sweep = [{"name": f"p{n}", key: value, "lr": value} for n, value in enumerate(each)]
    peft = wants(peft, peft_scheme=scheme, **{BLOCKS[scheme]: block})
    learning.run("peft", wants(peft, sweep=sweep))
    for point in sweep:
        one = alone(peft, point, tmp_path / point["name"], None)
        learning.run("peft", one)
        (saved,) = read_adapters(one.model.nemo_path).adapters
        for name, value in saved.state.items():
            found = point_of(peft, point["name"])[name]
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-5)


def test_the_best_point_is_marked_and_is_what_the_stage_leaves(peft, capsys):
    peft = wants(peft, sweep=RANKS)
    learning.run("peft", peft)
    summary = told(peft)
    losses = {point["name"]: point["val_loss"] for point in summary["sweep"]}
    (best,) = (point["name"] for point in summary["sweep"] if point["best"])
    assert losses[best] == min(losses.values()) == summary["val_loss"]
    (left,) = read_adapters(peft.model.nemo_path).adapters
    assert left.name == best
    assert all(torch.equal(left.state[k], v) for k, v in point_of(peft, best).items())
    steps = {point["name"]: point["step"] for point in summary["sweep"]}
    for name, step in steps.items():
        column = f"val_loss_of_{name}"
        seen = {int(r["step"]): float(r[column]) for r in read_metrics(peft) if r[column]}
        assert sorted(seen) == [3, 6]
        assert (losses[name], step) == (
            pytest.approx(min(seen.values())),
            min(seen, key=seen.__getitem__),
        )
    assert set(steps.values()) == {3, 6}  # each has its own
    for path, name in ((peft.model.nemo_path, best), (summary["sweep"][0]["adapter"], "r2")):
        (point,) = (point for point in summary["sweep"] if point["name"] == name)
        of_point = learned(Path(path))  # what eval shows beside the scores
        assert of_point["trainable_parameters"] == point["trainable_parameters"]
        assert of_point["file_bytes"] == Path(path).stat().st_size
        base_size = summary["total_parameters"] - summary["trainable_parameters"]
        assert of_point["total_parameters"] == base_size + point["trainable_parameters"]
    shown = [(p["settings"], p["lr"], p["seed"]) for p in summary["sweep"]]
    assert shown == [
        ({"adapter_dim": 2}, 0.1, 7),
        ({"weight_decay": 0.5}, 0.4, 1234),
        ({"adapter_dim": 8, "alpha": 16}, 30.0, 9),
    ]
    table = [line for line in capsys.readouterr().out.splitlines() if "*" in line]
    assert len(table) == 1
    assert best in table[0]


def test_without_save_best_model_the_last_weights_of_each_are_left(peft):
    peft.exp_manager.checkpoint_callback_params.save_best_model = False
    learning.run("peft", wants(peft, sweep=RANKS))
    assert {point["step"] for point in told(peft)["sweep"]} == {6}
    last = [row for row in read_metrics(peft) if row["val_loss"]][-1]
    for point in told(peft)["sweep"]:
        assert point["val_loss"] == pytest.approx(float(last[f"val_loss_of_{point['name']}"]))


def test_each_point_has_its_own_rate_under_the_schedule(peft):
    learning.run("peft", wants(peft, sweep=RANKS))
    rates = [[float(row[f"lr_of_{p['name']}"]) for p in RANKS] for row in read_metrics(peft)[:2]]
    assert rates[0] == [pytest.approx(p["lr"] / 3) for p in RANKS]  # two steps of warm-up
    assert rates[1] == [pytest.approx(p["lr"] * 2 / 3) for p in RANKS]


def test_a_point_that_diverges_leaves_the_others_as_they_are(peft, tmp_path, capsys):
    wild = [*RANKS[:2], {"name": "wild", "lr": 1e30}]
    learning.run("peft", wants(elsewhere(peft, tmp_path / "wild"), sweep=wild))
    assert "the gradients of wild are no numbers any more" in capsys.readouterr().out
    points = {p["name"]: p for p in told(elsewhere(peft, tmp_path / "wild"))["sweep"]}
    assert points["wild"]["val_loss"] is None
    assert not points["wild"]["best"]
    learning.run("peft", wants(elsewhere(peft, tmp_path / "tame"), sweep=RANKS[:2]))
    for name in ("r2", "r4"):
        found = [point_of(elsewhere(peft, tmp_path / f), name) for f in ("wild", "tame")]
        assert all(torch.isfinite(value).all() for value in found[0].values())
        assert all(torch.allclose(v, found[1][k], atol=1e-6) for k, v in found[0].items())


def test_a_sweep_of_which_all_diverge_stops_with_the_reason(peft):
    wild = [{"lr": 1e30}, {"lr": 1e31}]
    with pytest.raises(FloatingPointError, match=r"lower model\.optim\.lr"):
        learning.run("peft", wants(peft, sweep=wild))


def test_a_sweep_that_was_killed_goes_on_to_the_same_bits(peft, tmp_path):
    """Killed behind the validation that was the best of one point."""
    peft = wants(peft, sweep=RANKS)
    straight = elsewhere(peft, tmp_path / "straight")
    learning.run("peft", straight)
    run_killed("peft", peft, 4)
    assert learning.run("peft", peft) == 0
    assert 3 in {point["step"] for point in told(peft)["sweep"]}
    for point in RANKS:
        one, other = (point_of(each, point["name"]) for each in (straight, peft))
        assert all(torch.equal(one[key], other[key]) for key in one)
    for one, other in zip(told(straight)["sweep"], told(peft)["sweep"], strict=True):
        assert {**one, "adapter": ""} == {**other, "adapter": ""}


@pytest.mark.parametrize("before", ["Parallel(a, b)", "turned round", "another decay"])
def test_a_run_does_not_go_on_as_another_sweep(before, peft):
    points = [{"name": "a", "weight_decay": 0.5}, {"name": "b"}]
    first: dict[str, Any] = {"sweep": [*reversed(points)]}
    if before == "Parallel(a, b)":
        first = {"adapter_names": ["a", "b"], "composition": before}
    elif before == "another decay":
        first = {"sweep": [{"name": "a", "weight_decay": 0.25}, points[1]]}
    run_killed("peft", wants(peft, **first), 4)
    with pytest.raises(UserError, match=r"made with other points: put model\.peft\.sweep back"):
        learning.run("peft", wants(peft, sweep=points))


def test_a_complete_sweep_that_is_started_again_leaves_the_same(peft):
    peft = wants(peft, sweep=RANKS)
    learning.run("peft", peft)
    before = told(peft)["sweep"]
    learning.run("peft", peft)
    assert told(peft)["sweep"] == before


@pytest.mark.long
def test_two_processes_sweep_as_one_does_and_go_on_from_another_layout(peft, tmp_path):
    peft.model.optim.sched.max_steps = 6
    peft = wants(peft, sweep=RANKS)
    one, data, laid = (elsewhere(peft, tmp_path / name) for name in ("one", "data", "laid"))
    learning.run("peft", one)
    runs = [as_layout(data, "data"), up_to(as_layout(laid, "tensor"), 4)]
    run_on(2, [("peft", cfg) for cfg in (*runs, as_layout(laid, "pipeline"))])
    for two in (data, laid):
        for point, other in zip(told(one)["sweep"], told(two)["sweep"], strict=True):
            assert point["step"] == other["step"]
            assert point["trainable_parameters"] == other["trainable_parameters"]
            assert point["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)
            expected, found = (point_of(cfg, point["name"]) for cfg in (one, two))
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


# ---- what a sweep is made of


def goal_of(**keys: Any) -> Goal:
    return Goal.of({"seed": 5, "peft": {"peft_scheme": "lora", **keys}}, "peft")


def test_a_mapping_of_lists_is_the_grid_of_its_values():
    goal = goal_of(sweep={"adapter_dim": [4, 8], "lr": [0.1, 0.2, 0.3]})
    assert goal.trained == [f"lora_{n}" for n in range(1, 7)]
    found = [(point.method.dim, point.optim["lr"]) for point in goal.sweep]  # pyright: ignore
    assert found == [(4, 0.1), (4, 0.2), (4, 0.3), (8, 0.1), (8, 0.2), (8, 0.3)]
    assert {point.seed for point in goal.sweep} == {5}


def test_points_stand_side_by_side_on_top_of_what_is_frozen():
    assert goal_of(sweep={"seed": [1, 2]}).composition == Parallel("lora_1", "lora_2")
    frozen = goal_of(sweep={"seed": [1, 2]}, adapters=[{"name": "lang", "path": "/lang"}])
    assert frozen.composition == Stack("lang", Parallel("lora_1", "lora_2"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sweep": [{"lr": 1.0}]}, "peft.sweep must have two points or more, not 1"),
        ({"sweep": {"lr": []}}, "peft.sweep must have two points or more, not 0"),
        ({"sweep": {"lr": 1.0}}, "must be a list of mappings, or one mapping of keys to lists"),
        ({"sweep": [1, 2]}, "must be a list of mappings"),
        ({"sweep": [{}, {"rank": 4}]}, r"sweep.1: .*lora_tuning.rank is not known.*weight_decay"),
        ({"sweep": [{}, {"adapter_dim": "x"}]}, r"sweep.1: .*adapter_dim='x' must be"),
        ({"sweep": [{"lr": 0}, {}]}, r"sweep.0.lr=0 must be a number above 0"),
        ({"sweep": [{"lr": math.nan}, {}]}, r"sweep.0.lr=nan must be a number above 0"),
        ({"sweep": [{"weight_decay": -1}, {}]}, "weight_decay=-1 must be a number from 0 on"),
        ({"sweep": [{"seed": 1.5}, {}]}, "seed=1.5 must be a whole number"),
        ({"sweep": [{"name": "../x"}, {}]}, "name='../x' must be a name of letters"),
        ({"sweep": [{"name": "a"}, {"name": "a"}]}, "two points are called a"),
        ({"sweep": {"seed": [1, 2]}, "adapter_names": "x"}, "peft.adapter_names says what"),
        ({"sweep": {"seed": [1, 2]}, "composition": "Parallel(a, b)"}, "peft.composition says wh"),
        ({"sweep": {"seed": [1, 2]}, "peft_scheme": "lora,ia3"}, "peft_scheme is lora,ia3; name"),
        ({"sweep": {"seed": [1, 2]}, "peft_scheme": "none"}, "peft_scheme is none; name one of"),
        ({"sweep": {"seed": [1, 2]}, "peft_scheme": "selective"}, "peft_scheme is selective"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_one_line(keys, message):
    with pytest.raises(UserError, match=message) as raised:
        goal_of(**keys)
    assert "\n" not in str(raised.value)


def test_prompts_of_different_lengths_have_no_place_side_by_side():
    with pytest.raises(UserError, match=r"\[2, 3\] virtual tokens before a row"):
        goal_of(peft_scheme="prompt", sweep={"virtual_tokens": [2, 3]}).virtual_tokens  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"optim": {"sched": {"name": "ReduceLROnPlateau"}}}}, "use another schedule"),
        ({"model": {"data": {"validation_ds": []}}}, "needs validation to tell the points apart"),
        (
            {"exp_manager": {"checkpoint_callback_params": {"monitor": "train_loss"}}},
            "keeps the best of each point by its own val_loss",
        ),
    ],
)
def test_a_stage_that_cannot_tell_points_apart_is_refused(change, message, peft):
    changed: Any = OmegaConf.merge(wants(peft, sweep=RANKS), change)
    with pytest.raises(UserError, match=message):
        learning.run("peft", changed)
    assert not Path(peft.exp_manager.explicit_log_dir).exists()
