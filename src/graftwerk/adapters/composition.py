"""Compositions: which adapters are active, and how they are joined.

A composition is a small immutable tree whose leaves are adapter names. `Stack` applies its children
one after the other; `Parallel` runs them side by side on copies of the batch, which the model
repeats once, before the first layer that holds one of them; `BatchSplit` gives each child some rows
of the batch and `Split` some tokens of each row; `Average` weighs what they make, and `Fuse` does
so by trained attention (AdapterFusion, Pfeiffer et al. 2021, arXiv:2005.00247); `MultiTask` chooses
a child for each row. Which block may hold which is the rule of AdapterHub's `adapters`, with a
`Fuse` in a `Parallel` besides.

`str()` of a composition is the text that configurations hold, and `parse` reads it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graftwerk.errors import UserError


@dataclass(frozen=True, init=False, repr=False)
class Composition:
    """A node of the tree. Children are names or compositions."""

    holds: ClassVar[tuple[str, ...]] = ()  # the blocks that may be its children
    argument: ClassVar[str | None] = None  # its list of numbers, one a child

    children: tuple["Composition | str", ...]

    def __init__(self, *children: "Composition | str"):
        object.__setattr__(self, "children", children)
        self._check()

    def _check(self) -> None:
        kind = type(self).__name__
        if not self.children:
            raise UserError(f"{kind}() needs at least one adapter")
        for child in self.children:
            if isinstance(child, str):
                continue
            if not isinstance(child, Composition):
                raise UserError(f"{kind} holds names and compositions, not {child!r}")
            if type(child).__name__ not in self.holds:
                blocks = f", {', '.join(self.holds)}" if self.holds else " only"
                raise UserError(
                    f"{self}: {kind} cannot hold {type(child).__name__}; it holds adapters{blocks}"
                )
            if width(child) > 1 and not isinstance(self, Stack):
                raise UserError(
                    f"{self}: a Parallel repeats the whole batch: {kind} cannot hold it"
                )

    def __iter__(self) -> Iterator["Composition | str"]:
        return iter(self.children)

    def __len__(self) -> int:
        return len(self.children)

    def __getitem__(self, index: int) -> "Composition | str":
        return self.children[index]

    def _written(self, name: Callable[[str], str], inner: Callable[[Any], str]) -> str:
        words = [name(child) if isinstance(child, str) else inner(child) for child in self.children]
        if self.argument is not None and (numbers := getattr(self, self.argument)) is not None:
            words.append(f"{self.argument}=[{', '.join(f'{number!r}' for number in numbers)}]")
        return f"{type(self).__name__}({', '.join(words)})"

    def __repr__(self) -> str:
        return self._written(lambda name: f'"{name}"', repr)

    def __str__(self) -> str:
        return self._written(str, str)


class Stack(Composition):
    """Children applied in order, each on what the one before left in the slot."""

    holds = ("Fuse", "Split", "BatchSplit", "Parallel", "Average", "MultiTask")


class Fuse(Composition):
    """Children weighed, token by token, by a trained attention over what they add."""

    holds = ("Stack",)

    @property
    def name(self) -> str:
        """What its fusion layer is called: the last adapter of each child, joined by commas."""
        return ",".join(last(child) for child in self.children)

    def _check(self) -> None:
        super()._check()
        for child in self.children:
            if isinstance(child, Stack) and not isinstance(child[-1], str):
                raise UserError(f"{self}: a Stack in a Fuse must end in an adapter")


class Parallel(Composition):
    """Children side by side: child `i` sees the i-th copy of the batch."""

    holds = ("Stack", "BatchSplit", "Average", "Fuse")


@dataclass(frozen=True, init=False, repr=False)
class Split(Composition):
    """Tokens of each row to the children in turn, `splits` many to each.

    The last child takes what follows too, so that a row may grow.
    """

    holds: ClassVar[tuple[str, ...]] = ("Split", "Stack", "BatchSplit", "Average")
    argument: ClassVar[str | None] = "splits"

    splits: tuple[int, ...]

    def __init__(self, *children: Composition | str, splits: int | Sequence[int]):
        object.__setattr__(self, "splits", _counts(splits, children, "splits"))
        super().__init__(*children)


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(Composition):
    """Rows of the batch to the children in turn, `batch_sizes` many to each."""

    holds: ClassVar[tuple[str, ...]] = ("Stack", "Split", "BatchSplit", "Average")
    argument: ClassVar[str | None] = "batch_sizes"

    batch_sizes: tuple[int, ...]

    def __init__(self, *children: Composition | str, batch_sizes: int | Sequence[int]):
        object.__setattr__(self, "batch_sizes", _counts(batch_sizes, children, "batch_sizes"))
        super().__init__(*children)


@dataclass(frozen=True, init=False, repr=False)
class Average(Composition):
    """The weighted mean of what the children make. None: all weigh alike."""

    holds: ClassVar[tuple[str, ...]] = ("Stack", "Split", "BatchSplit")
    argument: ClassVar[str | None] = "weights"

    weights: tuple[float, ...] | None
    normalize_weights: bool

    def __init__(
        self,
        *children: Composition | str,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
    ):
        own = None if weights is None else tuple(float(weight) for weight in weights)
        if own is not None and len(own) != len(children):
            raise UserError(f"Average of {len(children)} has {len(own)} weights: one each")
        if own is not None and not math.isfinite(sum(own)):
            raise UserError(f"Average: weights={list(own)} must be finite numbers, as their sum")
        if own is not None and normalize_weights and not sum(own):
            raise UserError(f"Average: weights={list(own)} add up to 0 and cannot be normalised")
        object.__setattr__(self, "weights", own)
        object.__setattr__(self, "normalize_weights", bool(normalize_weights))
        super().__init__(*children)

    @property
    def shares(self) -> tuple[float, ...]:
        """What each child is multiplied with; they add up to 1 unless that was not wanted."""
        weights = self.weights or (1.0,) * len(self.children)
        total = sum(weights) if self.normalize_weights or self.weights is None else 1.0
        return tuple(weight / total for weight in weights)

    def _written(self, name: Callable[[str], str], inner: Callable[[Any], str]) -> str:
        text = super()._written(name, inner)
        return text if self.normalize_weights else f"{text[:-1]}, normalize_weights=False)"


class MultiTask(Composition):
    """For each row the child whose number the batch's `task_ids` give."""


