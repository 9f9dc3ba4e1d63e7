"""The processes of one run know of each other: who is gone, who failed first, who has to stop.

Collectives cannot tell: where a process is killed the others hang in them or fail with an error
that names an address. So each process holds a connection to rank zero. The kernel closes it when
the process dies, and gives it up half a minute after its host went silent, however busy Python is.
Rank zero tells the others, one of which says it, and all end.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from _thread import interrupt_main
from contextlib import suppress
from datetime import timedelta
from itertools import count
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import torch
import torch.distributed as dist

from graftwerk.errors import Ended, Exit, UserError, is_storage, one_line
from graftwerk.training.peers_hub import JOINING, SILENT, Connection, Hub, lost
from graftwerk.training.stopping import Interrupted, Stop
from graftwerk.training.world import World

MEETINGS = count()  # of this process; those of all have the same number
GRACE = 10.0  # seconds that a process has to end by itself once another one has failed


class Peers:
    """This process among those of a run; within its `with` they share their ends.

    An exception ends all processes with its exit code, and only the first to fail says why: the
    others leave with `Ended`. Where one has vanished, the code is
    `Exit.LOST_PEER`. Signals are noted in
    `world.stop` meanwhile, and passed on. A process alone has its signals to look after, no more.
    """

    def __init__(self, world: World) -> None:
        self.world, self.stop = world, world.stop
        self.hub: Hub | None = None
        self.link: Link | None = None

    def __enter__(self) -> "Peers":
        self.stop.__enter__()
        try:
            if self.world.size > 1:
                self._join()
        except BaseException:
            self.stop.__exit__()
            raise
        return self

    def _join(self) -> None:
        environment, rank = self.world.environment, self.world.rank
        # Not every build of torch has them, and torch.distributed does not export them.
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        assert environment is not None
        host, port = environment.main_address, environment.main_port
        # One server for this and for torch's process group: `multi_tenant`. torchrun has its own.
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        patience = timedelta(seconds=JOINING)
        try:
            self.server = TCPStore(
                host, port, None, serves, patience, wait_for_workers=False, multi_tenant=True
            )
            store = PrefixStore(f"graftwerk/peers/{attempt}/{next(MEETINGS)}", self.server)
            if rank == 0:
                self.hub = Hub(host, self.world.size)
                store.set("hub", f"{self.hub.port} {self.hub.token}")
            place, token = store.get("hub").decode().split()
            self.link = Link(rank, (host, int(place)), token, self.stop)
        except (dist.DistError, OSError) as error:
            words = str(error).partition("\n")[0]
            print(f"error: rank {rank} finds no rank 0 at {host}: {words}", file=sys.stderr)
            raise Ended(Exit.LOST_PEER) from None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if self.link is not None:
                self._leave(self.link, error)
        finally:
            self.stop.__exit__()

    def _leave(self, link: "Link", error: BaseException | None) -> None:
        if error is None or isinstance(error, Interrupted):
            if error is None and dist.is_initialized():
                dist.barrier()  # rank zero may be writing still; a loss meanwhile is noticed
            self._close(link)
            return
        code = Exit.WRONG_INPUT if isinstance(error, UserError) else Exit.FAILED
        if of_collective(error):  # another process is at fault, and is going to be named
            link.ended.wait(GRACE / 2 if self.stop.reason else SILENT + GRACE)
            # Who was told to stop before there was anything to save has left without more ado.
            code = Exit.REQUEUE if self.stop.reason else Exit.FAILED
        if link.fail(code) and code != Exit.REQUEUE:
            print(self._words(error), file=sys.stderr, flush=True)
        self._close(link)
        raise Ended(link.code or code) from None

    def _words(self, error: BaseException) -> str:
        if isinstance(error, UserError) or is_storage(error):
            return one_line(error)
        lines = "".join(traceback.format_exception(error)).rstrip()
        return f"rank {self.world.rank} on {socket.gethostname()} failed:\n{lines}"

    def _close(self, link: "Link") -> None:
        link.close()
        if self.hub is not None:  # who comes late has to hear of the end too
            self.hub.thread.join(SILENT + GRACE)


def any_of(flag: bool, world: World) -> bool:
    """Whether the flag is set in any process of the run; all of them have to ask."""
    if world.size == 1:
        return flag
    asked = torch.tensor([float(flag)])  # on the CPU: nothing waits for a device
    dist.all_reduce(asked, group=_control())
    return bool(asked)


def _control() -> Any:
    """A group whose collectives take tensors of the CPU; all processes make it together."""
    if dist.get_backend() == "gloo":
        return None
    world: Any = dist.group.WORLD  # which owns it: a later world has one of its own
    if not hasattr(world, "graftwerk_control"):
        world.graftwerk_control = dist.new_group(backend="gloo")
    return world.graftwerk_control


def of_collective(error: BaseException) -> bool:
    """Whether an exception is what a collective makes of another process's end."""
    words = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in words or "NCCL" in words)
    )


