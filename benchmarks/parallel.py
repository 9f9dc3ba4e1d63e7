"""Four adapters in one pass, and what empty slots cost: graftwerk beside AdapterHub's `adapters`.

    python3 benchmarks/parallel.py --setup      # their library into build/peer-adapters, once
    python3 benchmarks/parallel.py [--rounds 5]

GPT-2 of 124M parameters with random weights, 4 x 128 tokens, float32, one thread, forward passes to
the last hidden states. Four bottlenecks (`seq_bn`, reduction factor 16) lie in the upper six
layers; `Parallel` of the four is timed against four passes with one each. Empty models have none.

Either side is a process of its own, with its own libraries; they take turns, and each says its CPU
seconds. Theirs writes model and adapters, ours reads those files, and results must agree before
anything is timed. Figures are medians over the rounds, with the lowest and the highest; ratios are
of one round's seconds. Exit code 1 where ours is not faster, in one pass with four adapters and
without any.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import spread

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "build/peer-adapters"
PACKAGES = ("torch==2.13.0", "adapters==1.3.0", "transformers==4.57.6")
NAMES = ("one", "two", "three", "four")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"n_embd": 128, "n_layer": 4, "n_head": 2},  # to see that all runs
    "gpt2": {},
}
ROWS, TOKENS = 4, 128
TOLERANCE = 1e-3
MEASURES = {
    "parallel": "`Parallel` of four",
    "passes": "four passes with one each",
    "empty": "no adapter",
    "plain": "transformers' GPT-2, no slots",
}


def main() -> int:
    """Sets up, or measures and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setup", action="store_true", help="install their library")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.setup:
        venv.create(PEER, with_pip=True)
        install = [PEER / "bin/python", "-m", "pip", "install", "--quiet", *PACKAGES]
        return subprocess.run(install, check=False).returncode
    if arguments.worker:
        work(arguments.worker, arguments.folder, arguments.shape)
        return 0
    if not (PEER / "bin/python").exists():
        print("their library is not there: run benchmarks/parallel.py --setup", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        theirs = Worker(PEER / "bin/python", "theirs", folder, arguments.shape)
        ours = Worker(Path(sys.executable), "ours", folder, arguments.shape)
        apart = ours.ask("compare")
        if apart > TOLERANCE:
            print(f"the results are {apart} apart: nothing was timed", file=sys.stderr)
            return 1
        print(f"{ours.says} beside {theirs.says}; results agree to {apart:.1e}\n")
        found = measure(ours, theirs, arguments.rounds)
    print(table(found))
    times = {what: statistics.median(ratios(found, what)) for what in ("parallel", "empty")}
    return 0 if min(times.values()) > 1 else 1


Seconds = dict[str, dict[str, list[float]]]  # of each side and measure, round by round


def measure(ours: "Worker", theirs: "Worker", rounds: int) -> Seconds:
    """CPU seconds; sides and measures take turns."""
    seconds: Seconds = {"ours": {}, "theirs": {}}
    for number in range(rounds + 1):
        for what in MEASURES:
            for worker in (ours, theirs) if number % 2 else (theirs, ours):
                taken = worker.ask(what)
                if number:  # the first round warms up
                    seconds[worker.side].setdefault(what, []).append(taken)
    return seconds


def ratios(found: Seconds, what: str) -> list[float]:
    """How many times faster ours is than theirs, in each round."""
    pairs = zip(found["theirs"][what], found["ours"][what], strict=True)
    return [theirs / ours for theirs, ours in pairs]


def table(found: Seconds) -> str:
    lines = [
        "| CPU seconds: median (lowest, highest) | graftwerk | adapters | times faster |",
        "|---|---:|---:|---:|",
    ]
    for what, words in MEASURES.items():
        ours, theirs = (spread(found[side][what], ".2f") for side in ("ours", "theirs"))
        lines.append(f"| {words} | {ours} | {theirs} | {spread(ratios(found, what), '.2f')} |")
    gains = []
    for own in (found["ours"], found["theirs"]):
        pairs = zip(own["passes"], own["parallel"], strict=True)
        gains.append(spread([passes / parallel for passes, parallel in pairs], ".2f"))
    return "\n".join([*lines, f"| passes / `Parallel` | {' | '.join(gains)} | |"])


class Worker:
    """A side's process: it is asked by a word on a line, and answers with a number."""

    def __init__(self, python: Path, side: str, folder: str, shape: str):
        self.side = side
        command = [str(python), __file__, "--worker", side, "--folder", folder, "--shape", shape]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.says = self._answer()

    def ask(self, what: str) -> float:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.side} has ended: its error is above")
        return json.loads(line)


