"""What a learning stage tells at its end: `summary.json` and a table."""

import resource
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(summary: dict[str, Any]) -> None:
    """The end table."""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    loss = summary["val_loss"]
    rows = {
        "steps": f"{summary['steps']:,}",
        "validation loss": "not validated" if loss is None else f"{loss:.4f}",
        "trainable parameters": f"{summary['trainable_parameters']:,} ({share:.3%})",
        "time": time.strftime("%H:%M:%S", time.gmtime(summary["seconds"])),
        "file": f"{summary['adapter']} ({summary['file_bytes']:,} bytes)",
    }
    table = Table(title=summary["stage"], show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is never cut short
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)
    if points := summary["sweep"]:
        Console().print(_points(points))
        print(f"a file for each point, such as {points[0]['adapter']}", flush=True)


def _points(points: list[dict[str, Any]]) -> Table:
    """The points of a sweep, the best one marked."""
    own = list(dict.fromkeys(key for point in points for key in point["settings"]))
    table = Table(title="sweep")
    for name in ("", "point", *own, "lr", "seed", "parameters", "val_loss", "step"):
        table.add_column(name, overflow="fold")
    for point in points:
        loss = point["val_loss"]
        table.add_row(
            "*" if point["best"] else "",
            point["name"],
            *(str(point["settings"].get(key, "")) for key in own),
            str(point["lr"]),
            str(point["seed"]),
            f"{point['trainable_parameters']:,}",
            "none" if loss is None else f"{loss:.4f}",
            f"{point['step']:,}",
            style="bold" if point["best"] else "",
        )
    return table
