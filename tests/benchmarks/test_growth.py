"""The whole of `growth.py` at its smallest sizes."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SMALLEST = ["--rounds", "1", "--steps", "1", "--points", "2", "--hidden", "32"]


def growth(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks/growth.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_steps_and_data_have_an_exponent_for_each_size():
    ran = growth(*SMALLEST, "--rows", "200", "400", "800", "--no-million")
    assert ran.returncode == 0, ran.stderr
    firsts = [line.split("|")[1].strip() for line in ran.stdout.splitlines() if "|" in line]
    assert firsts.count("data_prep") == firsts.count("encoding") == 3 + 1  # 100, 200, 400; fitted
    assert {"tokens of a row", "rows", "adapters in `Parallel`", "layers"} <= {*firsts}
    assert "800" not in ran.stdout


@pytest.mark.parametrize(
    "words", [["--points", "1"], ["--hidden", "33"], ["--rows", "200", "400", "--no-million"]]
)
def test_sizes_that_nothing_can_be_fitted_to_are_refused(words: list[str]):
    ran = growth(*words)
    assert ran.returncode == 2
    assert words[0] in ran.stderr or "--rows" in ran.stderr
    assert not ran.stdout
