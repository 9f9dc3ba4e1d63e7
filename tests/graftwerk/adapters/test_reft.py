"""ReFT against formulas written here, and at which tokens it acts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from graftwerk.adapters.methods.reft import ReftConfig, ReftUnit, orthonormal, with_base
from graftwerk.adapters.slots import Site
from graftwerk.errors import UserError
from tests.graftwerk.adapters.slot_calls import OUT, call_of, check_gradients, part_of

BEHIND = Site("layer_output", 1, OUT, OUT)
NOREFT = ReftConfig(r=2, prefix_positions=2, suffix_positions=1, orthogonality=False, dropout=0.0)
KINDS = {
    "noreft": NOREFT,
    "loreft": replace(NOREFT, orthogonality=True),
    "loreft_base": replace(NOREFT, orthogonality=True, orthogonal_base=True),
    "direft": replace(NOREFT, subtract_projection=False),
    "relu": replace(NOREFT, non_linearity="relu"),
    "tied": replace(NOREFT, tied_weights=True),
}


def rotation(kind: str, raw: Tensor, base: Tensor | None) -> Tensor:
    """R of a unit: as it is, by Gram and Schmidt, or by Householder's reflections of a base."""
    if kind == "loreft":
        rows: list[Tensor] = []
        for row in raw:
            rest = row - sum((row @ done) * done for done in rows)
            rows.append(rest / rest.square().sum().sqrt())
        return torch.stack(rows)
    if kind == "loreft_base":
        assert base is not None
        size, count = base.shape[0], raw.shape[0]
        made = torch.eye(size).double()
        for k in range(count):  # the reflection along v = (0 ... 0, 1, the rest of a row)
            mask = (torch.arange(size) > k).double()
            v = raw[k] * mask + torch.eye(size).double()[k]
            made = made @ (torch.eye(size).double() - 2 * torch.outer(v, v) / (v @ v))
        signs = raw.detach().diagonal().trunc()
        return (base @ (made[:, :count] * signs)).T
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_and_its_gradients_are_those_of_the_formula(kind):
    part = part_of(KINDS[kind], BEHIND, nn.Module())
    bases = [buffer for name, buffer in part.named_buffers() if name.endswith("base")]

    def formula(w: dict[str, Tensor], y: Tensor, _: Tensor | None) -> Tensor:
        rows = []
        for example in y:
            tokens = []
            for i, h in enumerate(example):
                if 2 <= i < len(example) - 1:
                    tokens.append(h)
                    continue
                unit = 0 if i < 2 or kind == "tied" else 1
                leaf = "parametrizations.weight.original" if kind == "loreft_base" else "weight"
                raw = w[f"units.{unit}.projection.{leaf}"]
                r = rotation(kind, raw, bases[unit] if bases else None)
                source = w[f"units.{unit}.learned_source.weight"] @ h
                source = source + w[f"units.{unit}.learned_source.bias"]
                source = source.clamp(min=0) if kind == "relu" else source
                tokens.append(h + r.T @ (source if kind == "direft" else source - r @ h))
            rows.append(torch.stack(tokens))
        return torch.stack(rows)

    call = call_of(site=BEHIND)
    call.input = None
    check_gradients(part, call, formula)


def changed(config: ReftConfig, length: int, before: Tensor | None = None, behind=None) -> Tensor:
    """Which unit acts on each token: 0 for none, 1 for the first, 2 for the second; [B, S]."""
    part = part_of(config, BEHIND, nn.Module())
    call = call_of(rows=1 if before is None else len(before), length=length, site=BEHIND)
    call.before, call.behind = before, behind
    result = part(call)
    which = torch.zeros(result.shape[:2], dtype=torch.int64)
    for number, unit in enumerate(part.units, 1):
        which[torch.isclose(result, unit(call.output)).all(-1)] = number
    assert torch.equal((result == call.output).all(-1), which == 0)
    return which


