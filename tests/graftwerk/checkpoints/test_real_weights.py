"""Real pretrained models against `transformers`: `make real-weights` fetches them."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from graftwerk.checkpoints import load_base, load_tokenizer
from graftwerk.errors import UserError
from graftwerk.generation import generate
from tests.conftest import ROOT

REAL = Path(os.environ.get("GRAFTWERK_REAL_WEIGHTS", ROOT / "build" / "real-weights"))
PARAGRAPH = (
    "The Normans were the people who in the 10th and 11th centuries gave their name to Normandy, "
    "a region in France. They were descended from Norse raiders and pirates from Denmark, Iceland "
    "and Norway who, under their leader Rollo, agreed to swear fealty to King Charles III of West "
    "Francia."
)
SENTENCES = ["Where is Normandy?", "A region in France, named after the Normans who settled there."]


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no {REAL / name}: say `make real-weights`, or set GRAFTWERK_REAL_WEIGHTS")
    return REAL / name


@torch.no_grad()
def perplexity(logits: torch.Tensor, batch: torch.Tensor) -> float:
    return math.exp(F.cross_entropy(logits[0, :-1], batch[0, 1:]).item())


@torch.no_grad()
def test_perplexity_of_a_paragraph_under_smollm2():
    path = real("smollm2")
    batch = torch.tensor([load_tokenizer(path).encode(PARAGRAPH)])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = perplexity(theirs(batch).logits, batch)
    assert 2 < expected < 30  # a model that knows English
    assert perplexity(load_base(path)(batch), batch) == pytest.approx(expected, rel=5e-5)


@torch.no_grad()
def test_greedy_words_of_smollm2_are_those_of_transformers():

    path = real("smollm2")
    prompt = load_tokenizer(path).encode("The capital of France is")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert generate(load_base(path), [prompt], 20) == [expected[0, len(prompt) :].tolist()]


@torch.no_grad()
def test_states_of_a_real_bert_encoder():
    path = real("minilm")
    theirs, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    expected = theirs(**batch)
    ours = load_base(path)
    documents = torch.where(mask, 0, -1)
    got = ours(batch["input_ids"], None, documents, batch["token_type_ids"])
    torch.testing.assert_close(got[mask], expected.last_hidden_state[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled(got), expected.pooler_output, rtol=1e-5, atol=1e-5)


def test_a_real_encoder_decoder_of_another_family_is_refused_by_name(shared: Path):
    path = shared / "data" / "models" / "bart_g2p"
    with pytest.raises(UserError, match=r"model_type 'bart' is not known; those that are: bert,"):
        load_base(path)
