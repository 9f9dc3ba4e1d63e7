"""The whole way by one command: data, a base, two adapters on it, and their scores."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Fewer steps than the quickstart's own; enough for what is asserted.
SHORTER = [
    "training.trainer.max_steps=700",
    "adapter_learning.trainer.max_steps=300",
    "ia3_learning.trainer.max_steps=60",
    "adapter_learning.trainer.val_check_interval=100",
    "ia3_learning.trainer.val_check_interval=60",
    "training.trainer.val_check_interval=700",
]


def test_the_adapter_learns_in_minutes_what_the_base_cannot_do(tmp_path: Path):
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "main.py"),
            "experiment=quickstart",
            f"data_dir={tmp_path / 'data'}",
            f"base_results_dir={tmp_path / 'results'}",
            *SHORTER,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\x1b" not in run.stdout, "control codes where there is no terminal"
    (metrics,) = tmp_path.glob("results/*/eval_*/results/metrics.json")
    scores = {r["name"]: r for r in json.loads(metrics.read_text())["results"]}
    assert list(scores) == ["base", "adapter_learning", "ia3_learning"]
    assert scores["base"]["exact_match"] < 10
    assert scores["adapter_learning"]["exact_match"] > 80
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
