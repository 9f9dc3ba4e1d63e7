"""Floating point operations of a training pass, counted from shapes.

A multiply-add is two; matrix products count, what acts element by element does not. As in PaLM's
model FLOPs (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) attention is as wide as its rows,
whatever a causal kernel leaves out, and nothing that is computed twice to save memory counts twice.

Forward, a projection is `2 x weights x tokens`, attention `4 x query features x pairs`, and the
output layer sees labelled positions alone. Backward, the gradient of a product's input costs as
much as the product and so does that of its weight; neither is needed everywhere: inputs have one
from the lowest trained parameter on, and weights that are frozen have none.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.composition import Composition, Parallel, fusions
from graftwerk.adapters.methods.prefix import Prefix
from graftwerk.adapters.methods.prompt import Prompt
from graftwerk.models.config import TransformerConfig

Inputs = Mapping[str, Tensor | None]  # the arguments of a model's forward pass, by name


@dataclass(frozen=True)
class Work:
    """What a forward pass has to do, added up over its rows.

    Args:
        rows: of the batch.
        tokens: through the layers, of a T5 through its decoder's.
        pairs: of a query and a key, in one self-attention.
        answers: positions that reach the output layer.
        source, source_pairs: the same of a T5's encoder.
        cross_pairs: of a query in the decoder and a key of the encoder.
    """

    rows: int
    tokens: float
    pairs: float
    answers: int
    source: float = 0
    source_pairs: float = 0
    cross_pairs: float = 0

    @classmethod
    def of(cls, inputs: Inputs, virtual: int = 0) -> "Work":
        """All columns of a batch, padding too; `virtual`: those that prompts put before a row."""
        tokens, source = inputs["tokens"], inputs.get("source")
        assert tokens is not None
        rows, width = tokens.shape
        answers = _answers(inputs)
        if source is None:
            width += virtual
            return cls(rows, rows * width, rows * width**2, answers)
        read = source.shape[1] + virtual
        pairs = rows * width**2, rows * read, rows * read**2, rows * width * read
        return cls(rows, rows * width, pairs[0], answers, *pairs[1:])

    @classmethod
    def useful(cls, inputs: Inputs, num_tokens: int, architecture: str) -> "Work":
        """What of a batch is no padding, `num_tokens` with a T5's source, and the pairs in which a
        key is seen. Rows of a GPT without `end` are taken to be equally long, which is at most too
        little; a window takes nothing off.
        """
        tokens, source, end = inputs["tokens"], inputs.get("source"), inputs.get("end")
        assert tokens is not None
        rows, answers = len(tokens), _answers(inputs)
        if architecture == "bert":
            squares = float(_counts(inputs.get("documents"), tokens).square().sum())
            return cls(rows, num_tokens, squares, answers)
        read = torch.zeros(rows, 1)
        if source is not None:
            read = _counts(inputs.get("source_documents"), source)
        own = num_tokens - int(read.sum())
        if end is None:
            pairs = own * (own / rows + 1) / 2
        else:  # padding sees itself
            index = torch.arange(end.shape[1], device=end.device)
            pairs = int((end - index).sum()) - (tokens.numel() - own)
        if source is None:
            return cls(rows, own, pairs, answers)
        documents, mean = inputs.get("documents"), torch.full((rows, 1), own / rows)
        asking = mean.to(read) if documents is None else _counts(documents, tokens)
        most = min(asking.shape[1], read.shape[1])
        cross = float((asking[:, :most] * read[:, :most]).sum())
        return cls(rows, own, pairs, answers, float(read.sum()), float(read.square().sum()), cross)

    def __add__(self, other: "Work") -> "Work":
        return Work(**{key: value + getattr(other, key) for key, value in vars(self).items()})


def _answers(inputs: Inputs) -> int:
    select, tokens = inputs.get("select"), inputs["tokens"]
    assert tokens is not None
    return tokens.numel() if select is None else len(select)


def _counts(documents: Tensor | None, tokens: Tensor) -> Tensor:
    """[B, documents] the tokens of each document of a row; -1 is padding."""
    if documents is None:
        return torch.full((len(tokens), 1), tokens.shape[1], dtype=torch.float64)
    numbers = torch.arange(int(documents.max()) + 1, device=documents.device)
    return (documents[:, :, None] == numbers).sum(1).double()


@dataclass(frozen=True)
class Flops:
    """Operations of a pass each way."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __truediv__(self, number: float) -> "Flops":
        return Flops(self.forward / number, self.backward / number)


