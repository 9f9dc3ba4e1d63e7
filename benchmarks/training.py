"""Seconds, tokens and memory of training adapters: graftwerk beside `peft` and `adapters`.

    python3 benchmarks/training.py --setup          # their libraries into build/peer-*, once
    python3 benchmarks/training.py SQUAD TOKENIZER [--shape gpt2] [--method lora] [--paragraphs 8]

SQUAD is a file in SQuAD's format, TOKENIZER the folder of GPT-2's. Bases have random weights in the
shapes of GPT-2 124M and SmolLM2-135M (with GPT-2's words), float32. A step is forward, backward and
AdamW on the questions of some sampled paragraphs, each once: padded, shuffled, in micro-batches of
8; packed, in rows of 1,024 tokens; shared, each paragraph computed once. `--plain` takes rows of
one length instead, which pack into nothing and share nothing. With `--dtype bfloat16` bases are of
that type and adapters of float32; peers then run under autocast, as their trainer runs them.

Every variant is a process of its own with its own libraries. They take turns, round by round, and
each says its seconds, CPU seconds and peak memory: medians, and the spread of the rounds. A peer
writes its adapter, away from its values at birth, and ours reads it; all losses on the rows have to
agree before anything is timed, to 1e-5 with a peer and 1e-6 among ours (in bfloat16 to 1e-3), else
the exit code is 1.
All are in memory at one time: `--peers` and `--ours` leave some out. With `--deal` the rounds are
one pass: each takes its share of the steps, all variants the same; losses are compared, and
operations counted, over the first share.

The ceiling is what counted operations of matrices and attention allow over the first peer padded,
where every operation takes as long. Each process measures large products of matrices behind its
own step: of these the table says what share of operations a second the step reached. Tokens count
once for each row that they are in.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from figures import spread

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
PEERS = {
    "peft": (BUILD / "peer-peft", ("torch==2.13.0", "peft==0.21.2", "transformers==5.23.0")),
    "adapters": (
        BUILD / "peer-adapters",
        ("torch==2.13.0", "adapters==1.3.0", "transformers==4.57.6"),
    ),
}
GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**GPT2, "n_embd": 128, "n_layer": 2, "n_head": 2},  # to see that all runs
    "gpt2": GPT2,
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 50257,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    },
    "llama3_1b": {  # for a GPU: 5 GB of float32
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    },
}
METHODS = {"lora": ("peft", "adapters"), "ia3": ("peft", "adapters"), "bottleneck": ("adapters",)}
OURS = ("padded", "packed", "shared")
THEIRS = {"peft": ("padded", "packed"), "adapters": ("padded",)}
PROMPT = "context: {context} question: {question} answer: {answer}"
# How far losses may lie apart, relative to one: among ours, and with peers.
AGREE = {"float32": (1e-6, 1e-5), "bfloat16": (1e-3, 1e-3)}


@dataclass(frozen=True)
class Case:
    """What one process is told: who it is, and what it trains on.

    `folder` holds the base, `rows.json` (steps of rows, each its tokens and [position, token] of
    its labels) and the peers' adapters; without peers ours trains a new LoRA. `length`: the most
    tokens of a packed row. A pass takes the next of so many `shares` of the steps. `dtype` is the
    base's; the device is ours alone.
    """

    folder: str
    method: str
    peers: tuple[str, ...]
    side: str
    variant: str
    threads: int
    micro_batch: int = 8
    length: int = 1024
    shares: int = 1
    device: str = "cpu"
    dtype: str = "float32"


def main() -> int:
    """Sets up, or measures and prints the tables; returns the exit code."""
    arguments = parsed()
    if arguments.worker:
        import training_sides

        given = json.loads(arguments.worker)
        training_sides.work(Case(**given))
        return 0
    if arguments.setup:
        return setup()
    for name in {p for method in arguments.method for p in peers_of(method, arguments)}:
        if not (PEERS[name][0] / "bin/python").exists():
            print(f"{name} is not there: run benchmarks/training.py --setup", file=sys.stderr)
            return 2
    right = True
    for shape in arguments.shape:
        with tempfile.TemporaryDirectory() as folder:
            write_base(Path(folder), shape, arguments.seed, arguments.dtype)
            shares = arguments.rounds if arguments.deal else 1
            counts = write_rows(Path(folder), arguments, shares)
            if not all(share["rows"] for share in counts):
                print(f"{shares} rounds are dealt fewer steps: see --paragraphs", file=sys.stderr)
                return 2
            for method in arguments.method:
                right = measured(folder, shape, method, counts, arguments) and right
    return 0 if right else 1


def peers_of(method: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    """Those that stand beside ours: that have the method, and are asked for."""
    return tuple(peer for peer in METHODS[method] if peer in arguments.peers)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("squad", type=Path, nargs="?")
    parser.add_argument("tokenizer", type=Path, nargs="?")
    parser.add_argument("--setup", action="store_true", help="install their libraries")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["gpt2"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["lora"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[*PEERS], help="all, or these")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=[*OURS], help="all, or these")
    parser.add_argument("--paragraphs", type=int, default=8, help="0: all of the file")
    parser.add_argument("--step", type=int, default=8, help="paragraphs of a step")
    parser.add_argument("--plain", type=int, metavar="TOKENS", help="16 rows of one length instead")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--dtype", choices=AGREE, default="float32", help="of bases")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deal", action="store_true", help="all rounds together are one pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.setup or arguments.worker or arguments.tokenizer):
        parser.error("name a SQuAD file and the folder of GPT-2's tokenizer, or give --setup")
    if arguments.plain and "padded" not in arguments.ours:
        parser.error("--plain packs and shares nothing: it needs padded among --ours")
    for method in arguments.method:
        if not peers_of(method, arguments):
            parser.error(f"--method {method} is known by {', '.join(METHODS[method])} of --peers")
    return arguments


def setup() -> int:
    for folder, packages in PEERS.values():
        if not (folder / "bin/python").exists():
            venv.create(folder, with_pip=True)
            install = [folder / "bin/python", "-m", "pip", "install", "--quiet", *packages]
            subprocess.run(install, check=True)
    return 0


# ---- inputs


def write_base(folder: Path, shape: str, seed: int, dtype: str = "float32") -> None:
    """A base with random weights, by transformers."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config: Any = dict(SHAPES[shape])
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder / "base")


