"""Dropout by place: what its masks follow from, and what they do not depend on."""

from zlib import crc32

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graftwerk.adapters import (
    BottleneckConfig,
    Fuse,
    FusionConfig,
    HubLoRAConfig,
    LoRAConfig,
    Parallel,
    PrefixTuningConfig,
    Stack,
)
from graftwerk.adapters.masks import Chance, Dropout, chances, dropouts
from graftwerk.adapters.slots import Flow, Site, slots_of
from graftwerk.models import build_model
from tests.graftwerk.adapters.test_interpreter import SHAPES
from tests.graftwerk.tiny import shake, tokens

WORD = 0xFFFFFFFF
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def flow_of(rows: Tensor, offset: int = 0) -> Flow:
    return Flow(offset=offset, chance=Chance(rows))


def kept(rows: Tensor, columns: int, features: int, p: float = 0.5, key: str = "a") -> Tensor:
    """1 where a number stays, [B, S, F]."""
    ones = torch.ones(len(rows), columns, features, device=rows.device)
    return (Dropout(p, key).train()(ones, flow_of(rows)) != 0).double()


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x21F0AAAD & WORD
    x = (x ^ x >> 15) * 0x735A2D97 & WORD
    return x ^ x >> 15


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_is_that_of_the_formula_in_whole_numbers(device: str):
    seed, first, p = 7 + (5 << 32), 3 + (1 << 32), 0.3
    base = mix(mix(5) ^ mix(mix(7)))
    expected = []
    for number in range(first, first + 3):
        row = mix(mix(number >> 32) ^ mix(mix(number & WORD) ^ base))
        for column in range(-2, 5):
            token = mix(mix(column & WORD) ^ row)
            for feature in range(9):
                drawn = token ^ mix(mix(feature) ^ crc32(b"key"))
                # int32: moved by half its range, shifted with its sign, products wrapped
                drawn = signed(drawn * 0x21F0AAAD)
                drawn = signed((drawn ^ drawn >> 15) * 0x735A2D97)
                expected.append(0.0 if drawn < round(p * 2**32) - 2**31 else 1 / (1 - p))
    rows = chances(seed, range(first, first + 3)).to(device)
    ones = torch.ones(3, 7, 9, device=device)
    made = Dropout(p, "key").train()(ones, flow_of(rows, -2))
    assert 0 < sum(x == 0 for x in expected) < len(expected)
    torch.testing.assert_close(made.cpu().flatten(), torch.tensor(expected))


def signed(x: int) -> int:
    return (x + 2**31 & WORD) - 2**31


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_have_their_rate_and_nothing_tells_of_another(p: float):
    rows = chances(1234, range(16))

    def standard(mask: Tensor) -> Tensor:
        return (mask - (1 - p)) / (p * (1 - p)) ** 0.5

    def strength(*factors: Tensor) -> float:
        """A product's mean in its standard deviations."""
        product = factors[0]
        for factor in factors[1:]:
            product = product * factor
        return abs(float(product.mean())) * product.numel() ** 0.5

    one = standard(kept(rows, 64, 256, p))
    other_step = standard(kept(chances(1234, range(16, 32)), 64, 256, p))
    other_seed = standard(kept(chances(1235, range(16)), 64, 256, p))
    other_layer = standard(kept(rows, 64, 256, p, "b"))
    corners = one[:, :-1], one[:, 1:]
    found = {
        "rate": strength(one),
        "features": strength(one[..., 1:], one[..., :-1]),
        "columns": strength(*corners),
        "rows": strength(one[1:], one[:-1]),
        "steps": strength(one, other_step),
        "seeds": strength(one, other_seed),
        "layers": strength(one, other_layer),
        "rectangles": strength(*(x[..., s] for x in corners for s in (slice(1, None), slice(-1)))),
        "rectangles of layers": strength(*corners, other_layer[:, :-1], other_layer[:, 1:]),
    }
    assert max(found.values()) < 4, found
    # Rates of single features and tokens stray as chance has it: a chi-squared of so many.
    for dim in ((0, 1), (0, 2), (2,)):
        squares = one.mean(dim).square() * one.numel() / one.mean(dim).numel()
        spread = (float(squares.mean()) - 1) * (squares.numel() / 2) ** 0.5
        assert abs(spread) < 4 * (1 + 1 / (p * (1 - p) * one.numel() / squares.numel())), dim


def test_other_rows_padding_and_a_cut_change_no_mask():
    rows, x = chances(1, range(4)), torch.ones(4, 8, 6)
    dropout = Dropout(0.5, "a").train()
    whole = dropout(x, flow_of(rows, -2))
    longer = dropout(torch.ones(4, 30, 6), flow_of(rows, -2))
    assert torch.equal(longer[:, :8], whole)
    assert torch.equal(dropout(x[2:], flow_of(rows[2:], -2)), whole[2:])
    assert torch.equal(dropout(x[:, 3:], flow_of(rows, 1)), whole[:, 3:])
    assert torch.equal(dropout(x[..., :4], flow_of(rows, -2)), whole[..., :4])


