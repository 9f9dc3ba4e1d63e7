"""`state.json`: how a job stands, also where the cluster keeps no accounts."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher_scripts.job import Job

ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def now() -> str:
    """ISO 8601 in UTC, to the second, as the scripts' `date` writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read(path: Path) -> dict[str, Any] | None:
    """The content of a state file; None where there is none, or none that we wrote."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.chmod(mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One launcher at a time; the lock is the folder's own and leaves no file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: the rename has to do
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def submitted(job: Job) -> dict[str, Any]:
    """Say that a job is about to be handed over; its script reads the time from here."""
    state = {
        "stage": job.stage,
        "job_name": job.name,
        "job_id": None,
        "state": "SUBMITTED",
        "exit_code": None,
        "submitted": now(),
        "started": None,
        "ended": None,
        "requeues": 0,
    }
    write_atomically(job.state_file, _line(state))
    return state


def accepted(job: Job, state: dict[str, Any], job_id: str) -> None:
    """Add the id that the cluster gave. A job that runs already has written its own by now.

    The file is taken away and put back only where none has come in between, so that a script
    that starts at this very moment is not overwritten.
    """
    taken = job.state_file.with_name(f".state.json.taken.{os.getpid()}")
    try:
        job.state_file.replace(taken)
    except FileNotFoundError:
        return
    if read(taken) == state:
        write_atomically(taken, _line({**state, "job_id": job_id}))
    try:
        os.link(taken, job.state_file)
    except FileExistsError:
        pass  # the script's word is newer
    finally:
        taken.unlink()


def failed(job: Job, exit_code: int) -> None:
    """Close the state of a job whose script was killed before it could do so itself."""
    state = read(job.state_file) or {"stage": job.stage, "job_name": job.name, "job_id": None}
    if state.get("state") in ENDED:
        return
    times = {"submitted": state.get("submitted"), "started": state.get("started"), "ended": now()}
    write_atomically(
        job.state_file, _line({**state, "state": "FAILED", "exit_code": exit_code, **times})
    )


def cancelled(path: Path) -> None:
    """Say in a state file that its job was taken back; an end that is written already stands."""
    state = read(path)
    if state is None or state.get("state") in ENDED:
        return
    write_atomically(path, _line({**state, "state": "CANCELLED", "ended": now()}))


def _line(state: dict[str, Any]) -> str:
    return json.dumps(state) + "\n"
