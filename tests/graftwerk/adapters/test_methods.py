"""Each method: nothing at birth, parameters and numbers of its formula, the base untouched."""

import pytest
import torch
from torch.nn import functional as F

from graftwerk.adapters import BottleneckConfig, IA3Config, LoRAConfig
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError
from graftwerk.models import GPT
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt, tokens

TARGETS = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")
METHODS = {
    "parallel_adapter": BottleneckConfig(dim=5),
    "parallel_adapter_post": BottleneckConfig(dim=5, norm_position="post"),
    "linear_adapter": BottleneckConfig(type="linear_adapter", dim=5),
    "linear_adapter_post": BottleneckConfig(type="linear_adapter", dim=5, norm_position="post"),
    "ia3": IA3Config(),
    "lora_qkv": LoRAConfig(dim=3),
    "lora_all": LoRAConfig(dim=3, alpha=9, target_modules=TARGETS),
}


def expected_parameters(method: str, model: GPT) -> int:
    """The formulas of NeMo's documentation, for a whole model."""
    c = model.config
    h, f, q, kv = c.hidden_size, c.ffn_hidden_size, c.query_size, c.key_size
    wide = 2 * f if c.gated else f
    qkv = 3 * (h + q + 2 * kv)
    layer = {
        "parallel_adapter": 2 * (2 * h * 5 + 2 * h),
        "linear_adapter": 2 * (2 * h * 5 + 2 * h),
        "ia3": 2 * kv + f,
        "lora_qkv": qkv,
        "lora_all": qkv + 3 * ((q + h) + (h + wide) + (f + h)),
    }
    return c.num_layers * layer[method.removesuffix("_post")]


@pytest.fixture(params=[(m, s) for m in METHODS for s in SHAPES], ids="-".join)
def born(request) -> tuple[str, GPT]:
    method, shape = request.param
    model = tiny_gpt(SHAPES[shape])
    model.add_adapter("a", METHODS[method])
    return method, model


def test_no_logit_changes_at_birth(born):
    _, model = born
    before = model(tokens())
    model.set_active("a")
    assert torch.equal(model(tokens()), before)


def test_trainable_parameters_are_those_of_the_formula(born):
    method, model = born
    model.freeze_base()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected_parameters(method, model)


def test_a_step_changes_only_the_adapter_and_switching_off_leaves_the_base(born):
    _, model = born
    batch = tokens()
    before = model(batch).detach()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.freeze_base()
    model.set_active("a")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.1)
    for _ in range(2):  # the first moves what was zero at birth, the second all that hung on it
        optimizer.zero_grad()
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) == (not parameter.requires_grad), name
    assert not torch.allclose(model(batch), before)
    model.set_active(None)
    assert torch.equal(model(batch), before)


def test_gradients_stop_at_the_lowest_adapter(born):
    _, model = born
    model.freeze_base()
    model.set_active("a")
    model(tokens()).sum().backward()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(model.get_parameter(name).grad is None for name in frozen)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("kind", ["parallel_adapter", "linear_adapter"])
def test_a_bottleneck_computes_its_formula_on_the_result_before_the_bias(kind, position):
    config = BottleneckConfig(type=kind, dim=3, norm_position=position)
    part = config.create(Site("mlp_output", 0, 8, 8))
    assert part is not None
    shake(part)
    w = dict(part.named_parameters())
    output, bias = torch.randn(2, 4, 8), torch.randn(8)
    x = output - bias

    def norm(y):
        centred = y - y.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w["layer_norm.weight"] + w["layer_norm.bias"]

    inner = torch.einsum("bsh,dh->bsd", norm(x) if position == "pre" else x, w["linear_in.weight"])
    inner = torch.einsum("bsd,hd->bsh", inner * inner.sigmoid(), w["linear_out.weight"])
    expected = (norm(inner) if position == "post" else inner) + x + bias
    got = part(SlotCall(output, bias=bias))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ia3_equals_a_model_whose_weights_are_scaled():
    model, scaled = tiny_gpt(SHAPES["gpt2"]), tiny_gpt(SHAPES["gpt2"])
    model.add_adapter("a", IA3Config())
    model.set_active("a")
    for path, slot, part in model.parts("a"):
        shake(part, len(path))
        layer = scaled.get_submodule(path.rsplit(".", 2)[0])
        scalers = part.get_parameter("scalers")
        if slot.site.name == "mlp_inner":
            layer.get_submodule("mlp.linear_fc2").weight.mul_(scalers)
        else:
            index = ("keys", "values").index(slot.site.name) + 1
            for weight in layer.get_submodule("self_attention.linear_qkv").parameters():
                weight.view(4, 3, 8, *weight.shape[1:])[:, index].mul_(
                    scalers.view(4, 8, *[1] * (weight.ndim - 1))
                )
    torch.testing.assert_close(model(tokens()), scaled(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_lora_equals_a_model_with_the_update_in_its_weights(shape: str):
    model, merged = tiny_gpt(SHAPES[shape]), tiny_gpt(SHAPES[shape])
    model.add_adapter("a", LoRAConfig(dim=3, alpha=6, target_modules=TARGETS))
    model.set_active("a")
    linear = {
        "qkv": "linear_qkv",
        "output": "linear_proj",
        "fc1": "linear_fc1",
        "fc2": "linear_fc2",
    }
    for path, slot, part in model.parts("a"):
        shake(part, len(path))
        sublayer = merged.get_submodule(path.rpartition(".")[0])
        a, b = part.get_parameter("linear_in.weight"), part.get_parameter("linear_out.weight")
        sublayer.get_submodule(linear[slot.site.name]).weight.add_(6 / 3 * b @ a)
    torch.testing.assert_close(model(tokens()), merged(tokens()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_float32_adapter_on_a_bfloat16_base_computes_in_bfloat16(method: str):
    model = tiny_gpt().bfloat16()
    model.add_adapter("a", METHODS[method])
    model.freeze_base()
    model.set_active("a")
    logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_dropout_acts_in_training_only():
    model = tiny_gpt()
    model.add_adapter("a", BottleneckConfig(dim=4, dropout=0.5))
    for _, _, part in model.parts("a"):
        shake(part)
    model.set_active("a")
    assert torch.equal(model(tokens()), model(tokens()))
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("method", "statistics"),
    [("xavier", (0.0, (2 / (400 + 100)) ** 0.5)), ("normal", (0.0, 0.2)), ("zero", (0.0, 0.0))],
)
def test_column_init_method_gives_weights_of_its_distribution(method, statistics):
    torch.manual_seed(0)
    config = BottleneckConfig(dim=100, column_init_method=method)
    part = config.create(Site("mlp_output", 0, 400, 400))
    assert part is not None
    weight = part.get_parameter("linear_in.weight")
    assert weight.mean().item() == pytest.approx(statistics[0], abs=3e-3)
    assert weight.std().item() == pytest.approx(statistics[1], rel=0.03, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "adapter_dim=0"),
        ({"dropout": 1.5}, "adapter_dropout=1.5"),
        ({"norm_position": "middle"}, "norm_position='middle'"),
        ({"norm_type": "rms"}, "norm_type='rms'.*layernorm"),
        ({"column_init_method": "orthogonal"}, "column_init_method='orthogonal'.*xavier"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(settings, message):
    with pytest.raises(UserError, match=message):
        tiny_gpt().add_adapter("a", BottleneckConfig(**settings))
