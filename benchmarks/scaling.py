"""Step time, memory and traffic of each layout: LoRA on a GPT of 124M parameters.

    python3 benchmarks/scaling.py [--rounds 3] [--steps 3]

GPT-2's shape with random weights, rank 8 on the fused queries, keys and values, float32, 8 rows of
128 tokens (and the answer behind them) a step in passes of 2, plain `peft` stages on gloo
processes of one thread each. Layouts take turns. Of all steps but a process's first the fastest
counts: others share the machine. CPU seconds are those of all processes together. Memory is the
peak of a process (the larger one's) while it trains: what is its own, and with the pages of mapped
files that others share.

Traffic is counted in one step, on rank 0: the bytes of what is reduced, sent and received, and of
what is gathered. Exit code 1 where it is not what the formula says.
"""

import argparse
import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from graftwerk.checkpoints import save_base
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.models import GPT, TransformerConfig
from graftwerk.stages import learning
from graftwerk.training.module import SUMS, LearningModule

LAYERS, HIDDEN, WORDS, LENGTH, RANK = 12, 768, 50257, 128, 8
ROWS, MICRO = 8, 2
COUNTED = 1  # the step whose traffic is counted; the one before it warms up
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 process": {},
    "data 2": {},
    "tensor 2": {"tensor_model_parallel_size": 2},
    "tensor 2, sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline_model_parallel_size": 2},
    "data 2, base sharded": {"use_fsdp": True},
}
RECOMPUTED = {"activations_checkpoint_granularity": "full"}
LAYOUTS |= {"1 process, recomputed": RECOMPUTED}


def main() -> int:
    """Measures and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed ones of each round")
    arguments = parser.parse_args()
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for number in range(arguments.rounds):
            for name in LAYOUTS:
                print(f"round {number + 1}: {name}", file=sys.stderr)
                found[name].append(measure(Path(folder), name, arguments.steps))
    print("| layout | seconds a step | CPU seconds | own MB | with mapped | MB moved | formula |")
    print("|---|---|---|---|---|---|---|")
    right = True
    for name, rounds in found.items():
        ranks = [rank for each in rounds for rank in each]
        moved, wanted = ranks[0]["bytes"], formula(name)
        right = right and moved == wanted
        walls = [
            max(step) for each in rounds for step in zip(*(r["wall"] for r in each), strict=True)
        ]
        cpus = [
            sum(step) for each in rounds for step in zip(*(r["cpu"] for r in each), strict=True)
        ]
        memory = [max(rank[key] for rank in ranks) / 1e6 for key in ("own", "resident")]
        print(
            f"| {name} | {min(walls):.2f} | {min(cpus):.2f} | {memory[0]:.0f} | {memory[1]:.0f} "
            f"| {moved / 1e6:.2f} | {wanted / 1e6:.2f} |"
        )
    return 0 if right else 1


# ---- what the formula says


def formula(name: str) -> int:
    """Bytes on rank 0 in one step: B S h of a pass, as collectives.py's table has them."""
    states, passes = 4 * MICRO * LENGTH * HIDDEN, ROWS // MICRO
    labels = MICRO  # one answer token a row
    adapters = LAYERS * RANK * (HIDDEN + 3 * HIDDEN)  # A [r, h] and B [3 h, r]
    bucket = 4 * (adapters + SUMS)
    if name == "data 2":
        return bucket
    if name == "pipeline 2":
        # States there, gradients back; sums of the loss, of the wish to stop and of the norm.
        return passes * 2 * states + 4 * (2 + 1)
    if name == "data 2, base sharded":
        projections = HIDDEN * (3 * HIDDEN + HIDDEN + 4 * HIDDEN + 4 * HIDDEN)
        layer = projections + (3 + 1 + 4 + 1) * HIDDEN + 4 * HIDDEN  # and biases, two norms
        root = (WORDS + LENGTH + 1) * HIDDEN + 2 * HIDDEN
        padded = HIDDEN * (WORDS % 2 + (LENGTH + 1) % 2)  # both tables, to even rows
        return passes // 2 * 4 * (2 * LAYERS * layer + root + padded) + bucket
    if name.startswith("tensor 2"):
        # Two sublayers a layer; backward the first one's input has no gradient.
        exchanges = 2 * LAYERS + (2 * LAYERS - 1)
        words = states + 4 * labels * (1 + 2) + 4 * labels * HIDDEN
        if "sequence" in name:
            # A gather and a scatter instead of each, but for the gather of the gradient of the
            # first sublayer's output, and what the stack gathers at its end.
            exchanges = 2 * exchanges + 1 + 1
        once = LAYERS * RANK * HIDDEN + 1 + 1  # gradients of A, the wish to stop, the norm
        return passes * (exchanges * states + words) + 4 * once
    return 0


