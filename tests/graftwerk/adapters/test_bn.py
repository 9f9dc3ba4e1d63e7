"""AdapterHub's bottlenecks against formulas written here, in double precision."""

import math

import pytest
import torch
from torch import Tensor, nn

from graftwerk.adapters.methods.bn import BnConfig
from graftwerk.adapters.slots import Flow, Record, Site, SlotCall
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_prompts import make, run
from tests.graftwerk.tiny import shake

HIDDEN = 8
SITE = Site("mlp_output", 0, HIDDEN, HIDDEN)
SETTINGS = {
    "plain": {},
    "norm_before": {"original_ln_before": True},
    "what_enters_is_the_residual": {"original_ln_before": True, "residual_before_ln": False},
    "post_add": {"original_ln_before": True, "residual_before_ln": "post_add"},
    "layer_ends_with_the_adapter": {"original_ln_after": False},
    "own_norms": {"ln_before": True, "ln_after": True},
    "residual_before_own_norm": {"ln_after": True, "adapter_residual_before_ln": True},
    "scaled": {"scaling": 4},
    "learned_scaling": {"scaling": "learned"},
    "channel_scaling": {"scaling": "channel"},
    "gated": {"use_gating": True, "original_ln_before": True},
    "parallel": {"is_parallel": True, "scaling": 4.0},
    "parallel_gated": {"is_parallel": True, "use_gating": True, "ln_after": True},
    "parallel_ends_the_layer": {"is_parallel": True, "original_ln_after": False},
}


