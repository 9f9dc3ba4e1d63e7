"""AdapterHub's LoRA, IA3, VeRA, DoRA and MTL-LoRA against formulas written here."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graftwerk.adapters.methods.hub_lora import HubLoRAConfig, HubMTLLoRAConfig
from graftwerk.adapters.slots import Record, Site
from graftwerk.errors import UserError
from tests.graftwerk.adapters.slot_calls import (
    IN,
    OUT,
    UP,
    WHOLE,
    Weights,
    call_of,
    check_gradients,
    part_of,
    share,
    sublayer,
)

PLACES = ("query", "key", "value", "output", "fc1", "up", "fc2", "cross_query", "cross_value")
PLAIN = HubLoRAConfig(places=PLACES, r=3, alpha=7)
IA3 = HubLoRAConfig(places=PLACES, r=1, alpha=1, composition_mode="scale", init_weights="ia3")
DORA = replace(PLAIN, use_dora=True)
VERA = replace(PLAIN, init_weights="vera", vera_d=0.1, vera_b=0.0)
MTL = HubMTLLoRAConfig(places=PLACES, r=3, alpha=7, n_up_projection=2)
MTL_LINEAR = replace(MTL, task_specific_matrix_type="linear", weights_sharpness=0.5)
KINDS = {
    "lora": PLAIN,
    "lora_gated": replace(PLAIN, use_gating=True),
    "ia3": replace(IA3, alpha=1.5),
    "ia3_gated": replace(IA3, use_gating=True),
    "dora": DORA,
    "dora_gated": replace(DORA, use_gating=True),
    "vera": VERA,
    "vera_dora": replace(VERA, use_dora=True),
    "mtl": MTL,
    "mtl_linear": MTL_LINEAR,
    "mtl_gated": replace(MTL, use_gating=True),
}


def gate_of(weights: Weights, x: Tensor) -> Tensor:
    """One example at a time, one position at a time: the mean of the sigmoids."""
    rows = []
    for example in x:
        scores = [weights["gate.weight"][0] @ state + weights["gate.bias"][0] for state in example]
        rows.append(sum(1 / (1 + (-score).exp()) for score in scores) / len(scores))
    return torch.stack(rows)


def matrix_of(kind: str, w: Weights) -> Tensor:
    """What is added to a weight [out, in], before the scale."""
    if kind.startswith("vera"):
        return w["vera_B"].mm(w["shared.lora_B"]).mm(w["vera_D"]).mm(w["shared.lora_A"])
    if kind.startswith("mtl"):
        inner = w["task_specific.values"]
        inner = torch.diag(inner) if inner.ndim == 1 else inner.T
        powers = (w["weights"] / (0.5 if kind == "mtl_linear" else 0.05)).exp()
        return sum(
            p / powers.sum() * b.mm(inner).mm(w["lora_A"])
            for p, b in zip(powers, w["lora_B"], strict=True)
        )
    return w["lora_B"].mm(w["lora_A"])


def formula(kind: str, weight: Tensor):
    """What a part computes, written down: weights, output and input to the slot's new output."""

    def compute(w: Weights, y: Tensor, x: Tensor) -> Tensor:
        scale = 1.5 if kind == "ia3" else 7 / 3
        factor = gate_of(w, x) if kind.endswith("gated") else x.new_full((len(x),), scale)
        if kind.startswith("ia3"):
            return torch.einsum("b,oi,bso->bso", factor, w["lora_B"], y)
        matrix = matrix_of(kind, w)
        out = y + torch.einsum("b,oi,bsi->bso", factor, matrix, x)
        if "dora" not in kind:
            return out
        length = (weight + matrix).square().sum(1).sqrt()  # without the scale, with a gradient
        return out * w["m.weight"][:, 0] / length

    return compute


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_and_its_gradients_are_those_of_the_formula(kind):
    owner = sublayer()
    part = part_of(KINDS[kind], owner=owner)
    check_gradients(part, call_of(), formula(kind, owner["linear"].weight.detach()[OUT:]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "gated" not in kind])
@torch.no_grad()
def test_a_merged_projection_computes_what_projection_and_part_do(kind):
    owner = sublayer(WHOLE)
    part, linear = part_of(KINDS[kind], WHOLE, owner), owner["linear"]
    call = call_of(site=WHOLE)
    call.output = linear(call.input)
    merged = torch.nn.functional.linear(
        call.input, part.merged_weight(linear.weight), part.merged_bias(linear.bias)
    )
    torch.testing.assert_close(merged, part(call), rtol=1e-10, atol=1e-10)
    assert part.unmergeable is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "gated" in kind])
def test_a_gated_part_says_why_it_cannot_be_merged(kind):
    part = part_of(KINDS[kind])
    assert part.unmergeable == "its gate differs from example to example"
    assert part.whole_row


def test_updates_of_a_stack_add_and_scales_multiply():
    call = call_of()
    first, second = part_of(PLAIN), part_of(replace(PLAIN, r=2, alpha=1))
    apart = [part(call) - call.output for part in (first, second)]
    stacked = second(replace(call, output=first(call)))
    torch.testing.assert_close(stacked, call.output + apart[0] + apart[1])
    factors = [part_of(IA3)(call) / call.output, part_of(KINDS["ia3"])(call) / call.output]
    stacked = part_of(KINDS["ia3"])(replace(call, output=part_of(IA3)(call)))
    torch.testing.assert_close(stacked, call.output * factors[0] * factors[1])