def write_rows(
    folder: Path, arguments: argparse.Namespace, shares: int = 1
) -> list[dict[str, int]]:
    """The rows, drawn from torch's random state; returns how many each share of the steps has, and
    tokens in them."""
    import torch

    paragraphs = read_paragraphs(folder, arguments.squad, arguments.tokenizer)
    order = torch.randperm(len(paragraphs)).tolist()[: arguments.paragraphs or None]
    taken = [paragraphs[number] for number in order]
    if arguments.plain:
        tokens = [token for rows in taken for row, _ in rows for token in row]
        size = arguments.plain
        tokens *= -(-16 * size // len(tokens))
        rows = [tokens[size * n : size * (n + 1)] for n in range(16)]
        taken = [[(row, [(size - 1, tokens[n])]) for n, row in enumerate(rows)]]
    steps = []
    for start in range(0, len(taken), arguments.step):
        rows = [row for rows in taken[start : start + arguments.step] for row in rows]
        steps.append([rows[number] for number in torch.randperm(len(rows)).tolist()])
    (folder / "rows.json").write_text(json.dumps(steps))
    dealt = [[tokens for rows in steps[n::shares] for tokens, _ in rows] for n in range(shares)]
    return [{"rows": len(rows), "tokens": sum(map(len, rows))} for rows in dealt]


def read_paragraphs(folder: Path, squad: Path, tokenizer: Path) -> list[list[Any]]:
    """The rows of each paragraph's questions, as the data module would make them."""
    sys.path.insert(0, str(HERE.parent / "src"))
    from transformers import AutoTokenizer

    from graftwerk.data.dataset import AnswerDataset
    from graftwerk.data.encoding import Encoder
    from graftwerk.data.templates import TaskTemplate

    articles = json.loads(squad.read_text("utf-8"))["data"]
    counts, path = [], folder / "questions.jsonl"
    with open(path, "w") as file:
        for paragraph in (p for article in articles for p in article["paragraphs"]):
            counts.append(len(paragraph["qas"]))
            for asked in paragraph["qas"]:
                row = {"context": paragraph["context"], "question": asked["question"]}
                file.write(json.dumps({**row, "answer": asked["answers"][0]["text"]}) + "\n")
    template = TaskTemplate.from_config({"taskname": "squad", "prompt_template": PROMPT})
    encoder = Encoder(template, AutoTokenizer.from_pretrained(tokenizer), 1024)
    data = AnswerDataset([path], {"squad": encoder})
    held = (data.arrays(number) for number in range(len(data)))
    rows = ((row.tokens.tolist(), row.labels.tolist()) for row in held)
    return [[next(rows) for _ in range(count)] for count in counts]


# ---- processes


class Worker:
    """A variant's process: it is asked by a word on a line, and answers with a line of JSON."""

    def __init__(self, case: Case):
        self.name = f"{case.side} {case.variant}"
        python = sys.executable if case.side == "ours" else PEERS[case.side][0] / "bin/python"
        command = [str(python), __file__, "--worker", json.dumps(vars(case))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.says = self.answer()

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} has ended: its error is above")
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measured(
    folder: str,
    shape: str,
    method: str,
    counts: list[dict[str, int]],
    arguments: argparse.Namespace,
) -> bool:
    """One table; whether the losses agree."""
    peers = peers_of(method, arguments)
    case = Case(folder, method, peers, "", "", arguments.threads, length=arguments.length)
    case = replace(case, shares=len(counts), dtype=arguments.dtype)
    # The peers first: ours reads what they write.
    variants = [(peer, variant) for peer in peers for variant in THEIRS[peer]]
    variants += [("ours", variant) for variant in arguments.ours]
    if arguments.plain:
        variants = [(side, variant) for side, variant in variants if variant == "padded"]
    workers = []
    try:
        for side, variant in variants:
            workers.append(Worker(replace(case, side=side, variant=variant)))
        said = {worker.name: worker.says for worker in workers}
        apart = disagreement(said, peers)
        total = {name: sum(share[name] for share in counts) for name in counts[0]}
        print(f"\n{shape}, {method}, {case.dtype}, {total}, {arguments.threads} threads\n")
        print("; ".join(f"{name}: {says['version']}" for name, says in said.items()))
        print(
            f"losses, relative to {next(name for name in said if name.startswith('ours'))}: "
            + ", ".join(f"{k} {v:.1e}" for k, v in apart.items())
        )
        if wrong := disagreeing(apart, case.dtype):
            print(f"the losses do not agree: {', '.join(wrong)}; nothing was timed")
            return False
        found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
        for number in range(arguments.rounds + 1):
            print(f"round {number} of {arguments.rounds}; 0 is not timed", file=sys.stderr)
            for place in range(len(workers)):
                worker = workers[(place + number) % len(workers)]
                taken = worker.ask("step" if number else "count")  # which warms up, too
                print(f"  {worker.name}: {taken}", file=sys.stderr)
                if number:
                    found[worker.name].append(taken)
                else:
                    worker.says |= taken
    finally:
        for worker in workers:
            worker.end()
    print(table(found, {worker.name: worker.says for worker in workers}, counts, workers[0].name))
    return True


def disagreement(said: dict[str, dict[str, Any]], peers: tuple[str, ...]) -> dict[str, float]:
    """How far each variant's loss is from that of our first one; relative to it."""
    apart, first = {}, next(name for name in said if name.startswith("ours"))
    for peer in peers:
        mine = said[first]["loss"][peer]
        for name, says in said.items():
            if name.startswith(("ours", peer)) and name != first:
                apart[f"{name} ({peer}'s)"] = abs(says["loss"][peer] - mine) / mine
    return apart


def disagreeing(apart: dict[str, float], dtype: str) -> list[str]:
    """The variants whose losses are too far apart."""
    ours, theirs = AGREE[dtype]
    return [k for k, v in apart.items() if v > (ours if k.startswith("ours") else theirs)]


def table(
    found: dict[str, list[dict[str, Any]]],
    said: dict[str, dict[str, Any]],
    counts: list[dict[str, int]],
    first: str,
) -> str:
    """Medians of the rounds; ratios are those to the first variant in the same round."""
    lines = [
        "| | questions/s | row tokens/s | times faster (lowest, highest) | ceiling | GFLOP a "
        "question | GFLOP/s (of matrices alone) | CPU seconds a question | peak GB "
        "| seconds of all rounds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    flops = {name: says["flops"] / counts[0]["rows"] for name, says in said.items()}  # a question
    for name, rounds in found.items():
        shares = [counts[number % len(counts)] for number in range(len(rounds))]
        timed = list(zip(shares, rounds, strict=True))
        rate = statistics.median(share["rows"] / taken["seconds"] for share, taken in timed)
        tokens = statistics.median(share["tokens"] / taken["seconds"] for share, taken in timed)
        pairs = zip(found[first], rounds, strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        cpu = statistics.median(taken["cpu"] / share["rows"] for share, taken in timed)
        peak = max(taken["peak"] for taken in rounds)
        all_rounds = sum(taken["seconds"] for taken in rounds)
        reached = statistics.median(
            flops[name] * share["rows"] / taken["seconds"] / taken["matrices"]
            for share, taken in timed
        )
        lines.append(
            f"| {name} | {rate:.2f} | {tokens:.0f} | {spread(ratios, '.2f')} "
            f"| {flops[first] / flops[name]:.2f} | {flops[name] / 1e9:.1f} "
            f"| {flops[name] * rate / 1e9:.0f} ({reached:.0%}) "
            f"| {cpu:.3f} | {peak / 1e9:.2f} | {all_rounds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
