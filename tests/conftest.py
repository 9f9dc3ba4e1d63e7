"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GRAFTWERK_SHARED", ROOT.parent / "shared"))
# The files that take longest begin, so that none of them keeps a single processor busy at the end;
# those that mostly wait, for Slurm, stand between those that compute.
FIRST = (
    "tests/slurm/test_jobs.py",
    "tests/test_quickstart.py",
    "tests/slurm/test_actions.py",
    "tests/launcher_scripts/test_documented_commands.py",
    "tests/slurm/test_sweeps.py",
    "tests/graftwerk/checkpoints/test_fuzz.py",
    "tests/chaos/test_chaos.py",
    "tests/launcher_scripts/test_theirs.py",
)


def pytest_configure() -> None:
    # A shell's background jobs ignore Ctrl-C, and so would all that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(FIRST)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}: set GRAFTWERK_SHARED to its folder")
    return SHARED
