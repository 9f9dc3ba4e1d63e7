"""What the processes of `training.py` do: each side's model, its batches, and its step.

Nothing of one side is imported by another: each runs in an environment of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from operations import Operations, alone, forget_peak, matrices, peak, synchronise, traced

if TYPE_CHECKING:
    from training import Case

RATE = 1e-4
Rows = list[tuple[list[int], list[tuple[int, int]]]]  # tokens, and (position, token) of labels

Answer = Callable[[dict[str, Any]], None]


def work(case: "Case") -> None:
    """A worker's life: the loss at once, then questions are answered until there are none."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries talk
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    steps = json.loads((Path(case.folder) / "rows.json").read_text())
    side = {"ours": ours, "peft": peft, "adapters": adapters}[case.side]

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    side(case, steps, answer)


def asked(share: Callable[[int], Any], answer: Answer, case: "Case") -> Iterator[Any]:
    """Steps again and again, as often as is asked; what is asked for is answered.

    `step`: what the next share of them costs. `count`: operations of the first. `alone`: the same
    calls, each by itself. `trace`: seconds by groups of operators.
    """
    device, counted, turn = case.device, Operations(), 0
    for line in sys.stdin:
        what, groups = line.strip(), {}
        if what == "count":
            counted = Operations()
            with counted:
                yield from share(0)
            answer({"flops": counted.flops})
        elif what == "alone":
            answer({"calls": alone(counted.calls, device)})
        elif what == "trace":
            with traced(groups, device):
                yield from share(0)
            answer(groups)
        else:
            forget_peak(device)
            wall, cpu = time.perf_counter(), time.process_time()
            yield from share(turn % case.shares)
            turn += 1
            synchronise(device)
            seconds = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            memory = peak(device)
            large = matrices(device=device, dtype=case.dtype)
            answer({**seconds, "peak": memory, "matrices": large})


# ---- ours


def ours(case: "Case", steps: list[Rows], answer: Answer) -> None:
    """The learning stages' own module, under Lightning as they run it."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    from graftwerk.adapters.methods.lora import LoRAConfig
    from graftwerk.checkpoints import load_adapters, load_base
    from graftwerk.training.loss import label_losses

    batches = Steps(case, steps)
    dtype = getattr(torch, case.dtype)
    model: Any = load_base(Path(case.folder) / "base", dtype, case.device)
    if not case.peers:
        model.add_adapter("own", LoRAConfig(dim=8))
        model.set_active("own")
    first = [*case.peers, "own"][0]
    losses: dict[str, float] = {}
    for peer in reversed(case.peers):  # what the first one wrote is trained
        load_adapters(model, Path(case.folder) / f"{case.method}-{peer}", peer)
        model.set_active(peer)
        with torch.no_grad():
            losses[peer] = sum(
                label_losses(model(**micro.inputs()), micro.labels, micro.weights).sum().item()
                for step in batches.share(0)
                for micro in step
            )
    model.train_only([first])
    answer({"loss": losses, "version": f"torch {torch.__version__}", **formulas(model, batches)})
    fit(model, Asked(batches.share, answer, case), case.device)


def formulas(model: Any, batches: "Steps") -> dict[str, float]:
    """Operations of the first share of the steps as shapes have them: all, and useful ones."""
    from graftwerk.models.flops import Training, Work

    training, kind = Training.of(model), model.config.architecture
    micros = [micro for step in batches.share(0) for micro in step]
    works = {
        "formula": [Work.of(micro.inputs()) for micro in micros],
        "useful": [Work.useful(micro.inputs(), micro.num_tokens, kind) for micro in micros],
    }
    return {name: sum(training.flops(work).total for work in own) for name, own in works.items()}


def fit(model: Any, steps: Any, device: str = "cpu") -> None:
    """Trains what is to be trained on the steps that come, until there are none."""
    import pytorch_lightning as pl

    from graftwerk.training.module import LearningModule, TrainingSettings
    from graftwerk.training.trainer import quieten

    class Module(LearningModule):
        def on_train_epoch_start(self) -> None:
            """There is no data module whose place it could set."""

    quieten()
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    )
    trainer.fit(Module(model, TrainingSettings({"name": "adamw", "lr": RATE}, None, 1)), steps)


class Steps:
    """Micro-batches of each step, made by the data module's own means when they are asked for."""

    def __init__(self, case: "Case", steps: list[Rows]):
        from graftwerk.data.encoding import Example
        from graftwerk.data.micro_batches import PackedBatches, PaddedBatches
        from graftwerk.data.sampler import Step

        self.rows = [row for rows in steps for row in rows]
        self.filler, self.shares = Example([0]), case.shares
        data: Any = self
        if case.variant == "padded":
            self.batches = PaddedBatches(data, 0, 1, case.micro_batch)
        else:
            share = case.variant == "shared"
            self.batches = PackedBatches(data, 0, 1, 1, room=(case.length,), share=share)
        self.steps, first = [], 0
        for rows in steps:
            self.steps.append(Step(list(range(first, first + len(rows))), first))
            first += len(rows)

    def share(self, number: int) -> Iterator[Any]:
        return (self.batches[step] for step in self.steps[number :: self.shares])

    def __getitem__(self, number: int) -> Any:
        from graftwerk.data.encoding import Example, Label

        tokens, labels = self.rows[number]
        return Example(tokens, [Label(*label) for label in labels])

    def arrays(self, number: int) -> Any:
        import numpy as np

        from graftwerk.data.dataset import RowArrays

        tokens, labels = (np.array(field, np.int32) for field in self.rows[number])
        return RowArrays(number, tokens, labels.reshape(-1, 2), None, None, None)


