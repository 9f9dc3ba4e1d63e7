"""What all models share: embeddings, the output layer, and the context of a decoder's pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import Flow, Site, Slot
from graftwerk.adapters.texts import Texts
from graftwerk.models.cache import Grid, KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.context import Context, runs_within
from graftwerk.models.flex import Blocks, suits
from graftwerk.models.layers import Embedding
from graftwerk.models.positions import (
    neighbours,
    rotary_angles,
    same_document,
    visibility,
    within,
)
from graftwerk.models.scoring import Score, scored


@dataclass
class Start:
    """A pass through a stack of layers, before its first: what the embedding is given, and the
    layers' context.

    `columns` of the tokens [B, S] are virtual, in front; they leave when the layers are through.
    `told` is what the embedding's slots are told.
    """

    tokens: Tensor
    context: Context
    columns: int = 0
    types: Tensor | None = None
    told: Flow | None = None

    def own(self, x: Tensor, context: Context) -> tuple[Tensor, Flow]:
        """What came out of the last layer, of the row's own tokens, and what slots are told."""
        flow, first = context.flow, self.columns
        texts = flow.texts and flow.texts.each(lambda tensor: tensor[:, first:])
        return x[:, first:], replace(flow, offset=flow.offset + first, texts=texts)


class Transformer(AdapterModel):
    """A model with slots, an embedding and maybe an output layer.

    `attention` says by what packed rows attend: `flex` by FlexAttention, where it knows what is
    asked for, `sdpa` by torch's other kernels; `auto`: by FlexAttention where it is compiled.
    """

    attention: Literal["auto", "flex", "sdpa"] = "auto"

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        layers = config.num_layers + (
            config.decoder_num_layers if config.architecture == "t5" else 0
        )
        self.lm_input = Slot(Site("lm_input", layers, config.hidden_size, config.hidden_size))

    def embed(self, start: Start) -> Tensor:
        """What goes into a stack's first layer, [B, S, h]."""
        flow = start.context.flow if start.told is None else start.told
        positions = start.context.positions
        return self.embedding(start.tokens, positions, flow, start.types, start.columns)

    def is_packed(self, inputs: Mapping[str, Any]) -> bool:
        """Whether these arguments of a pass are rows that hold several texts."""
        return (
            inputs.get("spans" if self.config.architecture == "bert" else "documents") is not None
        )

    def columns_ahead(self, packed: bool) -> int:
        """Columns of prompts that the model puts before each row; texts of packed rows may have
        room for their own, behind which they stand."""
        return 0 if packed and self.plan.own_prompts else self.plan.virtual_tokens

    def flexes(self, tokens: Tensor) -> bool:
        """Whether a pass over rows [B, S], without a cache, masks them for FlexAttention."""
        wanted = self.attention == "auto" and suits(tokens, self.config)
        if not wanted and self.attention != "flex":
            return False
        drops = self.training and self.config.attention_dropout > 0
        return not drops and not any(key.endswith("prefix") for key in self.plan.actions)

    def keep_apart(self, context: Context, documents: Tensor, virtual: int, packed: bool) -> None:
        """Lets an encoder's tokens see those of their document alone; `documents` [B, S].

        `virtual`: columns of prompts in front. `packed`: rows hold several texts.
        """
        context.documents = self.spoken(documents) if packed else documents
        if packed and self.flexes(documents):
            context.blocks = Blocks.of_documents(documents, documents)
        else:
            context.mask = same_document(documents, virtual)

    def texts(self, documents: Tensor | None, prompt: int = 0) -> Texts | None:
        """The texts of packed rows as slots are told them; None where nothing active asks.

        `documents` [B, S]: which text of its row each column is of, -1 for padding. The first
        `prompt` columns of each text are virtual tokens.
        """
        if documents is None or not self.plan.reads_texts:
            return None
        return Texts.of(documents, neighbours(documents)[0], prompt)

    def spoken(self, documents: Tensor) -> Tensor:
        """Packed `documents` [B, S] without the columns that are prompts' (-1)."""
        if not self.plan.own_prompts:
            return documents
        return documents.masked_fill(neighbours(documents)[0] < self.plan.virtual_tokens, -1)

    def add_output_layer(self) -> None:
        """Gives the model its own output weights, or the bias beside tied ones, if it has them."""
        config = self.config
        self.output_layer: OutputLayer | None = None
        if not config.share_embeddings_and_output_weights or config.output_bias:
            self.output_layer = OutputLayer(config)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states behind the last norm [..., h] -> logits [..., V]."""
        return self.words(self.scaled(x))

    def scaled(self, x: Tensor) -> Tensor:
        """Hidden states [..., h] as they go to words: tied T5s scale them."""
        return x if self.config.output_scale == 1.0 else x * self.config.output_scale

    def words(self, x: Tensor) -> Tensor:
        """The vocabulary projection alone, of scaled states: [..., h] -> [..., V]."""
        weight = self.embedding.word_embeddings.weight
        return F.linear(x, weight) if self.output_layer is None else self.output_layer(x, weight)

    def answer(
        self, x: Tensor, flow: Flow, select: Tensor | None, score: Score | None = None
    ) -> Tensor:
        """A decoder's states behind its last layer [B, S, h] -> logits, or what `score` makes of
        them, as `forward` gives them."""
        decoder: Any = self.decoder
        if self.reads_words(flow):
            x, logits = self.word_states(decoder.finish(x), flow, select), self.words
        else:
            x, logits = self.selected(x, select), lambda x: self.logits(decoder.finish(x))
        return logits(x) if score is None else scored(x, logits, self.config.vocab_size, score)

    def word_states(self, x: Tensor, flow: Flow, select: Tensor | None = None) -> Tensor:
        """States behind the last norm [B, S, h] as the vocabulary projection reads them."""
        return self.selected(self.lm_input(self.scaled(x), flow), select)

    def reads_words(self, flow: Flow) -> bool:
        """Whether an adapter changes states before the vocabulary projection."""
        return self.lm_input.key in flow.actions

    def selected(self, x: Tensor, select: Tensor | None) -> Tensor:
        """[B, S, h] -> the positions [N] that `select` names, of each copy of the batch: [n N, h].

        All of them where it is None.
        """
        if select is None:
            return x
        return x.reshape(self.width, -1, x.shape[-1])[:, select].flatten(0, 1)

    @property
    def longest(self) -> int:
        """The most tokens of a row: the model's positions less those of prompts; 0: no limit."""
        limit = self.config.max_position_embeddings
        return max(limit - self.plan.shift, 1) if limit else 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base's weights."""
        return self.embedding.word_embeddings.weight.dtype

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random weights for training from scratch (GPT-2, Radford et al. 2019, section 2.3).

        Normal with `init_method_std`, divided by sqrt(2 layers) where a sublayer joins the
        residual stream; biases zero, norms one.
        """
        std = self.config.init_method_std
        joining = std / math.sqrt(2 * self.config.num_layers)
        unit = 0.0 if self.config.normalization == "layernorm1p" else 1.0
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                joins = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                parameter.normal_(0.0, joining if joins else std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else unit)


class OutputLayer(nn.Module):
    """Hidden states to logits, by a weight of its own or that of the embeddings."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.weight = self.bias = None
        if not config.share_embeddings_and_output_weights:
            size = config.embedding_size or config.hidden_size
            self.weight = nn.Parameter(torch.empty(config.vocab_size, size))
            if not self.weight.is_meta:
                nn.init.normal_(self.weight, std=config.init_method_std)
        if config.output_bias:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """[..., h] -> [..., V]."""
        weight = embeddings if self.weight is None else self.weight
        return nn.functional.linear(x, weight, self.bias)


