"""Ranks that read their share of a checkpoint against one process that reads all of it."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from graftwerk.adapters import LoRAConfig
from graftwerk.checkpoints import load_base
from graftwerk.models import BERT, GPT, T5
from graftwerk.parallel.tensor import gather, layout_of
from tests.graftwerk import families
from tests.graftwerk.parallel.two_ranks import on_two_ranks
from tests.graftwerk.tiny import tokens

# A file of fused and transposed projections, of separate ones, one that is already as ours; others.
NAMES = ("gpt2", "llama", "neox", "t5", "bert")


def answer(model: GPT | T5 | BERT) -> Tensor:
    return model(tokens(), source=tokens(seed=1)) if isinstance(model, T5) else model(tokens())


def dora(model: GPT | T5 | BERT) -> dict[str, Tensor]:
    """What a fresh DoRA on every projection holds: lengths of the base's rows among it."""
    torch.manual_seed(0)
    settings = {"row_init_method": "normal", "target_modules": ("all",)}
    model.add_adapter("a", LoRAConfig(dim=2, dora=True, **settings))
    model.set_active("a")
    return model.adapter_state("a")


@torch.no_grad()
def load_shares(folder: Path, mesh: DeviceMesh) -> dict[str, tuple]:
    found = {}
    for name in NAMES:
        model = load_base(folder / name, mesh=mesh)
        state = {
            key: gather(parameter, layout_of(parameter), mesh.get_group())
            for key, parameter in model.named_parameters()
        }
        kept = sum(parameter.numel() for parameter in model.parameters())
        plain = answer(model)
        born = {key: value.clone() for key, value in dora(model).items()}
        double = {key: 2 * value for key, value in born.items()}
        model.load_adapter_state("a", double)
        loaded = model.adapter_state("a")
        assert all(torch.equal(loaded[key], value) for key, value in double.items())
        model.load_adapter_state("a", born)
        found[name] = (state, kept, plain, born, answer(model))
    return found


@torch.no_grad()
def test_two_ranks_that_read_their_shares_hold_the_whole_model(tmp_path: Path):
    for name in NAMES:
        families.write(name, tmp_path / name)
    ranks = on_two_ranks(partial(load_shares, tmp_path), tmp_path)
    for name in NAMES:
        whole = load_base(tmp_path / name)
        total = sum(parameter.numel() for parameter in whole.parameters())
        base, plain = dict(whole.named_parameters()), answer(whole)
        born = dora(whole)
        adapted = answer(whole)
        for of_rank in ranks:
            state, kept, found, found_born, found_adapted = of_rank[name]
            assert state.keys() == base.keys()
            assert all(torch.equal(state[key], value) for key, value in base.items())
            assert kept < (0.8 if name == "bert" else 0.55) * total  # a BERT's words are whole
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
            assert found_born.keys() == born.keys()
            for key, value in born.items():
                torch.testing.assert_close(found_born[key], value, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found_adapted, adapted, rtol=1e-4, atol=1e-4)
