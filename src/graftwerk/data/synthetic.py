"""Generated question answering, offline and seeded: one task to train a base on, one to graft.

`lookup` asks for one of the things that the context says. `translate` asks the same in the same
words, but wants the answer in another language, a fixed dictionary that maps each word of the
answers to another of them. A model that knows `lookup` therefore has every word and finds the right
one, and yet answers no question of `translate`.
"""

import random
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwerk.data.prepared import Plan, Question, Sieve
from graftwerk.data.splits import SPLITS
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

NAMES = ["Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Lea"]
NAMES += ["Max", "Nina", "Otto", "Pam", "Quin", "Ron", "Sue", "Tom", "Una", "Vera", "Will", "Zoe"]
# Few values, so that a tiny model learns them within a minute.
KINDS = {
    "color": ["red", "blue", "green", "gray"],
    "drink": ["tea", "milk", "juice", "water"],
    "pet": ["cat", "dog", "fish", "horse"],
    "sport": ["chess", "golf", "judo", "tennis"],
}
VALUES = [value for values in KINDS.values() for value in values]
# The other language: each word means its successor here, so none means itself.
_CYCLE = random.Random(0).sample(VALUES, len(VALUES))
DICTIONARY = dict(zip(_CYCLE, _CYCLE[1:] + _CYCLE[:1], strict=True))

TASKS = {"lookup": lambda value: value, "translate": DICTIONARY.__getitem__}
# A row's text decides its split, so that no test row can occur in training: not under another
# seed, not in another task, not with more rows. Of 8 parts, val and test have one each.
SHARE = {0: "test", 1: "val"}
# About half of the 590 thousand different rows, so that drawing new ones stays quick.
MOST_ROWS = {"train": 220_000, "val": 36_000, "test": 36_000}


def plans(cfg: "DictConfig") -> list[Plan]:
    """What to prepare under a `data_prep` config of kind `synthetic`: a plan for each task."""
    tasks = [cfg.tasks] if isinstance(cfg.tasks, str) else list(cfg.tasks)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"data_prep.tasks: {task!r} is not known; allowed: {', '.join(TASKS)}")
    if not tasks:
        raise UserError(f"data_prep.tasks is empty; allowed: {', '.join(TASKS)}")
    rows = dict(cfg.rows)
    for name, count in rows.items():
        if name not in SPLITS:
            raise UserError(f"data_prep.rows: unknown key {name!r}; allowed: {', '.join(SPLITS)}")
        if (
            isinstance(count, bool)
            or not isinstance(count, int)
            or not 0 <= count <= MOST_ROWS[name]
        ):
            raise UserError(f"data_prep.rows.{name} must be 0 to {MOST_ROWS[name]}, not {count!r}")
    sizes = {name: rows.get(name, 0) for name in SPLITS}
    return [_plan(task, sizes, cfg.seed) for task in tasks]


def _plan(task: str, sizes: dict[str, int], seed: int) -> Plan:
    return Plan(
        prefix=task,
        inputs={"kind": "synthetic", "task": task, "rows": sizes, "seed": seed},
        rows=lambda sieve: _rows(task, sizes, seed, sieve),
        may_be_empty=not sizes["train"],
    )


def _rows(task: str, sizes: dict[str, int], seed: int, sieve: Sieve) -> Iterator[Question]:
    for split, size in sizes.items():
        questions = generate(task, split, seed)
        number = 0
        while number < size:
            fields, answer = next(questions)
            # Not `passes`: that a generator repeats itself is nothing to report.
            if sieve.is_new(split, fields):
                yield Question((split,), fields, [answer], f"{task}-{number}")
                number += 1


def generate(task: str, split: str, seed: int) -> Iterator[tuple[dict[str, str], str]]:
    """Endless (fields, answer) pairs of one split of a task; rows may repeat."""
    draw = random.Random(f"{seed} {split}")
    while True:
        name = draw.choice(NAMES)
        values = {kind: draw.choice(words) for kind, words in KINDS.items()}
        told = draw.sample(list(values.values()), len(values))
        asked = draw.choice(list(KINDS))
        fields = {
            "context": f"{name} likes {' , '.join(told[:-1])} and {told[-1]} .",
            "question": f"which {asked} does {name} like ?",
        }
        if split_of(fields) == split:
            yield fields, TASKS[task](values[asked])


def split_of(fields: dict[str, str]) -> str:
    """The split that a row belongs to."""
    return SHARE.get(zlib.crc32("\n".join(fields.values()).encode()) % 8, "train")
