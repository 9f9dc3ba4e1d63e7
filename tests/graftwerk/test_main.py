"""`python3 -m graftwerk`: what it runs, what it says, how it exits."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import graftwerk.__main__ as program
from graftwerk.errors import UserError
from tests.graftwerk.learning_stage import environment


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A stand-in for the learning stages that notes what it is given; and a config file."""
    given = []

    class Module:
        @staticmethod
        def run(name, cfg):
            given.append((name, cfg))
            return given_code[0]

    given_code = [0]
    monkeypatch.setitem(sys.modules, "graftwerk.stages.learning", Module)
    config = tmp_path / "job_hydra.yaml"
    config.write_text("model:\n  seed: 1\n  again: ${model.seed}\n")
    return given, given_code, str(config)


@pytest.mark.parametrize("name", ["training", "adapter_learning", "ia3_learning"])
def test_a_learning_stage_gets_its_name_and_the_resolved_config(name, stage):
    given, _, config = stage
    assert program.guarded([name, config]) == 0
    assert given[0][0] == name
    assert OmegaConf.to_container(given[0][1]) == {"model": {"seed": 1, "again": 1}}


def test_the_exit_code_is_the_stages(stage):
    _, code, config = stage
    code[0] = 75
    assert program.guarded(["training", config]) == 75


def test_a_mistake_is_one_line_and_exit_code_2(stage, monkeypatch, capsys):
    def wrong(name, cfg):
        raise UserError("model.seed is\nwrong")

    monkeypatch.setattr(sys.modules["graftwerk.stages.learning"], "run", wrong)
    assert program.guarded(["training", stage[2]]) == 2
    assert capsys.readouterr().err == "error: model.seed is wrong\n"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_rank_zero_says_the_mistake(variable, stage, monkeypatch, capsys):
    monkeypatch.setenv(variable, "1")
    assert program.guarded(["nothing"]) == 2
    assert capsys.readouterr().err == ""


def test_a_fault_of_ours_is_a_traceback_and_exit_code_1(stage, monkeypatch, capsys):
    def broken(name, cfg):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(sys.modules["graftwerk.stages.learning"], "run", broken)
    assert program.guarded(["training", stage[2]]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: ours" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["adapter_leaning"], "'adapter_leaning' is no stage or command: use one of data_prep"),
        (["training"], "usage: python3 -m graftwerk training CONFIG.yaml"),
        (["training", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
    ],
)
def test_wrong_command_lines_are_named(argv, message, capsys):
    assert program.guarded(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "a: ${b}\n", "\x00"])
def test_a_config_that_is_no_config_is_named(text, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert program.guarded(["training", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert err.count("\n") == 1


def test_help_names_every_stage_and_command_and_imports_no_torch():
    code = (
        "import sys; from graftwerk.__main__ import guarded; assert guarded(['--help']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    for word in (*program.STAGES, *program.COMMANDS, "75"):
        assert word in done.stdout


def test_the_modules_of_the_tables_exist():
    folder = Path(program.__file__).parent
    for module in {*program.STAGES.values(), *program.COMMANDS.values()}:
        assert (folder / f"{module.removeprefix('graftwerk.').replace('.', '/')}.py").is_file()


def test_score_runs_as_a_command(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "1", "pred": "a cat"}\n')
    (tmp_path / "g.jsonl").write_text('{"id": "1", "answer": ["Cat"]}\n')
    done = subprocess.run(
        [sys.executable, "-m", "graftwerk", "score", "p.jsonl", "g.jsonl"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "100.00" in done.stdout
