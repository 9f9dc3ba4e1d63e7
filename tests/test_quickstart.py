"""The whole way by one command: data, a base, two adapters on it, and their scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def quickstart(folder: Path, training: int, adapter: int, ia3: int) -> dict[str, dict]:
    """The scores by name, after so many steps: fewer than the quickstart's own."""
    steps = {"training": training, "adapter_learning": adapter, "ia3_learning": ia3}
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "main.py"),
            "experiment=quickstart",
            f"data_dir={folder / 'data'}",
            f"base_results_dir={folder / 'results'}",
            *(f"{stage}.trainer.max_steps={n}" for stage, n in steps.items()),
            *(f"{stage}.trainer.val_check_interval={min(n, 100)}" for stage, n in steps.items()),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\x1b" not in run.stdout, "control codes where there is no terminal"
    (metrics,) = folder.glob("results/*/eval_*/results/metrics.json")
    return {r["name"]: r for r in json.loads(metrics.read_text())["results"]}


@pytest.mark.long
def test_the_adapter_learns_in_minutes_what_the_base_cannot_do(tmp_path: Path):
    scores = quickstart(tmp_path, 700, 300, 60)
    assert scores["base"]["exact_match"] < 10
    assert scores["adapter_learning"]["exact_match"] > 80


def test_one_command_makes_data_a_base_and_two_adapters_and_scores_them(tmp_path: Path):
    scores = quickstart(tmp_path, 6, 4, 4)
    assert list(scores) == ["base", "adapter_learning", "ia3_learning"]
    assert scores["adapter_learning"]["trainable_parameters"] == 2 * (2 * 2 * 64 * 16 + 2 * 2 * 64)
    states = [json.loads(path.read_text()) for path in tmp_path.glob("results/**/state.json")]
    assert {state["state"] for state in states} == {"COMPLETED"}
    assert len(states) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "results"]
    train = {line for line in read(tmp_path, "translate_train.jsonl")}
    test = read(tmp_path, "translate_test.jsonl")
    assert len(test) == 200
    assert not train & set(test)


def read(folder: Path, name: str) -> list[tuple[str, str]]:
    """(context, question) of every row of a file."""
    (path,) = folder.glob(f"data/**/{name}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["context"], row["question"]) for row in rows]
