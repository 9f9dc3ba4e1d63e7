"""A checked configuration to a chain of jobs: planned, written down, then run or submitted."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from launcher_scripts import lock, manifest, state
from launcher_scripts.clusters import backend
from launcher_scripts.clusters.base import Backend
from launcher_scripts.job import Job, LaunchError, build, unusable
from launcher_scripts.manifest import Chain, Command, Launch, Stage
from launcher_scripts.state import write_atomically


def launch(cfg: DictConfig, notices: list[str], command: Command | None = None) -> int:
    """Write every stage's files and run the chain, or only say what would run (`dry_run`).

    `command` composes the same again; the manifest keeps it.

    Returns main.py's exit code: 0 done or submitted, 2 a mistake of the user's with nothing
    written, otherwise the code of the stage that failed, or 1 where the cluster refused.
    """
    try:
        return _launch(cfg, notices, command)
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.code


def _launch(cfg: DictConfig, notices: list[str], command: Command | None) -> int:
    cluster = backend(cfg.cluster_type)(cfg.cluster)
    jobs = plan(cfg, cluster)
    return start(cfg, cluster, jobs, notices, [Chain(stages_of(cfg, jobs))], command)


def start(
    cfg: DictConfig,
    cluster: Backend,
    jobs: list[Job],
    notices: list[str],
    chains: list[Chain],
    command: Command | None,
) -> int:
    """Check, write and run `jobs`; `chains`, where there are some, go into the manifest."""
    check(cfg, [(cluster, jobs)], notices)
    with lock.hold([] if cfg.dry_run else jobs):
        write(jobs, cluster)
        print(table(jobs, cluster), flush=True)
        if not cfg.dry_run:
            record(cfg, chains, command)
            return run(jobs, cluster)
    print("\nDry run: the files above are written, nothing runs. To run them by hand:")
    print(*(f"  {line}" for line in cluster.next_steps(jobs)), sep="\n")
    return 0


def check(cfg: DictConfig, chains: Sequence[tuple[Backend, list[Job]]], notices: list[str]) -> None:
    """Say what the user should know, or raise LaunchError with every mistake.

    `chains` are what is launched, each with its cluster; they may share jobs.
    """
    jobs = list({job.results_dir: job for _, chain in chains for job in chain}.values())
    if len(chains) == 1:  # with two stages of one folder, which is a mistake
        jobs = chains[0][1]
    mistakes = unusable(jobs) + unwritable(jobs)
    mistakes += [line for cluster, chain in chains for line in cluster.check(chain)]
    lacking = [line for cluster, chain in chains for line in cluster.check_machine(chain)]
    if cfg.dry_run:
        notices = [*notices, *lacking]
    else:
        mistakes += lacking
    if mistakes := list(dict.fromkeys(mistakes)) or lock.occupied(jobs):
        raise LaunchError("\n".join(mistakes))
    for notice in dict.fromkeys([*notices, *_unused(cfg)]):
        warns = notice.startswith("warning: ")
        print(notice if warns else f"note: {notice}", file=sys.stderr)


def run(jobs: list[Job], cluster: Backend) -> int:
    """Run or submit a chain whose files are written; what is never reached becomes CANCELLED."""
    if cluster.chained_by_cluster:
        return cluster.run(jobs)
    for job in jobs:
        state.submitted(job)
    code = cluster.run(jobs)
    for job in jobs:
        if (state.read(job.state_file) or {}).get("state") == "SUBMITTED":
            state.cancelled(job.state_file)
    return code


def stages_of(cfg: DictConfig, jobs: list[Job]) -> tuple[Stage, ...]:
    """The jobs of a configuration as the manifest names them."""
    return tuple(
        Stage(job.stage, job.name, job.results_dir, log_dir(cfg[job.stage], job.results_dir))
        for job in jobs
    )


def log_dir(part: DictConfig, results_dir: Path) -> Path:
    """Where a stage writes its progress and its results."""
    manager = part.get("exp_manager") or {}
    folder = manager.get("explicit_log_dir")
    if not folder and manager.get("exp_dir"):
        folder = Path(str(manager["exp_dir"])) / str(manager.get("name") or "default")
    return Path(str(folder)).absolute() if folder else results_dir / "results"


def record(cfg: DictConfig, chains: list[Chain], command: Command | None) -> None:
    """Add the launch to the manifest of the results root, unless it is there (no `chains`)."""
    if not chains:
        return
    root = Path(str(cfg.base_results_dir)).expanduser().absolute()
    try:
        manifest.record(root, Launch(cfg.cluster_type, tuple(chains), command, state.now()))
    except OSError as error:
        # Stages may have folders elsewhere; what is lost is finding the run by its folder.
        print(f"warning: {root}/{manifest.NAME}: {error.strerror}", file=sys.stderr)


def plan(cfg: DictConfig, cluster: Backend) -> list[Job]:
    """The jobs of `cfg.stages`, in that order."""
    prefix = cluster.prefix(cfg.cluster)
    return [build(cfg, str(stage), interpreter(cfg), prefix) for stage in cfg.stages]


def interpreter(cfg: DictConfig) -> str:
    """The Python of the jobs: this one, except in a container, which has its own `python3`."""
    elsewhere = cfg.cluster_type == "bcm" and cfg.get("container")
    return str(cfg.cluster.get("python") or ("python3" if elsewhere else sys.executable))


def write(jobs: list[Job], cluster: Backend) -> None:
    """Write each job's config, script and command line. Scripts are rendered before any write."""
    scripts = chain_scripts(jobs, cluster)
    for job, script in zip(jobs, scripts, strict=True):
        try:
            job.results_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(job.config_path, job.config)
            write_atomically(job.script, script, mode=0o755)
            with open(job.results_dir / "launcher_cmd.log", "a", encoding="utf-8") as log:
                log.write(shlex.join(["python3", *sys.argv]) + "\n")
        except OSError as error:
            raise LaunchError(
                f"{job.stage}.run.results_dir: cannot write to {job.results_dir}: {error.strerror}"
            ) from None


