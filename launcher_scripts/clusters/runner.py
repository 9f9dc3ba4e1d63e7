"""Runs job scripts here, one after the other: output streamed, signals passed on, nothing left."""

import os
import re
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import IO

from launcher_scripts import state
from launcher_scripts.job import Job

# What a terminal obeys and a file should not hold: CSI and OSC sequences, other escapes, and
# control characters besides tab and newline.
CONTROL = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b.|[\x00-\x08\x0b-\x1f\x7f]"
)
PATIENCE = 10  # seconds that a script has for itself, besides those for its processes
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # the processes checkpoint and end, and so does the job


def run_chain(jobs: list[Job]) -> int:
    """Run the scripts in order up to the first failure; returns its exit code, or 0."""
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.stage}: {job.name}", flush=True)
        state.submitted(job)
        code = run_script(job, max(job.signal_seconds, 20) + PATIENCE)
        if code:
            state.failed(job, code)
            left = ", ".join(later.stage for later in jobs[number:])
            after = f"; not run: {left}" if left else ""
            message = f"{job.stage} failed with exit code {code}, log in {job.results_dir}{after}"
            print(message, file=sys.stderr, flush=True)
            return code
    return 0


def run_script(job: Job, patience: int) -> int:
    """Run one script in a session of its own; returns its exit code (128 + n after signal n).

    INT, TERM and HUP go to the script, which ends its processes and writes its state; a second
    one, or `patience` seconds, ends them all. USR1 and USR2 only go to the script.
    """
    process = subprocess.Popen(
        ["bash", str(job.script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=copy_output, args=(process.stdout,), daemon=True)
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            signal.alarm(patience)
        else:
            _kill_session(process)

    def warn(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.signal(number, forward) for number in signals}
    before |= {number: signal.signal(number, warn) for number in WARNINGS}
    try:
        reader.start()
        code = process.wait()
        if code < 0:  # killed, so it ended none of its processes
            _kill_session(process)
        reader.join(timeout=5)  # `tee` ends with the last writer; a stray one must not hold us
    finally:
        signal.alarm(0)
        _kill_session(process)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def copy_output(source: IO[bytes]) -> None:
    """Copy a job's output to standard output as it comes, and keep reading if that is closed.

    Where standard output is no terminal, control codes are taken out and a carriage return, by
    which a progress bar rewrites its line, starts a new line.
    """
    terminal = sys.stdout.isatty()
    target: IO[bytes] | None = sys.stdout.buffer
    pending = b""
    while chunk := source.read1(65536):  # type: ignore[attr-defined]
        if not terminal:
            *lines, pending = re.split(rb"\r?\n|\r(?!\Z)", pending + chunk)
            chunk = b"".join(CONTROL.sub(b"", line) + b"\n" for line in lines)
        target = _write(target, chunk)
    if pending:
        _write(target, CONTROL.sub(b"", pending) + b"\n")


def _write(target: IO[bytes] | None, data: bytes) -> IO[bytes] | None:
    if target is None:
        return None
    try:
        target.write(data)
        target.flush()
    except BrokenPipeError:  # nobody reads on; the job and its log go on
        return None
    return target


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """End what the script may have left in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
