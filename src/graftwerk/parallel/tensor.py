"""Tensor parallelism: each rank holds a share of every projection's features.

A sublayer sees its whole input and splits its first projection by output features, its second by
input features; the second's partial sums meet in one all-reduce forward, the input's gradients in
one backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Words are split by their ids.
Adapter parts join in by the layouts that they declare, and by the few sums that some of them
declare too. Within a sublayer all tensors are plain local shards; a parameter remembers its
`Layout` so that files can hold the whole.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn import functional as F

from graftwerk.adapters.masks import dropouts
from graftwerk.adapters.part import Layout, Part
from graftwerk.adapters.ranks import Ranks
from graftwerk.adapters.slots import JoinSlot, Slot, slots_of
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5
from graftwerk.models.attention import Attention
from graftwerk.models.context import Context
from graftwerk.models.layers import Layers, TransformerLayer
from graftwerk.parallel.exchange import (
    enter_row,
    leave_row,
    scale_backward,
    sum_backward,
    sum_forward,
)
from graftwerk.parallel.sequence import SplitJoin, SplitRow, between_sublayers, row_of, tell_part
from graftwerk.parallel.shares import (
    gather,
    layout_of,
    norm_squared,
    remember,
    shard,
    share_of,
    sum_partial_gradients,
    whole_shape,
)
from graftwerk.parallel.vocabulary import SplitLookup, SplitOutputLayer, Vocabulary

__all__ = [
    "gather",
    "layout_of",
    "norm_squared",
    "parallelize",
    "shard",
    "share_of",
    "sum_partial_gradients",
]


class RowSplitLinear(nn.Module):
    """A rank's summand of a linear layer [out, in / ranks]. The first rank's has the bias."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, first: bool):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.first = first

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias if self.first else None)


