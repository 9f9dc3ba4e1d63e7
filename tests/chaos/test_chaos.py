"""Processes are killed and signalled anywhere: the run goes on, to the same bits, with no trace."""

import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from graftwerk.errors import Exit
from tests.chaos.strikes import PHASES, Strike
from tests.graftwerk.learning_stage import elsewhere, read_metrics
from tests.graftwerk.ranks import Rank, start_stage

SEEDS = range(4620, 4650)  # in which each phase has kills, also of a file that is half written
QUICK = (4633, 4639, 4647)  # a signal in a step, a kill in one, a kill in writing a checkpoint
PATIENCE = 300.0  # seconds for a run, where the machine has other things to do


@pytest.fixture
def two(cfg):
    """The stage for two processes."""
    cfg.trainer.devices = 2
    cfg.model.micro_batch_size = 1
    return cfg


def run(cfg: DictConfig, folder: Path, strike: Strike | None = None) -> list[Rank]:
    return start_stage(cfg, folder, 2, strike)


def export_of(cfg: DictConfig) -> DictConfig:
    """The stage that writes what was learned anew, beside it."""
    path = cfg.model.nemo_path
    model = {
        "language_model_path": cfg.model.language_model_path,
        "restore_from_path": None,
        "revision": None,
        "adapters": [{"name": "first", "path": path}],
    }
    settings = {"format": "graftwerk", "merge": False, "overwrite": True, "dtype": "keep"}
    return OmegaConf.create(
        {**settings, "output_path": str(Path(path).parent / "exported"), "model": model}
    )


def finish(ranks: list[Rank]) -> None:
    codes = [rank.wait(PATIENCE) for rank in ranks]
    assert not any(codes), "".join(rank.said + rank.complained for rank in ranks)


def finish_export(cfg: DictConfig, folder: Path) -> None:
    finish(start_stage(export_of(cfg), folder, 1, None, "export"))


@pytest.fixture(scope="session")
def undisturbed(base, rows, tmp_path_factory):
    """The folder of a run that nothing disturbs; made once."""
    return tmp_path_factory.mktemp("undisturbed")


def content(folder: Path, exported: bool) -> dict[str, bytes]:
    """The bytes of the adapter, or of what it is exported to."""
    files = (folder / "exported").rglob("*") if exported else [folder / "adapter.nemo"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def untimed(cfg: DictConfig) -> list[dict[str, str]]:
    rows = read_metrics(cfg)
    return [{k: v for k, v in row.items() if k not in ("samples/s", "tokens/s")} for row in rows]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_ended(ranks: list[Rank], strike: Strike) -> None:
    """All have ended as they should have; a killed process is named by the other."""
    struck = ranks[strike.rank]
    struck.wait_for("struck by", PATIENCE)
    at = time.monotonic()
    codes = [rank.wait() for rank in ranks]
    assert time.monotonic() - at < 60
    everything = "".join(rank.said + rank.complained for rank in ranks)
    if not strike.kills:
        assert codes in ([Exit.DONE] * len(codes), [Exit.REQUEUE] * len(codes)), everything
        return
    assert codes[strike.rank] == 128 + signal.SIGKILL
    for rank, code in enumerate(codes):
        if rank != strike.rank:
            assert code == Exit.LOST_PEER, everything
            assert f"rank {strike.rank} on {socket.gethostname()} is gone" in everything


def disturb(cfg: DictConfig, folder: Path, strike: Strike, undisturbed: Path) -> None:
    """Runs with one strike in it, or exports so what a run has given; and goes on to the end."""
    if strike.phase == "export":
        shutil.copytree(undisturbed / "results", folder / "results")
        shutil.rmtree(folder / "results" / "exported", ignore_errors=True)
        assert_ended(start_stage(export_of(cfg), folder, 1, strike, "export"), strike)
        finish_export(cfg, folder)
    else:
        assert_ended(run(cfg, folder, strike), strike)
        finish(run(cfg, folder))


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in SEEDS],
)
def test_whatever_is_struck_the_end_is_that_of_an_undisturbed_run(seed, two, tmp_path, undisturbed):
    straight, strike = elsewhere(two, undisturbed), Strike.of(seed)
    if not (undisturbed / "results").exists():
        finish(run(straight, undisturbed))
    if strike.phase == "export":
        finish_export(straight, undisturbed)
    results = tmp_path / "results"
    disturb(two, tmp_path, strike, undisturbed)
    given = [content(f, strike.phase == "export") for f in (results, undisturbed / "results")]
    assert given[0] == given[1] != {}, strike
    assert checkpoints(results) == checkpoints(undisturbed / "results"), strike
    assert untimed(two) == untimed(straight), strike
    assert [path for path in results.rglob(".*")] == [], strike


def test_the_seeds_strike_every_phase_and_either_process():
    strikes = [Strike.of(seed) for seed in SEEDS]
    assert {strike.phase for strike in strikes} == set(PHASES)
    assert {strike.rank for strike in strikes} == {0, 1}
    assert {strike.number for strike in strikes} >= {signal.SIGKILL, signal.SIGTERM}
    assert len({strike.place for strike in strikes}) >= 15
    halves = {strike.phase for strike in strikes if strike.place.half and strike.kills}
    assert halves == {"checkpoint", "export"}
