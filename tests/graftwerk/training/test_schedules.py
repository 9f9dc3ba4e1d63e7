"""Learning rates against NeMo's formulas (nemo/core/optim/lr_scheduler.py), written out anew."""

import math

import pytest
import torch

from graftwerk.errors import UserError
from graftwerk.training.schedules import Schedule, build_schedule, learning_rate

LR, STEPS, WARMUP, MIN = 0.5, 40, 8, 0.01


def rates(name: str, steps: int = STEPS, **keys) -> list[float]:
    at = learning_rate({"name": name, **keys}, LR, STEPS)
    return [at(step) for step in range(steps + 2)]


def warmup(step: int) -> float:
    return LR * (step + 1) / (WARMUP + 1)


def expected(after) -> list[float]:
    inside = [warmup(s) if s <= WARMUP else after(s) for s in range(STEPS + 1)]
    return [*inside, MIN]


def test_cosine_annealing_without_constant_steps():
    def after(step: int) -> float:
        share = (step - WARMUP) / (STEPS - WARMUP)
        return (LR - MIN) * 0.5 * (1 + math.cos(math.pi * share)) + MIN

    found = rates("CosineAnnealing", warmup_steps=WARMUP, constant_steps=0, min_lr=MIN)
    assert found == pytest.approx(expected(after))


def test_cosine_annealing_with_constant_steps_is_megatrons():
    constant = 10
    decay = STEPS - WARMUP - constant

    def at(step: int) -> float:
        if step <= WARMUP:
            return LR * step / WARMUP
        if step > WARMUP + decay:
            return MIN
        return MIN + (LR - MIN) * 0.5 * (math.cos(math.pi * (step - WARMUP) / decay) + 1)

    found = rates("CosineAnnealing", warmup_steps=WARMUP, constant_steps=constant, min_lr=MIN)
    assert found == pytest.approx([at(step) for step in range(STEPS + 2)])


def test_warmup_annealing_is_linear():
    def after(step: int) -> float:
        return MIN + (1 - (step - WARMUP) / (STEPS - WARMUP)) * (LR - MIN)

    assert rates("WarmupAnnealing", warmup_steps=WARMUP, min_lr=MIN) == pytest.approx(
        expected(after)
    )


def test_square_annealing():
    def after(step: int) -> float:
        left = (STEPS - step) / (STEPS - WARMUP)
        return max(LR * left**2, MIN)

    assert rates("SquareAnnealing", warmup_steps=WARMUP, min_lr=MIN) == pytest.approx(
        expected(after)
    )


def test_square_root_annealing_counts_from_the_first_step():
    def after(step: int) -> float:
        return max(LR * ((STEPS - step) / STEPS) ** 0.5, MIN)

    assert rates("SquareRootAnnealing", warmup_steps=WARMUP, min_lr=MIN) == pytest.approx(
        expected(after)
    )


def test_inverse_square_root_annealing():
    def after(step: int) -> float:
        return LR / ((step + 1) / (WARMUP + 1)) ** 0.5

    assert rates("InverseSquareRootAnnealing", warmup_steps=WARMUP, min_lr=MIN) == pytest.approx(
        expected(after)
    )


@pytest.mark.parametrize("name", ["constant", "WarmupPolicy"])
def test_constant_after_the_warmup(name):
    found = rates(name, warmup_steps=WARMUP)
    assert found == pytest.approx([warmup(s) if s <= WARMUP else LR for s in range(STEPS + 2)])


def test_warmup_hold_policy_holds_past_the_last_step():
    found = rates("WarmupHoldPolicy", 50, warmup_steps=WARMUP, hold_steps=36, min_lr=MIN)
    assert found[WARMUP + 1 : 44] == [LR] * (44 - WARMUP - 1)
    assert found[44:] == [MIN] * len(found[44:])


def test_key_max_steps_of_the_schedule_overrides_the_runs():
    at = learning_rate({"name": "WarmupAnnealing", "max_steps": 10}, LR, STEPS)
    assert at(5) == pytest.approx(LR / 2)


def test_the_schedule_sets_the_rate_of_every_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], lr=LR)
    schedule = build_schedule({"name": "WarmupAnnealing", "warmup_steps": 3}, optimizer, LR, 10)
    assert isinstance(schedule, Schedule)
    found = []
    for _ in range(4):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert found == [[pytest.approx(LR * n / 4)] * 2 for n in (1, 2, 3, 4)]


def test_a_resumed_schedule_follows_the_new_configuration():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = build_schedule({"name": "WarmupAnnealing"}, optimizer, LR, 20)
    schedule.load_state_dict({"last_epoch": 5})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR * 0.75)


@pytest.mark.parametrize(
    ("sched", "message"),
    [
        ({"name": "Cosine"}, "model.optim.sched.name='Cosine'.*CosineAnnealing.*ReduceLROnPlateau"),
        ({"name": "WarmupAnnealing", "constant_steps": 5}, "constant_steps=5 has no effect"),
        ({"name": "CosineAnnealing", "min_lr": 1.0}, "min_lr=1.0 is above model.optim.lr=0.5"),
        ({"name": "CosineAnnealing", "warmup_steps": -1}, "warmup_steps=-1 must be a number"),
        ({"name": "CosineAnnealing", "reduce_on_plateau": True}, "goes with name: ReduceLROnP"),
    ],
)
def test_wrong_schedules_are_named(sched, message):
    with pytest.raises(UserError, match=message):
        learning_rate(sched, LR, STEPS)


def test_an_endless_run_needs_a_schedule_that_has_no_end():
    assert learning_rate({"name": "constant"}, LR, None)(10**6) == LR
    with pytest.raises(UserError, match="must know the run's length"):
        learning_rate({"name": "CosineAnnealing"}, LR, None)


def test_published_keys_at_their_defaults_suit_every_schedule():
    keys = {"warmup_steps": 0, "constant_steps": 0, "min_lr": 0.0, "monitor": "val_loss"}
    for name in ("constant", "WarmupAnnealing", "SquareRootAnnealing"):
        learning_rate({"name": name, **keys, "reduce_on_plateau": False}, LR, STEPS)
