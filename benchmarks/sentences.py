"""Four methods on real questions with a real base, each at three learning rates.

    python3 benchmarks/sentences.py BASE WORK [METHOD ...]

BASE: the folder that benchmarks/smollm2_base.py wrote. The rows are the questions of SQuAD v1.1's
dev set, each with the one sentence that holds its answer; 60 questions, on sentences that training
never sees, are held out. Each run takes 60 steps of 4 rows; one that WORK holds already is kept.
GRAFTWERK_SHARED: the folder of shared data with data/squad/squad_v1.1_dev_sentence.jsonl
(default: ../shared).
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from runs import ROOT, launch, overrides, scores, training

SHARED = Path(os.environ.get("GRAFTWERK_SHARED", ROOT.parent / "shared"))
SEED, HELD_OUT = 1234, 60

RATES: dict[str, tuple[float, ...]] = {
    "lora": (2e-4, 5e-4, 1e-3),
    "adapter": (5e-4, 1e-3, 3e-3),
    "ia3": (3e-3, 1e-2, 3e-2),
    "ptuning": (1e-3, 3e-3, 1e-2),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {
        "lora_tuning.target_modules": "[all]",
        "lora_tuning.adapter_dim": 16,
        "lora_tuning.alpha": 32,
    },
    "adapter": {"adapter_tuning.adapter_dim": 32},
    "ia3": {},
    "ptuning": {"p_tuning.virtual_tokens": 10, "p_tuning.embedding_dim": 576},
}


def main(argv: list[str]) -> int:
    """Trains and scores what is not there yet; prints the table; returns the exit code."""
    if len(argv) < 2 or set(argv[2:]) - RATES.keys():
        usage = f"usage: sentences.py BASE WORK [METHOD ...]; METHOD: {', '.join(RATES)}"
        print(usage, file=sys.stderr)
        return 2
    base, work = Path(argv[0]).absolute(), Path(argv[1]).absolute()
    data = work / "data"
    if not data.exists():
        write_rows(data)
    found = [
        measure(base, work, method, lr) for method in argv[2:] or RATES for lr in RATES[method]
    ]
    print(table(found))
    return 0


def write_rows(folder: Path) -> None:
    """`train.jsonl`, `test.jsonl` and `test_ground_truth.jsonl`, the same each time."""
    source = SHARED / "data" / "squad" / "squad_v1.1_dev_sentence.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    random.Random(SEED).shuffle(rows)
    test = rows[:HELD_OUT]
    seen = {row["sentence"] for row in test}
    train = [row for row in rows if row["sentence"] not in seen]
    files = {
        "train": [{**_prompt(row), "answer": row["answers"][0]} for row in train],
        "test": [{"id": str(n), **_prompt(row)} for n, row in enumerate(test)],
        "test_ground_truth": [
            {"id": str(n), **_prompt(row), "answer": row["answers"]} for n, row in enumerate(test)
        ],
    }
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def _prompt(row: dict[str, Any]) -> dict[str, str]:
    return {"taskname": "squad", "context": row["sentence"], "question": row["question"]}


def measure(base: Path, work: Path, method: str, lr: float) -> dict[str, Any]:
    """One method at one learning rate: its scores on the held-out questions and its cost."""
    name, data = f"{method}_{lr:g}", work / "data"
    folder = work / "results/smollm2"
    if not (folder / f"eval_{name}/results/metrics.json").exists():
        learner = {
            "run.model_train_name": "smollm2",
            "run.task_name": name,
            "trainer.devices": 1,
            "trainer.accelerator": "cpu",
            "trainer.precision": 32,
            "trainer.max_steps": 60,
            "trainer.max_epochs": -1,
            "exp_manager.create_checkpoint_callback": False,
            "exp_manager.resume_if_exists": False,
            "model.nemo_path": folder / f"peft_{name}/results/result",
            "model.language_model_path": base,
            "model.peft.peft_scheme": method,
            "model.global_batch_size": 4,
            "model.micro_batch_size": 4,
            "model.new_tasks": "[squad]",
            "model.task_templates.0.taskname": "squad",
            "model.data.train_ds": f"[{data / 'train.jsonl'}]",
            "model.data.validation_ds": "[]",
            "model.data.num_workers": 0,
            "model.data.pin_memory": False,
            "model.optim.lr": lr,
            "model.optim.sched.warmup_steps": 6,
            **{f"model.peft.{key}": value for key, value in SETTINGS[method].items()},
        }
        scoring = {
            "run.model_train_name": "smollm2",
            "run.task_name": name,
            "trainer.accelerator": "cpu",
            "trainer.precision": 32,
            "model.evaluate_base": base_scores(folder) is None,  # once: it is always the same
            "model.data.test_ds": f"[{data / 'test.jsonl'}]",
            "model.data.ground_truth_ds": f"[{data / 'test_ground_truth.jsonl'}]",
            "model.data.batch_size": 20,
        }
        words = ["stages=[peft,eval]", "peft=gpt3/custom", "eval=gpt3/squad"]
        launch(work, name, [*words, *overrides("peft", learner), *overrides("eval", scoring)])
    found = scores(folder / f"eval_{name}")["peft"]
    run = training(folder / f"peft_{name}")
    return {**run, "method": method, "lr": lr, "scores": found, "base": base_scores(folder)}


def base_scores(folder: Path) -> dict[str, Any] | None:
    """What the base alone reaches, if a run has asked it."""
    evaluated = [path.parent.parent for path in folder.glob("eval_*/results/metrics.json")]
    found = [scores(each).get("base") for each in evaluated]
    return next((row for row in found if row is not None), None)


def table(found: list[dict[str, Any]]) -> str:
    """The table, in Markdown; the best F1 of each method is in bold."""
    best = {
        method: max(row["scores"]["f1"] for row in found if row["method"] == method)
        for method in RATES
        if any(row["method"] == method for row in found)
    }
    base = found[0]["base"]
    lines = [
        "| | lr | exact match | F1 | trained parameters | share | training | file |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| base | | {base['exact_match']:.1f} | {base['f1']:.1f} | | | | |",
    ]
    for row in found:
        f1, count = row["scores"]["f1"], row["trainable_parameters"]
        shown = f"**{f1:.1f}**" if f1 == best[row["method"]] else f"{f1:.1f}"
        lines.append(
            f"| `{row['method']}` | {row['lr']:g} | {row['scores']['exact_match']:.1f} | {shown} | "
            f"{count:,} | {count / row['total_parameters']:.2%} | {row['seconds']:.0f} s | "
            f"{row['file_bytes'] / 1024:,.0f} kB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
