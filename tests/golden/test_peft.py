"""peft's own files: what they compute here, what trains, and what is written back."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from graftwerk.checkpoints import load_adapter, load_base
from graftwerk.checkpoints.peft import WEIGHTS, save_peft
from graftwerk.generation.decoding import generate
from graftwerk.models import GPT, T5
from tests.conftest import SHARED

FOLDER = SHARED / "golden" / "peft"
LISTED = json.loads((FOLDER / "index.json").read_text())["cases"] if FOLDER.is_dir() else []
CASES: list[dict[str, Any]] = [
    json.loads((FOLDER / case["path"] / "case.json").read_text()) for case in LISTED
]
cases = pytest.mark.parametrize("case", CASES, ids=[case["path"] for case in CASES])
pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden cases at {FOLDER}")


def loaded(case: dict[str, Any]) -> tuple[GPT | T5, str, dict[str, Tensor]]:
    """The case's model with its adapter active, the adapter's name, inputs and outputs."""
    model = load_base(FOLDER / case["base"])
    assert isinstance(model, GPT | T5)
    name = load_adapter(model, FOLDER / case["files"]["adapter"])
    model.set_active(name)
    return model, name, load_file(FOLDER / case["files"]["tensors"])


def logits_of(model: GPT | T5, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [B, S, V]; the rows' padding is on the right."""
    seen = inputs["attention_mask"].bool()
    if isinstance(model, T5):
        documents = torch.where(seen, 0, -1)
        return model(
            inputs["decoder_input_ids"], source=inputs["input_ids"], source_documents=documents
        )
    return model(inputs["input_ids"], end=torch.where(seen, seen.shape[1], 0))


def loss_of(model: GPT | T5, inputs: dict[str, Tensor]) -> Tensor:
    logits, labels = logits_of(model, inputs), inputs["labels"]
    if isinstance(model, GPT):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@cases
@torch.no_grad()
def test_logits_and_loss_are_those_of_peft(case):
    model, _, golden = loaded(case)
    length = golden["labels"].shape[1]
    theirs = golden["logits"][:, -length:]  # without those of virtual tokens
    torch.testing.assert_close(logits_of(model, golden), theirs, **case["tolerance"])
    if golden["logits"].shape[1] == length:  # peft asks the last virtual token for the first word
        loss = loss_of(model, golden)[None]
        torch.testing.assert_close(loss, golden["loss"], **case["tolerance"])


@cases
def test_generation_with_a_cache_gives_the_ids_of_peft_without(case):
    model, _, golden = loaded(case)
    prompts, whole = golden["gen_input_ids"].tolist(), golden["generated_ids"]
    given = 1 if isinstance(model, T5) else len(prompts[0])
    made = generate(model, prompts, whole.shape[1] - given)
    assert made == whole[:, given:].tolist()


@cases
def test_gradients_are_as_long_as_those_of_peft(case):
    model, name, golden = loaded(case)
    model.freeze_base()
    loss_of(model, golden).backward()
    known = case["grad_l2"]
    if not any(key.startswith("base_model") for key in known):
        pytest.skip("peft keeps no network of a prompt: see the next test")
    squares = sum(
        float(parameter.grad.square().sum())
        for _, _, part in model.parts(name)
        for parameter in part.parameters()
        if parameter.grad is not None
    )
    assert squares**0.5 == pytest.approx(sum(n * n for n in known.values()) ** 0.5, rel=1e-4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case["trainable"]


@cases
def test_written_back_it_is_the_same_tensors(case, tmp_path):
    model, name, _ = loaded(case)
    save_peft(model, name, tmp_path / "again", base=case["base"])
    ours = load_file(tmp_path / "again" / WEIGHTS)
    theirs = load_file(FOLDER / case["files"]["adapter"] / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