BLOCKS: dict[str, type[Composition]] = {
    block.__name__: block
    for block in (Stack, Fuse, Parallel, Split, BatchSplit, Average, MultiTask)
}


def _counts(
    given: int | Sequence[int], children: Sequence[Composition | str], key: str
) -> tuple[int, ...]:
    numbers = [given] * len(children) if isinstance(given, int) else list(given)
    if len(numbers) != len(children) or not all(type(n) is int and n > 0 for n in numbers):
        raise UserError(f"{key}={given!r}: one number above 0 for each of {len(children)} children")
    return tuple(numbers)


# ---- reading off a tree


def names(composition: Composition | str | None) -> Iterator[str]:
    """The adapter names in a composition, from left to right."""
    if isinstance(composition, str):
        yield composition
    elif composition is not None:
        for child in composition.children:
            yield from names(child)


def fusions(composition: Composition | str | None) -> Iterator[Fuse]:
    """The `Fuse` blocks in a composition, from left to right."""
    if isinstance(composition, Composition):
        if isinstance(composition, Fuse):
            yield composition
        for child in composition.children:
            yield from fusions(child)


def last(composition: Composition | str) -> str:
    """The last adapter in a composition."""
    return composition if isinstance(composition, str) else last(composition.children[-1])


def width(composition: Composition | str | None) -> int:
    """How many copies of the batch a composition needs."""
    if composition is None or isinstance(composition, str):
        return 1
    if isinstance(composition, Parallel):
        return len(composition.children)
    widths = {width(child) for child in composition.children} - {1}
    if len(widths) > 1:
        raise UserError(f"{composition}: the Parallel blocks of a Stack must be of one width")
    return widths.pop() if widths else 1


def below(composition: Composition | str | None, *kinds: type[Composition]) -> set[str]:
    """The adapters below a block of one of the kinds."""
    if composition is None or isinstance(composition, str):
        return set()
    if isinstance(composition, kinds):
        return set(names(composition))
    return set().union(*(below(child, *kinds) for child in composition.children))


def branches(composition: Composition | str | None) -> list[Composition | str | None]:
    """A composition without a `Parallel` for each copy of the batch; itself where it has none."""
    if isinstance(composition, Parallel):
        return list(composition.children)
    if width(composition) == 1:
        return [composition]
    assert isinstance(composition, Stack)
    each = [branches(child) for child in composition.children]
    copies = [
        [own[n] if len(own) > 1 else own[0] for own in each] for n in range(width(composition))
    ]
    return [Stack(*(leaf for one in copy for leaf in _members(one))) for copy in copies]


def _members(composition: Composition | str | None) -> tuple[Composition | str, ...]:
    """What a `Stack` holds in the place of a composition."""
    if isinstance(composition, Stack):
        return composition.children
    return () if composition is None else (composition,)