@dataclass(frozen=True)
class PartShape:
    """What one adapter has in a slot.

    Args:
        matrices: the size of each in their order, and whether it is trained; 0: what comes before
            one and multiplies no matrix.
        copies: of the batch that go through them, where the model runs several.
        keys: rows that it puts before the keys of an attention.
        rows: of its own that go through the matrices, once for a batch; None: the batch's.
    """

    matrices: tuple[tuple[int, bool], ...] = ()
    copies: int = 1
    keys: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Training:
    """All that the operations of a pass depend on but its rows.

    A part that acts at some tokens (ReFT, a `Split`) is taken to act at all of them.

    Args:
        config: of the base.
        trained: names of the parameters that are trained; none: a forward pass alone.
        parts: what active adapters have, by the path of the slot.
        width: copies of the batch from layer `widen_at` on (`adapters.plan.Plan`).
    """

    config: TransformerConfig
    trained: Collection[str] = ()
    parts: Mapping[str, list[PartShape]] = field(default_factory=dict)
    width: int = 1
    widen_at: int | None = None

    @classmethod
    def of(cls, model: Any, numel: Callable[[Tensor], int] = Tensor.numel) -> "Training":
        """Of a model with what is active and trained in it now.

        `numel` gives the numbers in the whole of a parameter, where the model lies on several
        devices.
        """
        trained = {
            _place(name)
            for name, p in model.named_parameters(remove_duplicate=False)
            if p.requires_grad
        }
        parts: dict[str, list[PartShape]] = {}
        plan = model.plan
        for name, copies in _copies(model.active, plan.width):
            for path, _, part in model.parts(name):
                parts.setdefault(path, []).append(_shape(part, copies, numel))
        for fuse in fusions(model.active):
            for path, _, layer in model.fusion_layers(fuse.name):
                parts.setdefault(path, []).append(_shape(layer, 1, numel))
        return cls(model.config, frozenset(trained), parts, plan.width, plan.widen_at)

    def flops(self, work: Work) -> Flops:
        """The operations of a pass over some rows."""
        return _Pass(self, work).flops()


def _place(name: str) -> str:
    """Where a parameter is used: an adapter's copy of one of the base's, where that is."""
    if not name.startswith("replacements.copies."):
        return name
    return name.split(".", 3)[3].replace("/", ".")