def test_the_first_and_the_last_tokens_are_changed_and_the_last_win():
    config = replace(NOREFT, prefix_positions=2, suffix_positions=3)
    assert changed(config, 7).tolist() == [[1, 1, 0, 0, 2, 2, 2]]
    assert changed(config, 4).tolist() == [[1, 2, 2, 2]]
    assert changed(config, 2).tolist() == [[2, 2]]
    assert changed(replace(config, suffix_positions=0), 4).tolist() == [[1, 1, 0, 0]]
    assert changed(replace(config, prefix_positions=0), 4).tolist() == [[0, 2, 2, 2]]
    assert changed(replace(config, tied_weights=True), 6).tolist() == [[1, 1, 0, 1, 1, 1]]


def test_tokens_are_counted_from_the_ends_of_their_text():
    far = 99
    before = torch.tensor([[far, far, 0, 1, 2], [0, 1, 0, 1, 2]])
    behind = torch.tensor([[far, far, 2, 1, 0], [1, 0, 2, 1, 0]])
    config = replace(NOREFT, prefix_positions=1, suffix_positions=1)
    assert changed(config, 5, before, behind).tolist() == [[0, 0, 1, 0, 2], [1, 2, 1, 0, 2]]


def test_dropout_is_of_the_whole_changed_state():
    part = part_of(replace(NOREFT, dropout=0.5), BEHIND, nn.Module()).train()
    call = call_of(rows=300, site=BEHIND)
    result = part(call)
    share = (result == 0).double().mean((0, 2))
    assert share.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0.5], abs=0.05)


# ---- the orthonormal R


def test_loreft_is_born_orthonormal_and_orthonormal_rows_stay_what_they_are():
    unit = ReftUnit(30, replace(NOREFT, r=4, orthogonality=True)).double()
    torch.testing.assert_close(unit.rotation(), unit.projection.weight, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        unit.projection.weight.add_(torch.randn(4, 30))
    r = unit.rotation()
    torch.testing.assert_close(r @ r.T, torch.eye(4).double(), rtol=1e-10, atol=1e-10)


def test_a_base_is_kept_only_where_it_is_asked_for():
    small = KINDS["loreft"].create(BEHIND)
    large = KINDS["loreft_base"].create(BEHIND)
    assert sum(t.numel() for t in small.state_dict().values()) == 2 * (2 * 2 * OUT + 2)
    sizes = {name: tuple(t.shape) for name, t in large.units[0].projection.state_dict().items()}
    assert sizes == {
        "parametrizations.weight.original": (2, OUT),
        "parametrizations.weight.0.base": (OUT, OUT),
    }


def test_a_base_that_is_made_of_r_gives_r_back():
    r = orthonormal(torch.randn(3, 10, dtype=torch.double))
    original, base = with_base(r)
    torch.testing.assert_close(base @ base.T, torch.eye(10).double(), rtol=1e-9, atol=1e-9)
    linear = parametrizations.orthogonal(nn.Linear(10, 3, bias=False).double())
    linear.load_state_dict(
        {"parametrizations.weight.original": original, "parametrizations.weight.0.base": base}
    )
    torch.testing.assert_close(linear.weight, r)


# ---- at birth


def test_matrices_are_born_as_torchs_linear_layers():
    torch.manual_seed(0)
    unit = ReftUnit(400, replace(NOREFT, r=50))
    for weight in (unit.learned_source.weight, unit.projection.weight):
        assert weight.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
        assert weight.std().item() == pytest.approx(1200**-0.5, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_as_many_parameters_as_the_formula_says(tied):
    part = replace(NOREFT, tied_weights=tied, r=3).create(BEHIND)
    assert sum(p.numel() for p in part.parameters()) == (2 * 3 * OUT + 3) * (1 if tied else 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "r=0: must be at least 1"),
        ({"prefix_positions": -1}, "must not be negative"),
        ({"prefix_positions": 0, "suffix_positions": 0}, "are both 0: set one of them"),
        ({"dropout": 1.0}, "dropout=1.0: must be from 0"),
        ({"non_linearity": "round"}, "non_linearity='round' is not known"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, said):
    with pytest.raises(UserError) as error:
        replace(NOREFT, **changes)
    assert said in str(error.value)


def test_more_rows_than_features_cannot_be_orthogonal():
    with pytest.raises(UserError, match="r=9 rows cannot be orthogonal in 8 features"):
        replace(KINDS["loreft"], r=OUT + 1).create(BEHIND)