def test_dropout_is_of_the_input_of_a_and_only_in_training():
    part = part_of(replace(PLAIN, dropout=0.5))
    call = call_of(rows=200)
    part.eval()
    torch.testing.assert_close(part(call), part_of(PLAIN)(call))
    part.train()
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(call.input, 0.5)
    torch.manual_seed(0)
    expected = call.output + 7 / 3 * kept @ part.lora_A.T @ part.lora_B.T
    torch.testing.assert_close(part(call), expected)
    gated = part_of(replace(PLAIN, dropout=0.5, use_gating=True)).train()
    record = Record()
    gated(replace(call, flow=replace(call.flow, record=record)))
    expected = gate_of(dict(gated.named_parameters()), call.input)  # of what was not dropped
    torch.testing.assert_close(record.gates["a"][2]["intermediate_lora"], expected)


# ---- at birth


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "vera_dora", "mtl", "mtl_linear", "ia3"])
def test_nothing_changes_at_birth(kind):
    config = IA3 if kind == "ia3" else KINDS[kind]
    owner = sublayer()
    part = config.create(UP)
    part.double().attach(owner)
    call = call_of()
    with torch.no_grad():
        torch.testing.assert_close(part.double()(call), call.output, rtol=1e-6, atol=1e-6)


BIG = Site("query", 0, 400, 300, "column")


def spread(tensor: Tensor) -> tuple[float, float]:
    return tensor.std().item(), tensor.abs().max().item()


def test_matrices_are_born_as_init_weights_says():
    torch.manual_seed(0)
    parts = {
        name: replace(PLAIN, r=64, init_weights=name).create(BIG)
        for name in ("lora", "bert", "ia3", "vera")
    }
    a = {name: part.lora_A for name, part in parts.items()}
    b = {name: part.lora_B for name, part in parts.items()}
    bound = 1 / math.sqrt(400)  # kaiming-uniform with a = sqrt 5
    assert spread(a["lora"]) == pytest.approx((bound / math.sqrt(3), bound), rel=0.01)
    assert not b["lora"].any()
    for born in (a["bert"], b["bert"]):
        assert spread(born)[0] == pytest.approx(0.02, rel=0.02)
        assert 0.06 < spread(born)[1] < 0.12  # a normal's tail
    assert (a["ia3"] == 1).all()
    assert (b["ia3"] == 1).all()
    for born, fan_in in ((a["vera"], 400), (b["vera"], 64)):  # kaiming-uniform with a = 0
        bound = math.sqrt(6 / fan_in)
        assert spread(born) == pytest.approx((bound / math.sqrt(3), bound), rel=0.02)


def test_vectors_of_ia3_are_born_as_init_weights_says():
    torch.manual_seed(0)
    born = {
        name: replace(IA3, init_weights=name).create(BIG).lora_B for name in ("lora", "bert", "ia3")
    }
    assert not born["lora"].any()
    assert spread(born["bert"])[0] == pytest.approx(0.02, rel=0.15)
    assert (born["ia3"] == 1).all()


def test_gates_magnitudes_and_veras_vectors_are_born_as_documented():
    torch.manual_seed(0)
    gate = replace(PLAIN, use_gating=True).create(BIG).gate
    assert spread(gate.weight)[0] == pytest.approx(0.02, rel=0.15)
    assert abs(gate.bias.item()) < 1 / math.sqrt(400)
    owner = sublayer()
    dora = DORA.create(UP)
    dora.attach(owner)
    expected = owner["linear"].weight[OUT:].square().sum(1).sqrt()
    torch.testing.assert_close(dora.m["weight"][:, 0].double(), expected, rtol=1e-6, atol=1e-6)
    vera = replace(VERA, vera_b=0.3).create(UP)
    torch.testing.assert_close(vera.vera_D, 0.1 * torch.eye(3))
    torch.testing.assert_close(vera.vera_B, 0.3 * torch.eye(OUT))
    mtl = MTL_LINEAR.create(UP)
    torch.testing.assert_close(mtl.task_specific.values, torch.eye(3))
    assert (mtl.weights == 1).all()
    assert (MTL.create(UP).task_specific.values == 1).all()


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("lora", 3 * (IN + OUT)),
        ("lora_gated", 3 * (IN + OUT) + IN + 1),
        ("dora", 3 * (IN + OUT) + OUT),
        ("ia3", OUT),
        ("vera", 3 * 3 + OUT * OUT),
        ("mtl", 3 * (IN + 2 * OUT) + 2 + 3),
        ("mtl_linear", 3 * (IN + 2 * OUT) + 2 + 9),
    ],
)
def test_a_part_trains_as_many_parameters_as_its_formula_says(kind, count):
    part = part_of(KINDS[kind])
    part.requires_grad_(False)
    part.unfreeze()
    assert sum(p.numel() for p in part.parameters() if p.requires_grad) == count


