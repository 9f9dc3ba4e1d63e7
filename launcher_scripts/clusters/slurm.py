"""Slurm (`cluster_type=bcm`): one batch job for each stage, each after the success of the last."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher_scripts import state
from launcher_scripts.clusters.base import Backend
from launcher_scripts.job import Group, Job, LaunchError

LEAVE = 60  # seconds between the first process of a stage that ends and the last
SIZES = "the stage's trainer.num_nodes and trainer.devices say it"
OURS = {
    **dict.fromkeys(("--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node"), SIZES),
    **dict.fromkeys(("--array", "-a"), "one job is one stage; --multirun makes arrays"),
}
# As squeue names it: 12, or 12_3 for a task of an array.
_TASK = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
JOB_ID = rf'${{SLURM_JOB_ID:+"\"{_TASK}\""}}'
DEPENDENCY = r"[A-Za-z]+(:[0-9A-Za-z_+:]+)?"  # singleton, afterok:12:13, after:12+5


class Slurm(Backend):
    template = "slurm.sh"
    chained_by_cluster = True

    @classmethod
    def prefix(cls, settings: Mapping[str, Any]) -> str:
        return str(settings.get("job_name_prefix") or "")

    def check(self, jobs: list[Job]) -> list[str]:
        found = [*self._check_arguments(), *(line for job in jobs for line in self._check(job))]
        if (per_task := self.settings.get("gpus_per_task")) not in (None, 1):
            found.append(
                f"cluster.gpus_per_task: {per_task}, but each process has one device: 1 or null"
            )
        for job in jobs:
            if "?" in (job.dependency or "") and len(jobs) > 1:
                found.append(
                    f"{job.stage}.run.dependency: {job.dependency!r} means 'any of', which Slurm "
                    "cannot join with 'after the stage before': use ','"
                )
        lines = [line for job in jobs[:1] for line in self._directives(job, None)]
        lines += [str(a) for a in self.settings.get("srun_args") or []]
        if bad := next((line for line in lines if re.search(r"[\x00-\x1f]", line)), None):
            found.append(f"cluster: {bad!r} holds a line break or another control character")
        return found

    def _check(self, job: Job) -> list[str]:
        """What one job asks for that this cluster's settings do not allow."""
        found, size = [], job.resources
        node = self.settings.get("gpus_per_node")
        if node is not None and int(node) < size.gpus_per_node:
            found.append(
                f"{job.stage}.trainer.devices: {size.gpus_per_node} is more than "
                f"cluster.gpus_per_node={node}: use fewer devices a node, or more nodes"
            )
        named = named_nodes(str(self.settings.get("nodelist") or ""))
        if named is not None and named > size.nodes:
            found.append(
                f"cluster.nodelist: {self.settings['nodelist']} names {named} nodes, which all "
                f"take part, but {job.stage}.trainer.num_nodes is {size.nodes}: name as many, "
                "or leave others out by cluster.sbatch_args=[--exclude=...]"
            )
        limit = seconds(size.time_limit) if size.time_limit else None
        if limit is not None and limit <= job.signal_seconds:
            found.append(
                f"{job.stage}.run.signal_seconds: {job.signal_seconds} s before the time limit "
                f"{size.time_limit} is before the start: lower it, or raise run.time_limit"
            )
        if not re.fullmatch(rf"{DEPENDENCY}([,?]{DEPENDENCY})*", job.dependency or "singleton"):
            found.append(
                f"{job.stage}.run.dependency: {job.dependency!r} is none of Slurm's: for "
                "example singleton, afterok:1234 or afterok:1234,singleton"
            )
        if job.container and any("," in m or m.count(":") > 2 for m in job.mounts):
            found.append(
                f"{job.stage}: a folder mounted in the container holds ',' or ':', which "
                f"--container-mounts cannot express: {', '.join(job.mounts)}"
            )
        return found

    def _check_arguments(self) -> list[str]:
        """Free options that would start another number of processes than a stage expects."""
        return [
            f"cluster.{key}: {argument} is not free: {OURS[match[0]]}"
            for key in ("sbatch_args", "srun_args")
            for argument in self.settings.get(key) or []
            if (match := re.match(r"--[a-z-]+|-[A-Za-z]", str(argument))) and match[0] in OURS
        ]

    def check_machine(self, jobs: list[Job]) -> list[str]:
        missing = [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]
        return [
            f"cluster_type=bcm: `{tool}` is not on PATH: run this on a login node of a Slurm "
            "cluster, or use cluster_type=interactive for this machine, or dry_run=True"
            for tool in missing[:1]
        ]

    def fields(self, job: Job, after: str | None) -> dict[str, Any]:
        return {
            "directives": self._directives(job, after),
            "job_id": JOB_ID,
            "srun": lambda group: self._srun(job, group),
        }

    def _directives(self, job: Job, after: str | None) -> list[str]:
        """`--key=value` for sbatch, sorted; the user's own `sbatch_args` last, so that they win."""
        size, cluster = job.resources, self.settings
        log = f"{job.results_dir}/log-{job.name}_%j"
        dependency = ",".join(filter(None, [after and f"afterok:{after}", job.dependency]))
        exclusive, whole = cluster.get("exclusive"), cluster.get("gpus_per_node")
        gpus = size.gpus_per_node
        values = {
            "account": cluster.get("account"),
            "constraint": cluster.get("constraint"),
            "dependency": dependency or None,
            "error": f"{log}.err",
            "exclusive": exclusive or None,
            "gpus-per-node": (whole or gpus) if gpus else None,
            # Slurm wants as many of these as tasks, which leaves no room for idle GPUs of a node.
            "gpus-per-task": cluster.get("gpus_per_task")
            if gpus and whole in (None, gpus)
            else None,
            "job-name": job.name,
            "kill-on-invalid-dep": "yes" if dependency else None,
            "mem": cluster.get("mem"),
            "no-requeue": not job.max_requeues or None,
            "nodelist": cluster.get("nodelist"),
            "nodes": size.nodes,
            "ntasks-per-node": size.processes_per_node,
            "open-mode": "append",  # a requeued job goes on in the same log
            "output": f"{log}.out",
            "overcommit": cluster.get("overcommit") or None,
            "partition": cluster.get("partition"),
            "qos": cluster.get("qos"),
            "requeue": job.max_requeues > 0 or None,
            "reservation": cluster.get("reservation"),
            # To all processes of the stage, and not to the script: `B:` would be that.
            "signal": f"USR1@{job.signal_seconds}" if job.signal_seconds else None,
            "time": size.time_limit,
        }
        lines = [
            f"--{key}" if value is True else f"--{key}={in_directive(str(value))}"
            for key, value in values.items()
            if value is not None
        ]
        return lines + [
            in_directive(str(argument)) for argument in cluster.get("sbatch_args") or []
        ]

    def _srun(self, job: Job, group: Group) -> str:
        # One process that fails ends the others, and srun waits for those of a lost node no longer
        # than this: Slurm itself takes minutes to miss it.
        words = ["--kill-on-bad-exit=1", f"--wait={LEAVE}"]
        if group.alone and (job.resources.nodes, job.resources.processes_per_node) != (1, 1):
            words += ["--nodes=1", "--ntasks=1"]
        if job.container:
            words += ["--container-image", job.container]
            words += ["--container-mounts", ",".join(job.mounts)] if job.mounts else []
        extra = [str(argument) for argument in self.settings.get("srun_args") or []]
        if not job.container:  # flags of the container plug-in, unknown to a Slurm without it
            extra = [a for a in extra if not re.match(r"--(no-)?container", a)]
        return shlex.join([*words, *extra])

    def next_steps(self, jobs: list[Job]) -> list[str]:
        lines, after = [], ""
        for number, job in enumerate(jobs, start=1):
            own = f",{job.dependency}" if job.dependency else ""
            flag = f"--dependency=afterok:${after}{own} " if after else ""
            lines.append(f"job{number}=$(sbatch --parsable {flag}{shlex.quote(str(job.script))})")
            after = f"job{number}"
        return lines

    def run(self, jobs: list[Job]) -> int:
        """Submit the chain. A refusal half-way cancels what was accepted before it."""
        accepted: list[tuple[Job, str]] = []
        try:
            for job in jobs:
                after = accepted[-1][1] if accepted else None
                accepted.append((job, submit(job, self.render(job, after))))
                print(f"Submitted {job.name} as job {accepted[-1][1]}", flush=True)
        except BaseException as error:
            undone = _cancel(accepted)
            if isinstance(error, LaunchError):
                raise LaunchError("\n".join([str(error), *undone]), error.code) from None
            print(*undone, sep="\n", file=sys.stderr)
            raise
        ids = ",".join(job_id for _, job_id in accepted)
        print(f"Watch: squeue --jobs={ids}    Cancel: scancel {ids.replace(',', ' ')}")
        return 0


