"""Layers that share one part's weights, and how each is told which it is."""

import pytest
import torch
from torch.nn import functional as F

from graftwerk.adapters import BottleneckConfig, IA3Config, LoRAConfig, PromptTuningConfig
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_prompts import SHAPES, make, run
from tests.graftwerk.tiny import shake

STRATEGIES = ("add", "concat", "mlpconcat", "biasadd")
TIED = {"weight_tying": True}


def tied_methods(strategy: str | None):
    how = {**TIED, "position_embedding_strategy": strategy}
    return {
        "bottleneck": BottleneckConfig(dim=4, **how),
        "post": BottleneckConfig(dim=4, norm_position="post", **how),
        "lora": LoRAConfig(dim=4, target_modules=("all",), **how),
    }


def position_parameters(strategy: str | None, layers: int, inputs: int, outputs: int) -> int:
    """NeMo's: a row of the table for each layer; `mlpconcat` has two square matrices."""
    return {
        None: 0,
        "add": layers * inputs,
        "concat": layers * 4 + 4 * 4,  # and four more columns of linear_in
        "mlpconcat": layers * 4 + 4 * 4 + 2 * 4 * 4,
        "biasadd": layers * outputs,
    }[strategy]


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_tied_layers_have_one_set_of_weights_and_a_row_each(shape, strategy):
    c = SHAPES[shape]
    h, f, q, kv = c.hidden_size, c.ffn_hidden_size, c.query_size, c.key_size
    wide = 2 * f if c.gated else f
    stacks = [c.num_layers] if shape == "llama" else [c.num_layers, c.decoder_num_layers]
    own = [(h, q + 2 * kv), (q, h), (h, wide), (f, h)]
    cross = [(h, q), (h, kv), (h, kv), (q, h)]

    def total(shapes: list[tuple[int, int]], layers: int) -> int:
        extra = position_parameters
        return sum(4 * (i + o) + extra(strategy, layers, i, o) for i, o in shapes)

    lora = sum(total(own, layers) for layers in stacks)
    lora += 0 if shape == "llama" else total(cross, c.decoder_num_layers)
    norm = 2 * 4 if strategy in ("concat", "mlpconcat") else 0
    pre = sum(2 * (total([(h, h)], layers) + 2 * h) for layers in stacks)
    expected = {"bottleneck": pre + 2 * len(stacks) * norm, "post": pre, "lora": lora}
    for name, config in tied_methods(strategy).items():
        model = make(shape, a=config)
        assert sum(v.numel() for v in model.adapter_state("a").values()) == expected[name], name
        model.freeze_base()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected[name]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["bottleneck", "post", "lora"])
@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_tied_parts_change_nothing_at_birth_learn_whole_and_load_again(shape, method, strategy):
    model = make(shape)
    base = run(model)
    model.add_adapter("a", tied_methods(strategy)[method])
    model.set_active("a")
    torch.testing.assert_close(run(model), base, rtol=1e-5, atol=1e-5)
    for seed, (_, _, part) in enumerate(model.parts("a")):
        shake(part, seed)
    model.freeze_base()
    expected = run(model)
    expected[expected.isfinite()].square().mean().backward()
    held = {id(p): p for _, _, part in model.parts("a") for p in part.parameters()}.values()
    assert all(p.grad is not None and p.grad.any() for p in held)
    tables = [p for name, p in model.named_parameters() if name.endswith("position.table")]
    assert tables
    assert all(row.any() for table in tables for row in table.grad)  # each layer moves its own
    fresh = make(shape)
    fresh.add_adapter("b", tied_methods(strategy)[method])
    fresh.load_adapter_state("b", model.adapter_state("a"))
    fresh.freeze_base()  # attention takes another way where its scores want gradients
    fresh.set_active("b")
    assert torch.equal(run(fresh), expected)


@pytest.mark.parametrize("method", ["bottleneck", "lora"])
def test_the_gradient_of_tied_weights_is_the_sum_over_their_layers(method):
    tied = make("llama", a=tied_methods(None)[method]).double()
    plain = {
        "bottleneck": BottleneckConfig(dim=4),
        "lora": LoRAConfig(dim=4, target_modules=("all",)),
    }
    apart = make("llama", a=plain[method]).double()
    for (_, _, one), (_, _, other) in zip(tied.parts("a"), apart.parts("a"), strict=True):
        other.load_state_dict(one.state_dict())
    for model in (tied, apart):
        model.set_active("a")
        run(model).sin().sum().backward()
    sums: dict[tuple[str, str], torch.Tensor] = {}
    for _, slot, part in apart.parts("a"):
        for name, parameter in part.named_parameters():
            key = (slot.site.name, name)
            sums[key] = sums.get(key, 0) + parameter.grad
    for _, slot, part in tied.parts("a"):
        for name, parameter in part.named_parameters():
            expected = sums[slot.site.name, name]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