@pytest.mark.parametrize(
    ("of", "split", "size", "blocks"), [("input", "row", 12, 1), ("output", "column", 8, 2)]
)
def test_a_share_of_the_features_has_their_masks(of, split, size, blocks):
    site = Site("any", 0, 12, 8, split, blocks)
    rows = chances(1, range(4))
    whole = Dropout(0.5, "a", of).train()(torch.ones(4, 5, size), flow_of(rows))
    for rank in range(2):

        def own(numbers: Tensor, blocks: int, rank: int = rank) -> Tensor:
            return numbers.unflatten(-1, (blocks, 2, -1))[..., rank, :].flatten(-2)

        share = Dropout(0.5, "a", of).train()
        share.share(site, own)
        made = share(torch.ones(4, 5, size // 2), flow_of(rows))
        assert torch.equal(made, own(whole, blocks))


def test_what_all_ranks_hold_keeps_its_masks():
    dropout = Dropout(0.5, "a", "input").train()
    x, flow = torch.ones(2, 5, 12), flow_of(chances(1, range(2)))
    whole = dropout(x, flow)
    dropout.share(Site("any", 0, 12, 8, "column"), lambda numbers, _: numbers[:6])
    assert torch.equal(dropout(x, flow), whole)


def test_what_stays_grows_and_types_stay():
    x = torch.full((2, 40, 50), 3.0, dtype=torch.bfloat16, requires_grad=True)
    y = Dropout(0.25, "a").train()(x, flow_of(chances(1, range(2))))
    assert y.dtype == torch.bfloat16
    assert set(y.unique().tolist()) == {0.0, 4.0}
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0)


def test_without_chances_it_draws_from_torchs_random_state():
    x, dropout = torch.ones(2, 20, 20), Dropout(0.5, "a").train()
    torch.manual_seed(3)
    first, second = dropout(x, Flow()), dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(torch.nn.functional.dropout(x, 0.5), first)
    flow = flow_of(chances(1, range(2)))
    assert torch.equal(dropout.eval()(x, flow), x)
    assert not Dropout(1.0).train()(x, flow).any()


METHODS = {
    "lora": LoRAConfig(dim=2, target_modules=("all",), dropout=0.2),
    "post": LoRAConfig(dim=2, dropout=0.2, dropout_position="post"),
    "hub": HubLoRAConfig(r=2, dropout=0.2),
    "prefix": PrefixTuningConfig(prefix_length=3, reparametrise=False, dropout=0.2),
    "one": BottleneckConfig(dim=4, dropout=0.2),
    "two": BottleneckConfig(dim=4, dropout=0.2),
}


def model_of(shape: str, base: float = 0.0):
    torch.manual_seed(0)
    config = SHAPES[shape]
    rates = dict.fromkeys(("hidden_dropout", "embedding_dropout"), base)
    model = build_model(type(config)(**{**vars(config), **rates})).double()
    shake(model)
    for name, method in METHODS.items():
        model.add_adapter(name, method)
        for _, _, part in model.parts(name):
            shake(part.double())
    return model.train()


def given(shape: str, count: int, length: int) -> dict[str, Tensor]:
    inputs = {"tokens": tokens(count, length, 23, 1)}
    if shape == "t5":
        inputs["source"] = tokens(count, length + 2, 23, 2)
    return inputs


@pytest.mark.parametrize("shape", ["gpt2", "t5", "bert"])
def test_a_row_is_computed_alike_alone_and_among_others(shape: str):
    model = model_of(shape, 0.1)
    model.add_fusion(["one", "two"], FusionConfig(dropout_prob=0.2))
    for slot in slots_of(model).values():
        slot.fusion_layer.double()
    model.set_active(Stack("lora", "post", "hub", "prefix", Fuse("one", "two")))
    inputs, chance = given(shape, 3, 6), chances(5, range(3))
    whole = model(**inputs, chance=chance)
    assert not torch.equal(model(**inputs, chance=chances(5, range(3, 6))), whole)
    for row in range(3):
        own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        torch.testing.assert_close(model(**own, chance=chance[row : row + 1]), whole[row : row + 1])
    keys = [dropout.key for _, dropout in dropouts(model)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("shape", ["gpt2", "t5"])
def test_copies_of_a_row_are_those_of_each_adapter_alone(shape: str):
    model = model_of(shape, 0.1)
    inputs, chance = given(shape, 2, 5), chances(5, range(2))
    model.set_active(Parallel("one", "lora"))
    both = model(**inputs, chance=chance).chunk(2)
    for name, copy in zip(("one", "lora"), both, strict=True):
        model.set_active(name)
        torch.testing.assert_close(model(**inputs, chance=chance), copy)


def test_an_encoder_and_a_decoder_drop_other_embeddings():
    model = model_of("t5")
    model.embedding.dropout.p = 0.5
    seen = []
    model.embedding.register_forward_hook(lambda *call: seen.append(call[2] == 0))
    words = tokens(2, 6, 23, 1)
    model(words, source=words, chance=chances(5, range(2)))
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_a_pass_that_runs_again_needs_no_random_state():
    model = model_of("gpt2")
    model.set_active(Stack("lora", "prefix"))
    inputs, chance = given("gpt2", 2, 6), chances(5, range(2))
    expected = model(**inputs, chance=chance)
    model.zero_grad()
    expected.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    again = checkpoint(
        lambda: model(**inputs, chance=chance), use_reentrant=False, preserve_rng_state=False
    )
    assert isinstance(again, Tensor)
    again.square().sum().backward()
    for name, gradient in wanted.items():
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient), name
