"""Prompts as tokens: a text tokenised whole, or its pieces tokenised apart; both can be cut."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from graftwerk.data.templates import SFTTemplate, TaskTemplate, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
Tokens = list[int]


class Prompts(Protocol):
    """How the prompts of one template become tokens, without special ones."""

    def tokens(self, rows: Sequence[Row]) -> list[Tokens]:
        """The prompt of each row."""
        ...

    def shortened(self, row: Row, room: int) -> Tokens | None:
        """The prompt with as much of the template's `cut_fields` as `room` tokens allow.

        None where it does not fit without them.
        """
        ...


def plain_tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Tokens]:
    """Texts on all cores, without the tokenizer's own special tokens."""
    if not texts:
        return []
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


class Continuation:
    """Texts as they go on behind another one.

    A tokenizer that opens each text with a space of its own (SentencePiece) would give two spaces
    for " blue" alone, so texts are read behind `anchor`, a character that ends a token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", anchor: str) -> None:
        self.tokenizer = tokenizer
        self.anchor = anchor
        self.before = tokenizer.encode(anchor, add_special_tokens=False)

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text."""
        behind = plain_tokens(self.tokenizer, [self.anchor + text for text in texts])
        start = len(self.before)
        # Where a text's start has grown together with the anchor, it is read alone.
        merged = [n for n, row in enumerate(behind) if row[:start] != self.before]
        found = [row[start:] for row in behind]
        alone = plain_tokens(self.tokenizer, [texts[n] for n in merged])
        for number, row in zip(merged, alone, strict=True):
            found[number] = row
        return found


class WholePrompts:
    """The text before the answer, tokenised in one; cut at the end of `truncate_field`."""

    def __init__(self, template: TaskTemplate, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.template = template
        self.tokenizer = tokenizer

    def tokens(self, rows: Sequence[Row]) -> list[Tokens]:
        texts = [self.template.render(row, answer=False)[0] for row in rows]
        return plain_tokens(self.tokenizer, texts)

    def shortened(self, row: Row, room: int) -> Tokens | None:
        (name,) = self.template.cut_fields
        text = text_of(row, name)
        ends = self._token_ends(text)

        def head(kept: int) -> Tokens:
            prompt, _ = self.template.render({**row, name: text[: ends[kept]]}, answer=False)
            return self.tokenizer.encode(prompt, add_special_tokens=False)

        # ends[0] = 0 keeps nothing. The first length that is too long, less one:
        kept = bisect_left(range(len(ends)), True, key=lambda n: len(head(n)) > room) - 1
        # Merges over the cut make lengths only almost monotonous.
        while kept >= 0 and len(head(kept)) > room:
            kept -= 1
        return None if kept < 0 else head(kept)

    def _token_ends(self, text: str) -> list[int]:
        """Where `text` may be cut: 0 and the end of each of its tokens, in characters."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = encoded["offset_mapping"]
        else:
            starts = [0, *(i for i, c in enumerate(text) if c.isspace()), len(text)]
            spans = pairwise(starts)
        return sorted({0, *(end for _, end in spans)})


class PiecewisePrompts:
    """A template's words and fields tokenised apart, as NeMo's SFT data does.

    A field so has the same tokens whatever stands around it, and is cut by whole tokens: evenly
    over `truncation_fields`, as far as each has enough.
    """

    def __init__(self, template: SFTTemplate, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.behind = Continuation(tokenizer, ":")

    def tokens(self, rows: Sequence[Row]) -> list[Tokens]:
        return [[token for piece in row for token in piece] for row in self._pieces(rows)]

    def shortened(self, row: Row, room: int) -> Tokens | None:
        (pieces,) = self._pieces([row])
        names = [name for _, name in self.template.parts(row, answer=False)[:-1]]
        fields = [n for n, name in enumerate(names) if name in self.template.cut_fields]
        excess = sum(map(len, pieces)) - room
        cuts = even_cuts([len(pieces[n]) for n in fields], max(excess, 0))
        if cuts is None:
            return None
        left = self.template.truncation_method == "left"
        for number, cut in zip(fields, cuts, strict=True):
            piece = pieces[number]
            pieces[number] = piece[cut:] if left else piece[: len(piece) - cut]
        return [token for piece in pieces for token in piece]

    def _pieces(self, rows: Sequence[Row]) -> list[list[Tokens]]:
        """The tokens of each piece of each prompt; all rows' pieces in one place at once."""
        texts = [[text for text, _ in self.template.parts(row, answer=False)[:-1]] for row in rows]
        columns = [list(column) for column in zip(*texts, strict=True)]
        tokens = [
            self._column(column) if number else plain_tokens(self.tokenizer, column)
            for number, column in enumerate(columns)
        ]
        return [[column[n] for column in tokens] for n in range(len(rows))]

    def _column(self, texts: list[str]) -> list[Tokens]:
        # A template's own words are the same in every row.
        distinct = dict.fromkeys(texts)
        known = dict(zip(distinct, self.behind.tokens(list(distinct)), strict=True))
        return [list(known[text]) for text in texts]


def even_cuts(lengths: Sequence[int], excess: int) -> list[int] | None:
    """How many tokens each field loses, so that all lose `excess`; None where they have fewer.

    Even shares, the first fields one more; what a short field lacks, the longer ones give.
    """
    if sum(lengths) < excess:
        return None
    cuts = [0] * len(lengths)
    shortest_first = sorted(range(len(lengths)), key=lambda n: (lengths[n], -n))
    for done, n in enumerate(shortest_first):
        cuts[n] = min(lengths[n], excess // (len(lengths) - done))
        excess -= cuts[n]
    return cuts