# ---- VeRA's shared matrices


def test_slots_of_one_shape_share_veras_matrices():
    sites = [replace(UP, layer=layer, name=name) for layer in (0, 1) for name in ("query", "fc2")]
    sites.append(replace(UP, out_features=10))
    pairs = [(site, VERA.create(site)) for site in sites]
    VERA.tie(pairs)
    matrices = {id(part.shared["lora_A"]) for _, part in pairs}
    assert len(matrices) == 2  # the last slot is of another shape
    assert len({id(part.vera_B) for _, part in pairs}) == 5


# ---- gates


def test_gates_are_recorded_by_layer_and_adapterhubs_place():
    record = Record()
    for place in ("query", "value", "fc1", "fc2", "output"):
        part = part_of(KINDS["lora_gated"], replace(UP, name=place))
        part(call_of(record=record))
    gates = record.gates["a"][2]
    assert {place: tuple(gate.shape) for place, gate in gates.items()} == {
        "selfattn_lora": (3, 3),
        "intermediate_lora": (3,),
        "output_lora": (3,),
    }
    assert not gates["output_lora"].requires_grad


def test_a_llamas_output_is_its_first_projection():
    config = replace(KINDS["lora_gated"], output_places=("up",))
    assert config.location("up") == "output_lora"
    assert config.location("fc2") == "intermediate_lora"
    assert config.location("query") == "selfattn_lora"


# ---- what cannot be


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (PLAIN, {"places": ("queries",)}, "places: 'queries' is not known"),
        (PLAIN, {"places": ()}, "places is empty"),
        (PLAIN, {"r": 0}, "r=0: must be at least 1"),
        (PLAIN, {"dropout": 1.0}, "dropout=1.0: must be"),
        (PLAIN, {"composition_mode": "times"}, "composition_mode='times': use 'add' or 'scale'"),
        (PLAIN, {"init_weights": "zero"}, "init_weights='zero': use one of lora, bert, ia3, vera"),
        (PLAIN, {"use_dora": True, "weight_tying": True}, "set weight_tying=False"),
        (IA3, {"r": 2}, "set r=1, not 2"),
        (IA3, {"use_dora": True}, "goes with no dropout, use_dora"),
        (IA3, {"init_weights": "vera"}, "init_weights is 'ia3', 'bert' or 'lora'"),
        (MTL, {"use_dora": True}, "MTL-LoRA is of composition_mode='add'"),
        (MTL, {"init_weights": "ia3"}, "MTL-LoRA knows 'lora' and 'bert'"),
        (MTL, {"n_up_projection": 0}, "n_up_projection=0"),
        (MTL, {"task_specific_matrix_type": "round"}, "use one of singular_values, linear"),
        (MTL, {"weights_sharpness": 0}, "weights_sharpness=0: must be above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, said):
    with pytest.raises(UserError) as error:
        replace(config, **changes)
    assert said in str(error.value)


# ---- over devices


@pytest.mark.parametrize(
    ("kind", "site"),
    [*((kind, UP) for kind in KINDS if "vera" not in kind), ("lora", WHOLE), ("mtl", WHOLE)],
    ids=lambda value: value if isinstance(value, str) else value.split,
)
def test_shares_of_two_devices_make_the_whole(kind, site):
    owner = sublayer(site)
    part, call = part_of(KINDS[kind], site, owner), call_of(site=site)
    part(call).square().sum().backward()
    layouts = part.layouts(site)
    outputs, grads = [], {name: [] for name, _ in part.named_parameters()}
    for rank in (0, 1):
        local = part_of(KINDS[kind], site, owner)
        for name, whole in list(local.named_parameters()):
            holder, _, leaf = name.rpartition(".")
            piece = torch.nn.Parameter(share(whole.detach(), layouts.get(name), rank))
            setattr(local.get_submodule(holder), leaf, piece)
        if "dora" in kind:
            rows = torch.cat([half.chunk(2)[rank] for half in owner["linear"].weight.chunk(2)])
            local.projection.attach(torch.nn.ModuleDict({"linear": torch.nn.Linear(IN, OUT)}))
            local.projection.linear.weight = torch.nn.Parameter(rows.detach())
        if site.split == "column":
            mine = replace(call, output=call.output.detach().chunk(2, -1)[rank])
            outputs.append(local(mine))
            outputs[-1].square().sum().backward()
        else:  # a summand each
            mine = replace(call, input=call.input.detach().chunk(2, -1)[rank])
            outputs.append(local(replace(mine, output=torch.zeros_like(call.output))))
        for name, parameter in local.named_parameters():
            grads[name].append(parameter.grad)
    if site.split == "row":
        torch.testing.assert_close(call.output + outputs[0] + outputs[1], part(call))
        return
    torch.testing.assert_close(torch.cat(outputs, -1), part(call))
    for name, parameter in part.named_parameters():
        layout = layouts[name]
        if layout.partial_grad:
            torch.testing.assert_close(sum(grads[name]), parameter.grad, msg=name)
        else:
            torch.testing.assert_close(torch.cat(grads[name], layout.dim), parameter.grad, msg=name)
