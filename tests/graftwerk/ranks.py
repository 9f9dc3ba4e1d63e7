"""Processes of a run that start at once: forked by a server that has imported everything.

They can be patched first, by functions of a module. (Forking the test's own process would not do:
once it has trained, torch's threads are missing in the copy.)
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from torch.multiprocessing.spawn import start_processes

from graftwerk.__main__ import guarded

OUTSIDE = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.graftwerk.preload"])
ROOT = Path(__file__).resolve().parent.parent.parent


class Rank:
    """A process of a run; `said` and `complained` are its output."""

    def __init__(self, rank: int, folder: Path, *args):
        self.files = [folder / f"rank{rank}.{kind}" for kind in ("out", "err")]
        _serve()
        self.process = FORKS.Process(target=_main, args=(rank, self.files, *args))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def said(self) -> str:
        return self.files[0].read_text() if self.files[0].exists() else ""

    @property
    def complained(self) -> str:
        return self.files[1].read_text() if self.files[1].exists() else ""

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 60) -> int:
        """The exit code, 128 + n after signal n; fails where it takes longer."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running: {self.said}{self.complained}")
        return code if code >= 0 else 128 - code

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Waits until it has said something."""
        until = time.monotonic() + seconds
        while words not in self.said:
            assert time.monotonic() < until, f"never said {words!r}: {self.said}{self.complained}"
            time.sleep(0.01)


def _serve() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
        ensure_running()


def on_processes(count: int, work: Callable[..., None], *args: Any) -> None:
    """`work(rank, *args)`, a function of a module, in each of `count` processes, to its end."""
    _serve()
    start_processes(work, args, nprocs=count, start_method="forkserver")


def torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start_stage(
    cfg: DictConfig,
    folder: Path,
    size: int = 1,
    patch: Callable[[int], None] | None = None,
    stage: str = "adapter_learning",
    starter: Callable[[int, int, int], dict[str, str]] = torchrun,
) -> list[Rank]:
    """A stage as `python3 -m graftwerk` runs it, in `size` processes, each patched first.

    `starter(rank, size, port)` is what the program that starts several tells each of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "job_hydra.yaml"
    OmegaConf.save(cfg, config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [stage, str(config)]
    told = [starter(rank, size, port) if size > 1 else {} for rank in range(size)]
    return [Rank(rank, folder, told[rank], patch, argv) for rank in range(size)]


def _main(rank, files, environment, patch, argv) -> None:
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for name in [name for name in os.environ if name.startswith(OUTSIDE)]:
        del os.environ[name]
    os.environ.update(environment)
    faulthandler.dump_traceback_later(50, file=sys.stderr)  # where it hangs
    code = 1
    try:
        if patch is not None:
            patch(rank)
        code = guarded(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