class SplitSublayer(ParallelStyle):
    """Splits one sublayer, given the names of its projections and of the slot that ends it.

    `blocks`: a first projection's rows are this many runs, each split apart (gate and up).
    `sequence`: its input and its result are runs of the row's columns.
    """

    def __init__(
        self, columns: tuple[str, ...], row: str, output: str, blocks: int = 1, *, sequence: bool
    ):
        self.columns, self.row, self.output, self.blocks = columns, row, output, blocks
        self.sequence = sequence

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        for name in self.columns:
            column = module.get_submodule(name)
            for leaf, parameter in list(column.named_parameters(recurse=False)):
                setattr(column, leaf, shard(parameter, Layout(dim=0, blocks=self.blocks), group))
        row = module.get_submodule(self.row)
        weight, bias = row.get_parameter("weight"), row.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        if bias is not None:
            remember(bias, Layout(partial_grad=True))
        share = shard(weight, Layout(dim=1), group)
        setattr(module, self.row, RowSplitLinear(share, bias, dist.get_rank(group) == 0))
        if isinstance(module, Attention):
            for norm in (module.query_layernorm, module.key_layernorm):
                for parameter in () if norm is None else norm.parameters():
                    remember(parameter, Layout(partial_grad=True))  # each rank's heads alone

        def enter(_: nn.Module, args: tuple) -> tuple:
            if not self.sequence:
                return sum_backward(args[0], group), *args[1:]
            flow = args[1].flow if isinstance(args[1], Context) else args[1]
            return enter_row(args[0], group, row_of(flow).row_length), *args[1:]

        def leave(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return leave_row(output, group) if self.sequence else sum_forward(output, group)

        module.register_forward_pre_hook(enter)
        module.get_submodule(self.output).register_forward_hook(leave)
        return module


class SharedBias(ParallelStyle):
    """A slot at the end of a sublayer, told the bias of its projection.

    The gradients that ranks find for that bias are added up; here all of them find the same.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        share = 1 / device_mesh.size()

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            found = [value for value in (*args[6:7], kwargs.get("bias")) if value is not None]
            if not found or not found[0].requires_grad:
                return args, kwargs
            bias = scale_backward(found[0], share)
            if len(args) > 6:
                return (*args[:6], bias, *args[7:]), kwargs
            return args, {**kwargs, "bias": bias}

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


class EncoderStates(ParallelStyle):
    """A decoder's layers: what they do to encoder states is a summand on each rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()

        def enter(_: nn.Module, args: tuple) -> tuple | None:
            x, context, *rest = args
            assert isinstance(context, Context)
            if context.states is None:
                return None
            return x, replace(context, states=sum_backward(context.states, group)), *rest

        module.register_forward_pre_hook(enter)
        return module


class SplitHeads(ParallelStyle):
    """A table of distances [buckets, heads]."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = module.get_parameter("weight")
        module.weight = shard(weight, Layout(dim=1), device_mesh.get_group())
        return module


class GroupRanks(Ranks):
    """The ranks of a process group, among which features are split, and columns if `sequence`."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool = False):
        self.group, self.sequence = group, sequence
        self.first = dist.get_rank(group) == 0
        self.count = dist.get_world_size(group)

    def sum(self, x: Tensor) -> Tensor:
        return sum_forward(x, self.group)

    def joined(self, x: Tensor) -> Tensor:
        return sum_backward(x, self.group)

    def counted_once(self, x: Tensor) -> Tensor:
        return scale_backward(x, 1 / self.count)

    def length(self, lengths: Tensor) -> Tensor:
        return self.sum(lengths.square()).sqrt()

    def share(self, x: Tensor, dim: int) -> Tensor:
        return share_of(x, Layout(dim=dim), self.group)

    def whole(self, parameter: Tensor) -> Tensor:
        return gather(parameter.detach(), layout_of(parameter), self.group)

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        return share_of(whole, layout_of(parameter), self.group)

    def shape(self, parameter: Tensor) -> torch.Size:
        return whole_shape(parameter, self.group)

    def _own_features(self, numbers: Tensor, blocks: int) -> Tensor:
        return share_of(numbers, Layout(dim=0, blocks=blocks), self.group)

    def splitter(self) -> Callable[[nn.Module, nn.Module], None]:
        return partial(self.split, {})

    def split(
        self, shares: dict[nn.Parameter, nn.Parameter], part: nn.Module, slot: nn.Module
    ) -> None:
        """Gives a part of a slot its shares; `shares` are those of the parts before it, by the
        whole: parts may have parameters in common."""
        assert isinstance(slot, Slot)
        if self.sequence and between_sublayers(slot):
            tell_part(part, slot, self)
        if not isinstance(part, Part):
            return
        if slot.site.split == "row":
            part.ranks = self
        for _, dropout in dropouts(part):
            dropout.share(slot.site, self._own_features)
        for name, layout in part.layouts(slot.site).items():
            owner, _, leaf = name.rpartition(".")
            module = part.get_submodule(owner)
            whole = part.get_parameter(name)
            if whole not in shares:
                shares[whole] = shard(whole, layout, self.group)
            setattr(module, leaf, shares[whole])


def parallelize(model: GPT | T5 | BERT, mesh: DeviceMesh, sequence: bool = False) -> None:
    """Splits a model and the adapters that it holds over a one-dimensional mesh, in place.

    `sequence`: between sublayers, rows are split by their columns (`parallel.sequence`).

    Adapters that are added later are split as they are added: with the same random numbers on all
    ranks. From here on `model.adapter_state` gives whole tensors, to all ranks at once, and
    `model.load_adapter_state` takes them. A model's logits are whole too, except within
    `vocabulary.split_logits`.

    Raises:
        UserError: where heads, groups or features do not divide by the ranks.
    """
    _check_sizes(model, mesh.size())
    if mesh.size() == 1:
        return
    active, skipped = model.active, model.plan.skip_layers
    model.set_active(None)  # parameters of the base are in their places
    group = mesh.get_group()
    parallelize_module(model, mesh, _plan(model, sequence))
    if isinstance(model, T5):
        parallelize_module(model.decoder, mesh, EncoderStates())
    if sequence:
        _note_norms(model)
    _split_words(model, group)
    _split_copies(model, group)
    model.ranks = GroupRanks(group, sequence)
    split = model.ranks.splitter()
    for slot in slots_of(model).values():
        for part in (*slot.adapter_layer.values(), *slot.fusion_layer.values()):
            split(part, slot)
    model.set_active(active, skipped)


def _check_sizes(model: GPT | T5 | BERT, ranks: int) -> None:
    """Raises a UserError that names the sizes which do not divide, and the numbers that would."""
    keys = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    sizes = {key: getattr(model.config, key) for key in keys}
    wrong = [f"{key}={size}" for key, size in sizes.items() if size % ranks]
    if wrong:
        common = gcd(*sizes.values())
        fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(
            f"model.tensor_model_parallel_size={ranks} does not divide the base's "
            f"{', '.join(wrong)}: use one of {fit}"
        )
    if model.config.vocab_size < ranks:
        raise UserError(
            f"model.tensor_model_parallel_size={ranks}: the base has {model.config.vocab_size} "
            f"words only, of which each rank needs one"
        )


def _plan(model: GPT | T5 | BERT, sequence: bool) -> dict[str, ParallelStyle]:
    """A style for each submodule that is split or told of it, by its path."""
    blocks = 2 if model.config.gated else 1
    split = partial(SplitSublayer, sequence=sequence)
    layer: dict[str, ParallelStyle] = {
        "self_attention": split(("linear_qkv",), "linear_proj", "output"),
        "cross_attention": split(("linear_q", "linear_kv"), "linear_proj", "output"),
        "mlp": split(("linear_fc1",), "linear_fc2", "fc2", blocks),
    }
    paths = {path: module for path, module in model.named_modules()}
    plan: dict[str, ParallelStyle] = {}
    for path, module in paths.items():
        stack, _, rest = path.partition(".layers.")
        name = rest.partition(".")[2]
        if name in layer and stack in ("encoder", "decoder"):
            plan[path] = layer[name]
        elif sequence and between_sublayers(module):
            plan[path] = SplitJoin()
        elif isinstance(module, JoinSlot):
            plan[path] = SharedBias()
        elif sequence and isinstance(module, Layers):
            plan[path] = SplitRow()
        elif path in ("encoder.relative_position", "decoder.relative_position"):
            plan[path] = SplitHeads()
    return plan


def _note_norms(model: nn.Module) -> None:
    """Between sublayers each rank finds, of what norms are trained, its columns' gradients."""
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            for name, norm in layer.named_children():
                for parameter in norm.parameters() if name.endswith("layernorm") else ():
                    remember(parameter, Layout(partial_grad=True))


def _split_words(model: GPT | T5 | BERT, group: dist.ProcessGroup) -> None:
    """Splits word embeddings and output layer by words; a BERT's are whole, like its heads."""
    if isinstance(model, BERT):
        return
    vocabulary = Vocabulary(model.config.vocab_size, group)
    words, output = model.embedding.word_embeddings, model.output_layer
    own = (None, None) if output is None else (output.weight, output.bias)
    lookup = SplitLookup(words.get_parameter("weight"), vocabulary)
    places: list[tuple[nn.Module, str, nn.Module]] = [
        (model.embedding, "word_embeddings", lookup),
        (model, "output_layer", SplitOutputLayer(*own, vocabulary)),
    ]
    for owner, name, module in places:
        setattr(owner, name, module)


def _split_copies(model: GPT | T5 | BERT, group: dist.ProcessGroup) -> None:
    """Splits what adapters hold of the base's own parameters as these are split."""
    layouts = {name: layout_of(parameter) for name, parameter in model.base_parameters()}
    for copies in model.replacements.copies.values():
        assert isinstance(copies, nn.ParameterDict)
        for key, copy in copies.items():
            copies[key] = shard(copy, layouts[key.replace("/", ".")], group)