def tensors(*shape: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [tensor.requires_grad_() for tensor in made]


def born(site: Site = SITE, **settings):
    torch.manual_seed(0)
    part = BnConfig(**{"reduction_factor": 2, "non_linearity": "swish", **settings}).create(site)
    assert part is not None
    part.site, part.adapter = site, "a"
    return part


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def expected(w: dict[str, Tensor], h: Tensor, x: Tensor, norm: nn.LayerNorm | None, **settings):
    """What leaves the layer, by the formulas of AdapterHub's documentation."""

    def layer_norm(y: Tensor) -> Tensor:
        return y if norm is None else normalised(y, norm.weight, norm.bias)

    parallel = settings.get("is_parallel", False)
    z = layer_norm(h + x) if settings.get("original_ln_before") else h
    residual = {True: h, False: z, "post_add": h + x}[settings.get("residual_before_ln", True)]
    if parallel:
        z, residual = x, h
    entering = z
    first = "adapter_down.0"
    if settings.get("ln_before"):
        entering = normalised(z, w["adapter_norm_before.weight"], w["adapter_norm_before.bias"])
        first = "adapter_down.1"
    inner = torch.einsum("bsh,dh->bsd", entering, w[f"{first}.weight"]) + w[f"{first}.bias"]
    inner = inner / (1 + torch.exp(-inner))
    a = torch.einsum("bsd,hd->bsh", inner, w["adapter_up.weight"]) + w["adapter_up.bias"]
    a = a * w.get("scaling", settings.get("scaling", 1.0))
    if settings.get("use_gating"):
        gates = torch.einsum("bsh,h->bs", z, w["gate.weight"][0]) + w["gate.bias"]
        a = a * (1 / (1 + torch.exp(-gates))).mean(1)[:, None, None]
    if settings.get("ln_after"):
        after = w["adapter_norm_after.weight"], w["adapter_norm_after.bias"]
        inside = settings.get("adapter_residual_before_ln", False)
        out = normalised(a + residual, *after) if inside else normalised(a, *after) + residual
    else:
        out = a + residual
    return layer_norm(out + x) if settings.get("original_ln_after", True) else out


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_part_and_its_gradients_are_those_of_the_formula(name, post_norm):
    part = born(**SETTINGS[name]).double()
    shake(part)
    norm = nn.LayerNorm(HIDDEN).double() if post_norm else None
    if norm is not None:
        shake(norm, 3)
    h, x = tensors(2, 3, HIDDEN)
    weights = dict(part.named_parameters(remove_duplicate=False))
    call = SlotCall(h, Flow(), residual=x, norm=norm)
    call.output = part(call)
    call.join()
    want = expected(weights, h, x, norm, **SETTINGS[name])
    torch.testing.assert_close(call.output, want, rtol=1e-10, atol=1e-10)

    leaves = [h, x, *part.parameters()]
    given, wanted = (
        torch.autograd.grad(out.sin().sum(), leaves, retain_graph=True, materialize_grads=True)
        for out in (call.output, want)
    )
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_gradients_of_a_sequential_bottleneck_derived_by_hand():
    part = born(scaling=3.0).double()
    shake(part)
    h, x = tensors(2, 3, HIDDEN)
    part(SlotCall(h, Flow(), residual=x)).sum().backward()
    down, up = part.adapter_down[0], part.adapter_up
    z = h @ down.weight.T + down.bias
    gate = 1 / (1 + torch.exp(-z))
    d_up = torch.full_like(h, 3.0)
    d_z = d_up @ up.weight * gate * (1 + z * (1 - gate))
    for parameter, gradient in (
        (up.weight, torch.einsum("bsh,bsd->hd", d_up, z * gate)),
        (up.bias, d_up.sum((0, 1))),
        (down.weight, torch.einsum("bsd,bsh->dh", d_z, h)),
        (down.bias, d_z.sum((0, 1))),
        (h, 1 + d_z @ down.weight),
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-8)
    assert x.grad is None


@pytest.mark.parametrize("parallel", [False, True])
def test_the_sublayers_dropout_comes_first(parallel):
    class Doubles(nn.Module):
        def forward(self, y: Tensor, flow: Flow) -> Tensor:
            return 2 * y

    part = born(is_parallel=parallel, original_ln_before=True).double()
    shake(part)
    h, x = tensors(2, 3, HIDDEN)
    call = SlotCall(h, Flow(), residual=x, dropout=Doubles())
    given = part(call)
    torch.testing.assert_close(given, part(SlotCall(2 * h, Flow(), residual=x)))
    assert call.dropout is None


def test_a_gate_is_one_number_a_row_and_is_recorded():
    record = Record()
    part = born(Site("attention_output", 2, HIDDEN, HIDDEN), mh_adapter=True, use_gating=True)
    part = part.double()
    shake(part)
    h, x = tensors(2, 3, HIDDEN)
    part(SlotCall(h, Flow(record=record), residual=x))
    gates = record.gates["a"][2]["mh_adapter"]
    weight, bias = part.gate.weight[0].detach(), part.gate.bias[0].detach()
    for row in range(2):
        each = [1 / (1 + math.exp(-float(token @ weight + bias))) for token in h[row].detach()]
        assert gates[row].item() == pytest.approx(sum(each) / 3)
    assert gates.shape == (2,)
    assert not gates.requires_grad


def test_stochastic_depth_drops_whole_rows_in_training_and_keeps_the_mean():
    part = born(stochastic_depth=0.25, init_weights="houlsby").double()
    shake(part)
    h, x = (tensor[:1].expand(400, -1, -1).detach() for tensor in tensors(1, 3, HIDDEN))
    full = part.eval()(SlotCall(h, Flow(), residual=x)) - h
    update = part.train()(SlotCall(h, Flow(), residual=x)) - h
    ratio = update / full
    kept = ratio[:, 0, 0] > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4 / 3))
    assert not update[~kept].any()
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.08)


def test_dropout_acts_on_the_update_alone():
    part = born(dropout=1.0).double().train()
    shake(part)
    h, x = tensors(2, 3, HIDDEN)
    assert torch.equal(part(SlotCall(h, Flow(), residual=x)), h)


WIDE = Site("mlp_output", 0, 400, 400)


@pytest.mark.parametrize(("method", "std"), [("bert", 0.02), ("houlsby", 0.01 * 0.8796)])
def test_normal_inits_have_their_deviation_and_no_bias(method, std):
    part = born(WIDE, init_weights=method, use_gating=True)
    for linear in (part.adapter_down[0], part.adapter_up):
        assert linear.weight.mean().item() == pytest.approx(0, abs=3e-4)
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)
        assert not linear.bias.any()
    if method == "houlsby":  # cut at two deviations, which leaves 0.88 of one
        assert part.adapter_down[0].weight.abs().max() <= 0.02
    assert part.gate.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not part.gate.bias.any()


