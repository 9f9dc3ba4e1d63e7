"""What every back end does: check a chain of jobs, write each as a script, run them in order."""

import json
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launcher_scripts.job import Job

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # shell, not HTML: every value goes through `quote`
)
TEMPLATES.filters["quote"] = lambda value: shlex.quote(str(value))
TEMPLATES.filters["json"] = json.dumps


class Backend(ABC):
    """One kind of cluster. `settings` is the `cluster` group of the configuration."""

    template: ClassVar[str]
    chained_by_cluster: ClassVar[bool] = False  # jobs wait for each other in the cluster's queue

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @classmethod
    def prefix(cls, settings: Mapping[str, Any]) -> str:
        """What a job's name starts with here."""
        return ""

    @abstractmethod
    def check(self, jobs: list[Job]) -> list[str]:
        """Mistakes that need no running cluster to be seen, one line each."""

    @abstractmethod
    def check_machine(self, jobs: list[Job]) -> list[str]:
        """What this machine lacks for running the jobs now; a dry run only warns of it."""

    @abstractmethod
    def fields(self, job: Job, after: str | None) -> dict[str, Any]:
        """What the template needs besides `job`; `after` is the id of the job before."""

    @abstractmethod
    def run(self, jobs: list[Job]) -> int:
        """Submit or run the chain, whose files are written. Returns main.py's exit code."""

    def render(self, job: Job, after: str | None = None) -> str:
        """The job's script: bash, to be read and to be run again by hand."""
        fields = self.fields(job, after)
        return TEMPLATES.get_template(self.template).render(job=job, after=after, **fields)

    def placeholder(self, job: Job) -> str:
        """What stands in a script for the id of a job before it that is not submitted yet."""
        return "ID_OF_" + re.sub(r"\W", "_", job.name)

    def next_steps(self, jobs: list[Job]) -> list[str]:
        """Commands by which a person would run what a dry run wrote."""
        return [f"bash {shlex.quote(str(job.script))}" for job in jobs]