def columns(composition: Composition | str | None, lengths: Mapping[str, int]) -> int:
    """How many columns adapters put before a row; `lengths`: how many each of them does.

    Those of a `Stack` stand one after the other, those of other blocks' children at one place.

    Raises:
        UserError: where children at one place have different lengths.
    """
    if composition is None or isinstance(composition, str):
        return 0 if composition is None else lengths[composition]
    each = [columns(child, lengths) for child in composition.children]
    if isinstance(composition, Stack):
        return sum(each)
    if len(set(each)) > 1:
        raise UserError(
            f"{composition}: its children put {each} virtual tokens before a row; side by side "
            f"they must be as many"
        )
    return each[0]


# ---- reading a text

_TOKEN = re.compile(r"\s*(?:([^\W\d][\w-]*)|(-?\d{1,18}(?:\.\d*)?(?:[eE][-+]?\d+)?)|([(),=\[\]]))")
_DEEPEST = 50  # blocks in one another


def parse(text: str) -> Composition | str:
    """The composition that a text such as `Stack(a, Parallel(b, c))` means; a name is itself.

        composition = name | block "(" composition {"," composition} {"," key "=" list} ")"

    Raises:
        UserError: where the text is none, with the place at which it goes wrong.
    """
    words: list[tuple[str, int]] = []
    at = 0
    stripped = text.rstrip()
    while at < len(stripped):
        match = _TOKEN.match(stripped, at)
        if match is None:
            raise UserError(
                f"composition {text!r}: {stripped[at:].strip()[0]!r} at {at} is no word"
            )
        words.append((match.group().strip(), at))
        at = match.end()
    reader = _Reader(text, words)
    found = reader.composition()
    reader.expect(None)
    return found


class _Reader:
    """A recursive reader of the words of one text."""

    def __init__(self, text: str, words: list[tuple[str, int]]):
        self.text, self.words, self.at, self.depth = text, words, 0, 0

    @property
    def word(self) -> str | None:
        return self.words[self.at][0] if self.at < len(self.words) else None

    def take(self) -> str | None:
        word, self.at = self.word, self.at + 1
        return word

    def expect(self, wanted: str | None) -> None:
        if self.word != wanted:
            raise self.mistake("the end" if wanted is None else repr(wanted))
        self.at += 1

    def mistake(self, wanted: str) -> UserError:
        found = "the end" if self.word is None else f"{self.word!r} at {self.words[self.at][1]}"
        return UserError(f"composition {self.text!r}: {wanted} is missing before {found}")

    def composition(self) -> Composition | str:
        if self.word is None or not re.match(r"[^\W\d]", self.word):
            raise self.mistake("an adapter's name")
        name = str(self.take())
        if self.word != "(":
            return name
        if name not in BLOCKS:
            raise UserError(
                f"composition {self.text!r}: {name!r} is no block: use one of {', '.join(BLOCKS)}"
            )
        self.take()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise UserError(f"composition {self.text[:60]!r}...: more than {_DEEPEST} blocks deep")
        children: list[Composition | str] = []
        given: dict[str, Any] = {}
        while self.word != ")":
            if self.at + 1 < len(self.words) and self.words[self.at + 1][0] == "=":
                self.argument(BLOCKS[name], given)
            else:
                children.append(self.composition())
            if self.word != ")":
                self.expect(",")
        self.take()
        self.depth -= 1
        block = BLOCKS[name]
        if block in (Split, BatchSplit) and block.argument not in given:
            raise UserError(f"composition {self.text!r}: {name} needs {block.argument}=[...]")
        return block(*children, **given)

    def argument(self, block: type[Composition], given: dict[str, Any]) -> None:
        key = str(self.take())
        if key in given:
            raise UserError(f"composition {self.text!r}: {block.__name__} has {key!r} twice")
        self.expect("=")
        if block is Average and key == "normalize_weights" and self.word in ("True", "False"):
            given[key] = self.take() == "True"
            return
        if key != block.argument:
            known = f"its argument is {block.argument}" if block.argument else "it takes none"
            raise UserError(f"composition {self.text!r}: {block.__name__} has no {key!r}: {known}")
        self.expect("[")
        numbers: list[int | float] = []
        while self.word != "]":
            word = self.word
            if word is None or not re.match(r"-?\d", word):
                raise self.mistake("a number")
            self.take()
            numbers.append(float(word) if re.search(r"[.eE]", word) else int(word))
            if self.word != "]":
                self.expect(",")
        self.take()
        given[key] = numbers
