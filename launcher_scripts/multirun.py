"""The checked points of a sweep to jobs: arrays on Slurm, elsewhere one point after the other."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from launcher_scripts import lock, pipeline, state
from launcher_scripts.clusters import backend
from launcher_scripts.clusters.base import Backend
from launcher_scripts.job import Job, LaunchError, build
from launcher_scripts.manifest import Chain, Command

INTERRUPTED = (129, 130, 143)  # by HUP, INT or TERM


@dataclass(frozen=True)
class Run:
    """One point of a sweep with its jobs; points share the jobs that no swept value reaches."""

    label: str
    cfg: DictConfig
    cluster: Backend
    jobs: tuple[Job, ...]


def launch(points: Sequence[tuple[str, DictConfig]], notices: list[str], command: Command) -> int:
    """Write every point's files and run or submit them, or only say what would run (`dry_run`).

    `points` are labels and checked configurations. Returns main.py's exit code, as
    `pipeline.launch` does; of points that run here, that of the first that failed.
    """
    try:
        runs = plan(points)
        chains = [Chain(pipeline.stages_of(r.cfg, list(r.jobs)), r.label) for r in runs]
        return start(runs, notices, chains, command)
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.code


def plan(points: Sequence[tuple[str, DictConfig]]) -> list[Run]:
    """The jobs of all points; those of one folder are one."""
    built: dict[Path, Job] = {}
    runs = []
    for label, cfg in points:
        cluster = backend(cfg.cluster_type)(cfg.cluster)
        prefix, python = cluster.prefix(cfg.cluster), pipeline.interpreter(cfg)
        jobs = []
        for stage in map(str, cfg.stages):
            folder = Path(str(cfg[stage].run.results_dir))
            if folder not in built:
                built[folder] = build(cfg, stage, python, prefix)
            jobs.append(built[folder])
        runs.append(Run(label, cfg, cluster, tuple(jobs)))
    return runs


def start(runs: list[Run], notices: list[str], chains: list[Chain], command: Command | None) -> int:
    """Check, write and run; `chains`, where there are some, go into the manifest."""
    cfg, on_slurm = runs[0].cfg, runs[0].cluster.chained_by_cluster
    pipeline.check(cfg, [(run.cluster, list(run.jobs)) for run in runs], notices)
    with lock.hold([] if cfg.dry_run else unique(runs)):
        written: set[Path] = set()
        for run in runs:
            new = [job for job in run.jobs if job.results_dir not in written]
            pipeline.write(new, run.cluster)
            written |= {job.results_dir for job in new}
        print(table(runs), flush=True)
        if not cfg.dry_run:
            pipeline.record(cfg, chains, command)
        return _on_slurm(runs) if on_slurm else _here(runs)


def unique(runs: Sequence[Run]) -> list[Job]:
    return list({job.results_dir: job for run in runs for job in run.jobs}.values())


def _on_slurm(runs: list[Run]) -> int:
    from launcher_scripts import arrays

    cfg = runs[0].cfg
    limit = cfg.get("sweep", {}).get("max_parallel")
    steps = arrays.steps([(run.cluster, run.jobs) for run in runs], limit)
    arrays.write(steps)
    if not cfg.dry_run:
        return arrays.run(steps)
    _dry_run(arrays.next_steps(steps))
    return 0


def _here(runs: list[Run]) -> int:
    """One point after the other; a point that fails, or is cancelled, ends no other."""
    if runs[0].cfg.dry_run:
        lines = {job.script: run.cluster.next_steps([job]) for run in runs for job in run.jobs}
        _dry_run([line for each in lines.values() for line in each])
        return 0
    for job in unique(runs):
        state.submitted(job)
    ended: dict[Path, int] = {}
    failed: list[tuple[str, int]] = []
    for number, run in enumerate(runs, start=1):
        print(f"point {number} of {len(runs)}: {run.label}", flush=True)
        code = _point(run, ended)
        if code:
            failed.append((run.label, code))
        if code in INTERRUPTED and not any(lock.was_cancelled(j.results_dir) for j in run.jobs):
            break  # it was the sweep that was told to end
    for job in unique(runs):
        if (state.read(job.state_file) or {}).get("state") == "SUBMITTED":
            state.cancelled(job.state_file)
    if failed:
        print(f"failed: {', '.join(label for label, _ in failed)}", file=sys.stderr)
    return failed[0][1] if failed else 0


def _point(run: Run, ended: dict[Path, int]) -> int:
    """Run what of a point's chain has not run yet; 143 where it was cancelled before."""
    for job in run.jobs:
        if code := ended.get(job.results_dir):
            print(f"not run: {job.stage} failed with exit code {code}", file=sys.stderr)
            return code
        if lock.was_cancelled(job.results_dir):
            return 143
        if job.results_dir not in ended:
            ended[job.results_dir] = run.cluster.run([job])
            if ended[job.results_dir]:
                return ended[job.results_dir]
    return 0


def table(runs: Sequence[Run]) -> str:
    """The points and the folders of their last stages, below what they share."""
    rows = [("point", "stages", "results_dir")]
    rows += [
        (run.label, ", ".join(job.stage for job in run.jobs), str(run.jobs[-1].results_dir))
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(text.ljust(width) for text, width in row).rstrip() for row in cells)


def _dry_run(lines: Sequence[str]) -> None:
    print("\nDry run: the files above are written, nothing runs. To run them by hand:")
    print(*(f"  {line}" for line in lines), sep="\n")
