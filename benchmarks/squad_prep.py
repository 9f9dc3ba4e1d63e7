"""How long SQuAD preprocessing takes, and how much memory: `python3 benchmarks/squad_prep.py`.

Generates a train and a dev file in SQuAD's format, 22 thousand questions as long as the official
ones (five on a paragraph of 750 characters), and prepares them in a process of its own. The
published launcher takes 0.29 s and 48 MB for as many on two cores; the limits here are 0.3 s of
processing and 100 MB.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS, MEGABYTES = 0.3, 100
QUESTIONS = {"train": 20_000, "dev": 2_000}


def generate(path: Path, questions: int, seed: int) -> None:
    """A SQuAD v1.1 file of random words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(5000)]
    paragraphs = []
    for paragraph in range(questions // 5):
        context = " ".join(draw.choices(words, k=117))
        qas = [
            {
                "id": f"{seed:012x}{paragraph * 5 + number:012x}",
                "question": " ".join(draw.choices(words, k=9)) + "?",
                "answers": [{"text": " ".join(draw.choices(words, k=3)), "answer_start": 0}],
            }
            for number in range(5)
        ]
        paragraphs.append({"context": context, "qas": qas})
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))


def measure(source: Path, output_dir: Path) -> None:
    """Prepare `source`; prints seconds, and the process's peak memory in bytes."""
    sys.path.insert(0, str(ROOT / "src"))
    from omegaconf import OmegaConf

    from graftwerk.stages import data_prep

    config = {
        "run": {"results_dir": str(output_dir / "run")},
        "kind": "squad",
        "source": str(source),
        "output_dir": str(output_dir),
        "prefix": "squad",
        "tokenizer": None,
        "seed": 1234,
        "split": None,
        "unanswerable_answer": None,
    }
    started = time.perf_counter()
    data_prep.run(OmegaConf.create(config))
    seconds = time.perf_counter() - started
    # Linux counts in kilobytes.
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="runs, of which the median counts")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for seed, (name, questions) in enumerate(QUESTIONS.items()):
            generate(source / f"{name}.json", questions, seed)
        runs = []
        for number in range(arguments.repeat):
            command = [sys.executable, __file__, "--measure", str(source), f"{folder}/{number}"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, memory = map(float, output.split()[-2:])
            runs.append((seconds, memory / 1e6))
    seconds, megabytes = (sorted(values)[len(runs) // 2] for values in zip(*runs, strict=True))
    print(f"{sum(QUESTIONS.values())} questions: {seconds:.2f} s, {megabytes:.0f} MB peak")
    print(f"limits: {SECONDS} s, {MEGABYTES} MB")
    return 0 if seconds <= SECONDS and megabytes <= MEGABYTES else 1


if __name__ == "__main__":
    sys.exit(main())
