"""Rows to examples: tokens, and labels at the positions that predict them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from graftwerk.data.templates import TaskTemplate, text_of
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Label(NamedTuple):
    """The token that the hidden state at `position` has to predict, and how much that counts."""

    position: int
    token: int
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """What a model sees of a row: all of it, or one window of a long one.

    Args:
        tokens: the input (of a T5: of its decoder). A text's last token is not among them: nothing
            follows it, so it is only ever a label.
        labels: what is predicted where. One position may carry several labels (a tree's branching
            point) and one label may occur several times.
        positions: each token's position, or None for 0, 1, 2, ...
        end: for each token the index past the last one that may look at it, or None for plain
            causal rows.
        source: the input of a T5's encoder; None for other models.
        token_types: of a BERT that knows more than one; else None.
        span: first and last token of the answer to a BERT that marks it; such an example has no
            `labels`.
    """

    tokens: Sequence[int]
    labels: Sequence[Label] = ()
    positions: Sequence[int] | None = None
    end: Sequence[int] | None = None
    source: Sequence[int] | None = None
    token_types: Sequence[int] | None = None
    span: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        """Tokens of the text, the one that is only a label included."""
        if self.span is not None:
            return len(self.tokens)
        if self.source is not None:
            return len(self.source) + len(self.tokens)
        return len(self.tokens) + 1


class RowDropped(Exception):
    """A sound row that does not become an example; the message is the reason to count it under."""


class RowEncoder(Protocol):
    """Rows of one task to the examples of one family of models.

    `filler` is an example that weighs nothing, for a rank that has run out of rows.
    """

    template: TaskTemplate
    filler: Example

    def encode_all(self, rows: Sequence[Mapping[str, Any]]) -> Iterator["Encoded | RowDropped"]:
        """What became of each row, in order."""
        ...

    def encode_prompt(self, row: Mapping[str, Any], room: int = 0) -> Any:
        """What answers are made from: the row without its answer."""
        ...


class Encoded(NamedTuple):
    """A row's examples, and whether its `truncate_field` was cut to fit."""

    examples: list[Example]
    cut: bool


