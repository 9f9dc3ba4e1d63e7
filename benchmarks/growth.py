"""How cost grows: a step with rows, their length, adapters and layers; data preparation with rows.

    python3 benchmarks/growth.py [--only steps | data] [--rounds 5] [--no-million]

A step is the learning stages' own (forward, backward, AdamW) on a GPT of 4 layers, 256 wide, with
8,192 words, LoRA of rank 8, float32, one thread: 4 rows of 128 tokens, of which the last predicts.
One size at a time doubles. Sizes take turns, round by round; each step's CPU seconds count, since
others may share the machine. Beside the exponent of time stands that of counted operations.

Data is a JSONL file of questions, five on a paragraph. `data_prep` prepares it as a source of kind
`custom`, then its training rows are encoded as a learning stage does; each in a process of its own,
which does 100 rows first, to have imported all, and says its CPU seconds for the others and the
peak of its memory: all that is resident (VmHWM), files that are mapped included, and what is its
own alone (RssAnon). Memory of a process with 100 rows is taken off before a power is fitted.

An exponent is the slope of a line through the logarithms; R² says how straight they lie.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from figures import power

ROOT = Path(__file__).resolve().parent.parent
WORDS, RANK = 8192, 8
ROWS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BASELINE = 100
STEPS = {"prepare": "data_prep", "encode": "encoding"}


@dataclass(frozen=True)
class Point:
    """The sizes of a step."""

    length: int = 128
    batch: int = 4
    adapters: int = 1
    layers: int = 4


# What doubles: its words, its field, and where it begins.
AXES = {
    "tokens of a row": ("length", 64),
    "rows": ("batch", 1),
    "adapters in `Parallel`": ("adapters", 1),
    "layers": ("layers", 2),
}


def main() -> int:
    """Measures and prints the tables; returns the exit code."""
    arguments = parsed()
    if arguments.measure:
        what, folder = arguments.measure
        measure(what, Path(folder))
        return 0
    if arguments.only != "data":
        print(steps_table(arguments), flush=True)
    if arguments.only != "steps":
        rows = arguments.rows[:-1] if arguments.no_million else arguments.rows
        print("\n" + data_table(rows))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("steps", "data"))
    parser.add_argument("--rounds", type=int, default=5, help="of all sizes of a step")
    parser.add_argument("--steps", type=int, default=2, help="timed ones of a size in a round")
    parser.add_argument("--points", type=int, default=5, help="sizes of each kind, doubling")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of data")
    parser.add_argument("--no-million", action="store_true", help="leave the most rows out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, least in {"rounds": 1, "steps": 1, "points": 2}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if arguments.hidden < 32 or arguments.hidden % 32:
        parser.error("--hidden must be a multiple of 32, the width of a head")
    if min(arguments.rows) <= BASELINE or len(arguments.rows) - arguments.no_million < 2:
        parser.error(f"--rows: two numbers or more, each above the {BASELINE} of the baseline")
    return arguments


# ---- steps


def steps_table(arguments: argparse.Namespace) -> str:
    """Medians over all rounds, and what fits them."""
    import torch

    torch.set_num_threads(1)
    axes = {
        words: {first << n: replace(Point(), **{key: first << n}) for n in range(arguments.points)}
        for words, (key, first) in AXES.items()
    }
    points = dict.fromkeys(point for sizes in axes.values() for point in sizes.values())
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    flops: dict[Point, float] = {}
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        for point in points:
            taken, flops[point] = steps(point, arguments.hidden, arguments.steps)
            seconds[point] += taken
    lines = [
        "| a step, by | CPU seconds | exponent | R² | exponent of operations |",
        "|---|---|---:|---:|---:|",
    ]
    for words, sizes in axes.items():
        medians = [statistics.median(seconds[point]) for point in sizes.values()]
        (exponent, fit), (counted, _) = (
            power([*sizes], values) for values in (medians, [flops[p] for p in sizes.values()])
        )
        told = ", ".join(f"{n}: {value:.3f}" for n, value in zip(sizes, medians, strict=True))
        lines.append(f"| {words} | {told} | {exponent:.2f} | {fit:.4f} | {counted:.2f} |")
    return "\n".join(lines)


def steps(point: Point, hidden: int, count: int) -> tuple[list[float], float]:
    """CPU seconds of some steps behind one that warms up, and the operations of one."""
    sys.path.insert(0, str(ROOT / "src"))
    import torch
    from training_sides import fit

    from graftwerk.adapters import Parallel
    from graftwerk.adapters.methods.lora import LoRAConfig
    from graftwerk.data.dataset import collate
    from graftwerk.data.encoding import Example, Label
    from graftwerk.models import GPT, TransformerConfig
    from graftwerk.models.flops import Training, Work

    model: Any = GPT(
        TransformerConfig(
            vocab_size=WORDS,
            num_layers=point.layers,
            hidden_size=hidden,
            num_attention_heads=hidden // 32,
            ffn_hidden_size=4 * hidden,
            max_position_embeddings=point.length,
        )
    )
    model.initialise(torch.Generator().manual_seed(0))
    names = [f"a{n}" for n in range(point.adapters)]
    for name in names:
        model.add_adapter(name, LoRAConfig(dim=RANK))
    model.set_active(Parallel(*names) if len(names) > 1 else names[0])
    model.train_only(names)
    drawn = torch.randint(WORDS, (point.batch, point.length + 1)).tolist()
    batch = collate([Example(row[:-1], [Label(point.length - 1, row[-1])]) for row in drawn])
    seconds: list[float] = []
    fit(model, Repeated([batch], count, seconds))
    return seconds, Training.of(model).flops(Work.of(batch.inputs())).total


class Repeated:
    """What Lightning takes for a loader: a step again and again; all but the first are timed."""

    def __init__(self, step: Any, count: int, seconds: list[float]) -> None:
        self.step, self.count, self.seconds = step, count, seconds

    def __iter__(self) -> Iterator[Any]:
        yield self.step
        for _ in range(self.count):
            start = time.process_time()
            yield self.step
            self.seconds.append(time.process_time() - start)

    def __len__(self) -> int:
        return 1 << 40  # known, or Lightning would fetch one step ahead


# ---- data


def data_table(rows: list[int]) -> str:
    """What each number of rows costs, and what fits it."""
    found: dict[str, dict[int, dict[str, float]]] = {what: {} for what in STEPS}
    for number in (BASELINE, *rows):
        with tempfile.TemporaryDirectory() as folder:
            write_source(Path(folder) / "first", BASELINE)
            write_source(Path(folder) / "all", number)
            for what in STEPS:
                print(f"{STEPS[what]}: {number:,} rows", file=sys.stderr)
                command = [sys.executable, __file__, "--measure", what, folder]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[what][number] = json.loads(output.stdout.splitlines()[-1])
    lines = [
        "| | rows | CPU seconds | peak MB | its own MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for what, sizes in found.items():
        for number, taken in sizes.items():
            lines.append(
                f"| {STEPS[what]} | {number:,} | {taken['seconds']:.2f} "
                f"| {taken['peak'] / 1e6:.0f} | {taken['own'] / 1e6:.0f} |"
            )
    lines += [
        "",
        f"| memory above {BASELINE} rows' | exponent of CPU seconds | of the peak | of its own "
        "| bytes a row, peak and own |",
        "|---|---|---|---|---|",
    ]
    for what, sizes in found.items():
        fits = [fitted(sizes, key) for key in ("seconds", "peak", "own")]
        slopes = [bytes_a_row(sizes, key) for key in ("peak", "own")]
        told = ", ".join(f"{slope:.0f}" for slope in slopes)
        lines.append(f"| {STEPS[what]} | {' | '.join(fits)} | {told} |")
    return "\n".join(lines)


def fitted(sizes: dict[int, dict[str, float]], key: str) -> str:
    """The exponent, of memory above the baseline, and how well it fits."""
    base = 0.0 if key == "seconds" else sizes[BASELINE][key]
    numbers = [number for number in sizes if number != BASELINE]
    more = [sizes[number][key] - base for number in numbers]
    if min(more) <= 0:
        return "none: not above it"
    exponent, fit = power(numbers, more)
    return f"{exponent:.2f} (R² {fit:.4f})"


def bytes_a_row(sizes: dict[int, dict[str, float]], key: str) -> float:
    """The slope of memory over rows: what does not grow has one near zero, whatever its power."""
    return statistics.linear_regression([*sizes], [taken[key] for taken in sizes.values()]).slope


def write_source(folder: Path, rows: int) -> None:
    """Questions of random words, five on a paragraph, an object a line of `source.jsonl`."""
    folder.mkdir()
    draw = random.Random(0)
    words = vocabulary()
    with open(folder / "source.jsonl", "w") as file:
        for number in range(rows):
            if number % 5 == 0:
                context = " ".join(draw.choices(words, k=30))
            question, answer = (" ".join(draw.choices(words, k=k)) for k in (9, 2))
            row = {"id": str(number), "context": context, "question": question, "answer": answer}
            file.write(json.dumps(row) + "\n")


def vocabulary() -> list[str]:
    return [f"w{number}" for number in range(WORDS - 100)]


def measure(what: str, folder: Path) -> None:
    """One preparation or encoding in this process; prints what it took."""
    sys.path.insert(0, str(ROOT / "src"))
    from load import Peak, memory

    work = {"prepare": prepare, "encode": encode}[what]
    with Peak(every=0.02) as peak:
        work(folder / "first")
        start = time.process_time()
        work(folder / "all")
        seconds = time.process_time() - start
        peak.look()
    found = {"seconds": seconds, "peak": memory()["VmHWM"], "own": peak.anonymous}
    print("\n" + json.dumps(found))


def prepare(folder: Path) -> None:
    """The stage, as the launcher would have configured it."""
    from omegaconf import OmegaConf

    from graftwerk.stages import data_prep

    config = {
        "run": {"results_dir": str(folder / "run")},
        "kind": "custom",
        "source": str(folder / "source.jsonl"),
        "output_dir": str(folder / "prepared"),
        "prefix": "growth",
        "prompt_template": "context: {context} question: {question} answer: {answer}",
        "field_map": {},
        "answer_words": {},
        "subset": None,
        "split": {"train": 1.0},
        "tokenizer": None,
        "seed": 1234,
    }
    data_prep.run(OmegaConf.create(config))


def encode(folder: Path) -> None:
    """The rows of training, as a learning stage reads them: into its cache, and mapped from there.

    On one core: there one process does all of it.
    """
    from graftwerk.data.dataset import AnswerDataset
    from graftwerk.data.encoding import Encoder
    from graftwerk.data.templates import TaskTemplate
    from graftwerk.data.token_cache import TokenCache
    from graftwerk.data.tokenizers import build_tokenizer

    tokenizer = build_tokenizer("word", [*vocabulary(), "context", "question", "answer", ":"])
    prompt = "context: {context} question: {question} answer: {answer}"
    template = TaskTemplate.from_config({"taskname": "growth", "prompt_template": prompt})
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    encoders = {"growth": Encoder(template, tokenizer, 512)}
    cache = TokenCache(folder / "cache")
    AnswerDataset([folder / "prepared/growth_train.jsonl"], encoders, cache=cache)


if __name__ == "__main__":
    sys.exit(main())
