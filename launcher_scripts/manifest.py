"""`pipeline.json` in the results root: what was launched there, stage by stage, in order.

A file holds every launch below its folder, the newest last, since several pipelines may share one
`base_results_dir`. It is what `action=...` reads to find a run from a folder alone.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher_scripts import state

NAME = "pipeline.json"


@dataclass(frozen=True)
class Stage:
    """One job of a chain, by its names and folders."""

    stage: str
    job_name: str
    results_dir: Path
    log_dir: Path  # where the stage itself writes, and tells its progress

    @property
    def state_file(self) -> Path:
        return self.results_dir / "state.json"

    @property
    def script(self) -> Path:
        return self.results_dir / f"{self.job_name}_submission.sh"

    @property
    def config_path(self) -> Path:
        return self.results_dir / f"{self.job_name}_hydra.yaml"


@dataclass(frozen=True)
class Chain:
    """Stages, each after the one before; one point of a sweep, where `point` names it."""

    stages: tuple[Stage, ...]
    point: str | None = None

    @property
    def folders(self) -> frozenset[Path]:
        return frozenset(stage.results_dir for stage in self.stages)


@dataclass(frozen=True)
class Command:
    """The command line that composes a launch again."""

    words: tuple[str, ...] = ()
    multirun: bool = False
    config_name: str | None = None
    config_path: str | None = None
    config_dir: str | None = None
    cwd: str | None = None  # what relative paths are relative to


@dataclass(frozen=True)
class Launch:
    cluster_type: str
    chains: tuple[Chain, ...]
    command: Command | None = None
    launched: str = ""

    @property
    def folders(self) -> frozenset[Path]:
        return frozenset(folder for chain in self.chains for folder in chain.folders)

    @property
    def is_sweep(self) -> bool:
        return any(chain.point is not None for chain in self.chains)


def read(root: Path) -> list[Launch]:
    """The launches of a folder's manifest, the newest last; none where there is no manifest."""
    content = state.read(root / NAME) or {}
    try:
        return [_launch(entry) for entry in content.get("launches", [])]
    except (KeyError, TypeError, AttributeError):
        return []  # not written by us


def _launch(entry: dict[str, Any]) -> Launch:
    command = dict(entry["command"] or {})
    command["words"] = tuple(command.get("words", ()))
    chains = tuple(
        Chain(tuple(_stage(stage) for stage in chain["stages"]), chain["point"])
        for chain in entry["chains"]
    )
    return Launch(entry["cluster_type"], chains, Command(**command), entry["launched"])


def _stage(entry: dict[str, Any]) -> Stage:
    return Stage(
        entry["stage"], entry["job_name"], Path(entry["results_dir"]), Path(entry["log_dir"])
    )


def record(root: Path, launch: Launch) -> None:
    """Add a launch to the manifest, in place of those that it repeats."""
    root.mkdir(parents=True, exist_ok=True)
    with state.alone(root):
        kept = [old for old in read(root) if not old.folders <= launch.folders]
        entries = [asdict(entry) for entry in [*kept, launch]]
        text = json.dumps({"launches": entries}, indent=1, default=str)
        state.write_atomically(root / NAME, text + "\n")


def of_folder(folder: Path) -> tuple[list[Launch], Path | None]:
    """What was launched into a folder or below it, and the root whose manifest says so.

    The folder is a results root, the folder of a sweep, or that of a stage. A stage that several
    launches name belongs to the newest, and only chains that touch the folder are left.
    """
    if launches := read(folder):
        return launches, folder
    for root in folder.parents:
        for launch in reversed(read(root)):
            chains = tuple(c for c in launch.chains if _touches(c.folders, folder))
            if chains:
                return [Launch(launch.cluster_type, chains, launch.command, launch.launched)], root
    return [], None


def _touches(folders: Iterable[Path], folder: Path) -> bool:
    return any(one == folder or one.is_relative_to(folder) for one in folders)
