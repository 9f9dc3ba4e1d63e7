"""A job: everything that a cluster must know to run one stage."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launcher_scripts.stages import STAGES


class LaunchError(Exception):
    """A mistake of the user, or a refusal of the cluster: a line for each, and the exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Group:
    """Commands that run one after the other in each process of one `srun` or `bcprun`.

    `commands` are lines of shell whose user-typed parts are quoted already; the first that fails
    stops the group, and a group that fails stops the job.
    """

    commands: tuple[str, ...]
    alone: bool = False  # one process on one node, whatever the job's size


@dataclass(frozen=True)
class Resources:
    nodes: int
    processes_per_node: int
    gpus_per_node: int  # 0 where the stage computes on CPUs
    time_limit: str | None  # as Slurm spells it


@dataclass(frozen=True)
class Job:
    """One stage, ready to be written as a script. Names of its files hold `name`."""

    name: str
    stage: str
    python: str  # the interpreter of its processes
    groups: tuple[Group, ...]
    resources: Resources
    environment: dict[str, str]
    source: Path  # the folder in which `import graftwerk` finds it
    results_dir: Path
    config: str  # YAML, resolved
    dependency: str | None = None  # the user's own, besides the stage before
    container: str | None = None
    mounts: tuple[str, ...] = ()
    wandb_key_file: Path | None = None
    max_requeues: int = 0  # how often a cluster may start it anew after a signal or a lost node
    signal_seconds: int = 0  # before the time limit it is told to checkpoint; 0: never

    @property
    def python_path(self) -> str:
        """A line of shell (POSIX) that lets Python find `graftwerk`."""
        return f"export PYTHONPATH={shlex.quote(str(self.source))}${{PYTHONPATH:+:$PYTHONPATH}}"

    @property
    def key_lines(self) -> tuple[str, ...]:
        """Shell (POSIX) that reads the key of Weights & Biases where it runs: no file holds it."""
        if self.wandb_key_file is None:
            return ()
        return (
            f'WANDB_API_KEY="$(cat {shlex.quote(str(self.wandb_key_file))})"',
            "export WANDB_API_KEY",
        )

    @property
    def config_path(self) -> Path:
        return self.results_dir / f"{self.name}_hydra.yaml"

    @property
    def script(self) -> Path:
        return self.results_dir / f"{self.name}_submission.sh"

    @property
    def state_file(self) -> Path:
        return self.results_dir / "state.json"


def job_name(stage: str, run_name: str, prefix: str = "") -> str:
    """The stage is part of the name: `singleton` makes jobs of one name wait for each other."""
    named = re.search(rf"(?<![a-zA-Z]){stage}(?![a-zA-Z])", run_name)
    return prefix + (run_name if named else f"{stage}_{run_name}")


def build(cfg: DictConfig, stage: str, python: str, prefix: str = "") -> Job:
    """The job of one stage of a checked configuration; `python` is a path or a name on PATH."""
    kind, part = STAGES[stage], cfg[stage]
    name = job_name(stage, str(part.run.name), prefix)
    results_dir = _path(part.run.results_dir)
    root = _path(cfg.launcher_scripts_path).parent
    argv = tuple(kind.command(python, results_dir / f"{name}_hydra.yaml"))
    setup = tuple(str(line) for line in cfg.cluster.get("setup") or [])
    data_and_results = [str(cfg.data_dir), str(cfg.base_results_dir)]
    return Job(
        name=name,
        stage=stage,
        python=python,
        groups=(Group((*setup, f"exec {shlex.join(argv)}"), alone=not kind.per_device),),
        resources=_resources(part, kind.per_device),
        environment={k: str(v) for k, v in (cfg.get("env_vars") or {}).items() if v is not None},
        source=root / "src",
        results_dir=results_dir,
        config=OmegaConf.to_yaml(part, resolve=True),
        dependency=_text(part.run.get("dependency")),
        container=_text(cfg.get("container")),
        mounts=_mounts([root, *data_and_results, results_dir], cfg.get("container_mounts")),
        wandb_key_file=_path(key_file) if (key_file := cfg.get("wandb_api_key_file")) else None,
        max_requeues=int(part.run.get("max_requeues") or 0),
        signal_seconds=int(part.run.get("signal_seconds") or 0),
    )


def unusable(jobs: list[Job]) -> list[str]:
    """What no cluster can do, one line each: names that make no file, folders that collide."""
    found, owner = [], {}
    for job in jobs:
        if re.search(r"[/%\\\x00-\x1f]", job.name):
            found.append(
                f"{job.stage}.run.name: {job.name!r} cannot name files: "
                "leave out '/', '%', '\\' and control characters"
            )
        if re.search(r"[%\\\x00-\x1f]", str(job.results_dir)):
            found.append(
                f"{job.stage}.run.results_dir: {str(job.results_dir)!r} holds '%', '\\' or a "
                "control character, which log file names cannot: choose another folder"
            )
        if other := owner.get(job.results_dir):
            found.append(
                f"{job.stage}.run.results_dir: {job.results_dir} is {other}'s too, and their "
                "state.json and results would overwrite each other: give each stage its own"
            )
        owner[job.results_dir] = job.stage
    for key, value in (jobs[0].environment if jobs else {}).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            found.append(
                f"env_vars.{key}: no name of an environment variable: "
                "letters, digits and '_' only, no digit first"
            )
        if "\0" in value:
            found.append(f"env_vars.{key}: an environment variable cannot hold a zero byte")
    return found


def _resources(part: DictConfig, per_device: bool) -> Resources:
    time_limit = _text(part.run.get("time_limit"))
    trainer = part.get("trainer")
    if not per_device or trainer is None:
        return Resources(1, 1, 0, time_limit)
    devices = int(trainer.devices)
    gpus = 0 if trainer.get("accelerator") == "cpu" else devices
    return Resources(int(trainer.get("num_nodes", 1)), devices, gpus, time_limit)


def _path(value: object) -> Path:
    return Path(str(value)).expanduser().absolute()


def _mounts(own: list[str | Path], extra: list[str | None] | None) -> tuple[str, ...]:
    """`a:a` for every folder of ours that no other one holds, and what the user asks for."""
    folders = [_path(folder) for folder in own]
    outer = [f for f in folders if not any(o != f and f.is_relative_to(o) for o in folders)]
    wanted = [str(mount) for mount in extra or [] if mount]
    mounts = [*map(str, outer), *wanted]
    return tuple(dict.fromkeys(m if ":" in m else f"{m}:{m}" for m in mounts))


def _text(value: object) -> str | None:
    return None if value is None else str(value)
