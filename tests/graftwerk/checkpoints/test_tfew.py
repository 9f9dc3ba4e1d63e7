"""A real IA3 adapter of T-Few's on a T5 of T0-3B's shape: its names, and two layers' numbers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftwerk.adapters import IA3Config
from graftwerk.checkpoints import load_adapter, read_adapters
from graftwerk.errors import UserError
from graftwerk.models import T5, TransformerConfig

T0_3B = TransformerConfig(  # of its `config.json`: T5 v1.1 XL, adapted to language modelling
    architecture="t5",
    vocab_size=32128,
    num_layers=24,
    decoder_num_layers=24,
    hidden_size=2048,
    num_attention_heads=32,
    kv_channels=64,
    ffn_hidden_size=5120,
    max_position_embeddings=0,
    normalization="rmsnorm",
    layernorm_epsilon=1e-6,
    activation="geglu_tanh",
    bias=False,
    qkv_bias=False,
    normalize_attention_scores=False,
    position_embedding_type="relative",
    share_embeddings_and_output_weights=False,
)


@pytest.fixture(scope="module")
def file(shared: Path) -> Path:
    return shared / "data" / "models" / "t03b_ia3_finish.pt"


@pytest.fixture(scope="module")
def vectors(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)


def meta(config: TransformerConfig) -> T5:
    with torch.device("meta"):
        return T5(config)


def test_every_vector_has_its_place_on_a_t5_of_that_shape(file, vectors):
    model = meta(T0_3B)
    saved = read_adapters(file).on(model).adapters[0]
    assert saved.name == "t03b_ia3_finish"
    assert sum(tensor.numel() for tensor in saved.state.values()) == sum(
        vector.numel() for vector in vectors.values()
    )
    assert load_adapter(model, file, "t0") == "t0"
    assert model.adapters["t0"] == IA3Config()
    places = {path for path, _, _ in model.parts("t0")}
    assert len(places) == len(vectors) == 192
    scalers = saved.state["decoder.layers.23.cross_attention.values.scalers"]
    name = "decoder.block.23.layer.1.EncDecAttention.v.multi_lora_b"
    assert torch.equal(scalers, vectors[name].squeeze(1))


@torch.no_grad()
def test_two_real_layers_compute_what_the_formula_says(vectors, tmp_path):
    first = {name: vector for name, vector in vectors.items() if ".block.0." in name}
    torch.save(first, tmp_path / "first.pt")
    model = T5(replace(T0_3B, num_layers=1, decoder_num_layers=1, vocab_size=50)).eval()
    for stack in (model.encoder, model.decoder):  # distances have a test of their own
        assert stack.relative_position is not None
        stack.relative_position.get_parameter("weight").zero_()
    source, tokens = torch.tensor([[5, 9, 2, 7]]), torch.tensor([[0, 11, 3]])
    base = model.hidden_states(tokens, source=source)
    model.set_active(load_adapter(model, tmp_path / "first.pt"))
    states, made = formula(model, first, source, tokens)
    torch.testing.assert_close(model.encode(source), states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        model.hidden_states(tokens, source=source), made, atol=1e-4, rtol=1e-4
    )
    assert (made - base).abs().max() > 0.1


def formula(
    model: T5, vectors: dict[str, Tensor], source: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """(IA)^3 in a T5 of one layer each (arXiv:2205.05638, section 3.3), without distances."""
    words = model.embedding.word_embeddings.weight
    parameters = dict(model.named_parameters())

    def layer(stack: str, x: Tensor, states: Tensor | None) -> Tensor:
        def at(name: str) -> Tensor:
            return parameters[f"{stack}.layers.0.{name}.weight"]

        def scaled(name: str) -> Tensor:
            return vectors[f"{stack}.block.0.layer.{name}.multi_lora_b"].squeeze(1)

        normed = norm(x, at("input_layernorm"))
        query, key, value = at("self_attention.linear_qkv").view(32, 3, 64, 2048).unbind(1)
        key, value = (
            normed @ key.reshape(2048, -1).T * scaled("0.SelfAttention.k"),
            normed @ value.reshape(2048, -1).T * scaled("0.SelfAttention.v"),
        )
        seen = torch.ones(len(x), len(x), dtype=torch.bool)
        seen = seen.tril() if states is not None else seen
        x = (
            x
            + attend(normed @ query.reshape(2048, -1).T, key, value, seen)
            @ at("self_attention.linear_proj").T
        )
        if states is not None:
            normed = norm(x, at("pre_cross_attention_layernorm"))
            key, value = at("cross_attention.linear_kv").view(32, 2, 64, 2048).unbind(1)
            key = states @ key.reshape(2048, -1).T * scaled("1.EncDecAttention.k")
            value = states @ value.reshape(2048, -1).T * scaled("1.EncDecAttention.v")
            query = normed @ at("cross_attention.linear_q").T
            seen = torch.ones(len(x), len(states), dtype=torch.bool)
            x = x + attend(query, key, value, seen) @ at("cross_attention.linear_proj").T
        normed = norm(x, at("pre_mlp_layernorm"))
        gate, up = (normed @ at("mlp.linear_fc1").T).chunk(2, -1)
        number = 1 if states is None else 2
        up = up * scaled(f"{number}.DenseReluDense.wi_1")
        inner = 0.5 * gate * (1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        x = x + (inner * up) @ at("mlp.linear_fc2").T
        return norm(x, parameters[f"{stack}.final_layernorm.weight"])

    states = layer("encoder", words[source[0]], None)
    return states[None], layer("decoder", words[tokens[0]], states)[None]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """32 heads of 64 features each, scores as they are."""
    made = []
    for head in range(32):
        at = slice(64 * head, 64 * head + 64)
        scores = (query[:, at] @ key[:, at].T).masked_fill(~seen, -math.inf)
        made.append(scores.softmax(-1) @ value[:, at])
    return torch.cat(made, -1)


def test_a_torch_file_of_something_else_is_refused_by_name(tmp_path):
    torch.save({"linear.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"multi_lora_b, as T-Few's IA3; linear.weight is in it"):
        read_adapters(tmp_path / "other.pt")
