"""How jobs stand by the word of Slurm, and processes by that of this machine."""

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# States of a job that is still to run, runs, or is about to run again.
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
AT_WORK = {"CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
LIVE = WAITING | AT_WORK | {"STAGE_OUT"}
PATIENCE = 60  # seconds for one question; a loaded controller takes some


@dataclass(frozen=True)
class Standing:
    """One job, or one task of an array."""

    state: str  # Slurm's word, in capitals
    reason: str = ""  # why it waits
    nodes: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE


@dataclass
class Answer:
    """What Slurm said. An id that is not in `jobs` is unknown to it, if it was `reached`."""

    jobs: dict[str, Standing] = field(default_factory=dict)
    reached: bool = False


def ask(ids: Iterable[str]) -> Answer:
    """Ask the controller, and the accounts for what it has forgotten; one call each.

    Ids are `12`, or `12_3` for a task of an array. Where neither `squeue` nor `sacct` can be run,
    the answer is empty and not `reached`.
    """
    wanted = set(ids)
    answer = Answer()
    if wanted:
        _controller(answer, wanted)
    if unknown := wanted - set(answer.jobs):
        _accounts(answer, unknown)
    return answer


def _controller(answer: Answer, ids: set[str]) -> None:
    words = ["--noheader", "--array", "--states=all", "--format=%i|%A|%T|%N|%r", _jobs(ids)]
    code, out, err = _run(["squeue", *words])
    answer.reached |= code == 0 or "Invalid job id" in err
    for line in out.splitlines() if code == 0 else []:
        shown, raw, state, nodes, reason = [*line.strip().split("|", 4), "", "", "", ""][:5]
        standing = Standing(state, "" if reason == "None" else reason, nodes)
        answer.jobs[shown] = standing
        answer.jobs.setdefault(raw, standing)


def _accounts(answer: Answer, ids: set[str]) -> None:
    fields = "--format=JobID,JobIDRaw,State,NodeList"
    code, out, _ = _run(["sacct", "--parsable2", "--allocations", fields, _jobs(ids)])
    if code != 0:  # no accounts are kept
        return
    answer.reached = True
    header, *lines = [line.split("|") for line in out.splitlines()] or [[]]
    for line in lines:
        row = dict(zip(header, line, strict=False))
        state = row.get("State", "").split(" ")[0]  # CANCELLED by 1000
        nodes = row.get("NodeList", "")
        standing = Standing(state, nodes="" if nodes == "None assigned" else nodes)
        for name in [*_tasks(row.get("JobID", "")), row.get("JobIDRaw", "")]:
            answer.jobs.setdefault(name, standing)


def _tasks(name: str) -> list[str]:
    """The ids behind one of the accounts': `12_[0-2,7%4]` is tasks that never left the array."""
    lump = re.fullmatch(r"(\d+)_\[([\d,-]+).*\]", name)
    if lump is None:
        return [name]
    ends = [part.partition("-") for part in lump[2].split(",")]
    return [
        f"{lump[1]}_{task}"
        for first, _, last in ends
        for task in range(int(first), int(last or first) + 1)
    ]


def _jobs(ids: set[str]) -> str:
    return "--jobs=" + ",".join(sorted({name.split("_")[0] for name in ids}))


def _run(argv: list[str]) -> tuple[int, str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, "", str(error)
    return done.returncode, done.stdout, done.stderr


def alive(pid: int, since: float | None = None) -> bool:
    """Whether a process of this machine runs; one that began after `since` is another one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, for somebody else
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/stat").read_text(encoding="utf-8").split("btime ")[1].split()[0]
    except (OSError, IndexError):
        return True  # no Linux; the number has to do
    fields = text.rpartition(")")[2].split()
    begun = int(boot) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return fields[0] not in "ZX" and (since is None or begun <= since + 2)


def process_of(script: Path) -> int | None:
    """The process of this machine that runs a job's script, also one started by hand."""
    name, found = os.fsencode(script), {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if name in words and os.path.basename(words[0]) == b"bash":
                found[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
        except OSError:
            continue  # it ended just now, or is not ours to look at
    # Its subshells have the same words.
    return next((pid for pid, parent in found.items() if parent not in found), None)
