"""Every method on every kind of model: birth, gradients, one step, files, and all pairs."""

import hashlib
import itertools
from dataclasses import replace

import pytest
import torch

from graftwerk.adapters import Stack
from graftwerk.adapters.configs import METHODS as KNOWN
from graftwerk.adapters.configs import (
    BnConfig,
    BottleneckConfig,
    HubLoRAConfig,
    HubMTLLoRAConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    ReftConfig,
    SelectiveConfig,
    UnionConfig,
)
from graftwerk.checkpoints import load_adapter, save_adapter
from tests.graftwerk.adapters.test_prompts import SHAPES, make, run

MODELS = ("gpt2", "llama", "t5", "bert")
BN = BnConfig(mh_adapter=True, cross_adapter=True, reduction_factor=8, init_weights="mam_adapter")
METHODS = {
    "parallel_adapter": BottleneckConfig(dim=5),
    "linear_adapter": BottleneckConfig(type="linear_adapter", dim=5, norm_position="post"),
    "ia3": IA3Config(),
    "lora": LoRAConfig(dim=3, alpha=6, target_modules=("all",)),
    "canonical": LoRAConfig(dim=3, target_modules=("all",), variant="canonical"),
    "stabilised": LoRAConfig(dim=3, target_modules=("attention",), rank_stabilised=True),
    "dora": LoRAConfig(dim=3, target_modules=("all",), dora=True),
    "prompt": PromptTuningConfig(virtual_tokens=3),
    "ptuning": PTuningConfig(virtual_tokens=3, embedding_dim=8, bottleneck_dim=6),
    "prefix": PrefixTuningConfig(prefix_length=3, bottleneck_dim=6),
    "selective": SelectiveConfig(parameters=("*mlp.linear_fc2.weight",)),
    "bn": replace(BN, original_ln_before=True),
    "par_bn": replace(BN, is_parallel=True, scaling="channel", use_gating=True),
    "compacter": replace(BN, phm_layer=True, init_weights="bert", phm_init_range=1.0),
    "invertible": replace(BN, inv_adapter="nice"),
    "hub_lora": HubLoRAConfig(r=3, use_gating=True),
    "mtl_lora": HubMTLLoRAConfig(r=3, n_up_projection=2),
    "reft": ReftConfig(r=2, tied_weights=True, orthogonality=False, dropout=0.0),
    "union": UnionConfig(configs=(BN, PrefixTuningConfig(prefix_length=3, reparametrise=False))),
}
CHANGE_AT_BIRTH = ("prompt", "ptuning", "prefix", "compacter", "invertible", "reft", "union")
# Other numbers in the same places.
VARIANTS = ("linear_adapter", "stabilised", "par_bn", "compacter", "invertible", "hub_lora",
            "mtl_lora", "union")  # fmt: skip
PAIRS = list(itertools.combinations([name for name in METHODS if name not in VARIANTS], 2))
MATRIX = list(itertools.product(METHODS, MODELS))


