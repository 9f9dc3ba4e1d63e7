"""Learning rates over steps, by the names and formulas of NeMo's `lr_scheduler.py`.

`step` counts optimizer steps from 0. All but ReduceLROnPlateau warm up the same way: step s of w
warm-up steps runs at `lr * (s + 1) / (w + 1)`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from graftwerk.errors import UserError

LearningRate = Callable[[int], float]


def _warmed_up(lr: float, warmup_steps: int, after: LearningRate) -> LearningRate:
    def at(step: int) -> float:
        if warmup_steps > 0 and step <= warmup_steps:
            return lr * (step + 1) / (warmup_steps + 1)
        return after(step)

    return at


def _constant(lr: float, warmup_steps: int = 0) -> LearningRate:
    return _warmed_up(lr, warmup_steps, lambda step: lr)


def _warmup_hold(
    lr: float, max_steps: int, warmup_steps: int = 0, hold_steps: int = 0, min_lr: float = 0.0
) -> LearningRate:
    def after(step: int) -> float:
        return lr if step <= max(max_steps, warmup_steps + hold_steps - 1) else min_lr

    return _warmed_up(lr, warmup_steps, after)


def _annealing(fraction_of: Callable[[float], float], floor: bool = False) -> Callable:
    """A decay from the end of the warm-up (0) to `max_steps` (1) down to `min_lr`.

    `fraction_of` maps that progress to what is left of `lr - min_lr`; with `floor`, of `lr`, and
    the rate stops at `min_lr`.
    """

    def schedule(
        lr: float, max_steps: int, warmup_steps: int = 0, min_lr: float = 0.0
    ) -> LearningRate:
        span = max(max_steps - warmup_steps, 1)

        def after(step: int) -> float:
            if step > max_steps:
                return min_lr
            left = fraction_of(min((step - warmup_steps) / span, 1.0))
            return max(lr * left, min_lr) if floor else min_lr + (lr - min_lr) * left

        return _warmed_up(lr, warmup_steps, after)

    return schedule


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _cosine(
    lr: float,
    max_steps: int,
    warmup_steps: int = 0,
    constant_steps: int = 0,
    min_lr: float = 0.0,
) -> LearningRate:
    if not constant_steps:
        return _annealing(_half_cosine)(lr, max_steps, warmup_steps, min_lr)
    # Megatron-LM's form: the warm-up starts at 0, the last `constant_steps` run at `min_lr`.
    decay = max(max_steps - warmup_steps - constant_steps, 1)

    def at(step: int) -> float:
        if warmup_steps > 0 and step <= warmup_steps:
            return lr * step / warmup_steps
        return min_lr + (lr - min_lr) * _half_cosine(min((step - warmup_steps) / decay, 1.0))

    return at


def _square_root(
    lr: float, max_steps: int, warmup_steps: int = 0, min_lr: float = 0.0
) -> LearningRate:
    # Unlike the others it counts its decay from step 0, not from the end of the warm-up.
    def after(step: int) -> float:
        return max(lr * math.sqrt(max(max_steps - step, 0) / max_steps), min_lr)

    return _warmed_up(lr, warmup_steps, after)


def _inverse_square_root(
    lr: float, max_steps: int, warmup_steps: int = 0, min_lr: float = 0.0
) -> LearningRate:
    def after(step: int) -> float:
        return lr / math.sqrt((step + 1) / (warmup_steps + 1)) if step <= max_steps else min_lr

    return _warmed_up(lr, warmup_steps, after)


SCHEDULES: dict[str, Callable[..., LearningRate]] = {
    "CosineAnnealing": _cosine,
    "WarmupAnnealing": _annealing(lambda progress: 1 - progress),
    "SquareAnnealing": _annealing(lambda progress: (1 - progress) ** 2, floor=True),
    "SquareRootAnnealing": _square_root,
    "InverseSquareRootAnnealing": _inverse_square_root,
    "WarmupPolicy": _constant,
    "WarmupHoldPolicy": _warmup_hold,
    "constant": _constant,
}
PLATEAU = "ReduceLROnPlateau"
PLATEAU_KEYS = ("factor", "patience", "threshold", "cooldown", "min_lr")
# Not a schedule's own: what is watched, and two keys that every file of the launcher holds.
COMMON_KEYS = ("name", "monitor", "reduce_on_plateau", "max_steps")
HARMLESS = {"warmup_steps": 0, "constant_steps": 0, "min_lr": 0.0}  # without effect at these values


def learning_rate(sched: Mapping[str, Any], lr: float, max_steps: int | None) -> LearningRate:
    """The rate at each step for the `optim.sched` section.

    Args:
        sched: `name` and the schedule's own keys. `max_steps` overrides the run's.
        lr: the highest rate.
        max_steps: optimizer steps of the run; None where it has no end.

    Raises:
        UserError: an unknown name, a key that the schedule does not take, values out of range.
    """
    name = sched.get("name")
    if name not in SCHEDULES:
        names = ", ".join([*SCHEDULES, PLATEAU])
        raise UserError(f"model.optim.sched.name={name!r} is not known: use one of {names}")
    if sched.get("reduce_on_plateau"):
        raise UserError(
            f"model.optim.sched.reduce_on_plateau=True goes with name: {PLATEAU}, not {name}"
        )
    schedule = SCHEDULES[name]
    takes = inspect.signature(schedule).parameters
    own = _own_values(sched, name, takes)
    if own.get("min_lr", 0.0) > lr:
        raise UserError(f"model.optim.sched.min_lr={own['min_lr']} is above model.optim.lr={lr}")
    if "max_steps" in takes:
        own["max_steps"] = sched.get("max_steps") or max_steps
        if own["max_steps"] is None:
            raise UserError(
                f"model.optim.sched.name={name} must know the run's length: set trainer.max_steps "
                f"or trainer.max_epochs, or model.optim.sched.max_steps"
            )
    return schedule(lr, **own)


def _own_values(sched: Mapping[str, Any], name: str, takes: Mapping[str, Any]) -> dict[str, Any]:
    own = {}
    for key, value in sched.items():
        if key in COMMON_KEYS or value is None:
            continue
        if key in takes:
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                raise UserError(f"model.optim.sched.{key}={value!r} must be a number from 0 on")
            own[key] = value
        elif key not in HARMLESS or value != HARMLESS[key]:
            allowed = ", ".join(k for k in takes if k not in ("lr", "max_steps"))
            raise UserError(
                f"model.optim.sched.{key}={value!r} has no effect on {name}, which takes {allowed}"
            )
    return own


class Schedule(LRScheduler):
    """Sets the rate, a function of the step alone, of every parameter group: one for all, or each.

    Its state is the step: a resumed run follows the configuration that it is given.
    """

    def __init__(self, optimizer: Optimizer, rate: LearningRate | Sequence[LearningRate]):
        groups = len(optimizer.param_groups)
        self.rates = list(rate) if isinstance(rate, Sequence) else [rate] * groups
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [rate(self.last_epoch) for rate in self.rates]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = [*self.get_lr()]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def build_schedule(
    sched: Mapping[str, Any] | None,
    optimizer: Optimizer,
    lr: float | Sequence[float],
    max_steps: int | None,
) -> LRScheduler | ReduceLROnPlateau:
    """The scheduler for `optim.sched`; none given is a constant rate.

    `lr`: the highest rate of all parameter groups, or of each.
    """
    sched = sched or {"name": "constant"}
    if sched.get("name") != PLATEAU:
        if isinstance(lr, Sequence):
            return Schedule(optimizer, [learning_rate(sched, one, max_steps) for one in lr])
        return Schedule(optimizer, learning_rate(sched, lr, max_steps))
    unknown = {
        key
        for key, value in sched.items()
        if key not in (*COMMON_KEYS, *PLATEAU_KEYS) and value not in (None, HARMLESS.get(key))
    }
    if unknown:
        raise UserError(
            f"model.optim.sched: {', '.join(sorted(unknown))} has no effect on {PLATEAU}, "
            f"which takes {', '.join(PLATEAU_KEYS)}"
        )
    own = {key: sched[key] for key in PLATEAU_KEYS if sched.get(key) is not None}
    return ReduceLROnPlateau(optimizer, mode="min", **own)
