"""`action=status`: every stage, how it stands, how far it is, and why it waits or failed."""

import math
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from launcher_scripts.actions import Request, find, truth
from launcher_scripts.actions.truth import Truth
from launcher_scripts.manifest import Chain, Launch

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

EVERY = 5  # seconds between two looks; each asks the cluster
COLOURS = {
    "COMPLETED": "green",
    "RUNNING": "cyan",
    "PENDING": "yellow",
    "SUBMITTED": "yellow",
    "REQUEUED": "yellow",
    "NOT LAUNCHED": "dim",
}
UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s"))
MANY = 400  # columns where nobody's screen sets them


def run(asked: Request) -> int:
    """Show the table once, or keep it on the screen until everything has ended."""
    from rich.console import Console

    launches = find.launches(asked)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else MANY)
    if not asked.watch:
        console.print(shown(launches)[0])
        return 0
    from rich.live import Live

    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as screen:
            while True:
                table, live = shown(launches)
                screen.update(table, refresh=True)
                if not live:
                    return 0
                time.sleep(EVERY)
    except KeyboardInterrupt:
        return 0


def shown(launches: Sequence[Launch]) -> tuple["Group", bool]:
    """The tables of all launches, and whether anything in them still goes on."""
    from rich.console import Group

    looks = iter(truth.look([chain for launch in launches for chain in launch.chains]))
    tables, live = [], False
    for launch in launches:
        rows = [next(looks) for _ in launch.chains]
        live |= any(stage.live for row in rows for stage in row)
        tables += _sweep(launch, rows) if launch.is_sweep else [_chain(rows[0], _title(launch))]
    return Group(*tables), live


def _title(launch: Launch) -> str | None:
    return f"launched {launch.launched}" if launch.launched else None


def _chain(row: Sequence[Truth], title: str | None = None) -> "Table":
    table = _table(title, "stage", "state", "job", "runtime", "progress", "reason")
    for one in row:
        table.add_row(*_cells(one.stage.stage, one))
    return table


def _sweep(launch: Launch, rows: Sequence[Sequence[Truth]]) -> list["Table"]:
    """What all points share, then a line for each point: the stage that it has come to.

    A single point is shown as the chain that it is.
    """
    if len(rows) == 1:
        title = " ".join(filter(None, [launch.chains[0].point, _title(launch)]))
        return [_chain(rows[0], title)]
    shared = frozenset.intersection(*(chain.folders for chain in launch.chains))
    common = [one for one in rows[0] if one.stage.results_dir in shared]
    tables = [_chain(common, _title(launch))] if common else []
    losses = [_loss(row) for row in rows]
    known = [loss for loss in losses if loss is not None]
    title = None if common else _title(launch)
    table = _table(
        title, "point", "stage", "state", "job", "runtime", "val_loss", "progress", "reason"
    )
    current = [_current([one for one in row if one not in common] or row) for row in rows]
    for chain, one, loss in zip(launch.chains, current, losses, strict=True):
        best = loss is not None and loss == min(known)
        cells = _cells(str(chain.point), one)
        cells[1:1] = [_text(one.stage.stage)]
        said = "" if loss is None else f"{loss:.4g}" + " best" * best
        cells[5:5] = [_text(said, "bold green" if best else "")]
        table.add_row(*cells)
    table.caption = _summary(launch.chains, current, losses)
    table.caption_justify = "left"
    return [*tables, table]


def _current(row: Sequence[Truth]) -> Truth:
    """Where a chain is: the first stage that has not succeeded, or the last one."""
    return next((one for one in row if not one.succeeded), row[-1])


def _summary(
    chains: Sequence[Chain], current: Sequence[Truth], losses: Sequence[float | None]
) -> str:
    states = [one.state for one in current]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    known = [
        (loss, chain.point) for loss, chain in zip(losses, chains, strict=True) if loss is not None
    ]
    best = f"; best val_loss {min(known)[0]:.4g}: {min(known)[1]}" if known else ""
    return f"{len(current)} points: {', '.join(counted)}{best}"


def _loss(row: Sequence[Truth]) -> float | None:
    """A point's validation loss: that of its last stage that has one."""
    found = [truth.best_loss(one.stage) for one in row]
    return next(
        (loss for loss in reversed(found) if loss is not None and not math.isnan(loss)), None
    )


def _cells(name: str, one: Truth) -> list[Any]:
    requeued = int(one.told.get("requeues") or 0)
    again = f" (requeued {requeued}x)" if requeued and one.live else ""
    on = f" on {one.nodes}" if one.nodes and one.state == "RUNNING" else ""
    return [
        _text(name),
        _text(f"{one.state}{on}{again}", COLOURS.get(one.state, "red")),
        _text(one.job_id or "-"),
        _text(duration(one.seconds)),
        _text(progress(one)),
        _text(one.reason),
    ]


def progress(one: Truth) -> str:
    """Step, losses and time left, of a stage that tells them and has begun."""
    told = truth.progress(one.stage) if one.told.get("started") else {}
    parts = []
    if told.get("step") is not None:
        most = told.get("max_steps")
        parts.append(f"step {told['step']}" + (f"/{most}" if most and most > 0 else ""))
    for key, name in (("train_loss", "loss"), ("val_loss", "val_loss")):
        if isinstance(told.get(key), int | float):
            parts.append(f"{name} {told[key]:.4g}")
    if one.state == "RUNNING" and isinstance(told.get("seconds_left"), int | float):
        since = datetime.now(UTC).timestamp() - _updated(told)
        parts.append(f"ETA {duration(max(told['seconds_left'] - since, 0))}")
    return ", ".join(parts)


def _updated(told: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(told.get("updated"))).timestamp()
    except ValueError:
        return datetime.now(UTC).timestamp()


def duration(seconds: float | None) -> str:
    """`45s`, `12m 3s`, `3h 20m`, `2d 4h`; `-` where there is none."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    for size, name, below, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{name} {whole % size // below}{small}"
    return f"{max(whole, 0)}s"


def _table(title: str | None, *columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(text, style=style)  # not markup: names may hold brackets
