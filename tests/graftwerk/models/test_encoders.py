"""T5 and BERT against themselves by other ways: side by side, through the cache, packed."""

import pytest
import torch

from graftwerk.adapters import BottleneckConfig, IA3Config, Parallel, Stack
from graftwerk.models import BERT, T5, KeyValueCache, TransformerConfig, build_model
from tests.graftwerk.tiny import shake, tokens

SHAPE = {
    "vocab_size": 61,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
}
CONFIGS = {
    "t5": TransformerConfig(
        architecture="t5",
        **SHAPE,
        decoder_num_layers=3,
        max_position_embeddings=0,
        normalization="rmsnorm",
        position_embedding_type="relative",
        normalize_attention_scores=False,
        activation="geglu_tanh",
        bias=False,
        qkv_bias=False,
    ),
    "native_t5": TransformerConfig(
        architecture="t5", **SHAPE, max_position_embeddings=64, output_bias=True
    ),
}
BERT_SHAPE = TransformerConfig(
    architecture="bert",
    **SHAPE,
    max_position_embeddings=64,
    transformer_block_type="post_ln",
    final_layernorm=False,
    embedding_layernorm=True,
    num_token_types=2,
    head="question_answering",
)
DOCUMENTS = torch.tensor([[0] * 9, [0] * 6 + [-1] * 3])
SOURCE, TARGET = tokens(2, 9), tokens(2, 5, seed=1)


def with_adapters(config: TransformerConfig) -> T5 | BERT:
    """A random model with an adapter that is everywhere and one of the second half of layers."""
    torch.manual_seed(0)
    model = build_model(config)
    shake(model)
    model.add_adapter("a", BottleneckConfig(dim=4))
    model.add_adapter("b", BottleneckConfig(dim=4))
    model.add_adapter("scales", IA3Config())
    for seed, name in enumerate(("a", "b", "scales")):
        for _, _, part in model.parts(name):
            shake(part, seed + 1)
    assert isinstance(model, T5 | BERT)
    return model.eval()


def keep_layers(model: T5 | BERT, name: str, first: int) -> None:
    """Takes an adapter out of the layers below `first`."""
    for _, slot, _ in list(model.parts(name)):
        if slot.site.layer < first:
            del slot.adapter_layer[name]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("shape", CONFIGS)
@torch.no_grad()
def test_parallel_adapters_of_a_t5_give_what_each_gives_alone(shape: str, first: int):
    model = with_adapters(CONFIGS[shape])
    for name in ("a", "b"):
        keep_layers(model, name, first)
    alone = []
    for name in ("a", "b"):
        model.set_active(Stack("scales", name))
        alone.append(model(TARGET, source=SOURCE, source_documents=DOCUMENTS))
    model.set_active(Stack("scales", Parallel("a", "b")))
    together = model(TARGET, source=SOURCE, source_documents=DOCUMENTS)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    select = torch.tensor([1, 7])
    chosen = model(TARGET, source=SOURCE, source_documents=DOCUMENTS, select=select)
    expected = torch.cat([logits.flatten(0, 1)[select] for logits in alone])
    torch.testing.assert_close(chosen, expected, rtol=1e-5, atol=1e-5)
    cache = KeyValueCache(model.config.decoder_num_layers)
    pieces = [model(TARGET[:, :2], cache=cache, source=SOURCE, source_documents=DOCUMENTS)]
    pieces += [model(TARGET[:, i : i + 1], cache=cache) for i in range(2, 5)]
    torch.testing.assert_close(torch.cat(pieces, 1), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_parallel_adapters_of_a_bert_give_what_each_gives_alone(first: int):
    model = with_adapters(BERT_SHAPE)
    for name in ("a", "b"):
        keep_layers(model, name, first)
    alone = []
    for name in ("a", "b"):
        model.set_active(name)
        alone.append(model(SOURCE, documents=DOCUMENTS).unflatten(0, (2, -1)))
    model.set_active(Parallel("a", "b"))
    together = model(SOURCE, documents=DOCUMENTS).unflatten(0, (2, -1))
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_documents_packed_into_one_row_of_a_bert_do_not_see_each_other():
    model = with_adapters(BERT_SHAPE)
    first, second = tokens(1, 5), tokens(1, 4, seed=3)
    packed = torch.cat([first, second], 1)
    documents = torch.tensor([[0] * 5 + [1] * 4])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    start, end = model(packed, positions, documents)
    apart = [model(first), model(second)]
    torch.testing.assert_close(start, torch.cat([pair[0] for pair in apart]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, torch.cat([pair[1] for pair in apart]), rtol=1e-5, atol=1e-5)


def test_nobody_sees_padding_which_sees_the_row():
    torch.manual_seed(0)
    model = BERT(BERT_SHAPE).eval()
    shake(model)
    row, other = tokens(1, 6), tokens(1, 6, seed=1)
    documents = torch.tensor([[0, 0, 0, 0, -1, -1]])
    mixed = torch.cat([row[:, :4], other[:, 4:]], 1)
    states = model.hidden_states(mixed, documents=documents)
    torch.testing.assert_close(states[:, :4], model.hidden_states(row[:, :4]))
    alone = torch.tensor([[0, 0, 0, 0, -1]])  # the other padding is not there at all
    shorter = model.hidden_states(mixed[:, :5], documents=alone)
    torch.testing.assert_close(states[:, 4], shorter[:, 4])
    assert model.hidden_states(row, documents=torch.full((1, 6), -1)).isfinite().all()


def test_ia3_scales_keys_and_values_of_cross_attention_too():
    model = with_adapters(CONFIGS["t5"])
    # 2 kv + ffn a layer, and 2 kv more in each layer of the decoder.
    expected = 5 * (2 * 32 + 48) + 3 * 2 * 32
    assert sum(value.numel() for value in model.adapter_state("scales").values()) == expected


def test_bottlenecks_have_no_part_behind_cross_attention():
    model = with_adapters(CONFIGS["t5"])
    assert len(list(model.parts("a"))) == 2 * 5
