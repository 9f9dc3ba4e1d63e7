"""Learning runs for the benchmarks: one command line of the launcher each, and what it found."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def launch(work: Path, name: str, words: list[str]) -> None:
    """Runs main.py with the words on this machine; its output goes to `<name>.log` in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    folders = [f"data_dir={work / 'data'}", f"base_results_dir={work / 'results'}"]
    command = [sys.executable, str(ROOT / "main.py"), *folders, "cluster_type=interactive", *words]
    log = work / f"{name}.log"
    print(f"{name}: {log}", file=sys.stderr)
    with open(log, "w") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"{name} failed: see {log}")


def overrides(stage: str, settings: dict[str, Any]) -> list[str]:
    """The settings, by their keys in the stage's configuration, as words of a command line."""
    return [f"{stage}.{key}={value}" for key, value in settings.items()]


def training(folder: Path) -> dict[str, Any]:
    """What stage `peft`, or another that trains, says of its run in the folder."""
    return json.loads((folder / "results/summary.json").read_text())


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """What stage `eval` found in the folder, by the names of its rows; `base` is the base alone."""
    metrics = json.loads((folder / "results/metrics.json").read_text())
    return {row["name"]: row for row in metrics["results"]}
