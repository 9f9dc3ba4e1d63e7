"""Rows to examples: tokens, and labels at the positions that predict them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from graftwerk.data.prompts import Continuation, PiecewisePrompts, Prompts, WholePrompts
from graftwerk.data.templates import SFTTemplate, TaskTemplate
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANY_TASK = "*"  # the task of all rows, whatever they call it: SFT's and conversations


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
        labels: what is predicted where.
        source: the input of a T5's encoder; None for other models.
        token_types: of a BERT that knows more than one; else None.
        span: first and last token of the answer to a BERT that marks it; such an example has no
            `labels`.
    """

    tokens: Sequence[int]
    labels: Sequence[Label] = ()
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


class RowUnlabelled(RowDropped):
    """A row in which nothing is to be learned: an error, unless the configuration drops it."""


class RowEncoder(Protocol):
    """Rows of one task to the examples of one family of models.

    `filler` is an example that weighs nothing, for a rank that has run out of rows.
    """

    filler: Example

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises a `RowError` for a row that cannot be learned from, whatever its length."""
        ...

    def metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row holds besides: predictions carry it."""
        ...

    def encode_all(self, rows: Sequence[Mapping[str, Any]]) -> Iterator["Encoded | RowDropped"]:
        """What became of each row, in order."""
        ...

    def encode_prompt(self, row: Mapping[str, Any], room: int = 0) -> Any:
        """What answers are made from: the row without its answer."""
        ...


def task_of(row: Mapping[str, Any], encoders: Mapping[str, RowEncoder]) -> str | None:
    """The task that a row says it is of; None where it has to say so and does not."""
    if ANY_TASK in encoders:
        return ANY_TASK
    only = next(iter(encoders)) if len(encoders) == 1 else None
    return row.get("taskname", only)


class Encoded(NamedTuple):
    """A row's examples, and whether it was cut to fit."""

    examples: list[Example]
    cut: bool