def _copies(active: Composition | str | None, copies: int) -> Iterator[tuple[str, int]]:
    """The adapters of a composition, each with the copies of the batch that it sees."""
    if isinstance(active, str):
        yield active, copies
    elif active is not None:
        inner = max(copies // len(active.children), 1) if isinstance(active, Parallel) else copies
        for child in active.children:
            yield from _copies(child, inner)


def _shape(part: torch.nn.Module, copies: int, numel: Callable[[Tensor], int]) -> PartShape:
    first, *others = [*part.parameters()] or [torch.empty(0)]
    if isinstance(part, Prompt | Prefix):  # a table of vectors, and maybe a network behind it
        matrices = [(numel(p), p.requires_grad) for p in others if p.ndim > 1]
        keys = len(first) if isinstance(part, Prefix) else 0
        return PartShape(((0, first.requires_grad), *matrices), keys=keys, rows=len(first))
    matrices = [(numel(p), p.requires_grad) for p in (first, *others) if p.ndim > 1]
    if getattr(part, "norm_first", False):
        matrices.insert(0, (0, first.requires_grad))
    return PartShape(tuple(matrices), copies)


class _Pass:
    """Goes through a model as a forward pass does.

    `reached`: whether what comes next has a gradient, as something before it is trained.
    """

    def __init__(self, training: Training, work: Work) -> None:
        self.training, self.config, self.work = training, training.config, work
        self.forward = self.backward = 0.0
        self.reached = self.states = False  # `states`: of a T5's encoder
        # Every module that is trained, or a part of which is.
        self.touched = {
            name[:end]
            for name in training.trained
            for end, letter in enumerate(name)
            if letter == "."
        }

    def flops(self) -> Flops:
        config, work = self.config, self.work
        stack = "decoder" if config.architecture == "gpt" else "encoder"
        own = (work.source, work.source_pairs) if config.architecture == "t5" else ()
        self.embedding(own[0] if own else work.tokens, slots=True)
        for n in range(config.num_layers):
            self.layer(f"{stack}.layers.{n}", n, *(own or (work.tokens, work.pairs)))
        if config.architecture == "t5":
            self.touch(f"{stack}.final_layernorm")
            self.states, self.reached = self.reached, False
            self.embedding(work.tokens, slots=False)
            stack = "decoder"
            for n in range(config.decoder_num_layers):
                number = config.num_layers + n
                self.layer(f"{stack}.layers.{n}", number, work.tokens, work.pairs, cross=True)
        self.answer(stack)
        return Flops(self.forward, self.backward)

    # ---- what a model is made of

    def touch(self, *paths: str) -> None:
        self.reached = self.reached or any(path in self.touched for path in paths)

    def matrix(self, size: float, rows: float, trained: bool = False) -> None:
        flops = 2 * size * rows
        self.forward += flops
        self.backward += flops * (self.reached + trained)
        self.reached = self.reached or trained

    def linear(self, path: str, size: float, rows: float) -> None:
        self.matrix(size, rows, f"{path}.weight" in self.training.trained)
        self.touch(path)

    def slot(self, path: str, rows: float) -> None:
        """`rows` of one copy of the batch."""
        before = after = self.reached
        for part in self.training.parts.get(path, ()):
            self.reached = before
            for size, trained in part.matrices:
                given = rows * part.copies if part.rows is None else part.rows
                self.matrix(size, given, trained)
            after = after or self.reached
        self.reached = after
        self.touch(path)

    def keys(self, path: str) -> int:
        return sum(part.keys for part in self.training.parts.get(path, ()))

    def dots(self, pairs: float, query: bool, key: bool, value: bool) -> None:
        """Scores and their sums of values; the flags say what has a gradient."""
        half = 2 * self.config.query_size * pairs
        self.forward += 2 * half
        # Those of the probabilities and of scores are summands of what asks for them.
        self.backward += half * (query + key + value + (query or key))
        self.reached = query or key or value

    def embedding(self, rows: float, slots: bool) -> None:
        config, path = self.config, "embedding"
        tables = ("word_embeddings", "position_embeddings", "token_type_embeddings", "layernorm")
        self.touch(*(f"{path}.{table}" for table in tables))
        if config.embedding_size:
            self.linear(f"{path}.projection", config.embedding_size * config.hidden_size, rows)
        if slots:
            self.slot(f"{path}.words", rows)
            self.slot(f"{path}.output", rows)

    def layer(self, path: str, number: int, rows: float, pairs: float, cross: bool = False) -> None:
        config, training = self.config, self.training
        wide = training.widen_at is not None and number >= training.widen_at
        copies = training.width if wide else 1
        below = self.reached
        self.touch(f"{path}.input_layernorm")
        self.attention(f"{path}.self_attention", rows, pairs, copies)
        self.slot(f"{path}.attention_output", rows)
        self.touch(f"{path}.post_attention_layernorm")
        if cross:
            self.touch(f"{path}.pre_cross_attention_layernorm")
            self.cross_attention(f"{path}.cross_attention", rows, copies)
            self.slot(f"{path}.cross_attention_output", rows)
        beside = self.reached
        if config.parallel_residual:
            self.reached = below
        self.touch(f"{path}.pre_mlp_layernorm")
        inner, mlp = config.ffn_hidden_size, f"{path}.mlp"
        wide_inner = 2 * inner if config.gated else inner
        self.linear(f"{mlp}.linear_fc1", config.hidden_size * wide_inner, copies * rows)
        for name in ("fc1", "gate", "up", "inner"):
            self.slot(f"{mlp}.{name}", rows)
        self.linear(f"{mlp}.linear_fc2", inner * config.hidden_size, copies * rows)
        self.slot(f"{mlp}.fc2", rows)
        self.reached = self.reached or beside
        self.slot(f"{path}.mlp_output", rows)
        self.touch(f"{path}.post_mlp_layernorm")
        self.slot(f"{path}.output", rows)

    def attention(self, path: str, rows: float, pairs: float, copies: int) -> None:
        config = self.config
        size = config.hidden_size * (config.query_size + 2 * config.key_size)
        self.linear(f"{path}.linear_qkv", size, copies * rows)
        self.slot(f"{path}.qkv", rows)
        query = self.side(path, rows, "query", "query_layernorm")
        prefix = self.side(path, rows, "prefix")
        key = self.side(path, rows, "key", "keys", "key_layernorm") or prefix
        value = self.side(path, rows, "value", "values") or prefix
        more = rows * self.keys(f"{path}.prefix")
        self.dots(copies * (pairs + more), query, key, value)
        self.linear(f"{path}.linear_proj", config.query_size * config.hidden_size, copies * rows)
        self.slot(f"{path}.output", rows)

    def cross_attention(self, path: str, rows: float, copies: int) -> None:
        config, work = self.config, self.work
        self.linear(f"{path}.linear_q", config.hidden_size * config.query_size, copies * rows)
        query = self.side(path, rows, "query")
        below, self.reached = self.reached, self.states
        size = 2 * config.hidden_size * config.key_size
        self.linear(f"{path}.linear_kv", size, copies * work.source)
        prefix = self.side(path, rows, "prefix")
        key = self.side(path, work.source, "key", "keys") or prefix
        value = self.side(path, work.source, "value", "values") or prefix
        more = rows * self.keys(f"{path}.prefix")
        self.dots(copies * (work.cross_pairs + more), query or below, key, value)
        self.linear(f"{path}.linear_proj", config.query_size * config.hidden_size, copies * rows)
        self.slot(f"{path}.output", rows)

    def side(self, path: str, rows: float, *names: str) -> bool:
        """Goes through the slots of queries, keys or values; whether these have a gradient then."""
        below = self.reached
        for name in names:
            self.slot(f"{path}.{name}", rows)
        found, self.reached = self.reached, below
        return found

    def answer(self, stack: str) -> None:
        """What is behind the last layer."""
        config, work = self.config, self.work
        width = self.training.width if self.training.widen_at is not None else 1
        answers, hidden = width * work.answers, config.hidden_size
        words = config.vocab_size * (config.embedding_size or hidden)
        self.touch(f"{stack}.final_layernorm")
        if config.architecture != "bert":
            if config.embedding_size:
                size = config.embedding_size * hidden
                self.linear(f"{stack}.projection", size, answers)
            self.slot("lm_input", work.tokens)
            tied = config.share_embeddings_and_output_weights
            self.linear("embedding.word_embeddings" if tied else "output_layer", words, answers)
        elif config.head == "masked_lm":
            self.linear("head.dense", hidden * hidden, answers)
            self.slot("lm_input", work.tokens)
            tied = config.share_embeddings_and_output_weights
            self.linear("embedding.word_embeddings" if tied else "head.decoder", words, answers)
        elif config.head is not None:
            self.labels(hidden, answers, width)

    def labels(self, hidden: int, answers: float, width: int) -> None:
        """A BERT's head for labels, of which adapters have their own (`adapters.heads`)."""
        config, work = self.config, self.work
        labels = 2 if config.head == "question_answering" else config.num_labels
        rows = {"classification": work.rows, "question_answering": work.tokens}
        count = width * rows.get(str(config.head), answers)
        if config.head == "classification" and config.pooler:
            self.linear("pooler.dense", hidden * hidden, count)
        own = any(name.startswith("head.") for name in self.training.trained)
        self.matrix(labels * hidden, count, own)
