"""SQuAD answers a second: graftwerk beside `transformers.generate`.

    python3 benchmarks/generation.py [--rounds 5] [--paragraphs 8] [--tokens 32] [--threads 1]

GPT-2 of 124M parameters with random weights, which both sides read from one file, in float32. The
questions are those of some paragraphs of xquad (`../shared`, or GRAFTWERK_SHARED), which have few,
some and many as all of its paragraphs do, cut by GPT-2's tokenizer and answered greedily in batches
of 32. Random weights never say that a text ends, so one token in `ENDS` does: answers have some 4
tokens then, as SQuAD's do.

Theirs has rows padded on the left, once in the order of the file and once sorted by length. All
sides take turns, and each answer's ids must agree in every round. CPU seconds compare, since other
work on the machine takes turns too. Exit code 1 where ours is not three times as fast as the better
of theirs.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GRAFTWERK_SHARED", ROOT.parent / "shared"))
BATCH, ENDS, TARGET = 32, 5, 3.0
Ids = list[list[int]]
Side = Callable[[Ids], Ids]


def main() -> int:
    """Measures and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paragraphs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    prompts = questions(arguments.paragraphs)
    with tempfile.TemporaryDirectory() as folder:
        sides = make(Path(folder), arguments.tokens)
        wall, cpu, answers = measure(sides, prompts, arguments.rounds)
    count = len(prompts)
    added = statistics.mean(map(len, answers))
    read = statistics.mean(map(len, prompts))
    print(f"{count} questions of {read:.0f} tokens, answers of {added:.1f}; the same ids\n")
    print(table(wall, cpu, count))
    theirs = min(statistics.median(cpu[name]) for name in cpu if name != "graftwerk")
    gain = theirs / statistics.median(cpu["graftwerk"])
    print(f"\n{gain:.2f} times the better of theirs; target {TARGET:g}")
    return 0 if gain >= TARGET else 1


def questions(paragraphs: int) -> Ids:
    """The prompts of some paragraphs, one paragraph after the other.

    They are the middle ones of equal runs of all paragraphs, by how many questions they have.
    """
    from transformers import AutoTokenizer

    if not SHARED.exists():
        raise SystemExit(f"{SHARED} is not there: set GRAFTWERK_SHARED")
    tokenizer: Any = AutoTokenizer.from_pretrained(SHARED / "data/models/gpt2_tokenizer")
    articles = json.loads((SHARED / "data/squad/xquad.en.json").read_text())["data"]
    every = [paragraph for article in articles for paragraph in article["paragraphs"]]
    random.Random(0).shuffle(every)
    every.sort(key=lambda paragraph: len(paragraph["qas"]))
    share = len(every) / paragraphs
    chosen = [every[int((run + 0.5) * share)] for run in range(paragraphs)]
    texts = [
        f"Context: {paragraph['context']}\nQuestion: {qa['question']}\nAnswer:"
        for paragraph in chosen
        for qa in paragraph["qas"]
    ]
    return [tokenizer.encode(text) for text in texts]


def make(folder: Path, tokens: int) -> dict[str, Side]:
    """What each side does with prompts, by its name."""
    sys.path.insert(0, str(ROOT / "src"))
    import torch
    import transformers

    from graftwerk.checkpoints import load_base
    from graftwerk.generation import generate

    torch.manual_seed(0)
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None)
    theirs: Any = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # first weights say the same word again and again
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    theirs.save_pretrained(folder)
    ours: Any = load_base(folder)
    ends = list(range(0, config.vocab_size, ENDS))

    def padded(prompts: Ids) -> Ids:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        how = {
            "max_new_tokens": tokens,
            "do_sample": False,
            "eos_token_id": ends,
            "pad_token_id": 0,
        }
        found = theirs.generate(ids, attention_mask=mask, **how)[:, width:].tolist()
        stops = [next((n for n, i in enumerate(row) if i % ENDS == 0), tokens) for row in found]
        return [row[:stop] for row, stop in zip(found, stops, strict=True)]

    def in_order(prompts: Ids) -> Ids:
        parts = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
        return [answer for part in parts for answer in padded(part)]

    def by_length(prompts: Ids) -> Ids:
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        answers = dict(zip(order, in_order([prompts[row] for row in order]), strict=True))
        return [answers[row] for row in range(len(prompts))]

    return {
        "transformers, order of the file": in_order,
        "transformers, sorted by length": by_length,
        "graftwerk": lambda prompts: generate(ours, prompts, tokens, ends, BATCH),
    }


def measure(
    sides: dict[str, Side], prompts: Ids, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], Ids]:
    """Wall and CPU seconds of each side's rounds, and the answers; sides take turns."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    answers: Ids = []
    for side in sides.values():
        side(prompts[:2])  # warms up
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            start, used = time.perf_counter(), time.process_time()
            found = sides[name](prompts)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
            answers = answers or found
            if found != answers:
                differ = sum(a != b for a, b in zip(found, answers, strict=True))
                raise SystemExit(f"{differ} answers of {name} are others: nothing was measured")
    return wall, cpu, answers


def table(wall: dict[str, list[float]], cpu: dict[str, list[float]], count: int) -> str:
    """The table, in Markdown: medians, and the slowest and the fastest round."""
    lines = [
        "| | answers a CPU second | slowest, fastest round | CPU seconds | seconds | ours: times |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    least = statistics.median(cpu["graftwerk"])
    for name, used in cpu.items():
        middle = statistics.median(used)
        lines.append(
            f"| {name} | {count / middle:.2f} | {count / max(used):.2f}, {count / min(used):.2f} | "
            f"{middle:.1f} | {statistics.median(wall[name]):.1f} | {middle / least:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