def seconds(time_limit: str) -> int:
    """A time limit in Slurm's notation, in seconds."""
    days, dash, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, rest = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, rest = parts
    else:
        hours, (minutes, rest) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def named_nodes(nodelist: str) -> int | None:
    """How many nodes `n[1-4,7],m2` names; None where that cannot be said, as of a file."""
    if "/" in nodelist:
        return None
    count = 0
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        ways = 1
        for group in re.findall(r"\[([^\]]*)\]", name):
            ends = [part.partition("-") for part in group.split(",")]
            if not all(low.isdigit() and (high or low).isdigit() for low, _, high in ends):
                return None
            ways *= sum(int(high or low) - int(low) + 1 for low, _, high in ends)
        count += ways
    return count


def in_directive(value: str) -> str:
    """A value for a `#SBATCH` line.

    Its reader is no shell: a blank needs quotes around it even behind a backslash, and within
    quotes of either kind a backslash takes the next character as it is.
    """
    if re.fullmatch(r"[\w@%+=:,./\[\]-]*", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def submit(job: Job, script: str) -> str:
    """Hand one script to sbatch through submitit; returns the job's id.

    Raises LaunchError with sbatch's own words where it refuses, or where its answer names no job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    class ScriptExecutor(SlurmExecutor):
        """submitit's submission of a single script, with our text in place of a pickle's."""

        temporary: Path | None = None

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return command

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            self.temporary = submission_file_path
            return super()._make_submission_command(submission_file_path)

        def _num_tasks(self) -> int:
            return 1  # the job as a whole

    executor = ScriptExecutor(job.results_dir)
    before = state.submitted(job)
    errors = io.StringIO()  # submitit prints sbatch's complaint; we say it once
    try:
        with contextlib.redirect_stderr(errors):
            submitted = executor._submit_command(script)
    except FailedSubmissionError as error:
        raise LaunchError(
            f"{job.name}: sbatch's answer names no job; it may have been accepted all the same, "
            f"look with `squeue --me`: {_one_line(str(error))}",
            code=1,
        ) from None
    except FailedJobError as error:
        state.failed(job, 1)
        reason = _one_line(str(error) or errors.getvalue())
        raise LaunchError(f"{job.name}: sbatch refused {job.script}: {reason}", code=1) from None
    else:
        submitted.paths.submission_file.replace(job.script)
        job.script.chmod(0o755)
        state.accepted(job, before, submitted.job_id)
        return submitted.job_id
    finally:
        if executor.temporary is not None:
            executor.temporary.unlink(missing_ok=True)


def _cancel(accepted: list[tuple[Job, str]]) -> list[str]:
    """Take submitted jobs back, the last first; returns what was done, in lines."""
    lines = []
    for job, job_id in reversed(accepted):
        try:
            subprocess.run(["scancel", job_id], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines.append(f"{job.name}: job {job_id} is still queued: scancel failed: {error}")
        else:
            state.failed(job, 1)
            lines.append(f"{job.name}: job {job_id} was submitted before that and is cancelled")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "no reason given"