def with_virtual(
    count: int,
    shift: int,
    tokens: Tensor,
    positions: Tensor | None,
    end: Tensor | None,
    select: Tensor | None,
    held: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The arguments of a pass with `count` virtual tokens in front of each row.

    Everything else moves back by as many, and its positions by `shift`. Virtual tokens are seen by
    all, so rows of several documents share them. On later passes of a cache, which has `held`
    columns, they are there already.
    """
    length, first = tokens.shape[1], not held
    forever = torch.iinfo(torch.int64).max
    if positions is None and shift != count:
        start = 0 if first else held - count
        positions = torch.arange(start, start + length, device=tokens.device)[None]
    if positions is not None:
        positions = positions + shift
    if end is not None:
        end = end.clamp(max=forever - count) + count
    if first and count:
        tokens = F.pad(tokens, (count, 0))
        if positions is not None:
            ahead = torch.arange(count, device=tokens.device).clamp(max=max(shift - 1, 0))
            positions = torch.cat([ahead.expand(len(positions), -1), positions], 1)
        if end is not None:
            end = torch.cat([end.new_full((len(end), count), forever), end], 1)
        if select is not None:
            select = select // length * (length + count) + select % length + count
    return tokens, positions, end, select


def within_prompt(positions: Tensor, count: int, shift: int) -> Tensor:
    """Positions where each text of a packed row has `count` virtual tokens of its own, which
    `positions` [B, S] number from -count."""
    ahead = (positions + count).clamp(max=max(shift - 1, 0))
    return torch.where(positions < 0, ahead, positions + shift)


def decoder_context(
    config: TransformerConfig,
    dtype: torch.dtype,
    tokens: Tensor,
    positions: Tensor | None,
    end: Tensor | None,
    cache: KeyValueCache | None,
    flex: bool = False,
) -> Context:
    """Positions, masks and rotary angles of one causal pass; arguments as in `GPT.forward`.

    `flex`: masks are for FlexAttention.
    """
    batch, new = tokens.shape
    past = cache.length if cache is not None else 0
    if positions is None:
        positions = torch.arange(past, past + new, device=tokens.device)[None]
    if cache is not None and cache.grid is not None:
        return _grid_context(config, dtype, positions, cache, cache.grid)
    all_positions = positions
    if cache is not None:
        cache.note(end, positions, batch, new)
        assert cache.positions is not None
        end, all_positions = cache.end, cache.positions
    seen = past + new
    visible = end if end is not None else torch.full((1, seen), seen, device=tokens.device)
    context = Context(positions, cache=cache, end=end)
    masked = end is not None or (past > 0 and new > 1)
    window = config.window_size if config.window_size < seen else 0
    context.causal = not masked and new > 1
    if flex and (masked or window):
        context.blocks = Blocks.causal(batch, end, positions, window)
    elif masked:
        context.mask = visibility(visible, new)
        relative = config.position_embedding_type == "relative"  # whose scores are of whole rows
        if end is not None and cache is None and not relative and tokens.device.type == "cpu":
            context.runs = runs_within(end, context.mask)  # a GPU would have to wait for them
    if window and context.blocks is None:
        context.window_mask = visibility(visible, new, all_positions, window)
    if config.position_embedding_type == "rope":
        context.rotary = rotary_angles(positions, config, dtype)
    return context


def _grid_context(
    config: TransformerConfig,
    dtype: torch.dtype,
    positions: Tensor,
    cache: KeyValueCache,
    grid: Grid,
) -> Context:
    """That of a pass whose tokens are one row, positions [1, N], and attend in a grid."""
    placed = positions[0][grid.tokens]
    cache.note(None, placed, *placed.shape)
    context = Context(positions, mask=grid.mask, causal=grid.mask is None, cache=cache)
    if 0 < config.window_size < cache.length:
        assert cache.positions is not None
        near = within(placed, cache.positions, config.window_size)[:, None]
        context.window_mask = near.tril() if grid.mask is None else near & grid.mask
    if config.position_embedding_type == "rope":
        context.rotary = rotary_angles(positions, config, dtype)
    return context
