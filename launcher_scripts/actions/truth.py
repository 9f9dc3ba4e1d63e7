"""How a stage really stands: what its files say, held against what the cluster knows."""

import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher_scripts import lock, standing, state
from launcher_scripts.clusters.runner import CONTROL
from launcher_scripts.manifest import Chain, Stage

TAIL = 1 << 16  # bytes of a log that are looked through for its last error
ERROR = re.compile(
    r"^[\w.]*(Error|Exception|Interrupt|Exit)\b|\b(error|fatal|killed|out of memory|failed)\b",
    re.IGNORECASE,
)
# What reports the end of something else, which has said why before.
ECHO = re.compile(r"^(srun|slurmstepd|bcprun|tee)\b|^rank \d+( on \S+)?: failed with|^Terminated$")
WRONG_INPUT = 2  # an exit code that comes with one line, the last
LIVE = ("SUBMITTED", "PENDING", "RUNNING", "REQUEUED")


@dataclass(frozen=True)
class Truth:
    """One stage: its state, and why it is in it.

    `state` is one of LIVE, COMPLETED, FAILED, CANCELLED, or another word of Slurm's (TIMEOUT,
    NODE_FAIL, OUT_OF_MEMORY, ...); LOST where `state.json` speaks of a job that nobody knows; and
    NOT LAUNCHED where there is no `state.json`.
    """

    stage: Stage
    state: str
    reason: str = ""
    nodes: str = ""
    told: dict[str, Any] = field(default_factory=dict)  # state.json

    @property
    def live(self) -> bool:
        return self.state in LIVE or self.state in standing.LIVE

    @property
    def succeeded(self) -> bool:
        return self.state == "COMPLETED"

    @property
    def job_id(self) -> str | None:
        return str(self.told["job_id"]) if self.told.get("job_id") else None

    @property
    def seconds(self) -> float | None:
        """How long its last run took, or takes by now."""
        started, ended = _time(self.told.get("started")), _time(self.told.get("ended"))
        if started is None or self.state in ("PENDING", "SUBMITTED", "REQUEUED"):
            return None
        if ended is None and not self.live:  # nobody saw the end; its log is the last sign
            times = [path.stat().st_mtime for path in logs(self.stage)]
            return max([time - started for time in times], default=None)
        return (datetime.now(UTC).timestamp() if ended is None else ended) - started


def look(chains: Sequence[Chain]) -> list[list[Truth]]:
    """Every stage of every chain, in order; the cluster is asked once."""
    stages = {stage.results_dir: stage for chain in chains for stage in chain.stages}
    told = {folder: state.read(stage.state_file) or {} for folder, stage in stages.items()}
    answer = standing.ask(
        str(one["job_id"]) for one in told.values() if one.get("job_id") and _asks(one)
    )
    known: dict[Path, Truth] = {}
    found = []
    for chain in chains:
        before: Truth | None = None
        row = []
        for stage in chain.stages:
            if stage.results_dir not in known:
                known[stage.results_dir] = _one(stage, told[stage.results_dir], answer, before)
            before = known[stage.results_dir]
            row.append(before)
        found.append(row)
    return found


def _asks(told: dict[str, Any]) -> bool:
    """Whether the cluster may know better: an end that a script has written itself is one."""
    return told.get("state") != "COMPLETED"


def _one(
    stage: Stage, told: dict[str, Any], answer: standing.Answer, before: Truth | None
) -> Truth:
    written = str(told.get("state", "NOT LAUNCHED"))
    if written == "COMPLETED":
        return Truth(stage, written, told=told)
    job = answer.jobs.get(str(told.get("job_id")))
    if job is not None and (job.state in standing.WAITING or written not in state.ENDED):
        return _of_slurm(stage, told, job, before)
    if written == "NOT LAUNCHED":
        return Truth(stage, written, _after(before))
    if written in state.ENDED:
        final = job is not None and not job.live and job.state != "COMPLETED"
        ended = job.state if job is not None and final else written
        return Truth(stage, ended, _why(stage, told, ended, before), told=told)
    if told.get("job_id"):
        return _unknown_to_slurm(stage, told, answer, before)
    return _here(stage, told, before)


def _of_slurm(
    stage: Stage, told: dict[str, Any], job: standing.Standing, before: Truth | None
) -> Truth:
    word = job.state
    if word in standing.WAITING:
        word = "REQUEUED" if told.get("requeues") else "PENDING"
        return Truth(stage, word, _waits(job.reason, before), told=told)
    if word in standing.AT_WORK:
        word = "RUNNING"
        return Truth(stage, word, "" if job.state == word else job.state.lower(), job.nodes, told)
    return Truth(stage, word, _why(stage, told, word, before), job.nodes, told)


