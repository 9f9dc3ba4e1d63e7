"""What share of the device's matrix products a training step reaches, and where the rest goes.

    python3 benchmarks/training.py --setup      # `peft` into build/peer-peft, once; may be left out
    python3 benchmarks/roofline.py SQUAD TOKENIZER [--threads 2]
    python3 benchmarks/roofline.py SQUAD TOKENIZER --device cuda

SQUAD and TOKENIZER, the base, the step and what is counted are those of `training.py`: LoRA of rank
8 on queries, keys and values; GPT-2 124M in float32 or, on a GPU, the shape of Llama 3.2 1B in
bfloat16, random weights. Plain rows are 16 of one length in two passes, which share nothing; on the
CPU shared rows come behind them, the questions of some paragraphs, each paragraph computed once.
There `peft` trains the plain rows, too, where its environment is there; the losses must agree
before anything is timed.

The peak is that of large products of matrices in the same process, the best of those before and
behind a step. A step's share of it is by the operations that it did, counted as they ran (attention
as wide as its rows), and by those that are of use: no padding, no pair that is not seen. Alone, the
step's own products and attention run one by one, each on operands of the same shapes and strides:
what is lost there is the shapes' doing, what the step loses beyond it everything else's.

Variants are processes one after another, so that one model at a time is in memory. Exit code 1
where ours does not reach its target: on the CPU 75 % of the peak in plain rows and 60 % by useful
operations in shared ones, on a GPU 45 % in plain rows. A `--shape` of one's own has no target.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import training
from figures import spread

SHAPES = {"cpu": "gpt2", "cuda": "llama3_1b"}
TARGETS = {  # (device, variant): what, and its least share of the peak
    ("cpu", "padded"): ("done", 0.75),
    ("cpu", "shared"): ("useful", 0.60),
    ("cuda", "padded"): ("done", 0.45),
}
ROWS = {"padded": "plain rows", "shared": "shared rows"}
PRODUCTS = 12  # rows in the table of products; the others are one row


@dataclass
class Found:
    """What the process of a variant has said, and in each round of it.

    `flops`: operations of a step that it did; `formula`: those of its shapes by
    `graftwerk.models.flops`, `useful`: of them, those that it had to do; 0 where nobody says so.
    """

    tokens: int
    flops: float
    formula: float
    useful: float
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    alone: list[list[dict[str, Any]]] = field(default_factory=list)
    groups: dict[str, float] = field(default_factory=dict)

    def shares(self, of: str) -> list[float]:
        """Of the peak, round by round: `done`, `useful`, or what products reach `alone`."""
        rounds = range(len(self.seconds))
        if of == "alone":
            seconds = [sum(c["calls"] * c["seconds"] for c in calls) for calls in self.alone]
        else:
            seconds = self.seconds
        flops = self.useful if of == "useful" else self.flops
        return [flops / seconds[n] / self.peaks[n] for n in rounds]


def main() -> int:
    """Measures and prints the tables; returns the exit code."""
    arguments = parsed()
    shape = arguments.shape or SHAPES[arguments.device]
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = "bfloat16" if arguments.device == "cuda" else "float32"
        training.write_base(folder, shape, arguments.seed, dtype)
        for variant in (variant for device, variant in TARGETS if device == arguments.device):
            given = argparse.Namespace(**vars(arguments))
            given.plain = arguments.plain if variant == "padded" else None
            [counts] = training.write_rows(folder, given)
            print(f"{ROWS[variant]}: {counts}", file=sys.stderr)
            peers = ("peft",) if variant == "padded" and beside_peft(arguments) else ()
            case = training.Case(
                name, "lora", peers, "", variant, arguments.threads, device=arguments.device
            )
            case = replace(case, length=arguments.length, dtype=dtype)
            said: dict[str, Any] = {}
            for side in (*peers, "ours"):
                label = f"{side}, {ROWS[variant]}"
                found[label] = measured(replace(case, side=side), counts["tokens"], said, arguments)
            ours = found[f"ours, {ROWS[variant]}"]
            for side in peers:  # what is of use does not depend on who does it
                found[f"{side}, {ROWS[variant]}"].useful = ours.useful
    print(f"\n{shape}, {dtype}, {arguments.device}, {arguments.threads} threads\n")
    print(table(found))
    print("\n" + groups_table(found))
    for label, each in found.items():
        print(f"\n{label}\n\n{products_table(each)}")
    return 0 if reached(found, arguments) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("squad", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--shape", choices=training.SHAPES, help="instead of the device's")
    parser.add_argument("--plain", type=int, default=512, metavar="TOKENS", help="of a plain row")
    parser.add_argument("--paragraphs", type=int, default=8, help="0: all of the file")
    parser.add_argument("--step", type=int, default=8, help="paragraphs of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a shared row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in (arguments.squad, arguments.tokenizer):
        if not path.exists():
            parser.error(f"{path} is not there")
    for name in ("plain", "step", "length", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU")
    return arguments


def beside_peft(arguments: argparse.Namespace) -> bool:
    return arguments.device == "cpu" and (training.PEERS["peft"][0] / "bin/python").exists()


def measured(
    case: training.Case, tokens: int, said: dict[str, Any], arguments: argparse.Namespace
) -> Found:
    """A variant's process, from its beginning to its end; `said`: what those before it have said.

    Raises:
        SystemExit: where its loss is not that of the others.
    """
    worker = training.Worker(case)
    try:
        said[f"{case.side} padded"] = worker.says
        print(f"{worker.name}: {worker.says['version']}", file=sys.stderr)
        if case.side == "ours" and case.peers:
            apart = training.disagreement(said, case.peers)
            if wrong := training.disagreeing(apart, case.dtype):
                raise SystemExit(f"the losses do not agree: {', '.join(wrong)}: {apart}")
        flops = worker.ask("count")["flops"]
        found = Found(tokens, flops, *(worker.says.get(k, 0.0) for k in ("formula", "useful")))
        before = worker.ask("step")["matrices"]  # which warms up, too
        worker.ask("alone")
        for _ in range(arguments.rounds):
            taken = worker.ask("step")
            found.seconds.append(taken["seconds"])
            found.peaks.append(max(before, taken["matrices"]))
            before = taken["matrices"]
            found.alone.append(worker.ask("alone")["calls"])
        found.groups = worker.ask("trace")
    finally:
        worker.end()
    return found


def reached(found: dict[str, Found], arguments: argparse.Namespace) -> bool:
    """Whether ours reaches its targets; says so for each that there is."""
    right = True
    for variant, rows in ROWS.items():
        if arguments.shape is None and (arguments.device, variant) in TARGETS:
            of, least = TARGETS[arguments.device, variant]
            share = statistics.median(found[f"ours, {rows}"].shares(of))
            words = "by useful operations" if of == "useful" else "by operations"
            print(f"\n{rows}: {share:.0%} of the peak {words}; the target is {least:.0%}")
            right = right and share >= least
    return right


# ---- tables


def table(found: dict[str, Found]) -> str:
    lines = [
        "| | row tokens | seconds a step | GFLOP | by formula | useful | GFLOP/s | peak GFLOP/s "
        "| of the peak | useful | its products alone |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, each in found.items():
        rate = each.flops / statistics.median(each.seconds) / 1e9
        formula = f"{each.formula / 1e9:.1f}" if each.formula else ""
        lines.append(
            f"| {label} | {each.tokens:,} | {spread(each.seconds, '.3g')} "
            f"| {each.flops / 1e9:.1f} | {formula} | {each.useful / 1e9:.1f} "
            f"| {rate:.0f} "
            f"| {spread([peak / 1e9 for peak in each.peaks], '.0f')} "
            f"| {spread(each.shares('done'), '.0%')} "
            f"| {statistics.median(each.shares('useful')):.0%} "
            f"| {spread(each.shares('alone'), '.0%')} |"
        )
    return "\n".join(lines)


def groups_table(found: dict[str, Found]) -> str:
    """Where the seconds of one traced step go."""
    names: dict[str, None] = {}
    for each in found.values():
        names |= dict.fromkeys(sorted(each.groups, key=lambda name: -each.groups[name]))
    lines = [f"| share of a traced step | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    for name in names:
        shares = [each.groups.get(name, 0.0) / sum(each.groups.values()) for each in found.values()]
        lines.append(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(lines)


def products_table(found: Found) -> str:
    """The products that take longest alone: calls a step, operations, and what they reach."""
    flops: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    seconds: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(found.alone))
    for number, given in enumerate(found.alone):
        for call in given:
            name = call["product"]
            seconds[name][number] += call["calls"] * call["seconds"]
            if not number:
                flops[name] += call["calls"] * call["flops"]
                calls[name] += call["calls"]
    order = sorted(seconds, key=lambda name: -statistics.median(seconds[name]))
    kept = dict.fromkeys(order[:PRODUCTS]) | {"others": None}
    for name in order[PRODUCTS:]:
        flops["others"] += flops[name]
        calls["others"] += calls[name]
        pairs = zip(seconds["others"], seconds[name], strict=True)
        seconds["others"] = [one + other for one, other in pairs]
    step = statistics.median(found.seconds)
    lines = [
        "| product | calls | GFLOP | GFLOP/s alone | of the peak | of a step's seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in (name for name in kept if calls[name]):
        rates = [flops[name] / taken for taken in seconds[name]]
        shares = [rate / peak for rate, peak in zip(rates, found.peaks, strict=True)]
        lines.append(
            f"| {name} | {calls[name]} | {flops[name] / 1e9:.2f} "
            f"| {statistics.median(rates) / 1e9:.0f} | {statistics.median(shares):.0%} "
            f"| {statistics.median(seconds[name]) / step:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
