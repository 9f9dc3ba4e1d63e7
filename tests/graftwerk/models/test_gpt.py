"""Our GPT against the implementation in `transformers`, and against itself by other ways."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from graftwerk.checkpoints import load_base
from graftwerk.models import KeyValueCache
from tests.graftwerk.tiny import SHAPES, tiny_gpt, tokens

SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
THEIRS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **SIZES),
    "gpt2_wide": GPT2Config(n_embd=48, n_layer=2, n_head=3, n_inner=40, n_positions=64, **SIZES),
    "gpt2_untied": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, **SIZES
    ),
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=5000.0,
        **SIZES,
    ),
    "llama_head_dim": LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        **SIZES,
    ),
}


@pytest.fixture(params=THEIRS)
def pair(request, tmp_path: Path):
    """(their random model, ours read from what theirs wrote)."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(THEIRS[request.param], attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs.eval(), load_base(tmp_path / "theirs")


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair):
    theirs, ours = pair
    batch = tokens(3, 20)
    torch.testing.assert_close(ours(batch), theirs(batch).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_of_left_padded_rows_equal_those_of_transformers(pair):
    theirs, ours = pair
    batch, padding = tokens(3, 14), torch.tensor([0, 3, 7])
    index = torch.arange(14)
    real = index >= padding[:, None]
    positions = (index - padding[:, None]).clamp(min=0)
    end = torch.where(real, 14, index + 1)
    expected = theirs(batch, attention_mask=real.long(), position_ids=positions).logits
    got = ours(batch, positions=positions, end=end)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_real_pretrained_model_gives_the_logits_of_transformers(shared: Path):
    path = shared / "data" / "models" / "stories260k"
    theirs = AutoModelForCausalLM.from_pretrained(path).double().eval()
    batch = tokens(2, 60, vocabulary=theirs.config.vocab_size)
    got = load_base(path).double()(batch)  # in float32 rounding is the processor's
    torch.testing.assert_close(got, theirs(batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_tokens_fed_in_pieces_through_the_cache_give_the_same_logits(shape: str):
    model, batch = tiny_gpt(SHAPES[shape]), tokens(2, 12)
    cache = KeyValueCache(model.config.num_layers)
    pieces = [model(piece, cache=cache) for piece in batch.split([5, 1, 4, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_selected_positions_give_the_same_logits_as_all(shape: str):
    model, batch = tiny_gpt(SHAPES[shape]), tokens(2, 12)
    select = torch.tensor([3, 3, 14, 23])
    expected = model(batch).flatten(0, 1)[select]
    torch.testing.assert_close(model(batch, select=select), expected)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_documents_packed_into_one_row_do_not_see_each_other(shape: str):
    model = tiny_gpt(SHAPES[shape])
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    row = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    end = torch.tensor([[5] * 5 + [12] * 7])
    packed = model(row, positions=positions, end=end)
    apart = torch.cat([model(first), model(second)], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
