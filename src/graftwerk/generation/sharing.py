"""Prompts that begin alike are read once: trees of them, and how a batch of trees is read on.

A tree is laid out depth-first, each token once (`positions.visibility` has the rule by which the
first pass masks it), and stays so in the cache: its rows attend to the one copy of what they
share. Everything but attention meets the tokens of all trees as one row, without padding.

Shapes: T trees, W tokens of the widest, N rows that still run, G of the tree that has most, v
virtual tokens in front of each tree, K columns of the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.packing import bound_to_texts
from graftwerk.adapters.slots import LayerSlot, slots_of
from graftwerk.generation.reading import AHEAD
from graftwerk.models import GPT, KeyValueCache
from graftwerk.models.cache import Grid
from graftwerk.models.context import Context
from graftwerk.models.positions import visibility

FOREVER = torch.iinfo(torch.int64).max
Compiler = Callable[[nn.Module], Callable[..., tuple[Tensor, Context]]]


@dataclass
class Tree:
    """Prompts that begin alike.

    Args:
        rows: the prompts' numbers.
        paths: the columns of each prompt's tokens.
        tokens: of all columns; with `positions` in their prompts, and `end`: who sees them.
    """

    rows: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)

    def add(self, row: int, prompt: Sequence[int], shared: int) -> None:
        """Adds a prompt that shares its first tokens with the one before."""
        start = len(self.tokens)
        path = self.paths[-1] if self.paths else []
        for column in path[shared:]:
            self.end[column] = start
        added = len(prompt) - shared
        self.rows.append(row)
        self.paths.append([*path[:shared], *range(start, start + added)])
        self.tokens += prompt[shared:]
        self.positions += range(shared, len(prompt))
        self.end += [FOREVER] * added


def can_share(model: GPT) -> bool:
    """Whether what active adapters do at a token depends on nothing but it and those before it.

    ReFT counts the tokens before, in rows of the cache, and so does a `Split`.
    """
    if bound_to_texts(model) is not None or model.plan.reads_texts:
        return False
    slots = slots_of(model).values()
    return not any(isinstance(s, LayerSlot) and s.key in model.plan.actions for s in slots)


def grow(prompts: Sequence[Sequence[int]], hidden_size: int, most: int) -> list[Tree]:
    """The trees of some prompts, of at most `most` rows.

    A prompt joins the tree of the one before it in the order of their tokens where that saves more
    than it costs. A token takes 12 h^2 multiplications a layer, and 2h for each that it attends to;
    masks hide those of other rows, but they are computed.
    """
    trees: list[Tree] = []
    before: Sequence[int] = ()
    for row in sorted(range(len(prompts)), key=lambda row: list(prompts[row])):
        prompt = list(prompts[row])
        shared = _alike(before, prompt)
        tree = trees[-1] if trees else Tree()
        hidden = len(tree.tokens) * (len(prompt) - shared)  # of this row from the others, and back
        if not shared or len(tree.rows) >= most or 6 * hidden_size * shared <= 2 * hidden:
            trees.append(tree := Tree())
            shared = 0
        tree.add(row, prompt, shared)
        before = prompt
    return trees


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def batches(trees: Sequence[Tree], batch_size: int, most: int) -> Iterator[list[Tree]]:
    """Batches of trees of similar width, which hold no more than `batch_size` rows would.

    That is, in the cache: rows as long as the longest prompt and `most` tokens behind it.
    """
    batch: list[Tree] = []
    rows = longest = 0
    for tree in sorted(trees, key=lambda tree: len(tree.tokens)):
        more = max(rows, len(tree.rows))
        long = max(longest, *map(len, tree.paths))
        held = (len(batch) + 1) * (len(tree.tokens) + more * most)
        if batch and held > batch_size * (long + most):
            yield batch
            batch, more, long = [], len(tree.rows), max(map(len, tree.paths))
        batch.append(tree)
        rows, longest = more, long
    if batch:
        yield batch


class Trees:
    """A batch of trees whose prompts are read, as a `Reader` of their rows, tree after tree.

    Args:
        most: tokens that will be taken of a row.
        compiler: makes the passes behind the first, which are of one shape then: rows that have
            ended stay, the cache has room for all, and sizes are powers of two, so that few batches
            need another graph.
    """

    def __init__(
        self,
        model: GPT,
        trees: Sequence[Tree],
        device: torch.device,
        most: int,
        compiler: Compiler | None = None,
    ):
        self.model, self.device = model, device
        self.last = model.longest - 1 if model.longest else FOREVER  # position
        virtual = model.plan.virtual_tokens
        paths = [path for tree in trees for path in tree.paths]
        counts = torch.tensor([len(tree.rows) for tree in trees])
        self.read: Sequence[Sequence[int]] = [
            [tree.tokens[c] for c in path] for tree in trees for path in tree.paths
        ]
        self.trees = len(trees)
        self.tree = torch.arange(self.trees).repeat_interleave(counts).to(device)  # [N]
        self.positions = torch.tensor([len(path) for path in paths], device=device)  # [N]
        grid = _grid(trees, virtual)
        width = grid.tokens.shape[1]
        seen = torch.zeros(len(paths), width, dtype=torch.bool)
        seen[:, :virtual] = True
        for row, path in zip(seen, paths, strict=True):
            row[torch.tensor(path) + virtual] = True
        self.seen = seen.to(device)  # [N, K]: the columns that each row has met
        room = width + int(counts.max()) * min(most, AHEAD)
        self.cache = KeyValueCache(model.config.num_layers, room)
        self.cache.grid = grid.to(device)
        stops = accumulate(len(tree.tokens) for tree in trees)
        pairs = zip([0, *stops][:-1], trees, strict=True)
        last = [start + path[-1] for start, tree in pairs for path in tree.paths]
        self.logits = self._pass(
            torch.tensor([token for tree in trees for token in tree.tokens], device=device),
            torch.tensor([place for tree in trees for place in tree.positions], device=device),
            torch.tensor(last, device=device),
        )
        self._arrange()
        self.running: Tensor | None = None  # of the rows of compiled passes, those that do run
        if compiler is not None and most:
            self._fix(most)
            self.layers = compiler(model.decoder)

    def _pass(self, tokens: Tensor, positions: Tensor, select: Tensor | None = None) -> Tensor:
        """Logits behind the tokens of a row, or behind those that `select` names."""
        everything = torch.arange(len(tokens), device=self.device) if select is None else select
        return self.model(tokens[None], positions[None], cache=self.cache, select=everything)

    def _arrange(self) -> None:
        """Gives each row that still runs a place in its tree: [N], and the grid of all [T, G]."""
        every = torch.arange(len(self.tree), device=self.device)
        self.place = every - torch.searchsorted(self.tree, self.tree)
        shape = (self.trees, int(self.place.max()) + 1)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.tokens[self.tree, self.place] = every

    def _fix(self, most: int) -> None:
        """Rounds all sizes up, for the passes to come; what is added is of no account."""
        rows, width = self.seen.shape
        trees, places = self.tokens.shape
        more = rounded(rows) - rows
        self.running = torch.arange(rows, device=self.device)
        self.tokens = F.pad(self.tokens, (0, rounded(places) - places, 0, rounded(trees) - trees))
        self.trees, places = self.tokens.shape
        room = rounded(width + places * most)
        self.cache.fix(self.trees, places, room)
        self.seen = F.pad(self.seen, (0, room - width, 0, more))
        self.positions, self.tree, self.place = (
            F.pad(of_row, (0, more)) for of_row in (self.positions, self.tree, self.place)
        )

    def take(self, chosen: Tensor) -> None:
        if self.running is not None:
            self._take_fixed(chosen, self.running)
            return
        most = self.tokens.shape[1]
        own = F.one_hot(self.place, most).bool()
        self.seen = torch.cat([self.seen, own], 1)
        places = self.tree * most + self.place
        self.cache.grid = Grid(self.tokens, places, self.seen[self.tokens][:, None])
        self.logits = self._pass(chosen, self.positions)
        self.positions = self.positions + 1

    def _take_fixed(self, chosen: Tensor, running: Tensor) -> None:
        """As `take`, and what rows that have ended would go on with is of no account."""
        assert self.cache.columns is not None
        tokens = torch.zeros_like(self.positions).index_copy_(0, running, chosen)
        self.seen.scatter_(1, self.cache.columns[self.place][:, None], True)
        places = self.tree * self.tokens.shape[1] + self.place
        self.cache.grid = Grid(self.tokens, places, self.seen[self.tokens][:, None])
        model = self.model
        start = model.begin(tokens[None], self.positions[None], cache=self.cache)
        x, context = self.layers(model.embed(start), start.context, 1, None)
        self.logits = model.answer(*start.own(x, context), select=None)[0, running]
        self.positions = (self.positions + 1).clamp(max=self.last)
        self.cache.columns = self.cache.columns + self.tokens.shape[1]

    def keep(self, rows: Tensor) -> None:
        if self.running is not None:
            self.running = self.running[rows]
            return
        self.seen, self.positions = self.seen[rows], self.positions[rows]
        self.tree = self.tree[rows]
        living, places = self.tree.unique(return_inverse=True)
        if 2 * len(living) <= self.trees:  # copied once or twice; till then trees are passed over
            self.cache.keep(living)
            self.tree, self.trees = places, len(living)
        self._arrange()


def rounded(size: int) -> int:
    """The next power of two; at least 2, since compilers make graphs for 1 apart."""
    return max(1 << (size - 1).bit_length(), 2)


def _grid(trees: Sequence[Tree], virtual: int) -> Grid:
    """That of the first pass, in which virtual tokens come before all others."""
    lengths = torch.tensor([len(tree.tokens) for tree in trees])
    starts = lengths.cumsum(0) - lengths
    index = torch.arange(int(lengths.max()))
    there = index < lengths[:, None]
    tokens = torch.where(there, virtual + starts[:, None] + index, 0)
    ahead = torch.arange(virtual)
    tokens = torch.cat([ahead.expand(len(trees), -1), tokens], 1)
    width = tokens.shape[1]
    own = torch.arange(len(trees))[:, None] * width + virtual + index
    places = torch.cat([ahead, own[there]])
    return Grid(tokens, places, _mask(trees, virtual, width))


def _mask(trees: Sequence[Tree], virtual: int, width: int) -> Tensor | None:
    """Who sees whom in the first pass, [T, 1, W, W]; None where no tree branches."""
    if all(len(tree.rows) == 1 for tree in trees):
        return None
    end = torch.full((len(trees), width), FOREVER)
    for row, tree in zip(end, trees, strict=True):
        row[virtual : virtual + len(tree.end)] = torch.tensor(tree.end).clamp(max=FOREVER - virtual)
        row[virtual : virtual + len(tree.end)] += virtual
    return visibility(end, width)
