"""ReFT on whole models: it finds the first and the last tokens of every text."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.adapters import PromptTuningConfig, ReftConfig, Stack
from graftwerk.models import KeyValueCache
from graftwerk.models.positions import FAR, neighbours
from tests.graftwerk.adapters.test_prompts import SHAPES, SOURCE, TARGET, make, run
from tests.graftwerk.models.test_encoders import DOCUMENTS
from tests.graftwerk.tiny import tokens

REFT = ReftConfig(r=2, prefix_positions=2, suffix_positions=2, dropout=0.0)
FOREVER = torch.iinfo(torch.int64).max


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def active(shape: str, config: ReftConfig = REFT, **more):
    model = make(shape, a=config, **more)
    model.set_active("a")
    return model


def test_tokens_are_counted_within_runs_of_one_number():
    texts = torch.tensor([[-1, 4, 4, 4, 7, 7, -1, -1], [0, 0, 0, 0, 0, 1, 2, 2]])
    before, behind = neighbours(texts)
    assert before.tolist() == [[FAR, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0, 1]]
    assert behind.tolist() == [[FAR, 2, 1, 0, 1, 0, FAR, FAR], [4, 3, 2, 1, 0, 0, 1, 0]]


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5", "bert"])
@torch.no_grad()
def test_the_answer_changes_and_a_layer_has_as_many_parameters_as_the_formula_says(shape):
    model = make(shape, a=REFT)
    base = run(model)
    model.set_active("a")
    assert not torch.allclose(run(model), base, atol=1e-3, equal_nan=True)
    config = SHAPES[shape]
    layers = config.num_layers + (config.decoder_num_layers if shape == "t5" else 0)
    count = sum(p.numel() for _, _, part in model.parts("a") for p in part.parameters())
    assert count == layers * 2 * (2 * 2 * config.hidden_size + 2)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@torch.no_grad()
def test_padding_and_packing_leave_a_decoders_texts_their_ends(shape):
    model = active(shape)
    whole = model(SOURCE)
    index = torch.arange(13)
    ahead = torch.where(index >= 4, FOREVER, index + 1).expand(2, -1)
    positions = (index - 4).clamp(min=0).expand(2, -1)
    close(model(F.pad(SOURCE, (4, 0)), positions, ahead)[:, 4:], whole)
    for real in (FOREVER, 9):  # seen as long as the row is, or as long as the text is
        behind = torch.where(torch.arange(13) < 9, real, 0).expand(2, -1)
        close(model(F.pad(SOURCE, (0, 4)), None, behind)[:, :9], whole)
    packed = torch.cat([SOURCE[:1], SOURCE[1:]], 1)
    ends = torch.tensor([[9] * 9 + [18] * 9])
    close(model(packed, torch.arange(9).repeat(2)[None], ends).view(2, 9, -1), whole)


@torch.no_grad()
def test_padding_and_packing_leave_an_encoders_texts_their_ends():
    model = active("bert")
    whole = model.hidden_states(SOURCE)
    padded = torch.tensor([[0] * 9 + [-1] * 3] * 2)
    close(model.hidden_states(F.pad(SOURCE, (0, 3)), documents=padded)[:, :9], whole)
    both = torch.cat([SOURCE[:1], SOURCE[1:]], 1)
    positions = torch.arange(9).repeat(2)[None]
    apart = torch.tensor([[0] * 9 + [1] * 9])
    close(model.hidden_states(both, positions, apart).view(2, 9, -1), whole)


@torch.no_grad()
def test_a_t5s_source_may_be_padded():
    model = active("t5")
    whole = run(model)
    close(whole[1:], model(TARGET[1:], source=SOURCE[1:, : int((DOCUMENTS[1] == 0).sum())]))


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
@torch.no_grad()
def test_the_first_tokens_are_first_with_a_cache_too(shape):
    model = active(shape, replace(REFT, suffix_positions=0, prefix_positions=3))
    if shape == "t5":
        cache = KeyValueCache(model.config.decoder_num_layers)
        how = {"source": SOURCE, "source_documents": DOCUMENTS}
        pieces = [model(TARGET[:, :2], cache=cache, **how), model(TARGET[:, 2:], cache=cache)]
        close(torch.cat(pieces, 1), run(model))
        return
    batch, index = F.pad(SOURCE, (4, 0)), torch.arange(13)
    positions = (index - 4).clamp(min=0).expand(2, -1)
    end = torch.where(index >= 4, FOREVER, index + 1).expand(2, -1)
    cache = KeyValueCache(model.config.num_layers)
    pieces = [model(batch[:, :6], positions[:, :6], end[:, :6], cache)[:, 4:]]
    pieces += [model(batch[:, i : i + 1], positions[:, i : i + 1], cache=cache) for i in (6, 7)]
    pieces.append(model(batch[:, 8:], positions[:, 8:], end[:, 8:], cache=cache))
    close(torch.cat(pieces, 1), model(SOURCE))


@pytest.mark.parametrize("shape", ["llama", "bert"])
@torch.no_grad()
def test_prompts_are_no_tokens_of_a_text(shape):
    model = make(shape, a=REFT, prompt=PromptTuningConfig(virtual_tokens=3))
    model.set_active(Stack("prompt", "a"))
    seen = []
    layer = (model.encoder if shape == "bert" else model.decoder).layers[1]
    layer.output.adapter_layer["a"].register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model.hidden_states(tokens(2, 5))
    assert seen[0].before.tolist() == [[FAR] * 3 + [0, 1, 2, 3, 4]]
    assert seen[0].behind.tolist() == [[FAR] * 3 + [4, 3, 2, 1, 0]]