def expected_parameters(method: str, shape: str) -> int:
    """The formulas of the documentation; L layers, of which C have cross-attention."""
    c = SHAPES[shape]
    h, f, q, kv = c.hidden_size, c.ffn_hidden_size, c.query_size, c.key_size
    wide, halves = (2 * f, 2) if c.gated else (f, 1)
    cross = c.decoder_num_layers if c.architecture == "t5" else 0
    layers = c.num_layers + cross
    stacks = 3 if cross else 1  # kinds of layers that have a prefix encoder of their own
    dense = layers * (q + h) + cross * (q + h)
    apart = cross * (h + q + 2 * (h + kv))
    mlp = layers * (h + wide + f + h)
    lora = dense + apart + layers * (h + q + 2 * kv) + mlp
    outputs = layers * (q + 2 * kv + h + wide + h) + cross * (q + 2 * kv + h)
    places = 2 * layers + cross  # behind attentions and MLPs
    bn = places * (2 * h * (h // 8) + h // 8 + h)
    coupling = 2 * ((h // 2) * (h // 4) + h // 4 + (h // 4) * (h // 2) + h // 2)
    query_and_value = layers * ((h + q) + (h + kv))
    canonical = lora + layers * (2 * h + (halves - 1) * h)
    return {
        "parallel_adapter": layers * 2 * (2 * h * 5 + 2 * h),
        "linear_adapter": layers * 2 * (2 * h * 5 + 2 * h),
        "ia3": layers * (2 * kv + f) + cross * 2 * kv,
        "lora": 3 * lora,
        "canonical": 3 * canonical,
        "stabilised": 3 * (lora - mlp),
        "dora": 3 * lora + outputs,
        "prompt": 3 * h,
        "ptuning": 3 * 8 + 8 * 6 + 6 + 6 * h + h,
        "prefix": stacks * (3 * h + h * 6 + 6) + (layers + cross) * 2 * kv * (6 + 1),
        "selective": layers * f * h,
        "bn": bn,
        "par_bn": bn + places * (h + h + 1),
        "compacter": places * (h + h // 8) * 3 + 64,
        "invertible": bn + coupling,
        "hub_lora": 3 * query_and_value + layers * 2 * (h + 1),
        "mtl_lora": layers * (3 * (2 * h + 2 * (q + kv)) + 2 * (2 + 3)),
        "reft": layers * (2 * 2 * h + 2),
        "union": bn + (layers + cross) * 3 * 2 * kv,
    }[method] + (2 * h + 2 if shape == "bert" else 0)


def digest(model) -> str:
    """A hash of all of the base's bytes."""
    found = hashlib.sha256()
    for name, parameter in model.base_parameters():
        found.update(name.encode() + parameter.detach().numpy().tobytes())
    return found.hexdigest()


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_the_matrix_has_every_method():
    assert {type(config) for config in METHODS.values()} == set(KNOWN.values())


@pytest.mark.parametrize(("method", "shape"), MATRIX)
@torch.no_grad()
def test_no_answer_changes_at_birth(method, shape):
    model = make(shape)
    before = run(model)
    model.add_adapter("a", METHODS[method])
    model.set_active("a")
    # Halves that were apart lie elsewhere in memory, and the last bit of their product differs.
    same = torch.allclose(run(model), before, rtol=1e-5, atol=1e-5)
    assert same == (method not in CHANGE_AT_BIRTH)


@pytest.mark.parametrize(("method", "shape"), MATRIX)
def test_one_step_moves_the_parameters_of_the_formula_and_nothing_else(method, shape):
    model = make(shape, a=METHODS[method])
    model.freeze_base()
    model.set_active("a")
    own = trained(model)
    assert sum(parameter.numel() for parameter in own) == expected_parameters(method, shape)
    born, base = [parameter.detach().clone() for parameter in own], digest(model)
    scores = run(model)
    scores[scores.isfinite()].square().mean().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in own}
    torch.optim.AdamW(own, lr=0.01, weight_decay=0.0).step()
    assert not any(torch.equal(p, before) for p, before in zip(own, born, strict=True))
    model.set_active(None)
    assert digest(model) == base


@pytest.mark.parametrize(("method", "shape"), MATRIX)
@torch.no_grad()
def test_a_saved_adapter_answers_the_same_on_a_fresh_base(method, shape, tmp_path):
    model = make(shape, a=METHODS[method])
    base = run(model)
    model.set_active("a")
    save_adapter(model, "a", tmp_path / "adapter")
    fresh = make(shape)
    fresh.set_active(load_adapter(fresh, tmp_path / "adapter", "b"))
    torch.testing.assert_close(run(fresh), run(model), rtol=0, atol=1e-6)
    assert not torch.allclose(run(fresh), base, atol=1e-3)


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_two_methods_stacked_both_act_and_both_learn(one, two, shape):
    model = make(shape, a=METHODS[one], b=METHODS[two])
    with torch.no_grad():
        alone = []
        for name in ("a", "b"):
            model.set_active(name)
            alone.append(run(model))
    model.freeze_base()
    model.set_active(Stack("a", "b"))
    together = run(model)
    together[together.isfinite()].square().mean().backward()
    assert not any(torch.allclose(together, other, atol=1e-4) for other in alone)
    for name in ("a", "b"):
        parts = [part for _, _, part in model.parts(name)]
        held = [p for part in parts for p in part.parameters()]
        held += model.replacements.of(name).values()
        assert held
        assert all(p.grad is not None and p.grad.any() for p in held)
