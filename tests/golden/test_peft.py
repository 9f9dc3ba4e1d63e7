"""peft's own files: what they compute here, what trains, and what is written back."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from graftwerk.adapters import PrefixTuningConfig, PTuningConfig
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
        pytest.skip("peft keeps no network of a prompt: see the test of those")
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


# ---- what made a prompt in training, of which the file has the result alone

SIZES: dict[str, Any] = {"virtual_tokens": 4, "embedding_dim": 32, "bottleneck_dim": 16}
PREFIX: dict[str, Any] = {
    "prefix_length": 4, "shifts_positions": True, "relative_positions": "both",
    "cross_prefix": False, "bottleneck_dim": 16,
}  # fmt: skip
NETWORKS: dict[str, Any] = {
    "p_tuning_mlp": PTuningConfig(encoder="peft_mlp", place="word_embedding", **SIZES),
    "p_tuning_lstm": PTuningConfig(encoder="peft_lstm", place="word_embedding", **SIZES),
    "prefix": PrefixTuningConfig(reparametrise=False, **PREFIX),
    "prefix_projection": PrefixTuningConfig(**PREFIX),
}
LEAVES = {
    "p_tuning_mlp": {"mlp_head.0": "first", "mlp_head.2": "between", "mlp_head.4": "second"},
    "p_tuning_lstm": {"lstm_head": "lstm", "mlp_head.0": "first", "mlp_head.2": "second"},
}


def network_state(name: str, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft's network of a prompt by our names; each layer's rows of a prefix are its own here."""
    theirs = {key.removeprefix("default."): tensor for key, tensor in theirs.items()}
    slot = "decoder.layers.{}.self_attention.prefix."
    words = theirs["embedding.weight"]
    if name in LEAVES:
        state = {"embedding.words.embedding": words}
        for start, ours in LEAVES[name].items():
            found = {key: tensor for key, tensor in theirs.items() if key.startswith(f"{start}.")}
            state |= {f"embedding.words.{ours}{k.removeprefix(start)}": t for k, t in found.items()}
        return state
    if name == "prefix":
        return {f"{slot.format(i)}rows": rows for i, rows in enumerate(words.chunk(3, 1))}
    encoder = f"{slot.format(0)}encoder."
    state = {f"{encoder}embedding": words}
    for leaf in ("weight", "bias"):
        state[f"{encoder}linear_in.{leaf}"] = theirs[f"transform.0.{leaf}"]
        for layer, rows in enumerate(theirs[f"transform.2.{leaf}"].chunk(3)):
            state[f"{slot.format(layer)}linear_out.{leaf}"] = rows
    return state


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["case"] in NETWORKS], ids=lambda c: c["path"]
)
def test_a_network_that_peft_trained_makes_the_same_prompt_and_trains_as_many(case, tmp_path):
    model = load_base(FOLDER / case["base"])
    assert isinstance(model, GPT)
    model.add_adapter("mine", NETWORKS[case["case"]])
    theirs = load_file(FOLDER / case["path"] / "prompt_encoder_train.safetensors")
    model.load_adapter_state("mine", network_state(case["case"], theirs))
    model.set_active("mine")
    model.freeze_base()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case["trainable"]
    golden = load_file(FOLDER / case["files"]["tensors"])
    logits = logits_of(model, golden)
    wanted = golden["logits"][:, -logits.shape[1] :]
    torch.testing.assert_close(logits, wanted, **case["tolerance"])
    save_peft(model, "mine", tmp_path / "out")
    saved = load_file(FOLDER / case["files"]["adapter"] / WEIGHTS)["prompt_embeddings"]
    made = load_file(tmp_path / "out" / WEIGHTS)["prompt_embeddings"]
    torch.testing.assert_close(made, saved, atol=1e-6, rtol=1e-5)
    if golden["logits"].shape[1] == logits.shape[1]:  # a prompt's first word has no loss here
        loss_of(model, golden).backward()
        squares = sum(
            float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None
        )
        known = sum(n * n for n in case["grad_l2"].values()) ** 0.5
        assert squares**0.5 == pytest.approx(known, rel=1e-4)