# ---- runs


def write_inputs(folder: Path) -> None:
    """The base, and rows of `LENGTH` tokens and an answer of one."""
    texts = [f"w{n}" for n in range(60)]
    tokenizer = build_tokenizer("word", texts)
    shape = TransformerConfig(
        vocab_size=WORDS,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=12,
        ffn_hidden_size=4 * HIDDEN,
        max_position_embeddings=LENGTH + 1,
    )
    model = GPT(shape)
    model.initialise(torch.Generator().manual_seed(0))
    save_base(model, tokenizer, folder / "base")
    with open(folder / "rows.jsonl", "w") as file:
        for row in range(64):
            words = [f"w{(7 * row + 3 * n) % 60}" for n in range(LENGTH)]
            line = {"taskname": "t", "question": " ".join(words), "answer": f"w{row % 60}"}
            file.write(json.dumps(line) + "\n")


def configuration(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """The stage's, as the launcher would write it."""
    results = folder / "results"
    template = {"taskname": "t", "prompt_template": "{question} {answer}"}
    return {
        "run": {"name": "scaling", "results_dir": str(results)},
        "trainer": {
            "devices": world_of(name),
            "num_nodes": 1,
            "accelerator": "cpu",
            "precision": 32,
            "max_epochs": -1,
            "max_steps": steps,
            "log_every_n_steps": 100,
            "gradient_clip_val": 1.0,
        },
        "exp_manager": {
            "explicit_log_dir": str(results),
            "create_tensorboard_logger": False,
            "create_checkpoint_callback": False,
        },
        "model": {
            "seed": 1234,
            "nemo_path": str(results / "adapter"),
            "encoder_seq_length": LENGTH + 1,
            "global_batch_size": ROWS,
            "micro_batch_size": MICRO,
            "language_model_path": str(folder / "base"),
            "new_tasks": ["t"],
            "task_templates": [template],
            "peft": {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": RANK}},
            "data": {"train_ds": [str(folder / "rows.jsonl")], "add_eos": False},
            "optim": {"name": "adamw", "lr": 1e-4},
            **LAYOUTS[name],
        },
    }


def world_of(name: str) -> int:
    return 1 if name.startswith("1 ") else 2


def measure(folder: Path, name: str, steps: int) -> list[dict[str, Any]]:
    """What each process of a run says of itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = world_of(name)
    config = configuration(folder, name, steps + COUNTED + 1)
    spawn(process, (world, port, folder, config), nprocs=world)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def process(rank: int, world: int, port: int, folder: Path, config: dict[str, Any]) -> None:
    """One process of a run, in torchrun's environment; the first says nothing on the screen."""
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in given.items()}, MASTER_ADDR="127.0.0.1")
    found: dict[str, Any] = {"wall": [], "cpu": [], "bytes": 0, "own": 0, "resident": 0}
    step = LearningModule.training_step

    def measured(self: LearningModule, batch: Any, batch_idx: int) -> None:
        if self.global_step == COUNTED:
            with Traffic() as traffic:
                step(self, batch, batch_idx)
            found["bytes"] = traffic.bytes
            return
        wall, cpu = time.perf_counter(), time.process_time()
        with watched(found):
            step(self, batch, batch_idx)
        if self.global_step > COUNTED:
            found["wall"].append(time.perf_counter() - wall)
            found["cpu"].append(time.process_time() - cpu)

    LearningModule.training_step = measured  # type: ignore[method-assign]
    with redirect_stdout(io.StringIO()):
        assert learning.run("peft", OmegaConf.create(config)) == 0
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what collectives, sends and receives are given."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            # What is gathered comes first, and what is scattered is the second argument.
            given = args[1] if "reduce_scatter" in str(func) else args[0]
            self.bytes += sum(tensor.nbytes for tensor in tensors_in(given))
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


@contextmanager
def watched(found: dict[str, Any]) -> Iterator[None]:
    """Notes the highest RssAnon and VmRSS of this process, looked at every 20 ms."""
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {k: int(v.split()[0]) for k, v in (x.split(":") for x in lines if " kB" in x)}
            found["own"] = max(found["own"], sizes["RssAnon"] * 1024)
            found["resident"] = max(found["resident"], sizes["VmRSS"] * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
