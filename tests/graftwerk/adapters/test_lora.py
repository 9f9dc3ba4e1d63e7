"""LoRA's targets, variants and settings; DoRA; both split over two ranks; a base in 4 bits."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from graftwerk.adapters import IA3Config, LoRAConfig, Parallel, Stack
from graftwerk.adapters.merge import merge
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.checkpoints import load_base, save_base
from graftwerk.errors import UserError
from graftwerk.models import GPT
from graftwerk.parallel.tensor import gather, layout_of, parallelize, sum_partial_gradients
from tests.graftwerk.adapters.test_prompts import make, run
from tests.graftwerk.ranks import on_processes
from tests.graftwerk.tiny import shake, tiny_gpt, tokens

CROSS = {"cross_query", "cross_key", "cross_value"}
PLACES = {
    "attention_qkv": {"qkv", *CROSS},
    "attention_dense": {"output", "cross_output"},
    "mlp_fc1": {"fc1"},
    "mlp_fc2": {"fc2"},
    "attention": {"qkv", "output", "cross_output", *CROSS},
    "mlp": {"fc1", "fc2"},
    "all": {"qkv", "output", "cross_output", "fc1", "fc2", *CROSS},
}


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5", "bert"])
def test_a_target_names_its_places_fused_or_apart(shape, target):
    fused = PLACES[target] if shape == "t5" else {n for n in PLACES[target] if "cross" not in n}
    apart = fused - {"qkv"} | ({"query", "key", "value"} if "qkv" in fused else set())
    if shape in ("llama", "t5") and "fc1" in fused:
        apart = apart - {"fc1"} | {"gate", "up"}
    for variant, places in (("nemo", fused), ("canonical", apart)):
        model = make(shape, a=LoRAConfig(dim=2, target_modules=(target,), variant=variant))
        assert {slot.site.name for _, slot, _ in model.parts("a")} == places


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 32}, 4.0),
        ({"alpha": 1}, 0.125),
        ({"alpha": 32, "rank_stabilised": True}, 32 / 8**0.5),
        ({"rank_stabilised": True}, 8**0.5),
    ],
)
@torch.no_grad()
def test_the_update_is_scaled_by_alpha_over_the_rank_or_its_root(settings, scale):
    part = LoRAConfig(dim=8, **settings).create(Site("qkv", 0, 6, 10))
    assert part is not None
    shake(part)
    x, y = torch.randn(2, 3, 6), torch.randn(2, 3, 10)
    a, b = part.get_parameter("linear_in.weight"), part.get_parameter("linear_out.weight")
    expected = y + scale * torch.einsum("bsi,ri,or->bso", x, a, b)
    torch.testing.assert_close(part(SlotCall(y, input=x)), expected)


@pytest.mark.parametrize("position", ["pre", "post"])
@torch.no_grad()
def test_dropout_takes_features_of_the_input_or_of_the_update(position):
    torch.manual_seed(0)
    config = LoRAConfig(dim=400, dropout=0.5, dropout_position=position)
    part = config.create(Site("qkv", 0, 400, 400))
    assert part is not None
    eye = torch.eye(400)
    for name in ("linear_in.weight", "linear_out.weight"):
        part.get_parameter(name).copy_(eye)
    x, y = torch.ones(1, 20, 400), torch.zeros(1, 20, 400)
    got = part.train()(SlotCall(y, input=x))  # B A = 1: either way 0 or twice the input
    assert set(got.unique().tolist()) == {0.0, 2.0}
    part.get_parameter("linear_out.weight").copy_(torch.ones(400, 400))
    spread = part(SlotCall(y, input=x))
    # Dropped inputs are summed, so that no output is zero; dropped outputs are zero themselves.
    assert (spread == 0).any() == (position == "post")
    assert torch.equal(part.eval()(SlotCall(y, input=x)), torch.full((1, 20, 400), 400.0))


@pytest.mark.parametrize(
    ("method", "low", "high", "deviation"),
    [
        ("xavier", -1, 1, (2 / (400 + 100)) ** 0.5),
        ("normal", -1.2, 1.2, 0.2),
        ("kaiming", -((1 / 400) ** 0.5), (1 / 400) ** 0.5, (1 / 400 / 3) ** 0.5),
    ],
)
def test_a_is_born_by_the_named_distribution_and_b_zero(method, low, high, deviation):
    torch.manual_seed(0)
    part = LoRAConfig(dim=100, column_init_method=method).create(Site("qkv", 0, 400, 300))
    assert part is not None
    weight = part.get_parameter("linear_in.weight").detach()
    assert weight.shape == (100, 400)
    assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert low <= weight.min().item() < -2 / 3 * deviation
    assert 2 / 3 * deviation < weight.max().item() <= high
    assert not part.get_parameter("linear_out.weight").any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ("q_proj",)},
            "'q_proj' is not known: use some of attention_qkv,",
        ),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"variant": "peft"}, "variant='peft': use 'nemo' or 'canonical'"),
        ({"dropout_position": "mid"}, "dropout_position='mid'"),
        ({"dropout": 1.0}, "adapter_dropout=1.0"),
        ({"dim": 0}, "adapter_dim=0"),
        ({"alpha": -1}, "alpha=-1"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(settings, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**settings)


# ---- DoRA


@torch.no_grad()
def test_a_dora_is_the_length_of_each_row_times_its_direction():
    """arXiv:2402.09353, equation 5, on a projection with a bias."""
    model = make("gpt2", a=LoRAConfig(dim=3, alpha=6, target_modules=("mlp_fc2",), dora=True))
    model.set_active("a")
    _, slot, part = next(iter(model.parts("a")))
    linear = model.get_submodule("decoder.layers.0.mlp.linear_fc2")
    x = torch.randn(2, 5, 48)
    direction = linear.weight + 2 * part.linear_out.weight @ part.linear_in.weight
    rows = direction / direction.norm(dim=1, keepdim=True)
    expected = x @ (part.magnitude[:, None] * rows).T + linear.bias
    torch.testing.assert_close(slot(linear(x), model.flow(), x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_dora_is_born_with_the_lengths_of_the_rows_and_follows_its_weights():
    model = make("llama")
    before = run(model)
    config = LoRAConfig(dim=3, target_modules=("mlp_fc1",), variant="canonical", dora=True)
    model.add_adapter("a", config)
    weight = model.get_submodule("decoder.layers.0.mlp.linear_fc1").weight
    for name, rows in (("gate", weight[:48]), ("up", weight[48:])):
        part = model.get_submodule(f"decoder.layers.0.mlp.{name}.adapter_layer.a")
        torch.testing.assert_close(part.magnitude, rows.norm(dim=1))
    model.set_active("a")
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)
    part.linear_out.weight.normal_()
    once = run(model)  # the lengths that were kept are those of other weights
    part.linear_out.weight.mul_(-1)
    part.linear_out.weight.mul_(-1)
    torch.testing.assert_close(run(model), once)
    assert not torch.allclose(once, before, atol=1e-3)
    expected = weight[48:] + part.linear_out.weight @ part.linear_in.weight
    torch.testing.assert_close(part.length(), expected.norm(dim=1))


@torch.no_grad()
def test_doras_side_by_side_give_what_each_gives_alone():
    config = LoRAConfig(dim=2, target_modules=("all",), dora=True)
    model = make("t5", a=config, b=config)
    alone = []
    for name in ("a", "b"):
        model.set_active(name)
        alone.append(run(model))
    model.set_active(Parallel("a", "b"))
    torch.testing.assert_close(run(model), torch.cat(alone), rtol=1e-4, atol=1e-4)


# ---- two ranks

SPLIT = {
    "canonical": LoRAConfig(dim=4, target_modules=("all",), variant="canonical"),
    "dora": LoRAConfig(dim=4, target_modules=("attention_qkv", "mlp_fc1"), dora=True),
    "apart": LoRAConfig(
        dim=4, target_modules=("attention_qkv", "mlp_fc1"), dora=True, variant="canonical"
    ),
    "added": LoRAConfig(
        dim=2, target_modules=("all",), weight_tying=True, position_embedding_strategy="add"
    ),
    "biased": LoRAConfig(dim=2, weight_tying=True, position_embedding_strategy="biasadd"),
    "joined": LoRAConfig(dim=2, weight_tying=True, position_embedding_strategy="mlpconcat"),
    "ia3": IA3Config(),
}


def split_model() -> GPT:
    model = tiny_gpt().double()
    for seed, (name, config) in enumerate(SPLIT.items()):
        model.add_adapter(name, config)
        for _, _, part in model.parts(name):
            shake(part.double(), seed)
    model.freeze_base()
    model.set_active(Stack(*SPLIT))
    return model


def one_step(model: GPT, reduce=lambda: None) -> None:
    batch = tokens()
    logits = model(batch[:, :-1]).flatten(0, 1)
    nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
    reduce()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()


def two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = split_model()
    parallelize(model, mesh)
    one_step(model, lambda: sum_partial_gradients(model.parameters(), mesh.get_group()))
    state = {
        name: gather(parameter.detach(), layout_of(parameter), mesh.get_group())
        for name, parameter in model.named_parameters()
    }
    logits = model(tokens()).detach()
    model.set_active(Stack("canonical", "dora", "apart", "ia3"))
    with torch.no_grad():
        unmerged = model(tokens())
        merge(model)  # each rank its own rows or columns
        merged = model(tokens())
    torch.save((state, logits, unmerged, merged), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_one_step_and_a_merge_on_two_ranks_equal_one_process(tmp_path: Path):
    on_processes(2, two_ranks, tmp_path)
    plain = split_model()
    born = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    one_step(plain)
    for rank in (0, 1):
        loaded = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        state, logits, unmerged, merged = loaded
        torch.testing.assert_close(logits, plain(tokens()), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(merged, unmerged, rtol=1e-9, atol=1e-9)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(state[name], parameter, rtol=1e-9, atol=1e-9)
            assert parameter.requires_grad != torch.equal(parameter, born[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weight_tying": True, "position_embedding_strategy": "concat"},
            r"position_embedding_strategy='concat' on fc2 does not split .* use 'add'",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_by_its_key(settings, message):
    model = make("llama", a=LoRAConfig(dim=2, target_modules=("mlp_fc2",), **settings))
    ((_, slot, part), *_) = model.parts("a")
    with pytest.raises(UserError, match=message):
        part.layouts(slot.site)


# ---- a base in 4 bits


def test_without_bitsandbytes_a_base_in_four_bits_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = (
        r"^quantize=nf4 needs the package bitsandbytes.*: pip install bitsandbytes, or load.*$"
    )
    with pytest.raises(UserError, match=message):
        load_base(tmp_path / "nowhere", quantize="nf4")
    with pytest.raises(UserError, match="quantize='int3' is not known: use nf4"):
        load_base(tmp_path / "nowhere", quantize="int3")


def test_a_base_in_four_bits_trains_a_lora_in_full_precision(tmp_path):
    bitsandbytes: ModuleType = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    save_base(make("llama"), None, tmp_path / "base")
    model = load_base(tmp_path / "base", quantize="nf4")
    plain = load_base(tmp_path / "base")
    packed = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 3 * 4
    for name, module in model.named_modules():
        if module in packed:
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            plain.get_submodule(name).weight.data = weight
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-4)
    base = run(model)
    model.add_adapter("a", LoRAConfig(dim=2, target_modules=("all",)))
    model.freeze_base()
    model.set_active("a")
    torch.testing.assert_close(run(model), base)
    run(model).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained)
    with pytest.raises(UserError, match="a quantised base takes no merge"):
        merge(model)
    with pytest.raises(UserError, match="dora=True reads the base's weights, which are quantised"):
        model.add_adapter("b", LoRAConfig(dim=2, dora=True))