def test_mam_adapter_is_born_with_a_uniform_down_projection_and_no_up_projection():
    part = born(WIDE, init_weights="mam_adapter")
    down = part.adapter_down[0].weight
    bound = 1 / math.sqrt(400)
    assert down.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not any(p.any() for p in (part.adapter_down[0].bias, *part.adapter_up.parameters()))


def test_a_seed_makes_all_parts_alike_and_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    config = BnConfig(init_weights_seed=7)
    first, second = (config.create(Site("mlp_output", layer, 32, 32)) for layer in (0, 1))
    assert torch.equal(torch.rand(1), untouched)
    assert first is not None
    assert second is not None
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize("parallel", [False, True])
@torch.no_grad()
def test_an_up_projection_of_zero_changes_nothing_at_birth(shape, parallel):
    base = run(make(shape))
    model = make(shape)
    config = BnConfig(mh_adapter=True, cross_adapter=True, is_parallel=parallel,
                      init_weights="mam_adapter")  # fmt: skip
    model.add_adapter("a", config)
    model.set_active("a")
    torch.testing.assert_close(run(model), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2 * 32 * 4 + 4 + 32),
        ({"use_gating": True}, 2 * 32 * 4 + 4 + 32 + 33),
        ({"ln_before": True, "ln_after": True}, 2 * 32 * 4 + 4 + 32 + 4 * 32),
        ({"scaling": "learned"}, 2 * 32 * 4 + 4 + 32 + 1),
        ({"scaling": "channel"}, 2 * 32 * 4 + 4 + 32 + 32),
    ],
)
def test_parameters_are_those_of_the_formula(settings, count):
    model = make("t5", a=BnConfig(reduction_factor=8, cross_adapter=True, **settings))
    parts = list(model.parts("a"))
    names = [slot.site.name for _, slot, _ in parts]
    layers = model.config.num_layers, model.config.decoder_num_layers
    assert names.count("mlp_output") == sum(layers)
    assert names.count("cross_attention_output") == layers[1]
    assert len(names) == sum(layers) + layers[1]
    model.freeze_base()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count * len(parts)


def test_reduction_factors_are_by_layer_and_never_leave_a_bottleneck_empty():
    config = BnConfig(reduction_factor={"0": 2, "2": 0.5, "default": 64})
    widths = [config.width(Site("mlp_output", layer, 32, 32)) for layer in range(3)]
    assert widths == [16, 1, 64]
    with pytest.raises(UserError, match="layer 1"):
        BnConfig(reduction_factor={"0": 2}).width(Site("mlp_output", 1, 32, 32))


def test_layers_that_are_left_out_have_no_part():
    model = make("gpt2", a=BnConfig(leave_out=(0, 2)))
    assert [slot.site.layer for _, slot, _ in model.parts("a")] == [1]


def test_a_part_computes_in_the_type_of_its_input():
    part = born(scaling="channel", ln_before=True, ln_after=True, use_gating=True)
    h, x = (tensor.bfloat16() for tensor in tensors(2, 3, HIDDEN))
    assert part(SlotCall(h, Flow(), residual=x)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"non_linearity": "sine"}, "non_linearity='sine'.*relu"),
        ({"init_weights": "xavier"}, "init_weights='xavier'.*houlsby"),
        ({"scaling": "free"}, "scaling='free'.*channel"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"reduction_factor": {"0": "x"}}, "reduction_factor=.*'x'"),
        ({"dropout": 2}, "dropout=2"),
        ({"stochastic_depth": -1}, "stochastic_depth=-1"),
        ({"residual_before_ln": "before"}, "residual_before_ln='before'.*post_add"),
        ({"inv_adapter": "glow"}, "inv_adapter='glow'.*nice"),
        ({"phm_layer": True, "init_weights": "houlsby"}, "phm_layer.*init_weights='bert'"),
        ({"phm_rank": 0}, "phm_rank=0"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(settings, message):
    with pytest.raises(UserError, match=message):
        BnConfig(**settings)
