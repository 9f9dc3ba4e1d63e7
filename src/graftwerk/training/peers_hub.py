"""Rank zero's end of the connections between the processes of a run."""

import json
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from graftwerk.errors import Exit

SILENT = 30  # seconds after which a host that does not answer is taken for dead
JOINING = 600  # seconds in which all processes have to come up
GATHERED = 1.0  # seconds in which several losses are one: a node has many processes
LONGEST = 1 << 16  # bytes of a message


class Connection:
    """Messages, as lines of JSON, over a socket whose other end is watched by the kernel."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw, self.pending = raw, b""
        raw.settimeout(5.0)  # of a message of some bytes
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        asks = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": (SILENT - 10) // 5}
        for name, value in {**asks, "TCP_USER_TIMEOUT": SILENT * 1000}.items():
            if hasattr(socket, name):  # macOS has others
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        self.raw.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """What has come; None: the other end is gone, or is none of ours."""
        try:
            data = self.raw.recv(LONGEST)
            *lines, self.pending = (self.pending + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if data and len(self.pending) < LONGEST else None


class Hub:
    """Hears from every process, and tells all others. Ends when all have come and gone.

    `port` is where it listens, `token` what a process has to say to be heard.
    """

    def __init__(self, host: str, size: int) -> None:
        self.size, self.token = size, secrets.token_hex(16)
        inside = host == "localhost" or host.startswith("127.")
        if inside or not socket.has_dualstack_ipv6():
            self.listener = socket.create_server(("127.0.0.1" if inside else "", 0), backlog=size)
        else:
            self.listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=size
            )
        self.port: int = self.listener.getsockname()[1]
        self.hosts: dict[int, str] = {}  # of all that have ever come
        self.open: dict[int, Connection] = {}
        self.lost: list[int] = []
        self.judged_at = time.monotonic() + JOINING
        self.verdict: dict[str, Any] | None = None
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self._serve, name="peers-hub", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while len(self.hosts) < self.size or self.open:
            for key, _ in self.selector.select(0.2):
                if key.fileobj is self.listener:
                    raw, _ = self.listener.accept()
                    connection = Connection(raw)
                    self.selector.register(raw, selectors.EVENT_READ, connection)
                else:
                    self._hear(key.data)
            if time.monotonic() > self.judged_at:
                self._judge()
        self.listener.close()

    def _hear(self, connection: Connection) -> None:
        rank = next((rank for rank, other in self.open.items() if other is connection), None)
        messages = connection.read()
        try:
            for message in messages or ():
                if rank is None:
                    rank = self._greet(connection, message)
                elif "bye" in message:
                    self._drop(connection, rank)
                    return
                else:
                    self._pass_on(connection, rank, message)
        except (KeyError, TypeError, ValueError):  # a stranger
            messages = None
        if messages is None:
            self._drop(connection, rank)
            if rank is not None and self.verdict is None:
                self.lost.append(rank)
                self.judged_at = min(self.judged_at, time.monotonic() + GATHERED)

    def _greet(self, connection: Connection, message: dict[str, Any]) -> int:
        rank = int(message["hello"])
        if not secrets.compare_digest(str(message["token"]), self.token) or rank in self.hosts:
            raise ValueError("a stranger")
        self.hosts[rank], self.open[rank] = str(message["host"]), connection
        if len(self.hosts) == self.size:
            self.judged_at = float("inf") if not self.lost else self.judged_at
            self._tell_all(hosts=[self.hosts[rank] for rank in range(self.size)])
        if self.verdict is not None:
            self._tell(connection, **self.verdict)
        return rank

    def _pass_on(self, connection: Connection, rank: int, message: dict[str, Any]) -> None:
        if "stop" in message:
            self._tell_all(but=rank, stop=message["stop"])
        if "failed" in message:
            # Where one is gone already, that is the cause.
            first = self.verdict is None and not self.lost
            if first:
                self.verdict = {"end": int(message["failed"]), "say": ""}
                self._tell_all(but=rank, **self.verdict)
            self._tell(connection, first=first)

    def _judge(self) -> None:
        self.judged_at = float("inf")
        if self.verdict is not None:
            return
        if self.lost:
            host = self.hosts[self.lost[0]]
            there = sorted(rank for rank in self.lost if self.hosts[rank] == host)
        else:
            host, there = "a host unknown", sorted(set(range(self.size)) - set(self.hosts))
        self.verdict = {"end": Exit.LOST_PEER, "say": ""}
        speaker = min(self.open, default=0)
        for rank in sorted(self.open, reverse=True):  # rank zero last: where it ends, this does
            say = lost(there, host) if rank == speaker else ""
            self._tell(self.open[rank], end=Exit.LOST_PEER, say=say)

    def _tell_all(self, but: int | None = None, **message: Any) -> None:
        for rank in sorted(self.open, reverse=True):
            if rank != but:
                self._tell(self.open[rank], **message)

    @staticmethod
    def _tell(connection: Connection, **message: Any) -> None:
        with suppress(OSError):  # its end will be read
            connection.send(**message)

    def _drop(self, connection: Connection, rank: int | None) -> None:
        self.selector.unregister(connection.raw)
        connection.raw.close()
        if rank is not None:
            del self.open[rank]


def lost(ranks: list[int], host: str) -> str:
    """The line about processes that have vanished."""
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return (
        f"{who} on {host} {'is' if len(ranks) == 1 else 'are'} gone, killed or with the host: all "
        f"processes end; start again to go on from the last checkpoint"
    )
