"""AdapterFusion: its attention against one written here, token by token, and `Fuse` in a slot."""

import pytest
import torch
from torch import Tensor

from graftwerk.adapters import BottleneckConfig, Fuse, Stack
from graftwerk.adapters.fusion import Fusion, FusionConfig, fuse
from graftwerk.adapters.methods.bn import BnConfig
from graftwerk.adapters.slots import Flow, Record, Site, SlotCall
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_prompts import make, run
from tests.graftwerk.tiny import shake

HIDDEN = 8
SITE = Site("mlp_output", 1, HIDDEN, HIDDEN)
CONFIGS = {
    "dynamic": FusionConfig(),
    "static": FusionConfig.named("static"),
    "value_behind_softmax": FusionConfig(value_before_softmax=False),
    "residual_before": FusionConfig(residual_before=True),
    "no_query": FusionConfig(query=False),
    "no_key": FusionConfig(key=False),
    "nothing_trained": FusionConfig(query=False, key=False, value=False),
    "warm": FusionConfig(temperature=True),
}


def layer(config: FusionConfig) -> Fusion:
    torch.manual_seed(0)
    fusion = config.create(SITE).double()
    fusion.name = "a,b,c"
    shake(fusion)
    return fusion


def doubles(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def attention(fusion: Fusion, query: Tensor, updates: Tensor, residual: Tensor) -> Tensor:
    """One token and one adapter at a time, each matrix where the paper has it."""
    config = fusion.config
    w = dict(fusion.named_parameters())

    def through(name: str, vector: Tensor) -> Tensor:
        bias = w.get(f"{name}.bias", 0)
        return w[f"{name}.weight"] @ vector + bias if f"{name}.weight" in w else vector

    rows = []
    for b in range(query.shape[0]):
        tokens = []
        for s in range(query.shape[1]):
            own = [update + (residual[b, s] if config.residual_before else 0)
                   for update in updates[b, s]]  # fmt: skip
            scores = [through("query", query[b, s]) @ through("key", update) for update in own]
            powers = torch.stack(scores) / (50 if config.temperature else 1)
            powers = torch.exp(powers - powers.max().detach())
            weights = powers / powers.sum()
            out = sum(p * through("value", u) for p, u in zip(weights, own, strict=True))
            tokens.append(out if config.residual_before else out + residual[b, s])
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fusion_and_its_gradients_are_those_of_the_formula(name):
    fusion = layer(CONFIGS[name]).eval()
    query, residual = doubles(2, 3, HIDDEN, seed=1), doubles(2, 3, HIDDEN, seed=2)
    updates = doubles(2, 3, 4, HIDDEN, seed=3)
    given, weights = fusion(query, updates, residual)
    want = attention(fusion, query, updates, residual)
    torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    leaves = [query, residual, updates, *fusion.parameters()]
    for one, other in zip(
        torch.autograd.grad(given.sin().sum(), leaves),
        torch.autograd.grad(want.sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_fusion_is_born_near_the_mean_of_what_its_adapters_add():
    torch.manual_seed(0)
    fusion = FusionConfig().create(Site("mlp_output", 0, 300, 300))
    for matrix in (fusion.query, fusion.key):
        assert matrix is not None
        assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not matrix.bias.any()
    assert fusion.value is not None
    value = fusion.value.weight
    assert torch.equal(value.diagonal(), torch.ones(300))
    assert torch.equal(value - value.diagonal().diag(), 1e-6 * (1 - torch.eye(300)))
    trained = sum(p.numel() for p in fusion.parameters())
    assert trained == 2 * 300 * 301 + 300 * 300


def test_a_value_matrix_that_is_not_initialised_is_normal():
    torch.manual_seed(0)
    fusion = FusionConfig(value_initialized=False).create(Site("mlp_output", 0, 300, 300))
    assert fusion.value is not None
    assert fusion.value.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_the_loss_is_a_hundredth_of_the_squared_distance_to_the_identity():
    fusion = layer(FusionConfig())
    assert fusion.value is not None
    rows = fusion.value.weight.tolist()
    squares = [(w - (i == j)) ** 2 for i, row in enumerate(rows) for j, w in enumerate(row)]
    assert fusion.loss().item() == pytest.approx(0.01 * sum(squares))
    assert layer(FusionConfig.named("static")).loss().item() == 0
    assert layer(FusionConfig(regularization=False)).loss().item() == 0


def test_the_temperature_falls_once_a_backward_pass_down_to_one():
    fusion = layer(FusionConfig(temperature=True)).train()
    query, updates = doubles(1, 2, HIDDEN, seed=1), doubles(1, 2, 3, HIDDEN, seed=2)
    fusion(query, updates, query)
    assert fusion.temperature.item() == 50
    for _ in range(2):
        fusion(query, updates, query)[0].sum().backward()
    assert fusion.temperature.item() == pytest.approx(49.9)
    fusion.temperature.fill_(1.02)
    fusion(query, updates, query)[0].sum().backward()
    assert fusion.temperature.item() == 1
    assert "temperature" in fusion.state_dict()


def test_dropout_acts_on_scores_in_training():
    fusion = layer(FusionConfig(dropout_prob=1.0)).train()
    query, updates = doubles(1, 2, HIDDEN, seed=1), doubles(1, 2, 4, HIDDEN, seed=2)
    _, weights = fusion(query, updates, query)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))


def bottleneck(seed: int, **settings):
    part = BnConfig(reduction_factor=2, original_ln_before=True, **settings).create(SITE)
    assert part is not None
    part.adapter, part.site = "abc"[seed], SITE
    shake(part, seed)
    return part.double()


@pytest.mark.parametrize("before_norm", [False, True])
def test_fuse_weighs_what_is_added_to_the_input_of_the_last(before_norm):
    first, last = bottleneck(0), bottleneck(1, original_ln_after=False, residual_before_ln=False)
    fusion = layer(FusionConfig(query_before_ln=before_norm))
    norm = torch.nn.LayerNorm(HIDDEN).double()
    h, x = doubles(2, 3, HIDDEN, seed=1), doubles(2, 3, HIDDEN, seed=2)
    record = Record()
    call = SlotCall(h, Flow(record=record), residual=x, norm=norm)
    given = fuse(fusion, [(None, first), (None, last)], call)
    z = norm(h + x)
    updates = torch.stack([part.adapter_up(part.adapter_down(z)) for part in (first, last)], 2)
    want = attention(fusion, h if before_norm else z, updates, z)
    torch.testing.assert_close(given, want)
    assert call.joined
    weights = record.fusions["a,b,c"][1]["output_adapter"]
    assert weights.shape == (2, 3, 2)
    assert not weights.requires_grad


def test_in_a_fuse_a_stack_runs_on_what_the_last_adapter_reads():
    one, two, last = (bottleneck(seed) for seed in range(3))
    fusion = layer(FusionConfig())
    h, x = doubles(2, 3, HIDDEN, seed=1), doubles(2, 3, HIDDEN, seed=2)
    call = SlotCall(h, Flow(), residual=x)
    given = fuse(fusion, [(one.__call__, two), (None, last)], call)

    def added(part, z):
        return part.adapter_up(part.adapter_down(z))

    z = h + x  # pre-norm: what the last adapter reads; a Stack adds the residual at each adapter
    left = added(one, z + x) + z
    updates = torch.stack([added(two, left + x), added(last, z)], 2)
    torch.testing.assert_close(given, attention(fusion, z, updates, h))


def test_gates_and_dropout_act_on_what_is_weighed():
    part = bottleneck(0, use_gating=True)
    h, x = doubles(2, 3, HIDDEN, seed=1), doubles(2, 3, HIDDEN, seed=2)
    fusion = layer(FusionConfig(value=False))
    fused = fuse(fusion, [(None, part)], SlotCall(h, Flow(), residual=x))
    torch.testing.assert_close(fused, part(SlotCall(h, Flow(), residual=x)))


IDENTITY = FusionConfig(value=False, regularization=False)


@pytest.mark.parametrize(
    "config",
    [
        BnConfig(),
        BnConfig(original_ln_before=True, residual_before_ln="post_add", mh_adapter=True),
        BnConfig(is_parallel=True, scaling=4.0),
        BnConfig(original_ln_after=False),
        BottleneckConfig(dim=4),
        BottleneckConfig(dim=4, norm_position="post"),
    ],
    ids=["sequential", "post_add", "parallel", "joined", "nemo", "nemo_post"],
)
@pytest.mark.parametrize("shape", ["gpt2", "t5", "bert"])
@torch.no_grad()
def test_a_fusion_of_one_adapter_without_values_is_the_adapter(shape, config):
    model = make(shape, a=config)
    model.set_active("a")
    alone = run(model)
    model.add_fusion(("a",), IDENTITY)
    model.set_active(Fuse("a"))
    torch.testing.assert_close(run(model), alone, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_only_the_fusion_learns_and_its_loss_is_that_of_its_layers():
    model = make("gpt2", a=BnConfig(), b=BnConfig(), c=BnConfig())
    key = model.add_fusion(("b", "c"), FusionConfig())
    model.train_only(fusions=(key,))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".fusion_layer.b,c." in name for name in trained)
    model.set_active(Stack("a", Fuse("b", "c")))
    (run(model).sin().sum() + model.fusion_loss()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    layers = [layer for _, _, layer in model.fusion_layers(key)]
    assert len(layers) == model.config.num_layers
    assert model.fusion_loss().item() == pytest.approx(sum(one.loss().item() for one in layers))


@torch.no_grad()
def test_attentions_are_recorded_by_the_fusions_name():
    model = make("t5", a=BnConfig(), b=BnConfig(cross_adapter=True))
    model.add_fusion(("a", "b"), FusionConfig())
    model.set_active(Fuse("a", "b"))
    record = Record()
    run(model, record=record)
    layers = record.fusions["a,b"]
    total = model.config.num_layers + model.config.decoder_num_layers
    assert sorted(layers) == list(range(total))
    assert layers[0]["output_adapter"].shape == (2, 9, 2)
    assert layers[total - 1]["output_adapter"].shape == (2, 5, 2)
    assert layers[total - 1]["cross_adapter"].shape == (2, 5, 1)


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: FusionConfig(dropout_prob=2.0), "dropout_prob=2.0"),
        (lambda: FusionConfig.named("moving"), "'moving'.*'dynamic' or 'static'"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(make_wrong, message):
    with pytest.raises(UserError, match=message):
        make_wrong()
