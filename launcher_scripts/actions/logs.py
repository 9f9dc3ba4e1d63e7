"""`action=logs`: the log of a stage, as it is or as it comes."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from launcher_scripts.actions import Request, find, truth
from launcher_scripts.actions.truth import Truth
from launcher_scripts.clusters.runner import CONTROL
from launcher_scripts.manifest import Chain, Launch
from launcher_scripts.notices import Mistakes

EVERY = 0.5  # seconds between two looks at a log that is followed
ASK_EVERY = 5  # seconds between two questions whether its job has ended
CHUNK = 1 << 20


def run(asked: Request) -> int:
    """Print the log; with `watch=True` go on until the job has ended."""
    chain, place = choose(find.launch(asked), asked.stage, asked.point)
    try:
        return _follow(chain, place) if asked.watch else _print(chain, place)
    except KeyboardInterrupt:
        return 0


def choose(launch: Launch, stage: str | None, point: str | None) -> tuple[Chain, int]:
    """The chain that is meant, and the place of the stage in it.

    Without a name it is the stage that runs, or the first that failed, or the last that ran.

    Raises:
        Mistakes: no such stage or point, or a sweep without one.
    """
    chains = launch.chains
    if launch.is_sweep and point is not None:
        chains = tuple(chain for chain in chains if chain.point == point)
    if not chains:
        names = ", ".join(str(chain.point) for chain in launch.chains)
        raise Mistakes([f"point: there is no {point}; there are {names}"])
    if len(chains) > 1:
        names = ", ".join(str(chain.point) for chain in chains)
        raise Mistakes([f"point: say which one; there are {names}"])
    chain = next(iter(chains))
    names = [one.stage for one in chain.stages]
    if stage is not None:
        if stage not in names:
            raise Mistakes(
                [f"stage: there is no {stage} in this launch; there are {', '.join(names)}"]
            )
        return chain, names.index(stage)
    row = truth.look([chain])[0]
    return chain, _telling(row)


def _telling(row: Sequence[Truth]) -> int:
    ran = [number for number, one in enumerate(row) if truth.logs(one.stage)]
    running = [n for n in ran if row[n].state == "RUNNING"]
    failed = [n for n in ran if not row[n].succeeded and not row[n].live]
    return (running or failed or ran[-1:] or [0])[0]


def _print(chain: Chain, place: int) -> int:
    stage = chain.stages[place]
    paths = truth.logs(stage)
    if not paths:
        one = truth.look([chain])[0][place]
        why = f" ({one.reason})" if one.reason else ""
        print(f"{stage.stage} has no log yet: it is {one.state}{why}", file=sys.stderr)
        return 1
    with _Printer() as printer:
        for path in paths:
            printer.rest_of(path)
    return 0


def _follow(chain: Chain, place: int) -> int:
    stage, asked = chain.stages[place], 0.0
    with _Printer() as printer:
        while True:
            ended = False
            if time.monotonic() - asked >= ASK_EVERY or not asked:
                ended = not _goes_on(truth.look([chain])[0][: place + 1])
                asked = time.monotonic()
            new = [printer.rest_of(path) for path in truth.logs(stage)]
            if ended and not any(new):
                return 0
            time.sleep(0 if ended else EVERY)


def _goes_on(row: Sequence[Truth]) -> bool:
    """Whether the last stage of a row runs, or will."""
    *before, last = row
    waits = last.state == "NOT LAUNCHED" and any(one.live for one in before)
    return last.live or waits


class _Printer:
    """Prints logs to standard output, each from where it stopped before."""

    def __init__(self) -> None:
        self.open: dict[Path, IO[bytes]] = {}
        self.last: Path | None = None

    def __enter__(self) -> "_Printer":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.open.values():
            file.close()

    def rest_of(self, path: Path) -> bool:
        """Print what has come since; a header says where several logs change. False: nothing."""
        if path not in self.open:
            self.open[path] = open(path, "rb")  # noqa: SIM115 (until `__exit__`)
        some = False
        while chunk := self.open[path].read(CHUNK):
            if path != self.last:
                print(f"==> {path} <==", file=sys.stderr, flush=True)
            self.last, some = path, True
            if not sys.stdout.isatty():
                chunk = CONTROL.sub(b"", chunk.replace(b"\r", b"\n"))
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        return some
