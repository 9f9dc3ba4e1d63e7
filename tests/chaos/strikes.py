"""Where and how a process of a run is struck: drawn by a seed, and done in the process itself."""

import io
import os
import pkgutil
import random
import signal
from dataclasses import dataclass
from itertools import count
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A function that processes call, `most` times or more; `onto` is how its last argument ends.

    `half`: it writes, and is struck with half of its bytes on the disk. `ranks`: who calls it.
    """

    owner: str
    name: str
    most: int = 1
    onto: str = ""
    half: bool = False
    ranks: tuple[int, ...] = (0, 1)


STAGE, MODULE = "graftwerk.stages.learning", "graftwerk.training.module:LearningModule"
LAST = "graftwerk.training.callbacks:LastCheckpoint"
# Twelve steps and four validations; each validation has its checkpoints, of the best and the last.
PHASES: dict[str, tuple[Place, ...]] = {
    "load": tuple(
        Place(STAGE, name) for name in ("open_base", "build_learner", "find_resume", "assemble")
    ),
    "step": (
        Place(MODULE, "training_step", 12),
        Place(LAST, "on_train_batch_end", 12),
    ),
    "validation": (
        Place(MODULE, "validation_step", 8),
        Place(LAST, "on_validation_end", 4),
    ),
    "checkpoint": (
        Place("torch", "save", 6, half=True, ranks=(0,)),
        Place("os", "replace", 10, onto=".ckpt", ranks=(0,)),
        Place("os", "fsync", 6, ranks=(0,)),
        Place(LAST, "_save", 4),
    ),
    "result": (
        Place(STAGE, "restore_best"),
        Place(STAGE, "write_result", ranks=(0,)),
        Place("os", "replace", onto="adapter.nemo", ranks=(0,)),
        Place("os", "replace", onto="summary.json", ranks=(0,)),
    ),
    "export": (
        Place("graftwerk.stages.export", "load", ranks=(0,)),
        Place("graftwerk.checkpoints.adapter", "save_file", half=True, ranks=(0,)),
        Place("graftwerk.checkpoints.adapter_export", "replace_path", ranks=(0,)),
    ),
}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Strike:
    """A signal that rank `rank` sends itself at its `nth` call of a place."""

    phase: str
    place: Place
    nth: int
    rank: int
    number: int

    @classmethod
    def of(cls, seed: int) -> "Strike":
        """The phases take turns, and so do the processes; the place and the signal are drawn."""
        turn, number = divmod(seed, len(PHASES))
        phase, draw = list(PHASES)[number], random.Random(seed)
        rank = turn % 2 if phase != "export" else 0  # one process exports
        place = draw.choice([place for place in PHASES[phase] if rank in place.ranks])
        kind = signal.SIGKILL if draw.random() < 0.7 else draw.choice(SIGNALS)
        return cls(phase, place, draw.randint(1, place.most), rank, kind)

    @property
    def kills(self) -> bool:
        return self.number == signal.SIGKILL

    def __call__(self, rank: int) -> None:
        """Patches this process, where it is the one."""
        if rank != self.rank:
            return
        owner, calls = pkgutil.resolve_name(self.place.owner), count(1)
        whole = getattr(owner, self.place.name)

        def struck(*args, **kwargs):
            if str(args[-1] if args else "").endswith(self.place.onto) and next(calls) == self.nth:
                print("struck by", self.number, flush=True)
                if self.place.half:
                    write_half(whole, *args)
                os.kill(os.getpid(), self.number)
            return whole(*args, **kwargs)

        setattr(owner, self.place.name, struck)

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{self.phase}: {name} to rank {self.rank} at {self.place.name} {self.nth}"


def write_half(save, content, file) -> None:
    """What a disk has of a file, open or named, while it is being written.

    Where the process lives on, the whole is written over it.
    """
    if isinstance(file, str | Path):
        save(content, file)
        os.truncate(file, Path(file).stat().st_size // 2)
        return
    buffer = io.BytesIO()
    save(content, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    file.seek(0)
