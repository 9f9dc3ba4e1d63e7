"""Prefixes against formulas written here: gates, places, dropout, a T5's distances."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from graftwerk.adapters import BatchSplit, LoRAConfig, Parallel, PrefixTuningConfig, Stack
from graftwerk.adapters.slots import Record, Site
from graftwerk.errors import UserError
from graftwerk.models.positions import RelativePosition
from tests.graftwerk.adapters.slot_calls import IN, call_of, check_gradients, part_of, share
from tests.graftwerk.adapters.test_prompts import SOURCE, make, run
from tests.graftwerk.models.test_encoders import CONFIGS

KV, ROWS = 4, 3
SITE = Site("prefix", 2, IN, 2 * KV, "column", 2, "decoder")
NETWORK = PrefixTuningConfig(prefix_length=ROWS, bottleneck_dim=5)
FLAT = PrefixTuningConfig(prefix_length=ROWS, reparametrise=False)
KINDS = {
    "network": NETWORK,
    "relu": replace(NETWORK, non_linearity="relu"),
    "flat": FLAT,
    "network_gated": replace(NETWORK, use_gating=True),
    "flat_gated": replace(FLAT, use_gating=True),
    "flat_gated_apart": replace(FLAT, use_gating=True, shared_gating=False),
}


def empty_call(**how):
    """A call of a slot in which there is no prefix yet."""
    call = call_of(site=SITE, **how)
    return replace(call, output=call.output.detach()[:, :0].requires_grad_())


def formula(kind: str):
    def compute(w: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        if kind.startswith("flat"):
            rows = w["rows"]
        else:
            inner = w["encoder.embedding"].mm(w["encoder.linear_in.weight"].T)
            inner = inner + w["encoder.linear_in.bias"]
            inner = inner.clamp(min=0) if kind == "relu" else inner.tanh()
            rows = inner.mm(w["linear_out.weight"].T) + w["linear_out.bias"]
        keys, values = rows[:, :KV], rows[:, KV:]
        made = []
        for example in x:
            gates = torch.ones(2).double()
            if "gated" in kind:
                scores = example.mm(w["gate.weight"].T) + w["gate.bias"]
                gates = (1 / (1 + (-scores).exp())).sum(0) / len(example)
            made.append(torch.cat([gates[0] * keys, gates[-1] * values], 1))
        return torch.cat([torch.stack(made), y], 1)

    return compute


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_and_its_gradients_are_those_of_the_formula(kind):
    check_gradients(part_of(KINDS[kind], SITE, nn.Module()), empty_call(), formula(kind))


def test_a_later_prefix_stands_before_an_earlier_one_and_shows_its_rows():
    first, second = part_of(FLAT, SITE, nn.Module()), part_of(NETWORK, SITE, nn.Module())
    call = empty_call()
    call.output = first(call)
    call.seen = torch.tensor([[False, True, True]] * 3)
    both = second(call)
    torch.testing.assert_close(both[:, :ROWS], second(empty_call()))
    torch.testing.assert_close(both[:, ROWS:], first(empty_call()))
    assert call.seen.tolist() == [[True, True, True, False, True, True]] * 3


def test_dropout_differs_from_example_to_example_and_ends_with_training():
    part = part_of(replace(FLAT, dropout=0.5), SITE, nn.Module()).train()
    rows = part(empty_call(rows=400))
    dropped = rows == 0
    assert dropped.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(rows[~dropped], (2 * part.rows).expand_as(rows)[~dropped])
    torch.testing.assert_close(part.eval()(empty_call())[0], part.rows)


# ---- gates


@pytest.mark.parametrize(
    ("name", "stack", "alone", "place"),
    [
        ("prefix", "decoder", False, "self_prefix"),
        ("prefix", "encoder", False, "encoder_prefix"),
        ("prefix", "encoder", True, "self_prefix"),
        ("cross_prefix", "decoder", False, "cross_prefix"),
    ],
)
def test_gates_are_recorded_under_adapterhubs_places(name, stack, alone, place):
    config = KINDS["flat_gated"]
    site, other = replace(SITE, name=name, stack=stack), replace(SITE, stack="decoder")
    part = config.create(site)
    pairs = [(site, part), *([] if alone else [(other, config.create(other))])]
    config.tie(pairs)
    part.adapter, part.site = "a", site
    for shared, shape in ((True, (3,)), (False, (3, 2))):
        record = Record()
        made = part
        if not shared:
            made = replace(config, shared_gating=False).create(site)
            replace(config, shared_gating=False).tie([(site, made), *pairs[1:]])
            made.adapter, made.site = "a", site
        made.double()(empty_call(record=record))
        assert {key: tuple(v.shape) for key, v in record.gates["a"][2].items()} == {place: shape}


def test_a_gated_part_reads_the_whole_row_and_is_no_part_of_a_weight():
    assert part_of(KINDS["flat_gated"], SITE, nn.Module()).whole_row
    part = part_of(FLAT, SITE, nn.Module())
    assert not part.whole_row
    assert part.unmergeable is not None


# ---- where


def places(config: PrefixTuningConfig, shape: str) -> set[tuple[str, str]]:
    model = make(shape, a=config)
    return {(slot.site.name, slot.site.stack) for _, slot, _ in model.parts("a")}


def test_a_t5_has_prefixes_where_it_is_told_to():
    own, source, cross = ("prefix", "decoder"), ("prefix", "encoder"), ("cross_prefix", "decoder")
    assert places(FLAT, "t5") == {own, source, cross}
    assert places(replace(FLAT, encoder_prefix=False), "t5") == {own, cross}
    assert places(replace(FLAT, cross_prefix=False), "t5") == {own, source}
    assert places(replace(FLAT, leave_out=(0, 1, 2)), "t5") <= {own, source, cross}
    model = make("t5", a=replace(FLAT, leave_out=(0,)))
    assert 0 not in {slot.site.layer for _, slot, _ in model.parts("a")}


@torch.no_grad()
def test_shifted_positions_are_those_behind_the_prefix():
    model = make("gpt2", a=FLAT, b=replace(FLAT, shifts_positions=True))
    model.load_adapter_state("b", model.adapter_state("a"))
    model.set_active("b")
    moved = run(model)
    model.set_active("a")
    positions = torch.arange(SOURCE.shape[1]).expand_as(SOURCE)
    torch.testing.assert_close(model(SOURCE), model(SOURCE, positions))
    torch.testing.assert_close(moved, model(SOURCE, positions + ROWS))


@pytest.mark.parametrize("shape", ["gpt2", "t5", "bert"])
@torch.no_grad()
def test_prefixes_of_different_lengths_and_none_run_side_by_side(shape):
    longer = replace(FLAT, prefix_length=5, relative_positions="keys", cross_prefix=False)
    short = replace(NETWORK, relative_positions="keys", use_gating=True)
    model = make(shape, a=longer, b=short, c=LoRAConfig(dim=2))
    alone = []
    for name in ("a", "b", "c"):
        model.set_active(name)
        alone.append(run(model))
    model.set_active(Parallel("a", "b", "c"))
    got = run(model)
    if shape == "bert":  # start scores of all rows, then end scores
        got = got.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2)
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-5, atol=1e-5)
    model.set_active(BatchSplit("a", "c", batch_sizes=[1, 1]))
    rows = run(model)
    torch.testing.assert_close(rows[0], alone[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[1], alone[2][1], rtol=1e-5, atol=1e-5)


# ---- a T5's distances


def expected_scores(table: RelativePosition, queries: int, keys: int, seen, kind: str) -> Tensor:
    """One score at a time, by what each kind says of where things stand."""
    length = len(seen[0])
    scores = torch.zeros(len(seen), table.weight.shape[1], queries, length + keys)
    for b, row in enumerate(seen):
        there = sum(row)
        for i in range(queries):
            query = keys - queries + i + (there if kind == "both" else 0)
            place = 0
            for c in range(length + keys):
                if c < length and not row[c]:
                    continue
                if kind == "none":
                    distance = c - length - query
                else:
                    distance = place - query
                    place += 1
                if kind == "none" and c < length:
                    continue
                scores[b, :, i, c] = table.weight[table.buckets(torch.tensor(distance))]
    return scores


@pytest.mark.parametrize("kind", ["none", "keys", "both"])
@pytest.mark.parametrize("bidirectional", [True, False])
@torch.no_grad()
def test_scores_of_a_prefix_are_those_of_its_distances(kind, bidirectional):
    table = RelativePosition(CONFIGS["t5"], bidirectional)
    table.weight.copy_(torch.randn(table.weight.shape))
    seen = [[True, True, True], [False, False, True]]
    got = table.with_prefix(4, 6, torch.tensor(seen)[:, None], kind)
    expected = expected_scores(table, 4, 6, seen, kind)
    shown = torch.tensor(seen)[:, None, None].expand(-1, got.shape[1], 4, -1)
    shown = nn.functional.pad(shown, (0, 6), value=True)
    torch.testing.assert_close(got[shown], expected[shown])


@torch.no_grad()
def test_settings_of_distances_change_a_t5_and_prefixes_that_disagree_are_refused():
    kinds = {"plain": "none", "a": "keys", "b": "both"}
    model = make("t5", **{n: replace(FLAT, relative_positions=kind) for n, kind in kinds.items()})
    answers = []
    for name in kinds:
        model.load_adapter_state(name, model.adapter_state("plain"))
        model.set_active(name)
        answers.append(run(model))
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)
    assert not torch.allclose(answers[0], answers[2], atol=1e-3)
    assert not torch.allclose(answers[1], answers[2], atol=1e-3)
    with pytest.raises(UserError, match="relative_positions is both and keys"):
        model.set_active(Stack("a", "b"))


def test_from_where_layers_differ_a_single_adapter_of_adapterhub_has_no_distances():
    keys = replace(FLAT, relative_positions="keys")
    config = CONFIGS["t5"]
    layers, first = config.num_layers, config.num_layers + 1
    total = layers + config.decoder_num_layers
    model = make("t5", a=replace(keys, leave_out=(first,)), b=keys)
    model.set_active("a")
    assert model.plan.unplaced == set(range(first, total))
    model.set_active("b", skip_layers=[0])
    assert model.plan.unplaced == set(range(1, layers))
    model.set_active(Stack("a", "b"))
    assert not model.plan.unplaced


# ---- at birth, and what cannot be


def test_rows_and_what_the_network_reads_are_born_with_the_deviation_asked_for():
    torch.manual_seed(0)
    wide = replace(SITE, in_features=300, out_features=400)
    flat = replace(FLAT, prefix_length=50, init_std=1.0).create(wide)
    assert flat.rows.std().item() == pytest.approx(1.0, rel=0.02)
    network = replace(NETWORK, prefix_length=50, init_std=0.5, bottleneck_dim=200).create(wide)
    assert network.encoder.embedding.std().item() == pytest.approx(0.5, rel=0.02)
    for linear, fan_in in ((network.encoder.linear_in, 300), (network.linear_out, 200)):
        assert linear.weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.01)
        assert linear.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
    gate = replace(FLAT, use_gating=True).create(wide).gate
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert gate.bias.abs().item() < 300**-0.5


@pytest.mark.parametrize(("shared", "gates"), [(True, 1), (False, 2)])
def test_gates_add_as_many_parameters_as_the_formula_says(shared, gates):
    config = replace(FLAT, use_gating=True, shared_gating=shared)
    count = sum(p.numel() for p in config.create(SITE).parameters())
    assert count == 2 * ROWS * KV + gates * (IN + 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prefix_length": 0}, "prefix_length=0: at least 1"),
        ({"dropout": 1.0}, "dropout=1.0: must be from 0"),
        ({"relative_positions": "some"}, "relative_positions='some': use none, keys or both"),
        ({"non_linearity": "round"}, "non_linearity='round' is not known"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, said):
    with pytest.raises(UserError) as error:
        replace(FLAT, **changes)
    assert said in str(error.value)


# ---- over devices


@pytest.mark.parametrize("kind", ["flat_gated_apart", "network_gated"])
def test_shares_of_two_devices_make_the_whole(kind):
    part, call = part_of(KINDS[kind], SITE, nn.Module()), empty_call()
    part(call).square().sum().backward()
    layouts = part.layouts(SITE)
    grads = {name: [] for name, _ in part.named_parameters()}
    outputs = []
    for rank in (0, 1):
        local = part_of(KINDS[kind], SITE, nn.Module())
        for name, whole in list(local.named_parameters()):
            holder, _, leaf = name.rpartition(".")
            piece = nn.Parameter(share(whole.detach(), layouts.get(name), rank))
            setattr(local.get_submodule(holder), leaf, piece)
        outputs.append(local(replace(call, output=call.output.detach()[..., :KV])))
        outputs[-1].square().sum().backward()
        for name, parameter in local.named_parameters():
            grads[name].append(parameter.grad)
    halves = [output.chunk(2, -1) for output in outputs]  # a rank's keys, then its values
    whole = torch.cat([half[i] for i in (0, 1) for half in halves], -1)
    torch.testing.assert_close(whole, part(call))
    for name, parameter in part.named_parameters():
        layout = layouts[name]
        if layout.partial_grad:
            torch.testing.assert_close(sum(grads[name]), parameter.grad, msg=name)
        else:
            blocks = [grad.chunk(layout.blocks, layout.dim) for grad in grads[name]]
            joined = [block[i] for i in range(layout.blocks) for block in blocks]
            torch.testing.assert_close(torch.cat(joined, layout.dim), parameter.grad, msg=name)