def chain_scripts(jobs: list[Job], cluster: Backend) -> list[str]:
    """The scripts before submission: ids of jobs that do not exist yet have readable names."""
    before: list[Job | None] = [None, *jobs[:-1]]
    return [
        cluster.render(job, cluster.placeholder(last) if last else None)
        for job, last in zip(jobs, before, strict=True)
    ]


def unwritable(jobs: list[Job]) -> list[str]:
    """Results folders that cannot be made or written, known before anything is written."""
    found = []
    for job in jobs:
        nearest = job.results_dir
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            found.append(f"{job.stage}.run.results_dir: {nearest} is a file, not a folder")
        elif not os.access(nearest, os.W_OK | os.X_OK):
            found.append(
                f"{job.stage}.run.results_dir: cannot write to {nearest}: set base_results_dir to "
                "a folder that you may write to"
            )
    return found


def table(jobs: list[Job], cluster: Backend) -> str:
    """The chain in aligned columns: what runs, after what, and where its files are."""
    rows = [("stage", "job", "after", "results_dir")]
    for number, job in enumerate(jobs):
        own = job.dependency if cluster.chained_by_cluster else None
        after = ", ".join(filter(None, [jobs[number - 1].stage if number else None, own]))
        rows.append((job.stage, job.name, after or "-", str(job.results_dir)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(text.ljust(width) for text, width in row).rstrip() for row in cells)


def _unused(cfg: DictConfig) -> list[str]:
    """What is set but means nothing on this cluster, in one line."""
    if cfg.cluster_type == "bcm":
        return []
    runs = [cfg[stage].run for stage in cfg.stages]
    keys = [f"run.{key}" for key in ("dependency", "time_limit") if any(r.get(key) for r in runs)]
    keys += ["container"] if cfg.get("container") else []
    if not keys:
        return []
    return [f"without effect with cluster_type={cfg.cluster_type}: {', '.join(keys)}"]