class Link:
    """A process's connection to rank zero, and the thread that obeys what comes over it."""

    def __init__(self, rank: int, address: tuple[str, int], token: str, stop: Stop) -> None:
        self.rank, self.stop = rank, stop
        self.code: int | None = None  # with which all end, once it is known
        self.ended, self.answered = threading.Event(), threading.Event()
        self.first = self.closing = self.told = False
        self.hosts: list[str] = []
        self.until = float("inf")  # when this process is ended, where it does not end by itself
        self.lock = threading.Lock()
        raw = socket.create_connection(address, JOINING)
        self.connection = Connection(raw)
        self.connection.send(hello=rank, host=socket.gethostname(), token=token)
        self.thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self.thread.start()

    def fail(self, code: int) -> bool:
        """Tells of this process's failure; whether it is the first."""
        self._send(failed=code)
        self.answered.wait(GRACE)
        return self.first

    def close(self) -> None:
        """Leaves, so that this process's end is no loss."""
        self.closing = True
        self._pass_on()
        self._send(bye=self.rank)
        self.thread.join(GRACE)

    def _send(self, **message: Any) -> None:
        with self.lock, suppress(OSError):  # rank zero is gone: the thread sees to that
            self.connection.send(**message)

    def _pass_on(self) -> None:
        if self.stop.reason is not None and not self.told:
            self.told = True
            self._send(stop=f"{self.stop.reason} of rank {self.rank}")

    def _listen(self) -> None:
        selector = DefaultSelector()  # select() would know of the first 1024 files alone
        selector.register(self.connection.raw, EVENT_READ)
        while True:
            self._pass_on()
            if time.monotonic() > self.until:
                self._end_late()
            if not selector.select(0.2):
                continue
            messages = self.connection.read()
            if messages is None:
                if not self.closing:
                    self._without_hub()
                return
            for message in messages:
                self._obey(message)

    def _obey(self, message: dict[str, Any]) -> None:
        if "hosts" in message:
            self.hosts = message["hosts"]
        if "first" in message:
            self.first = message["first"]
            self.answered.set()
        if "stop" in message:
            self.stop.ask(message["stop"])
            self.told = True
            if not self.stop.polled:
                self.until = time.monotonic() + GRACE  # it may wait for one that has left
                interrupt_main(signal.SIGUSR2)
        if "end" in message:
            self.code = message["end"]
            self.ended.set()
            if self.code == Exit.LOST_PEER:
                end_now(self.code, message["say"])
            self.until = time.monotonic() + GRACE

    def _end_late(self) -> None:
        if self.code is None and self.stop.polled:  # it has begun, and will stop by itself
            self.until = float("inf")
            return
        end_now(Exit.REQUEUE if self.code is None else self.code, "")

    def _without_hub(self) -> None:
        """Rank zero is gone, and nobody is left to choose who says it: the first of each side."""
        host = self.hosts[0] if self.hosts else "its host"
        away = next((rank for rank, other in enumerate(self.hosts) if other != host), 1)
        end_now(Exit.LOST_PEER, lost([0], host) if self.rank in (1, away) else "")


def end_now(code: int, say: str) -> None:
    """Ends this process from a thread, whatever its main thread hangs in."""
    if say:
        print(say, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
