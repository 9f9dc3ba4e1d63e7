"""A process that dies ends the others, which say whose end it was; so does one that fails."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from graftwerk.checkpoints.resume import read_checkpoint
from graftwerk.errors import Exit
from graftwerk.training.module import LearningModule
from graftwerk.training.peers import Peers
from graftwerk.training.peers_hub import Connection, Hub
from graftwerk.training.stopping import Stop
from graftwerk.training.world import World
from tests.graftwerk.ranks import start_stage

HOST = socket.gethostname()


@pytest.fixture
def two(cfg):
    """The stage for two processes."""
    cfg.trainer.devices = 2
    cfg.model.micro_batch_size = 1
    return cfg


def slow_steps(rank):
    """Steps that leave time to be killed in; rank zero hangs where no Python runs."""
    whole = LearningModule.training_step

    def slowly(self, batch, batch_idx):
        time.sleep(0.2)
        return whole(self, batch, batch_idx)

    LearningModule.training_step = slowly


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_the_other_which_ends_with_76(victim, two, tmp_path):
    ranks = start_stage(two, tmp_path, 2, slow_steps)
    ranks[0].wait_for("step 4/12")
    ranks[victim].send(signal.SIGKILL)
    killed = time.monotonic()
    other = ranks[1 - victim]
    assert other.wait() == Exit.LOST_PEER
    assert time.monotonic() - killed < 20
    assert other.complained == (
        f"rank {victim} on {HOST} is gone, killed or with the host: all processes end; start "
        f"again to go on from the last checkpoint\n"
    )
    last = Path(two.exp_manager.explicit_log_dir) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 3


def wait_elsewhere(rank):
    """Rank zero hangs in a receive, as in a collective that nothing ends; rank one is killed."""

    def hanging(self, batch, batch_idx):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        one, _other = socket.socketpair()
        one.recv(1)

    LearningModule.training_step = hanging


def test_a_process_that_hangs_is_ended_too(two, tmp_path):
    first, second = start_stage(two, tmp_path, 2, wait_elsewhere)
    assert (first.wait(), second.wait()) == (Exit.LOST_PEER, 128 + signal.SIGKILL)
    assert first.complained.startswith(f"rank 1 on {HOST} is gone")


def fail_in_rank_1(rank):
    whole = LearningModule.training_step

    def failing(self, batch, batch_idx):
        if rank == 1 and self.global_step == 2:
            raise ValueError("rank one's own")
        return whole(self, batch, batch_idx)

    LearningModule.training_step = failing


def test_an_error_of_one_process_ends_both_and_only_its_traceback_is_seen(two, tmp_path):
    first, second = start_stage(two, tmp_path, 2, fail_in_rank_1)
    assert (first.wait(), second.wait()) == (1, 1)
    assert first.complained == ""
    assert second.complained.startswith(f"rank 1 on {HOST} failed:\nTraceback")
    assert second.complained.endswith("ValueError: rank one's own\n")
    assert second.complained.count("Traceback") == 1


# ---- the hub alone


def connect(hub, rank, token=None):
    connection = Connection(socket.create_connection(("127.0.0.1", hub.port)))
    connection.send(hello=rank, host=f"node{rank // 2}", token=token or hub.token)
    return connection


def read(connection):
    """The next message that is no list of hosts."""
    while True:
        came = connection.read()
        assert came is not None, "the hub has left"
        messages = [message for message in came if "hosts" not in message]
        if messages:
            return messages[0]


def test_all_processes_of_a_dead_host_are_named_in_one_line_of_one_process():
    hub = Hub("127.0.0.1", 4)
    ranks = [connect(hub, rank) for rank in range(4)]
    for rank in (2, 3):
        ranks[rank].raw.close()
    said = [read(ranks[rank]) for rank in (0, 1)]
    assert [message["end"] for message in said] == [Exit.LOST_PEER] * 2
    assert said[0]["say"].startswith("ranks 2, 3 on node1 are gone")
    assert said[1]["say"] == ""
    for rank in (0, 1):
        ranks[rank].raw.close()
    hub.thread.join(10)
    assert not hub.thread.is_alive()


def test_who_says_goodbye_is_not_missed():
    hub = Hub("127.0.0.1", 2)
    ranks = [connect(hub, rank) for rank in range(2)]
    for connection in ranks:
        connection.send(bye=True)
    hub.thread.join(10)
    assert not hub.thread.is_alive()
    assert hub.verdict is None


def test_of_two_that_fail_one_is_the_first():
    hub = Hub("127.0.0.1", 2)
    ranks = [connect(hub, rank) for rank in range(2)]
    ranks[1].send(failed=1)
    assert read(ranks[1]) == {"first": True}
    assert read(ranks[0]) == {"end": 1, "say": ""}
    ranks[0].send(failed=2)
    assert read(ranks[0]) == {"first": False}
    for connection in ranks:
        connection.send(bye=True)
    hub.thread.join(10)


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": 1}\n', b"\xff\n"]
)
def test_strangers_are_not_heard_and_disturb_nobody(words):
    hub = Hub("127.0.0.1", 1)
    own = connect(hub, 0)
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(words)
        stranger.settimeout(10)
        assert stranger.recv(1) == b""
    connect(hub, 0, token="guessed").raw.close()
    assert hub.verdict is None
    own.send(bye=True)
    hub.thread.join(10)
    assert not hub.thread.is_alive()


def test_a_process_alone_opens_nothing():
    with Peers(World()) as peers:
        assert peers.link is None
        assert peers.hub is None


def test_a_note_to_stop_keeps_its_first_reason():
    stop = Stop()
    stop.ask("SIGUSR1")
    stop.ask("SIGTERM")
    assert stop.reason == "SIGUSR1"
