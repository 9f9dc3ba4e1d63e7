"""Compositions of adapters as text, `Stack(a, Parallel(b, c))`: read, and checked before a job is.

The grammar and the rules are those of `graftwerk.adapters.composition`, which a launcher cannot
import: it has no torch. A test holds the two together.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# What each block may hold besides names of adapters, and its list of numbers.
HOLDS: dict[str, tuple[str, ...]] = {
    "Stack": ("Fuse", "Split", "BatchSplit", "Parallel", "Average", "MultiTask"),
    "Fuse": ("Stack",),
    "Parallel": ("Stack", "BatchSplit", "Average", "Fuse"),
    "Split": ("Split", "Stack", "BatchSplit", "Average"),
    "BatchSplit": ("Stack", "Split", "BatchSplit", "Average"),
    "Average": ("Stack", "Split", "BatchSplit"),
    "MultiTask": (),
}
NUMBERS = {"Split": "splits", "BatchSplit": "batch_sizes", "Average": "weights"}
OPTIONAL = ("Average",)  # whose numbers may be left out
# Blocks that need what a stage's batches do not have.
UNFIT = {
    "BatchSplit": "its numbers are those of one batch, and a stage has batches of several sizes",
    "MultiTask": "it needs the task of each row, which no stage gives",
}
_NAME = r"[A-Za-z_][\w-]*"
_TOKEN = re.compile(rf"\s*({_NAME}|-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|[(),=\[\]])")


@dataclass(frozen=True)
class Tree:
    """A block and what it holds: names and blocks."""

    block: str
    children: tuple["Tree | str", ...]

    def __str__(self) -> str:
        return f"{self.block}({', '.join(map(str, self.children))})"


def names_in(tree: "Tree | str") -> Iterator[str]:
    """The adapters of a composition, from left to right."""
    if isinstance(tree, str):
        yield tree
    else:
        for child in tree.children:
            yield from names_in(child)


def blocks_in(tree: "Tree | str") -> Iterator[Tree]:
    """The blocks of a composition, outer ones first."""
    if isinstance(tree, Tree):
        yield tree
        for child in tree.children:
            yield from blocks_in(child)


def read(text: str) -> Tree | str:
    """The composition that a text means.

    Raises:
        ValueError: where it means none; the message is what is wrong.
    """
    words: list[str] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None or match.end() > end:
            raise ValueError(f"{text[at:].strip()[0]!r} is no word of a composition")
        words.append(match[1])
        at = match.end()
    reader = _Reader(words)
    found = reader.composition()
    if reader.words:
        raise ValueError(f"{reader.words[0]!r} follows the end of the composition")
    width(found)
    return found


class _Reader:
    """Reads words from the left."""

    def __init__(self, words: list[str]):
        self.words = words

    def next_is(self, *wanted: str) -> bool:
        return bool(self.words) and self.words[0] in wanted

    def take(self, wanted: str, what: str) -> str:
        """The next word, which matches the expression `wanted`, called `what`."""
        if not self.words or not re.fullmatch(wanted, self.words[0]):
            before = repr(self.words[0]) if self.words else "the end"
            raise ValueError(f"{what} is missing before {before}")
        return self.words.pop(0)

    def composition(self) -> Tree | str:
        name = self.take(_NAME, "an adapter's name")
        if not self.next_is("("):
            return name
        if name not in HOLDS:
            raise ValueError(f"{name} is no block; there are {', '.join(HOLDS)}")
        self.words.pop(0)
        children: list[Tree | str] = []
        numbers: list[int | float] | None = None
        while not self.next_is(")"):
            if self.words[1:2] == ["="]:
                numbers = self.numbers(name, numbers)
            else:
                children.append(self.composition())
            if not self.next_is(")"):
                self.take(",", "','")
        self.words.pop(0)
        _check(name, children, numbers)
        return Tree(name, tuple(children))

    def numbers(self, block: str, known: list[int | float] | None) -> list[int | float] | None:
        """What is read of `key=...`; the numbers of the block, as far as they are known then."""
        key = self.take(_NAME, "a name")
        self.words.pop(0)
        if block == "Average" and key == "normalize_weights":
            self.take("True|False", "True or False")
            return known
        if key != NUMBERS.get(block):
            own = f"its list is {NUMBERS[block]}" if block in NUMBERS else "it has none"
            raise ValueError(f"{block} has no {key}: {own}")
        self.take(r"\[", "'['")
        found: list[int | float] = []
        while not self.next_is("]"):
            word = self.take(r"-?\d.*", "a number")
            found.append(float(word) if re.search("[.eE]", word) else int(word))
            if not self.next_is("]"):
                self.take(",", "','")
        self.words.pop(0)
        return found


def _check(name: str, children: list[Tree | str], numbers: list[int | float] | None) -> None:
    """Raise a ValueError where a block cannot be."""
    if not children:
        raise ValueError(f"{name}() needs at least one adapter")
    for child in children:
        if isinstance(child, Tree) and child.block not in HOLDS[name]:
            held = ", ".join(["adapters", *HOLDS[name]])
            raise ValueError(f"{name} cannot hold {child.block}; it holds {held}")
        if name != "Stack" and width(child) > 1:
            raise ValueError(f"a Parallel repeats the whole batch: {name} cannot hold it")
        ends = child.children[-1] if isinstance(child, Tree) else ""
        if name == "Fuse" and isinstance(ends, Tree):
            raise ValueError("a Stack in a Fuse must end in an adapter")
    if name not in NUMBERS:
        return
    if numbers is None:
        if name not in OPTIONAL:
            raise ValueError(f"{name} needs {NUMBERS[name]}=[...]")
    elif len(numbers) != len(children):
        raise ValueError(
            f"{name} of {len(children)} has {len(numbers)} {NUMBERS[name]}: one for each"
        )
    elif name not in OPTIONAL and not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"{NUMBERS[name]} of {name} must be whole numbers above 0")


def width(tree: "Tree | str") -> int:
    """How many copies of the batch a composition needs.

    Raises:
        ValueError: where the blocks of a Stack need different ones.
    """
    if isinstance(tree, str):
        return 1
    if tree.block == "Parallel":
        return len(tree.children)
    widths = {width(child) for child in tree.children} - {1}
    if len(widths) > 1:
        raise ValueError("the Parallel blocks of a Stack must be of one width")
    return widths.pop() if widths else 1
