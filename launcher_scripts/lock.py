"""`lock.json`: who works in a results folder, so that two launches never do at a time.

A launcher holds the folders of its whole chain as long as it runs: through a submission to Slurm,
or until the last stage has ended where it runs them itself. From a submission on, the job in the
queue holds the folder; its id is in `state.json`. A lock whose holder is gone is taken over; a
script that has outlived its launcher, or was started by hand, is found among the processes.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher_scripts import standing, state
from launcher_scripts.job import Job, LaunchError

BEAT = 30  # seconds between two signs of life, for those who look from another machine
SILENCE = 300  # seconds without one, after which a holder on another machine counts as gone


def path_of(results_dir: Path) -> Path:
    return results_dir / "lock.json"


def holder(results_dir: Path) -> dict[str, Any] | None:
    """The lock of a folder, if its holder lives."""
    lock = state.read(path_of(results_dir))
    return lock if lock is not None and _lives(lock, path_of(results_dir)) else None


def _lives(lock: dict[str, Any], path: Path) -> bool:
    if lock.get("host") != socket.gethostname():
        try:
            return time.time() - path.stat().st_mtime < SILENCE
        except OSError:
            return False
    try:
        taken = datetime.fromisoformat(str(lock["time"])).timestamp()
        return standing.alive(int(lock["pid"]), taken)
    except (KeyError, TypeError, ValueError):
        return False  # none that we wrote


def told(lock: dict[str, Any]) -> str:
    """The holder, in words."""
    return (
        f"{lock.get('job_name')} (process {lock.get('pid')} on {lock.get('host')}, "
        f"since {lock.get('time')})"
    )


def occupied(jobs: Sequence[Job]) -> list[str]:
    """A line for each folder in which another launch works, or has a job in the queue."""
    found, queued = [], []
    for job in jobs:
        earlier = state.read(job.state_file) or {}
        if lock := holder(job.results_dir):
            found.append(_refusal(job, told(lock)))
        elif earlier.get("state", "COMPLETED") == "COMPLETED":
            continue
        elif earlier.get("job_id"):
            queued.append((job, earlier))
        elif (
            earlier["state"] not in state.ENDED
            and (pid := standing.process_of(job.script)) is not None
        ):
            found.append(_refusal(job, f"{job.name} (process {pid} on {socket.gethostname()})"))
    answer = standing.ask(str(earlier["job_id"]) for _, earlier in queued)
    for job, earlier in queued:
        now = answer.jobs.get(str(earlier["job_id"]))
        # One whose script has ended may be in the queue again, by hand, or on its way out.
        ended = earlier["state"] in state.ENDED
        if now is not None and (now.state in standing.WAITING if ended else now.live):
            on = f" on {now.nodes}" if now.nodes else ""
            since = earlier.get("submitted")
            who = f"job {earlier['job_id']} ({now.state}{on}, submitted {since})"
            found.append(_refusal(job, who))
    return found


def _refusal(job: Job, who: str) -> str:
    return (
        f"{job.stage}.run.results_dir: {who} of an earlier launch works in {job.results_dir}: "
        f"wait for it, end it with action=cancel results={job.results_dir}, or set another "
        "results_dir"
    )


@contextmanager
def hold(jobs: Sequence[Job]) -> Iterator[None]:
    """Hold the folders of `jobs`, which are made, against every other launch.

    Raises:
        LaunchError: another launch has come in between; what was taken is given back.
    """
    own = {"host": socket.gethostname(), "pid": os.getpid()}
    taken: list[Path] = []
    over = threading.Event()
    try:
        for job in jobs:
            lock = {"job_name": job.name, "job_id": None, **own, "time": state.now()}
            try:
                job.results_dir.mkdir(parents=True, exist_ok=True)
                _take(path_of(job.results_dir), lock, job)
            except OSError as error:
                raise LaunchError(
                    f"{job.stage}.run.results_dir: cannot write to {job.results_dir}: "
                    f"{error.strerror}"
                ) from None
            taken.append(path_of(job.results_dir))
        threading.Thread(target=_beat, args=(taken, over), daemon=True).start()
        yield
    finally:
        over.set()
        for path in reversed(taken):
            lock = state.read(path) or {}
            if all(lock.get(key) == own[key] for key in own):
                path.unlink(missing_ok=True)


def _take(path: Path, lock: dict[str, Any], job: Job) -> None:
    """Put the lock where there is none, or where the one there is stale."""
    with state.alone(path.parent):
        there = state.read(path)
        if there is not None and _lives(there, path):
            raise LaunchError(_refusal(job, told(there)))
        state.write_atomically(path, json.dumps(lock) + "\n")


def _beat(paths: list[Path], over: threading.Event) -> None:
    while not over.wait(BEAT):
        for path in paths:
            with suppress(OSError):
                os.utime(path)


def mark_cancelled(results_dir: Path) -> None:
    """Tell a launcher that this job alone was cancelled, and not what it runs after it."""
    lock = state.read(path_of(results_dir))
    if lock is not None:
        text = json.dumps({**lock, "cancelled": True}) + "\n"
        state.write_atomically(path_of(results_dir), text)


def was_cancelled(results_dir: Path) -> bool:
    return bool((state.read(path_of(results_dir)) or {}).get("cancelled"))
