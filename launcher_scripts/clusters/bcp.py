"""Base Command Platform (`cluster_type=bcp`): the stages run in the job the launcher runs in."""

import os
import shlex
import shutil
from typing import Any

from launcher_scripts.clusters.base import Backend
from launcher_scripts.clusters.runner import run_chain
from launcher_scripts.job import Group, Job


class BaseCommand(Backend):
    template = "bcp.sh"

    def check(self, jobs: list[Job]) -> list[str]:
        return []

    def check_machine(self, jobs: list[Job]) -> list[str]:
        found = []
        if shutil.which("bcprun") is None:
            found.append(
                "cluster_type=bcp: `bcprun` is not on PATH: run this inside a Base Command job, "
                "or use cluster_type=interactive for this machine, or dry_run=True"
            )
        sizes = (
            ("NGC_ARRAY_SIZE", "num_nodes", "nodes", lambda job: job.resources.nodes),
            (
                "NGC_GPUS_PER_NODE",
                "devices",
                "GPUs a node",
                lambda job: job.resources.gpus_per_node,
            ),
        )
        for variable, key, what, wanted in sizes:
            given = os.environ.get(variable, "")
            if not given.isdigit():
                continue  # not said by this job: bcprun itself will refuse what does not fit
            found += [
                f"{job.stage}.trainer.{key}: {wanted(job)} is more than the {given} {what} of "
                f"this job ({variable}={given}): lower it, or start a larger job"
                for job in jobs
                if wanted(job) > int(given)
            ]
        return found

    def fields(self, job: Job, after: str | None) -> dict[str, Any]:
        pairs = (f"{key}={value}" for key, value in job.environment.items())
        return {
            "job_id": r'${NGC_JOB_ID:+"\"$NGC_JOB_ID\""}',
            "log": job.results_dir / f"log-{job.name}",
            "size": lambda group, last: _size(job, group, last),
            "environment": "".join(f" \\\n  --env {shlex.quote(pair)}" for pair in pairs),
            "inner": lambda group: "\n".join(  # for any POSIX shell: bcprun's may be sh
                ["set -eu", *job.key_lines, job.python_path, *group.commands]
            ),
        }

    def run(self, jobs: list[Job]) -> int:
        return run_chain(jobs)


def _size(job: Job, group: Group, last: bool) -> str:
    """Only the last group runs on the whole job: those before it prepare."""
    size = job.resources
    if group.alone or not last:
        return "--nnodes 1 --npernode 1"
    return f"--nnodes {size.nodes} --npernode {size.processes_per_node}"
