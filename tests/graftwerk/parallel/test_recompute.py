"""Activation checkpointing: the same gradients, of fewer tensors kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters import LoRAConfig
from graftwerk.adapters.slots import Record
from graftwerk.errors import UserError
from graftwerk.models import GPT
from graftwerk.parallel.recompute import recompute
from tests.graftwerk.parallel.cases import BN, CASES, PREFIX, SHAPES, Case, loss, make
from tests.graftwerk.tiny import tokens

DROPPED = Case({"a": LoRAConfig(dim=3, target_modules=("all",), dropout=0.5)})
SOME = {name: CASES[name] for name in ("dora", "unipelt", "fuse", "parallel", "selective")}
SOME |= {"dropout": DROPPED, "prefix dropout": Case({"a": replace(PREFIX, dropout=0.5)})}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss(model).backward()  # type: ignore[arg-type]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize(
    ("shape", "case"),
    [("llama", "dora"), ("bert", "fuse"), *(("native_t5", name) for name in SOME)],
)
def test_gradients_are_those_of_a_pass_that_keeps_everything(
    shape: str, case: str, granularity: str
):
    kept, again = make(shape, SOME[case]), make(shape, SOME[case])
    recompute(again, granularity)
    if "dropout" in case:
        kept.train()
        again.train()
    wanted, found = gradients(kept), gradients(again)
    assert wanted
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def held(model: GPT, length: int) -> int:
    """Bytes that a forward pass keeps for the backward one, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(tokens(2, length)).square().mean()
    assert result.requires_grad
    return sum(seen.values())


def test_full_keeps_less_than_selective_which_keeps_less_than_everything():
    sizes = []
    for granularity in (None, "selective", "full"):
        model = make("gpt2", Case({"a": PREFIX, "b": LoRAConfig(dim=3)}))
        recompute(model, granularity)
        sizes.append(held(model, 40))  # type: ignore[arg-type]
    everything, selective, full = sizes
    assert full < selective < everything
    assert full < everything / 3


def test_passes_without_gradients_and_with_a_record_run_once(monkeypatch: pytest.MonkeyPatch):
    model = make("gpt2", Case({"a": replace(BN, use_gating=True, is_parallel=True)}))
    recompute(model, "full")
    calls: list[int] = []
    attention = F.scaled_dot_product_attention

    def counted(*args, **kwargs) -> Tensor:
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    layers = SHAPES["gpt2"].num_layers
    with torch.no_grad():
        model(tokens())
    assert len(calls) == layers
    record = Record()
    model(tokens(), record=record).sum().backward()
    assert len(calls) == 2 * layers
    gates = [g for places in record.gates["a"].values() for g in places.values()]
    assert gates
    assert all(len(gate) == 2 for gate in gates)  # one for each row, noted once
    model(tokens()).sum().backward()
    assert len(calls) == 4 * layers


def test_another_granularity_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match="uniform is not known: use full, selective or null"):
        recompute(make("gpt2", DROPPED), "uniform")
