"""What a profile comes to, as a table to read and as one for programs."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from graftwerk.data.jsonl import replacing, write_json

# `rest`: random state, metrics and Lightning's loop.
PHASES = ("data", "forward", "backward", "communication", "optimizer", "rest")


@dataclass(frozen=True)
class Rank:
    """What one process did in the timed steps.

    Args:
        seconds: of each phase.
        rows: of data.
        columns: tokens that were computed, padding too.
        row_tokens: what the rows hold, a beginning that they share for each.
        forward, backward: operations of the model for these columns.
        useful: operations without padding and without what no query sees.
        peak: operations a second of its device.
    """

    seconds: dict[str, float]
    rows: float
    columns: float
    row_tokens: float
    forward: float
    backward: float
    useful: float
    peak: float


@dataclass(frozen=True)
class Table:
    """A profile of all processes; a step is as long as it takes the slowest.

    Args:
        ranks: all processes.
        steps: those that were timed, counted as in the log.
        device: cpu or cuda.
        dtype: of matrix products.
    """

    ranks: Sequence[Rank]
    steps: range
    device: str
    dtype: torch.dtype

    @property
    def seconds(self) -> float:
        """Of the timed steps."""
        return max(sum(rank.seconds.values()) for rank in self.ranks)

    def rate(self, what: str) -> float:
        """Of a field of `Rank`: the sum over processes in a second."""
        return sum(getattr(rank, what) for rank in self.ranks) / self.seconds

    @property
    def peak(self) -> float:
        """Operations a second of all devices."""
        return sum(rank.peak for rank in self.ranks)

    def phases(self) -> dict[str, tuple[float, float]]:
        """Seconds a step, the mean over processes, and their share."""
        count = len(self.steps) * len(self.ranks)
        mean = {phase: sum(r.seconds[phase] for r in self.ranks) / count for phase in PHASES}
        whole = sum(mean.values())
        return {phase: (seconds, seconds / whole) for phase, seconds in mean.items()}

    def as_dict(self) -> dict[str, Any]:
        """For `table.json`; operations are floating point operations of all processes."""
        forward, backward = (
            sum(getattr(r, w) for r in self.ranks) for w in ("forward", "backward")
        )
        steps = len(self.steps)
        return {
            "first_step": self.steps.start,
            "last_step": self.steps.stop - 1,
            "seconds_per_step": self.seconds / steps,
            "phases": {
                phase: {"seconds_per_step": seconds, "share": share}
                for phase, (seconds, share) in self.phases().items()
            },
            "samples_per_second": self.rate("rows"),
            "tokens_per_second": self.rate("columns"),
            "useful_tokens_per_second": self.rate("row_tokens"),
            "forward_flops_per_step": forward / steps,
            "backward_flops_per_step": backward / steps,
            "model_flops_per_second": (forward + backward) / self.seconds,
            "peak_flops_per_second": self.peak,
            "model_flop_utilisation": (forward + backward) / self.seconds / self.peak,
            "useful_flop_utilisation": self.rate("useful") / self.peak,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "ranks": [asdict(rank) for rank in self.ranks],
        }

    def rich(self) -> RichTable:
        """For people."""
        found = self.as_dict()
        many = f", {len(self.ranks)} processes" if len(self.ranks) > 1 else ""
        first, last = found["first_step"], found["last_step"]
        table = RichTable(title=f"profile of steps {first} to {last}{many}", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column(justify="right")
        for phase, (seconds, share) in self.phases().items():
            table.add_row(phase, f"{1000 * seconds:,.2f} ms", f"{share:.1%}")
        table.add_row("step", f"{1000 * found['seconds_per_step']:,.2f} ms", "", end_section=True)
        table.add_row("tokens/s", f"{found['tokens_per_second']:,.0f}", "")
        table.add_row("useful tokens/s", f"{found['useful_tokens_per_second']:,.0f}", "")
        reached, peak = found["model_flops_per_second"], found["peak_flops_per_second"]
        what = f"peak ({found['dtype']} matrix products, measured)"
        table.add_row("model FLOP/s", _flops(reached), f"{found['model_flop_utilisation']:.1%}")
        useful = self.rate("useful")
        table.add_row("... useful", _flops(useful), f"{found['useful_flop_utilisation']:.1%}")
        table.add_row(what, _flops(peak), "")
        return table

    def write(self, folder: Path) -> None:
        """`table.json` and `table.txt`, each whole or not at all."""
        write_json(folder / "table.json", self.as_dict())
        text = io.StringIO()
        Console(file=text, width=100).print(self.rich())
        with replacing(folder / "table.txt") as file:
            file.write(text.getvalue().encode())

    def show(self) -> None:
        """Prints it."""
        Console().print(self.rich())


def _flops(number: float) -> str:
    units = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M"}
    unit = next((unit for unit in units if number >= unit), 1e6)
    return f"{number / unit:,.1f} {units[unit]}"
