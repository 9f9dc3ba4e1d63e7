"""Projections of a frozen base in 4 bits, for QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

`bitsandbytes` holds and multiplies the 4-bit weights; it is no dependency and is imported when it
is asked for. Embeddings, norms, biases, heads and adapters stay as they are.
"""

import importlib
from types import ModuleType

import torch
from torch import nn

from graftwerk.adapters.slots import slots_of
from graftwerk.errors import UserError

KINDS = ("nf4",)


def quantizer(kind: str) -> ModuleType:
    """The library that quantises.

    Raises:
        UserError: for an unknown kind, and where `bitsandbytes` cannot be imported.
    """
    if kind not in KINDS:
        raise UserError(f"quantize={kind!r} is not known: use {', '.join(KINDS)}, or none")
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # a library that does not fit torch or CUDA raises what it likes
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"quantize={kind} needs the package bitsandbytes, which cannot be imported here "
            f"({line}): pip install bitsandbytes, or load the base without quantize"
        ) from None


@torch.no_grad()
def quantize(model: nn.Module, kind: str, device: str | torch.device, dtype: torch.dtype) -> None:
    """Puts 4-bit projections in place of a model's own, one at a time, and moves it to `device`.

    Weights that are still in the host's memory so never lie on the device whole. `dtype` is the
    type that products are computed in.

    Raises:
        UserError: as `quantizer`.
    """
    library = quantizer(kind)
    projections = {
        (path.rpartition(".")[0], slot.site.rows.linear)
        for path, slot in slots_of(model).items()
        if slot.site.rows is not None
    }
    for owner, name in sorted(projections):
        sublayer = model.get_submodule(owner)
        linear = getattr(sublayer, name)
        with torch.device("meta"):
            packed = library.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                quant_type=kind,
            )
        weight = library.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type=kind, module=packed
        )
        packed.weight = weight.to(device)  # quantises
        packed.bias = linear.bias
        setattr(sublayer, name, packed)
    model.to(device)