class Asked:
    """What Lightning takes for a loader: it waits until a pass over the steps is asked for."""

    def __init__(self, share: Callable[[int], Any], answer: Answer, case: "Case"):
        self.share, self.answer, self.case = share, answer, case

    def __iter__(self) -> Iterator[Any]:
        return asked(self.share, self.answer, self.case)

    def __len__(self) -> int:
        return 1 << 40  # known, or Lightning would fetch one step ahead


# ---- theirs


def peft(case: "Case", steps: list[Rows], answer: Answer) -> None:
    """Transformers' model under peft; packed by the padding-free collator of transformers."""
    import peft  # pyright: ignore[reportMissingImports]
    import transformers

    folder = Path(case.folder)
    model = their_base(case)
    written = folder / f"{case.method}-peft"
    if written.exists():
        model = peft.PeftModel.from_pretrained(model, written, is_trainable=True)
    else:
        gpt2 = model.config.model_type == "gpt2"
        names = ["c_attn"] if gpt2 else ["q_proj", "k_proj", "v_proj"]
        config: Any = peft.IA3Config(fan_in_fan_out=gpt2, task_type="CAUSAL_LM")
        if case.method == "lora":
            config = peft.LoraConfig(
                r=8, lora_alpha=8, target_modules=names, fan_in_fan_out=gpt2, task_type="CAUSAL_LM"
            )
        model = peft.get_peft_model(model, config)
        shake(model)
        model.save_pretrained(written)
    flattened = transformers.DataCollatorWithFlattening()

    def packed(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: Any = flattened(rows)
        return batch

    version = f"peft {peft.__version__}, transformers {transformers.__version__}"
    train(case, model, steps, packed if case.variant == "packed" else padded, answer, version)


def adapters(case: "Case", steps: list[Rows], answer: Answer) -> None:
    """AdapterHub's library on transformers' model."""
    import adapters  # pyright: ignore[reportMissingImports]
    import transformers

    folder = Path(case.folder)
    model = their_base(case)
    adapters.init(model)
    config: Any = {
        "lora": lambda: adapters.LoRAConfig(r=8, alpha=8, attn_matrices=["q", "k", "v"]),
        "ia3": adapters.IA3Config,
        "bottleneck": lambda: adapters.DoubleSeqBnConfig(
            reduction_factor=model.config.hidden_size / 64
        ),
    }[case.method]()
    model.add_adapter("adapters", config=config)
    model.train_adapter("adapters")
    shake(model)
    model.save_adapter(str(folder / f"{case.method}-adapters"), "adapters")
    version = f"adapters {adapters.__version__}, transformers {transformers.__version__}"
    train(case, model, steps, padded, answer, version)


def their_base(case: "Case") -> Any:
    """Transformers' model of the base, whose weights keep their type."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        Path(case.folder) / "base",
        attn_implementation="sdpa",
        dtype=getattr(torch, case.dtype),
    )


def shake(model: Any) -> None:
    """Moves what is trained away from its values at birth, where an adapter does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest."""
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def train(
    case: "Case",
    model: Any,
    steps: list[Rows],
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    answer: Answer,
    version: str,
) -> None:
    """Their steps, as their trainer runs them: the mean over a step's labels, pass by pass."""
    examples = [[as_theirs(row) for row in rows] for rows in steps]
    model.config.use_cache = False  # as their trainer has it; else packed rows see each other

    def batches(rows: list[Any]) -> Iterator[dict[str, torch.Tensor]]:
        if collate is padded:
            groups = [rows[n : n + case.micro_batch] for n in range(0, len(rows), case.micro_batch)]
        else:
            groups = first_fit_decreasing(rows, case.length)
        return (collate(group) for group in groups)

    mixed = case.dtype != "float32"  # as their trainer does with `bf16=True`

    def losses(rows: list[Any]) -> Iterator[torch.Tensor]:
        labels = sum(label >= 0 for row in rows for label in row["labels"])
        for batch in batches(rows):
            with torch.autocast("cpu", getattr(torch, case.dtype), enabled=mixed):
                loss = model(**batch, num_items_in_batch=torch.tensor(labels)).loss * labels
            yield loss

    with torch.no_grad():
        model.eval()
        total = sum(loss.item() for rows in examples[:: case.shares] for loss in losses(rows))
    answer({"loss": {case.side: total}, "version": version})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    for rows in asked(lambda number: examples[number :: case.shares], answer, case):
        for loss in losses(rows):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def as_theirs(row: Any) -> dict[str, list[int]]:
    """A row with its last answer token, and a label at each token of the answer."""
    tokens, labels = row
    said = [-100] * (len(tokens) + 1)
    for position, token in labels:
        said[position + 1] = token
    last = [token for position, token in labels if position == len(tokens) - 1]
    return {"input_ids": tokens + last, "labels": said[: len(tokens) + len(last)]}


def first_fit_decreasing(rows: list[Any], length: int) -> list[list[Any]]:
    """Rows as they are packed on our side: the longest first, each where there is room."""
    packs: list[list[Any]] = []
    free: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        place = next((n for n, room in enumerate(free) if room >= size), len(packs))
        if place == len(packs):
            packs.append([])
            free.append(max(length, size))
        packs[place].append(row)
        free[place] -= size
    return packs
