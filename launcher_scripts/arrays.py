"""A sweep on Slurm: one job array for each stage, whose tasks are the points.

A task runs the script of its point, so a point can be killed, requeued and run again by itself.
Where a stage follows another one point by point, `aftercorr` lets each of its tasks wait for the
same task of the array before, and for that alone.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher_scripts import state
from launcher_scripts.clusters.base import TEMPLATES, Backend
from launcher_scripts.clusters.slurm import submit
from launcher_scripts.job import Job, LaunchError, job_name
from launcher_scripts.sweep import common_folder


@dataclass(frozen=True)
class Step:
    """What is handed to Slurm at once: one job, or an array of jobs that are alike."""

    jobs: tuple[Job, ...]
    cluster: Backend
    before: tuple["Step", ...] = ()
    point_by_point: bool = False  # each task waits for the same task of the array before
    limit: int | None = None  # tasks that run at a time

    @property
    def is_array(self) -> bool:
        return len(self.jobs) > 1

    @property
    def name(self) -> str:
        if not self.is_array:
            return self.jobs[0].name
        prefix = self.cluster.prefix(self.cluster.settings)
        return f"{job_name(self.jobs[0].stage, self.folder.name, prefix)}_sweep"

    @property
    def folder(self) -> Path:
        return common_folder([job.results_dir for job in self.jobs])

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sh" if self.is_array else self.jobs[0].script

    def waits_for(self, ids: Sequence[str]) -> str | None:
        """The dependency on the steps before, whose ids these are."""
        if not ids:
            return None
        return f"{'aftercorr' if self.point_by_point else 'afterok'}:{':'.join(ids)}"

    def render(self, ids: Sequence[str]) -> str:
        """The script that sbatch is given."""
        after = self.waits_for(ids)
        if not self.is_array:
            return self.cluster.render(self.jobs[0], ":".join(ids) or None)
        own = ",".join(filter(None, [after, self.jobs[0].dependency]))
        whole = replace(
            self.jobs[0], name=self.name, results_dir=self.folder, dependency=own or None
        )
        lines = self.cluster.fields(whole, None)["directives"]
        limit = f"%{self.limit}" if self.limit else ""
        directives = [
            f"--array=0-{len(self.jobs) - 1}{limit}",
            # What is said outside the tasks' own logs, such as that a script has vanished.
            *(re.sub(r"^(--(output|error)=.*)%j", r"\1%A", line) for line in lines),
        ]
        return TEMPLATES.get_template("slurm_array.sh").render(
            directives=directives,
            stage=self.jobs[0].stage,
            jobs=self.jobs,
            script=self.script,
            after=after,
        )


def steps(chains: Sequence[tuple[Backend, Sequence[Job]]], limit: int | None) -> list[Step]:
    """The arrays and jobs of a sweep, in an order in which they can be submitted.

    Points that ask for different machines, or have different stages, go into different arrays.
    """
    groups: dict[tuple, list[tuple[Backend, Sequence[Job]]]] = {}
    for cluster, jobs in chains:
        groups.setdefault(tuple(_kind(cluster, job) for job in jobs), []).append((cluster, jobs))
    found: list[Step] = []
    step_of: dict[Path, Step] = {}
    for group in groups.values():
        cluster = group[0][0]
        for place in range(len(group[0][1])):
            # The jobs of this stage, each with those that it follows.
            follows: dict[Path, set[Path]] = {}
            for _, chain in group:
                own = follows.setdefault(chain[place].results_dir, set())
                own |= {chain[place - 1].results_dir} if place else set()
            new = {chain[place].results_dir: chain[place] for _, chain in group}
            new = {folder: job for folder, job in new.items() if folder not in step_of}
            if not new:
                continue
            earlier = [step_of[folder] for own in new for folder in follows[own]]
            before = list({id(step): step for step in earlier}.values())
            same = len(before) == 1 and len(new) > 1
            same = same and [{job.results_dir} for job in before[0].jobs] == [
                follows[folder] for folder in new
            ]
            step = Step(tuple(new.values()), cluster, tuple(before), same, limit)
            step_of |= dict.fromkeys(new, step)
            found.append(step)
    return found


def _kind(cluster: Backend, job: Job) -> tuple[str, ...]:
    """All that the jobs of one array have in common."""
    alike = replace(job, name="point", results_dir=Path("/point"))
    return (job.stage, *cluster.fields(alike, None)["directives"])


def next_steps(found: Sequence[Step]) -> list[str]:
    """Commands by which a person would submit what a dry run wrote."""
    lines, names = [], {}
    for number, step in enumerate(found, start=1):
        after = step.waits_for([f"$job{names[id(before)]}" for before in step.before])
        own = f",{step.jobs[0].dependency}" if after and step.jobs[0].dependency else ""
        flag = f"--dependency={after}{own} " if after else ""
        lines.append(f"job{number}=$(sbatch --parsable {flag}{shlex.quote(str(step.script))})")
        names[id(step)] = number
    return lines


def write(found: Sequence[Step]) -> None:
    """The scripts of the arrays; those of the points are there."""
    for step in found:
        if step.is_array:
            ids = [f"ID_OF_{re.sub(r'[^A-Za-z0-9_]', '_', before.name)}" for before in step.before]
            state.write_atomically(step.script, step.render(ids), mode=0o755)


def run(found: Sequence[Step]) -> int:
    """Submit all steps. A refusal half-way cancels what was accepted before it."""
    ids: dict[int, str] = {}
    try:
        for step in found:
            ids[id(step)] = _submit(step, [ids[id(before)] for before in step.before])
            many = f"{len(step.jobs)} points" + (f", {step.limit} at a time" * bool(step.limit))
            what = (
                f"job array {ids[id(step)]} ({many})" if step.is_array else f"job {ids[id(step)]}"
            )
            print(f"Submitted {step.name} as {what}", flush=True)
    except BaseException as error:
        undone = _cancel([step for step in found if id(step) in ids], ids)
        if isinstance(error, LaunchError):
            raise LaunchError("\n".join([str(error), *undone]), error.code) from None
        raise
    numbers = list(ids.values())
    print(f"Watch: squeue --jobs={','.join(numbers)}    Cancel: scancel {' '.join(numbers)}")
    return 0


def _submit(step: Step, after: Sequence[str]) -> str:
    script = step.render(after)
    if not step.is_array:
        return submit(step.jobs[0], script)
    before = [state.submitted(job) for job in step.jobs]
    state.write_atomically(step.script, script, mode=0o755)
    done = subprocess.run(["sbatch", "--parsable", step.script], capture_output=True, text=True)
    answer = re.fullmatch(r"(?:.*\s)?(\d+)(;\S*)?\s*", done.stdout, re.DOTALL)
    if done.returncode or answer is None:
        for job in step.jobs:
            state.failed(job, 1)
        reason = " ".join((done.stderr or done.stdout).split()) or "no reason given"
        raise LaunchError(f"{step.name}: sbatch refused {step.script}: {reason}", code=1)
    for number, (job, written) in enumerate(zip(step.jobs, before, strict=True)):
        state.accepted(job, written, f"{answer[1]}_{number}")
    return answer[1]


def _cancel(accepted: Sequence[Step], ids: dict[int, str]) -> list[str]:
    """Take submitted steps back, the last first; returns what was done, in lines."""
    lines = []
    for step in reversed(accepted):
        done = subprocess.run(["scancel", ids[id(step)]], capture_output=True, text=True)
        if done.returncode:
            lines.append(f"{step.name}: job {ids[id(step)]} is still queued: {done.stderr.strip()}")
            continue
        for job in step.jobs:
            state.cancelled(job.state_file)
        lines.append(f"{step.name}: job {ids[id(step)]} was submitted before and is cancelled")
    return lines
