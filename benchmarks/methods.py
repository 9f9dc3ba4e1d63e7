"""Every method on the quickstart's task, which its base cannot do: what it reaches and costs.

    make methods        (or python3 benchmarks/methods.py WORK [METHOD ...])

Makes the base and the data in WORK once, trains each method on them by stage `peft` or
`fine_tuning`, scores the 200 test questions by `eval`, and prints one table. A method that misses
its target is named below it.

The base differs from the quickstart's in three things. Its positions are rotary: virtual tokens
move a row to places that a table of positions, trained on shorter rows, knows nothing of. It has
four layers, and wider first weights: a prompt can only steer what the frozen parts do already, and
these answer to many directions.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import launch, overrides, scores, training

BASE = {
    "model.position_embedding_type": "rope",
    "model.num_layers": 4,
    "model.init_method_std": 0.1,
}


@dataclass(frozen=True)
class Run:
    """How one method is trained, and the exact match that it has to reach."""

    lr: float
    steps: int = 600
    exact: float = 0  # at least
    gain: float = 0  # at least, over the base
    settings: dict[str, Any] = field(default_factory=dict)  # of model.peft

    @property
    def target(self) -> str:
        return f"base + {self.gain:g}" if self.gain else f"{self.exact:g}"

    def reached(self, exact: float, base: float) -> bool:
        return exact >= max(self.exact, base + self.gain)


# By `peft_scheme`, and the whole model by stage `fine_tuning`.
RUNS = {
    "lora": Run(3e-3, exact=70, settings={"lora_tuning.adapter_dim": 16}),
    "adapter": Run(3e-3, exact=70, settings={"adapter_tuning.adapter_dim": 16}),
    "selective": Run(
        1e-3, exact=70, settings={"selective_tuning.tunable_base_param_names": "[mlp]"}
    ),
    "fine_tuning": Run(1e-3, exact=70),
    "ia3": Run(2e-2, gain=30),
    "prefix": Run(
        3e-2,
        gain=30,
        settings={"prefix_tuning.reparametrise": False, "prefix_tuning.init_std": 0.5},
    ),
    "prompt": Run(
        0.1,
        1000,
        gain=30,
        settings={"prompt_tuning.virtual_tokens": 20, "prompt_tuning.init_std": 0.2},
    ),
    "ptuning": Run(
        1e-2,
        1000,
        gain=30,
        settings={
            "p_tuning.virtual_tokens": 20,
            "p_tuning.embedding_dim": 64,
            "p_tuning.bottleneck_dim": 256,
            "p_tuning.init_std": 1.0,
        },
    ),
}


def main(argv: list[str]) -> int:
    """Runs the methods that are named, or all of them; returns the exit code."""
    if not argv or set(argv[1:]) - RUNS.keys():
        print(f"usage: methods.py WORK [METHOD ...]; METHOD: {', '.join(RUNS)}", file=sys.stderr)
        return 2
    work, names = Path(argv[0]).absolute(), argv[1:] or list(RUNS)
    if not (work / "results/gpt3_tiny/results/model").exists():
        words = ["experiment=quickstart", "stages=[data_prep,training]"]
        launch(work, "base", [*words, *overrides("training", BASE)])
    found = {name: measure(work, name, RUNS[name]) for name in names}
    base = next(iter(found.values()))["base"]
    print(table(found, base))
    missed = [name for name, row in found.items() if not RUNS[name].reached(row["exact"], base)]
    print(f"\nmissed: {', '.join(missed)}" if missed else "\nevery method reached its target")
    return 0


def measure(work: Path, name: str, run: Run) -> dict[str, Any]:
    """Trains and scores one method; what is there from an earlier run is made anew."""
    stage = "fine_tuning" if name == "fine_tuning" else "peft"
    data = "${data_prep.output_dir}/translate"
    folder = work / "results/gpt3_tiny"
    model = {
        "nemo_path": folder / f"{stage}_{name}/results/result",
        "language_model_path": folder / "results/model",
        "encoder_seq_length": 64,
        "global_batch_size": 32,
        "micro_batch_size": 32,
        "new_tasks": "[translate]",
        "task_templates.0.taskname": "translate",
        "data.train_ds": f"[{data}_train.jsonl]",
        "data.validation_ds": f"[{data}_val.jsonl]",
        "data.num_workers": 0,
        "data.pin_memory": False,
        "optim.lr": run.lr,
        **{f"peft.{key}": value for key, value in run.settings.items()},
    }
    if stage == "peft":
        model["peft.peft_scheme"] = name
    trainer = {"devices": 1, "accelerator": "cpu", "precision": 32, "max_epochs": -1}
    trainer |= {"max_steps": run.steps, "val_check_interval": run.steps // 2}
    trainer |= {"log_every_n_steps": 100}
    own = {f"trainer.{key}": value for key, value in trainer.items()}
    own |= {f"model.{key}": value for key, value in model.items()}
    own |= {"run.model_train_name": "gpt3_tiny", "run.task_name": name}
    own |= {"exp_manager.resume_if_exists": False}
    words = ["experiment=quickstart", f"stages=[{stage},eval]", f"eval.run.task_name={name}"]
    launch(work, name, [*words, *overrides(stage, own)])
    exact = {row: found["exact_match"] for row, found in scores(folder / f"eval_{name}").items()}
    summary = training(folder / f"{stage}_{name}")
    return {**summary, "base": exact["base"], "exact": exact[stage]}


def table(found: dict[str, dict[str, Any]], base: float) -> str:
    """The table, in Markdown."""
    lines = [
        "| | exact match | target | trained parameters | share | steps | lr | training | file |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| base | {base:.1f} | | | | | | | |",
    ]
    for name, row in found.items():
        run, count = RUNS[name], row["trainable_parameters"]
        lines.append(
            f"| `{name}` | {row['exact']:.1f} | {run.target} | {count:,} | "
            f"{count / row['total_parameters']:.1%} | {row['steps']:,} | {run.lr:g} | "
            f"{row['seconds']:.0f} s | {row['file_bytes'] / 1024:,.0f} kB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