class Encoder:
    """Rows to the examples of a GPT: prompt and answer in one text.

    Args:
        template: the row's task. Prompts of an `SFTTemplate` are tokenised piece by piece.
        tokenizer: its own special tokens are never added; `add_bos` and `add_eos` say which are.
        encoder_seq_length: the most tokens of a whole row: virtual tokens, start token, prompt,
            separator, answer, end token.
        add_bos, add_eos: put the tokenizer's start token first, its end token last (as a label).
        add_sep: put its separator between prompt and answer.
        tokens_to_generate: prompts leave room for so many tokens of answer at least.
        virtual_tokens: that the model puts before each row.
        over_long: `cut` or `drop` rows that are too long; None: cut where a field may be cut.
    """

    def __init__(
        self,
        template: TaskTemplate,
        tokenizer: "PreTrainedTokenizerBase",
        encoder_seq_length: int,
        add_bos: bool = False,
        add_eos: bool = True,
        *,
        add_sep: bool = False,
        tokens_to_generate: int = 0,
        virtual_tokens: int = 0,
        over_long: str | None = None,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.limit = encoder_seq_length - virtual_tokens
        self.length = length_words(encoder_seq_length, virtual_tokens)
        self.filler = Example([padding_token(tokenizer)])
        self.bos = self._special("bos", add_bos)
        self.eos = self._special("eos", add_eos)
        self.sep = self._special("sep", add_sep)
        self.room = tokens_to_generate
        self.cuts = over_long != "drop"
        if over_long == "cut" and not template.cut_fields:
            raise UserError(
                f"model.data.over_long=cut, but {template.key('truncate_field')} is null: name a "
                f"field to cut, or set over_long: drop"
            )
        self.prompts: Prompts = (
            PiecewisePrompts(template, tokenizer)
            if isinstance(template, SFTTemplate)
            else WholePrompts(template, tokenizer)
        )
        literal = template.pieces[-1][0].rstrip() if template.answer_field is not None else ""
        self._behind = Continuation(tokenizer, literal[-1:] or ":")

    def _special(self, name: str, wanted: bool) -> list[int]:
        token = getattr(self.tokenizer, f"{name}_token_id")
        if wanted and token is None:
            raise UserError(
                f"data.add_{name} is True, but the tokenizer has no {name} token; "
                f"set data.add_{name}: False"
            )
        return [token] if wanted else []

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises a `RowError` for a row without the template's fields."""
        self.template.render(row)

    def metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row holds besides the template's fields."""
        return {key: value for key, value in row.items() if key not in self.template.fields}

    def encode(self, row: Mapping[str, Any]) -> tuple[Example, bool]:
        """The row's example, and whether it was cut to fit.

        Raises `RowError` for a row without its fields, `RowUnlabelled` for one with an empty
        answer, `RowDropped` for one too long to fit.
        """
        (outcome,) = self.encode_all([row])
        if isinstance(outcome, RowDropped):
            raise outcome
        return outcome.examples[0], outcome.cut

    def encode_all(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Encoded | RowDropped]:
        """What becomes of many rows, with prompts and answers tokenised on all cores."""
        prompts = self.prompts.tokens(rows)
        answers = self._answers([self.template.render(row) for row in rows])
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            try:
                example, cut = self._example(row, prompt, answer)
                yield Encoded([example], cut)
            except RowDropped as dropped:
                yield dropped

    def _example(
        self, row: Mapping[str, Any], prompt: list[int], answer: list[int]
    ) -> tuple[Example, bool]:
        if self.template.answer_field is not None and not answer:
            raise RowUnlabelled("empty answer")
        head, tail = self._framed(prompt), answer + self.eos
        room = self.limit - max(len(tail), self._reserved)
        cut = len(head) > room
        if cut:
            head = self._fit(row, room)
        tokens = head + tail
        # The first token of all has no predecessor that could predict it.
        first = max(len(head) if self.template.answer_only_loss else 0, 1)
        labels = [Label(index - 1, tokens[index]) for index in range(first, len(tokens))]
        if not labels:
            raise RowUnlabelled("nothing to predict")
        return Example(tokens[:-1], labels), cut

    @property
    def _reserved(self) -> int:
        """Tokens that every prompt leaves room for, so that it is cut alike wherever it is read."""
        return self.room + len(self.eos) if self.room else 0

    def encode_prompt(self, row: Mapping[str, Any], room: int = 0) -> list[int]:
        """The row's prompt, which needs no answer: exactly the tokens that precede it in training.

        Cut where it and `room` tokens more would not fit into `encoder_seq_length`; `RowDropped`
        where that cannot be done.
        """
        room = self.limit - max(room, self._reserved)
        prompt = self._framed(self.prompts.tokens([row])[0])
        return self._fit(row, room) if len(prompt) > room else prompt

    def _framed(self, prompt: list[int]) -> list[int]:
        """A prompt's tokens with those that belong around them."""
        return self.bos + prompt + self.sep

    def _answers(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The answers of (prompt, answer) as they continue their prompts."""
        first = [number for number, (prompt, _) in enumerate(texts) if not prompt]
        found = self._behind.tokens([answer for _, answer in texts])
        for number in first:
            found[number] = self.tokenizer.encode(texts[number][1], add_special_tokens=False)
        return [row if text.strip() else [] for row, (_, text) in zip(found, texts, strict=True)]

    def _fit(self, row: Mapping[str, Any], room: int) -> list[int]:
        """The prompt's tokens, framed, with as much of the fields to cut as `room` allows."""
        names = self.template.cut_fields
        if not self.cuts:
            raise RowDropped(f"longer than {self.length}")
        if not names:
            key = self.template.short_key("truncate_field")
            raise RowDropped(f"longer than {self.length}, {key} is null")
        prompt = self.prompts.shortened(row, room - len(self._framed([])))
        if prompt is None:
            raise RowDropped(f"longer than {self.length} without its {' and '.join(names)}")
        return self._framed(prompt)


def length_words(length: int, virtual_tokens: int) -> str:
    """The bound of a row, in words."""
    virtual = f" less {virtual_tokens} virtual tokens" if virtual_tokens else ""
    return f"encoder_seq_length {length}{virtual}"


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

    def join(self, other: "RowReport") -> None:
        """Count the rows of another one too."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest" else mine + value)

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