def _unknown_to_slurm(
    stage: Stage, told: dict[str, Any], answer: standing.Answer, before: Truth | None
) -> Truth:
    if not answer.reached:
        return Truth(stage, str(told["state"]), "Slurm does not answer: by state.json", told=told)
    if told.get("started") is None:  # tasks that are taken out of an array leave no trace
        gone = before is not None and not (before.live or before.succeeded)
        why = _after(before) if gone else "it left the queue before it began"
        return Truth(stage, "CANCELLED", why, told=told)
    return Truth(stage, "LOST", f"Slurm knows no job {told['job_id']}", told=told)


def _here(stage: Stage, told: dict[str, Any], before: Truth | None) -> Truth:
    """A stage of `interactive` or `bcp`: by the lock of its launcher, or by its process."""
    written, here = str(told["state"]), socket.gethostname()
    if holder := lock.holder(stage.results_dir):
        waits = _after(before) if written == "SUBMITTED" else ""
        return Truth(stage, written, waits, str(holder.get("host")), told)
    if (pid := standing.process_of(stage.script)) is not None:
        return Truth(stage, "RUNNING", f"process {pid}", here, told)
    if written == "SUBMITTED" and before is not None and not before.live and not before.succeeded:
        return Truth(stage, "CANCELLED", _after(before), told=told)
    if written == "SUBMITTED":
        return Truth(stage, "LOST", "its launcher has ended", told=told)
    return Truth(stage, "LOST", f"no process of it on {here}", told=told)


def _waits(reason: str, before: Truth | None) -> str:
    if reason == "Dependency" and before is not None and before.live:
        return f"waits for {before.stage.stage}"
    return reason


def _after(before: Truth | None) -> str:
    """Why a stage has not begun."""
    if before is None or before.succeeded:
        return ""
    if before.live:
        return f"waits for {before.stage.stage}"
    return f"{before.stage.stage} is {before.state}"


def _why(stage: Stage, told: dict[str, Any], ended: str, before: Truth | None) -> str:
    """Why a stage ended as it did: by what it said last, unless a person wanted the end."""
    if told.get("started") is None:
        return "" if before is None or before.live else _after(before)
    if ended == "CANCELLED":
        return ""
    code = told.get("exit_code")
    said = last_error(logs(stage), only_last=code == WRONG_INPUT)
    return ": ".join(filter(None, [f"exit code {code}" if code else "", said]))


def logs(stage: Stage) -> list[Path]:
    """The logs of a stage's last run: one, or Slurm's two, output first."""
    found = sorted(
        stage.results_dir.glob(f"log-{_escaped(stage.job_name)}_*"),
        key=lambda path: path.stat().st_mtime,
    )
    if not found:
        return []
    newest = found[-1]
    return [path for end in (".out", ".err") if (path := newest.with_suffix(end)).exists()]


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def last_error(paths: Iterable[Path], only_last: bool = False) -> str:
    """The last line that tells of an error, or else the last line; of errors' logs first."""
    for path in sorted(paths, key=lambda path: path.suffix != ".err"):
        lines = [line for line in tail(path) if line.strip()]
        own = [line for line in lines if not ECHO.match(line)] or lines
        errors = [line for line in own if ERROR.search(line) and not only_last]
        if errors or own:
            return (errors or own)[-1].strip()
    return ""


def tail(path: Path) -> list[str]:
    """The last lines of a log, without control codes."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, path.stat().st_size - TAIL))
            data = log.read()
    except OSError:
        return []
    lines = re.split(rb"\r?\n|\r", data)
    return [CONTROL.sub(b"", line).decode("utf-8", "replace") for line in lines]


def progress(stage: Stage) -> dict[str, Any]:
    """What the stage last told of itself (`progress.json`); empty where it told nothing."""
    return state.read(stage.log_dir / "progress.json") or {}


def best_loss(stage: Stage) -> float | None:
    """The lowest validation loss of a stage that learns, by its progress or its summary."""
    values = [
        progress(stage).get("best_val_loss"),
        (state.read(stage.log_dir / "summary.json") or {}).get("val_loss"),
    ]
    return next((float(v) for v in values if isinstance(v, int | float)), None)


def _time(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
