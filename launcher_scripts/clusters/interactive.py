"""This machine (`cluster_type=interactive`): one process for each device, one stage at a time."""

from typing import Any

from launcher_scripts.clusters.base import Backend
from launcher_scripts.clusters.runner import run_chain
from launcher_scripts.job import Job


class Interactive(Backend):
    template = "interactive.sh"

    def check(self, jobs: list[Job]) -> list[str]:
        return [
            f"{job.stage}.trainer.num_nodes: {job.resources.nodes}, but cluster_type=interactive "
            "is this machine alone: 1, or use bcm or bcp"
            for job in jobs
            if job.resources.nodes != 1
        ]

    def check_machine(self, jobs: list[Job]) -> list[str]:
        return []

    def fields(self, job: Job, after: str | None) -> dict[str, Any]:
        return {
            "job_id": "null",
            "log": job.results_dir / f"log-{job.name}",
            "processes": job.resources.processes_per_node,
        }

    def run(self, jobs: list[Job]) -> int:
        return run_chain(jobs)
