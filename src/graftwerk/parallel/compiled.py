"""Layers compiled by torch, from outside: one graph for all that are alike.

A layer as it stands is told by the names of its slots from every other, and would be compiled by
itself. So what is active in it is looked up for it before the compiled part, which then knows its
slots by their places alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.adapters.configs import schemes
from graftwerk.adapters.masks import dropouts
from graftwerk.adapters.slots import Slot
from graftwerk.errors import UserError
from graftwerk.models.compiling import allow_graphs, why_not_compiled
from graftwerk.models.context import Context
from graftwerk.models.layers import TransformerLayer

KEY = "model.compile"


def compiles(model: Mapping[str, Any], device: torch.device) -> bool:
    """Whether layers are compiled for training, by `model.compile` in a stage's `model` section.

    `auto`: on a GPU, where rows are packed: their shapes stay.

    Raises:
        UserError: where it is asked for and cannot be.
    """
    setting = model.get("compile", "auto")
    if not isinstance(setting, bool) and setting != "auto":
        raise UserError(f"{KEY}={setting!r} is not known: use auto, true or false")
    packed = bool((model.get("data") or {}).get("packed_sequence_size"))
    if setting is False or (setting == "auto" and (device.type == "cpu" or not packed)):
        return False
    reason = _why_not(model) or why_not_compiled(device.type)
    if reason is not None and setting is True:
        raise UserError(f"{KEY}=True: {reason}: set it to auto or False")
    return reason is None


def _why_not(model: Mapping[str, Any]) -> str | None:
    """What of a configuration does not go with compiled layers."""
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if (model.get(key) or 1) > 1:
            return f"it is for layers that lie on one device, and {key} is {model[key]}"
    if model.get("use_fsdp"):
        return "it is for layers that lie on one device, and use_fsdp is True"
    if model.get("activations_checkpoint_granularity") == "selective":
        return "activations_checkpoint_granularity=selective takes attention out of a layer"
    if "qlora" in schemes(model.get("peft") or {}):
        return "qlora holds the base in 4 bits, by a library's own kernels"
    return None


def compile_layers(
    model: nn.Module, compiler: Callable[..., Any] = torch.compile, strict: bool = True
) -> None:
    """Makes the passes of a model's layers compiled ones.

    Passes that note something (a record) or fill a cache are as before. So is a layer's first, in
    which dropouts make what they draw from. Not `strict`: what torch fails to compile, it runs as
    it is, and warns.
    """
    torch._dynamo.config.suppress_errors = not strict
    allow_graphs()
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            layer.forward = _compiled(layer, compiler)


def _compiled(layer: TransformerLayer, compiler: Callable[..., Any]) -> Callable[..., Tensor]:
    slots = [module for module in layer.modules() if isinstance(module, Slot)]
    keys = [slot.key for slot in slots]
    drawing = [dropout for _, dropout in dropouts(layer)]
    plain, quick = layer.forward, compiler(layer.forward)
    for slot in slots:
        slot.asks = slot.site.name

    @wraps(plain)
    def forward(x: Tensor, context: Context) -> Tensor:
        flow = context.flow
        pairs = zip(keys, slots, strict=True)
        own = {slot.asks: flow.actions[key] for key, slot in pairs if key in flow.actions}
        source_flow = replace(context.source_flow, actions=own)
        context = replace(context, flow=replace(flow, actions=own), source_flow=source_flow)
        if flow.record is not None or context.cache is not None:
            return plain(x, context)
        if flow.chance is not None:
            flow.chance.tokens(flow.offset, x.shape[1])  # once for all layers
            if context.states is not None and source_flow.chance is not None:
                source_flow.chance.tokens(source_flow.offset, context.states.shape[1])
            if any(dropout.lacks_hashes for dropout in drawing):
                return plain(x, context)
        return quick(x, context)

    return forward
