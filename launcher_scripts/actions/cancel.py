"""`action=cancel`: end a chain, the last stage first, so that nothing starts in between."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from launcher_scripts import lock, standing, state
from launcher_scripts.actions import Request, find, truth
from launcher_scripts.actions.truth import Truth
from launcher_scripts.notices import Mistakes

GRACE = 15  # seconds for jobs of Slurm to leave; they do so by themselves
PATIENCE = 180  # seconds for processes of this machine, which may write a checkpoint first


def run(asked: Request) -> int:
    """Cancel what is queued or runs; returns 0, or 1 where something could not be ended."""
    launch = find.launch(asked)
    rows = truth.look(launch.chains)
    others = find.others(launch)  # points of the same sweep that go on, with what they share
    live = {one.stage.results_dir: one for row in rows for one in row if one.live}
    live = {folder: one for folder, one in live.items() if folder not in others}
    # The last stages first, over all points: no task starts because the one before it ended.
    order = sorted(live.values(), key=lambda one: -_place(rows, one))
    if not order:
        print("nothing to cancel: no stage is queued or running")
        return 0
    queued = [one for one in order if one.job_id and launch.cluster_type == "bcm"]
    here = [one for one in order if one not in queued]
    problems = _scancel(queued) if queued else []
    problems += _end(here, bool(others)) if here else []
    for one in order:
        if not any(line.startswith(f"{one.stage.job_name}:") for line in problems):
            print(f"cancelled {one.stage.job_name}" + (f" (job {one.job_id})" * bool(one.job_id)))
    print(*problems, sep="\n" if problems else "", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


def _place(rows: Sequence[Sequence[Truth]], one: Truth) -> int:
    return max(row.index(one) for row in rows if one in row)


# -- Slurm


def _scancel(jobs: Sequence[Truth]) -> list[str]:
    """Cancel by id; what never began is CANCELLED at once, the rest as soon as it has ended."""
    problems = []
    by_place: dict[str, list[Truth]] = {}
    for one in jobs:
        by_place.setdefault(one.stage.stage, []).append(one)
    for several in by_place.values():
        ids = [str(one.job_id) for one in several]
        try:
            done = subprocess.run(["scancel", *ids], capture_output=True, text=True)
            error = done.stderr.strip() if done.returncode else ""
        except OSError as missing:
            error = str(missing)
        if error and not re.search("already complet|Invalid job id", error):
            reason = " ".join(error.split())
            problems += [f"{one.stage.job_name}: scancel {one.job_id}: {reason}" for one in several]
    _wait(jobs, GRACE)
    for one in jobs:
        state.cancelled(one.stage.state_file)
    return problems


def _wait(jobs: Sequence[Truth], seconds: float) -> None:
    until = time.monotonic() + seconds
    pause = 0.2
    while time.monotonic() < until:
        answer = standing.ask(str(one.job_id) for one in jobs)
        if not any(answer.jobs[i].live for one in jobs if (i := str(one.job_id)) in answer.jobs):
            return
        time.sleep(pause)
        pause = min(2 * pause, 2)


# -- this machine


def _end(stages: Sequence[Truth], part: bool) -> list[str]:
    """End the launcher, which ends its stage and starts no other; or the stage's script alone."""
    here = socket.gethostname()
    locks = {one.stage.results_dir: lock.holder(one.stage.results_dir) or {} for one in stages}
    elsewhere = sorted({str(lk["host"]) for lk in locks.values() if lk and lk["host"] != here})
    if elsewhere:
        raise Mistakes([f"it runs on {', '.join(elsewhere)}: cancel it there"])
    pids = {int(one["pid"]) for one in locks.values() if one} if not part else set()
    for one in stages:
        if part:
            lock.mark_cancelled(one.stage.results_dir)
        if (part or not locks[one.stage.results_dir]) and (
            pid := standing.process_of(one.stage.script)
        ):
            pids.add(pid)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and any(standing.alive(pid) for pid in pids):
        time.sleep(0.1)
    for one in stages:
        state.cancelled(one.stage.state_file)
    left = [pid for pid in pids if standing.alive(pid)]
    return [f"process {pid} on {here} has not ended; kill -9 {pid} would end it" for pid in left]