class Encoder:
    """Rows to the examples of a GPT: prompt and answer in one text.

    Args:
        template: the row's task.
        tokenizer: its own special tokens are never added; `add_bos` and `add_eos` say which are.
        encoder_seq_length: the most tokens of a whole row: start token, prompt, answer, end token.
        add_bos, add_eos: put the tokenizer's start token first, its end token last (as a label).
    """

    def __init__(
        self,
        template: TaskTemplate,
        tokenizer: "PreTrainedTokenizerBase",
        encoder_seq_length: int,
        add_bos: bool = False,
        add_eos: bool = True,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.limit = encoder_seq_length
        self.filler = Example([padding_token(tokenizer)])
        self.bos = self._special("bos", add_bos)
        self.eos = self._special("eos", add_eos)
        literal = template.pieces[-1][0].rstrip() if template.answer_field is not None else ""
        self._anchor = literal[-1:] or ":"
        self._anchor_tokens = self._tokens(self._anchor)

    def _special(self, name: str, wanted: bool) -> list[int]:
        token = getattr(self.tokenizer, f"{name}_token_id")
        if wanted and token is None:
            raise UserError(
                f"data.add_{name} is True, but the tokenizer has no {name} token; "
                f"set data.add_{name}: False"
            )
        return [token] if wanted else []

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode(self, row: Mapping[str, Any]) -> tuple[Example, bool]:
        """The row's example, and whether its `truncate_field` was cut to fit.

        Raises `RowError` for a row without its fields, `RowDropped` for one with an empty answer
        or too long to fit.
        """
        prompt, answer = self.template.render(row)
        return self._example(row, self._tokens(prompt), self._answer_tokens(prompt, answer))

    def encode_all(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Encoded | RowDropped]:
        """`encode` for many rows at once, with the prompts tokenised on all cores."""
        texts = [self.template.render(row) for row in rows]
        if not texts:
            return
        prompts = self.tokenizer([prompt for prompt, _ in texts], add_special_tokens=False)
        for row, (prompt, answer), tokens in zip(rows, texts, prompts["input_ids"], strict=True):
            try:
                answer_tokens = self._answer_tokens(prompt, answer)
                example, cut = self._example(row, list(tokens), answer_tokens)
                yield Encoded([example], cut)
            except RowDropped as dropped:
                yield dropped

    def _example(
        self, row: Mapping[str, Any], prompt: list[int], answer: list[int]
    ) -> tuple[Example, bool]:
        if self.template.answer_field is not None and not answer:
            raise RowDropped("empty answer")
        head, tail = self._framed(prompt), answer + self.eos
        cut = len(head) + len(tail) > self.limit
        if cut:
            head = self._fit(row, self.limit - len(tail))
        tokens = head + tail
        # The first token of all has no predecessor that could predict it.
        first = max(len(head) if self.template.answer_only_loss else 0, 1)
        labels = [Label(index - 1, tokens[index]) for index in range(first, len(tokens))]
        if not labels:
            raise RowDropped("nothing to predict")
        return Example(tokens[:-1], labels), cut

    def encode_prompt(self, row: Mapping[str, Any], room: int = 0) -> list[int]:
        """The row's prompt, which needs no answer: exactly the tokens that precede it in training.

        Cut where it and `room` tokens more would not fit into `encoder_seq_length`; `RowDropped`
        where that cannot be done.
        """
        prompt = self._framed(self._tokens(self.template.render(row, answer=False)[0]))
        if len(prompt) + room > self.limit:
            return self._fit(row, self.limit - room)
        return prompt

    def _framed(self, prompt: list[int]) -> list[int]:
        """A prompt's tokens with those that belong around them."""
        return self.bos + prompt

    def _answer_tokens(self, prompt: str, answer: str) -> list[int]:
        """The answer as it continues a prompt.

        A tokenizer that opens each text with a space of its own (SentencePiece) would give two
        spaces for " blue" alone, so the answer is read behind the prompt's last literal character.
        """
        if not answer.strip():
            return []
        if not prompt:
            return self._tokens(answer)
        tokens = self._tokens(self._anchor + answer)
        behind = len(self._anchor_tokens)
        if tokens[:behind] == self._anchor_tokens:
            return tokens[behind:]
        return self._tokens(answer)

    def _fit(self, row: Mapping[str, Any], room: int) -> list[int]:
        """The prompt's tokens with as much of the start of `truncate_field` as `room` allows."""
        name = self.template.truncate_field
        if name is None:
            raise RowDropped(f"longer than encoder_seq_length {self.limit}, truncate_field is null")
        text = text_of(row, name)
        ends = self._token_ends(text)

        def head(kept: int) -> list[int]:
            prompt, _ = self.template.render({**row, name: text[: ends[kept]]}, answer=False)
            return self._framed(self._tokens(prompt))

        # ends[0] = 0 keeps nothing. The first length that is too long, less one:
        kept = bisect_left(range(len(ends)), True, key=lambda n: len(head(n)) > room) - 1
        # Merges over the cut make lengths only almost monotonous.
        while kept >= 0 and len(head(kept)) > room:
            kept -= 1
        if kept < 0:
            raise RowDropped(f"longer than encoder_seq_length {self.limit} without its {name}")
        return head(kept)

    def _token_ends(self, text: str) -> list[int]:
        """Where `text` may be cut: 0 and the end of each of its tokens, in characters."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = encoded["offset_mapping"]
        else:
            starts = [0, *(i for i, c in enumerate(text) if c.isspace()), len(text)]
            spans = pairwise(starts)
        return sorted({0, *(end for _, end in spans)})


def padding_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token to fill rows with: nothing attends to it and no label is it, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


@dataclass
class RowReport:
    """What became of the rows that were read: for `summary.json` and the log."""

    rows: int = 0
    kept: int = 0
    cut: int = 0
    examples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    labels: int = 0
    longest: int = 0

    def add(self, encoded: Encoded) -> None:
        self.kept += 1
        self.cut += encoded.cut
        for example in encoded.examples:
            self.examples += 1
            self.tokens += example.length
            self.labels += len(example.labels) if example.span is None else 2
            self.longest = max(self.longest, example.length)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; `tokens` and `longest` count whole examples, end token included."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "cut": self.cut,
            "examples": self.examples,
            "dropped": dict(self.dropped),
            "tokens": self.tokens,
            "labels": self.labels,
            "longest": self.longest,
        }

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        windows = f" in {self.examples} windows" if self.examples > self.kept else ""
        return (
            f"{self.rows} rows, {self.kept} kept{windows}, {self.cut} cut, "
            f"{sum(self.dropped.values())} dropped{f' ({reasons})' if reasons else ''}; "
            f"{self.tokens} tokens, {self.labels} of them labels, longest row {self.longest}"
        )