def test_encoder_and_decoder_share_with_their_own_kind_alone():
    model = make("t5", a=LoRAConfig(dim=2, **TIED))
    weights = {
        stack: {
            id(part.linear_in.weight)
            for _, s, part in model.parts("a")
            if s.site.stack == stack and s.site.name == "qkv"
        }
        for stack in ("encoder", "decoder")
    }
    assert {stack: len(ids) for stack, ids in weights.items()} == {"encoder": 1, "decoder": 1}
    assert not weights["encoder"] & weights["decoder"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_a_bottleneck_computes_the_formula_of_its_strategy(strategy):
    """NeMo's `ParallelLinearAdapterWeightTying.forward`, for the second of three layers."""
    config = BottleneckConfig(dim=4, **TIED, position_embedding_strategy=strategy)
    sites = [Site("mlp_output", layer, 8, 8) for layer in range(3)]
    parts = [config.create(site) for site in sites]
    config.tie(list(zip(sites, parts, strict=True)))
    part = parts[1]
    assert part is not None
    shake(part)
    w = dict(part.named_parameters())
    x = torch.randn(2, 5, 8)
    row = w["position.table"][1]
    entering = x
    if strategy == "add":
        entering = x + row
    elif strategy == "concat":
        entering = torch.cat([x, row.expand(2, 5, 4)], 2)
    elif strategy == "mlpconcat":
        row = F.gelu(row @ w["position.first.weight"].T) @ w["position.second.weight"].T
        entering = torch.cat([x, row.expand(2, 5, 4)], 2)
    entering = F.layer_norm(
        entering, entering.shape[-1:], w["layer_norm.weight"], w["layer_norm.bias"], 1e-5
    )
    inner = F.silu(entering @ w["linear_in.weight"].T) @ w["linear_out.weight"].T
    expected = x + inner + (row if strategy == "biasadd" else 0)
    torch.testing.assert_close(part(SlotCall(x)), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_lora_computes_the_formula_of_its_strategy(strategy):
    config = LoRAConfig(dim=4, alpha=8, **TIED, position_embedding_strategy=strategy)
    sites = [Site("qkv", layer, 8, 12) for layer in range(3)]
    parts = [config.create(site) for site in sites]
    config.tie(list(zip(sites, parts, strict=True)))
    part = parts[2]
    assert part is not None
    shake(part)
    w = dict(part.named_parameters())
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    row = w["position.table"][2]
    if strategy == "mlpconcat":
        row = F.gelu(row @ w["position.first.weight"].T) @ w["position.second.weight"].T
    entering = x + row if strategy == "add" else x
    if strategy in ("concat", "mlpconcat"):
        entering = torch.cat([x, row.expand(2, 5, 4)], 2)
    expected = y + 2 * entering @ w["linear_in.weight"].T @ w["linear_out.weight"].T
    expected = expected + (row if strategy == "biasadd" else 0)
    torch.testing.assert_close(part(SlotCall(y, input=x)), expected)


def test_selected_layers_have_a_row_each_and_no_other():
    chosen = LoRAConfig(dim=2, **TIED, position_embedding_strategy="add", layer_selection=(1, 3))
    model = make("llama", a=chosen)
    ((name, table),) = [
        (name, value) for name, value in model.adapter_state("a").items() if "table" in name
    ]
    assert name == "decoder.layers.0.self_attention.qkv.position.table"
    assert table.shape == (2, 32)
    assert [part.position.index for _, _, part in model.parts("a")] == [0, 1]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (LoRAConfig, {"position_embedding_strategy": "add"}, "set weight_tying=True, or null here"),
        (
            BottleneckConfig,
            {**TIED, "position_embedding_strategy": "sine"},
            r"='sine': use null or one of add, concat, mlpconcat, biasadd",
        ),
        (IA3Config, {**TIED, "position_embedding_strategy": "add"}, "IA3 has no use for it"),
        (
            PromptTuningConfig,
            {**TIED, "position_embedding_strategy": "add"},
            "PromptTuning has no use for it",
        ),
        (LoRAConfig, {**TIED, "dora": True}, "layers cannot share: set weight_tying=False"),
    ],
)
def test_a_strategy_that_has_no_effect_is_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        method(**settings)