def work(side: str, folder: Path, shape: str) -> None:
    """A worker's life: everything is made, then questions are answered until there are none."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(0, 50257, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries talk
    with torch.no_grad():
        if side == "theirs":
            runs, says = theirs(folder, tokens, SHAPES[shape])
        else:
            runs, says = ours(folder, tokens)
        print(json.dumps(says), file=answers, flush=True)
        for line in sys.stdin:
            what = line.strip()
            if what == "compare":
                result = float(
                    (runs["parallel"]() - torch.load(folder / "parallel.pt")).abs().max()
                )
            else:
                start = time.process_time()
                runs[what]()
                result = time.process_time() - start
            print(json.dumps(result), file=answers, flush=True)


def theirs(
    folder: Path, tokens: Any, shape: dict[str, int]
) -> tuple[dict[str, Callable[[], Any]], str]:
    """Their models, which it writes for ours to read."""
    import adapters
    import torch
    import transformers
    from adapters import composition

    torch.manual_seed(0)
    plain = transformers.GPT2Model(transformers.GPT2Config(**shape)).eval()
    plain.save_pretrained(folder / "base")

    def another() -> Any:
        model = transformers.GPT2Model.from_pretrained(folder / "base").eval()
        adapters.init(model)
        return model

    empty, model = another(), another()
    free = list(range(model.config.n_layer // 2))  # layers without adapters
    for name in NAMES:
        config = adapters.SeqBnConfig(reduction_factor=16, leave_out=free)
        model.add_adapter(name, config=config)
        model.save_adapter(str(folder / name), name)
    side_by_side = composition.Parallel(*NAMES)

    def under(setup: Any) -> Any:
        model.set_active_adapters(setup)
        return model(tokens, use_cache=False).last_hidden_state

    torch.save(under(side_by_side), folder / "parallel.pt")
    runs = {
        "parallel": lambda: under(side_by_side),
        "passes": lambda: [under(name) for name in NAMES],
        "empty": lambda: empty(tokens, use_cache=False),
        "plain": lambda: plain(tokens, use_cache=False),
    }
    return runs, f"adapters {adapters.__version__} (transformers {transformers.__version__})"


def ours(folder: Path, tokens: Any) -> tuple[dict[str, Callable[[], Any]], str]:
    """Our models from what they have written, and today's transformers."""
    sys.path.insert(0, str(ROOT / "src"))
    import torch
    import transformers

    from graftwerk.adapters import Parallel
    from graftwerk.checkpoints import load_adapters, load_base

    plain = transformers.GPT2Model.from_pretrained(folder / "base").eval()
    empty: Any = load_base(folder / "base")
    model: Any = load_base(folder / "base")
    for name in NAMES:
        load_adapters(model, folder / name)
    side_by_side = Parallel(*NAMES)

    def under(setup: Any) -> Any:
        model.set_active(setup)
        return model.hidden_states(tokens)

    runs = {
        "parallel": lambda: under(side_by_side),
        "passes": lambda: [under(name) for name in NAMES],
        "empty": lambda: empty.hidden_states(tokens),
        "plain": lambda: plain(tokens, use_cache=False),
    }
    return runs, f"torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    sys.exit(main())
