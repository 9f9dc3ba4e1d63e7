"""Rows to the examples of a BERT that marks the answer in its context.

Question and context are read together, a long context in overlapping windows; the label is the
span of tokens that holds the answer, in windows without it the first token, `[CLS]` (Devlin et al.
2018, arXiv:1810.04805, section 4.2 f.).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwerk.data.encoding import (
    Encoded,
    Example,
    RowDropped,
    RowUnlabelled,
    length_words,
    padding_token,
)
from graftwerk.data.templates import TaskTemplate, text_of
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOC_STRIDE = 128  # tokens of the context that neighbouring windows share
NOWHERE = (0, 0)  # [CLS]
FIELDS = ("context", "question")

Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Question and a run of the context's tokens.

    Args:
        tokens: ids, special ones included.
        token_types: of each token, or None.
        first: index of the context's first token here.
        begin: index of that token among the context's tokens.
        count: how many of the context's tokens are here.
    """

    tokens: list[int]
    token_types: list[int] | None
    first: int
    begin: int
    count: int


@dataclass(frozen=True)
class WindowedQuestion:
    """A question's context and the windows over it.

    `offsets` has (start, end) of each of the context's tokens, in characters of the context.
    """

    context: str
    offsets: list[Span]
    windows: list[Window]

    def tokens_of(self, start: int, end: int) -> Span | None:
        """First and last of the context's tokens that hold characters `start` to `end`, if any."""
        held = [n for n, (a, b) in enumerate(self.offsets) if a < end and start < b]
        return (held[0], held[-1]) if held else None

    def spans(self, first: int, last: int) -> list[Span]:
        """Where each window has the context's tokens `first` to `last`: (first, last) in its own.

        `NOWHERE` for a window that lacks one of them.
        """
        return [
            (w.first + first - w.begin, w.first + last - w.begin)
            if w.begin <= first and last < w.begin + w.count
            else NOWHERE
            for w in self.windows
        ]

    def text(self, window: int, first: int, last: int) -> str:
        """The context's characters from token `first` to token `last` of a window."""
        here = self.windows[window]
        shift = here.begin - here.first
        start, end = self.offsets[first + shift][0], self.offsets[last + shift][1]
        return self.context[start:end].strip()


class SpanEncoder:
    """Rows with `context` and `question` to windows with the answer's span.

    Of the template it takes the fields; how question and context stand together is the
    tokenizer's own pair template (`[CLS] question [SEP] context [SEP]`).

    Args:
        template: the row's task; names `context` and `question`.
        tokenizer: a fast one, which knows where each token comes from.
        encoder_seq_length: the most tokens of a window.
        num_token_types: that the model knows; below 2 examples have none.
        virtual_tokens: that the model puts before each window.
    """

    def __init__(
        self,
        template: TaskTemplate,
        tokenizer: "PreTrainedTokenizerBase",
        encoder_seq_length: int,
        num_token_types: int = 0,
        virtual_tokens: int = 0,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.limit = encoder_seq_length - virtual_tokens
        self.length = length_words(encoder_seq_length, virtual_tokens)
        self.typed = num_token_types > 1
        self._check()
        self.specials = tokenizer.num_special_tokens_to_add(pair=True)
        # A single token that sees itself has a loss of 0 by either score.
        types = [0] if self.typed else None
        self.filler = Example([padding_token(tokenizer)], token_types=types, span=NOWHERE)

    def _check(self) -> None:
        template, tokenizer = self.template, self.tokenizer
        named = f"task_templates entry {template.taskname!r}"
        if set(template.fields) != {*FIELDS, template.answer_field}:
            raise UserError(
                f"{named}: for head question_answering the prompt_template has the fields "
                f"{{context}}, {{question}} and the answer, not {', '.join(template.fields)}"
            )
        if template.truncate_field is not None:
            raise UserError(
                f"{named}: truncate_field={template.truncate_field!r} has no meaning for head "
                f"question_answering, which reads long contexts in windows: set it to null"
            )
        if not template.answer_only_loss:
            raise UserError(
                f"{named}: answer_only_loss: False has no meaning for head question_answering: "
                f"set it to True"
            )
        if not tokenizer.is_fast:
            raise UserError(
                "head question_answering needs a tokenizer that says where tokens come from: a "
                "`tokenizer.json` in the base's folder"
            )
        if tokenizer("a", "b")["input_ids"][:1] != [tokenizer.cls_token_id]:
            raise UserError(
                "head question_answering needs a tokenizer whose texts begin with its cls token, "
                "as BERT's and RoBERTa's do"
            )

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises a `RowError` for a row without the template's fields."""
        self.template.render(row)

    def metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row holds besides the template's fields and where its answer is."""
        known = (*self.template.fields, "answer_start")
        return {key: value for key, value in row.items() if key not in known}

    def encode_all(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Encoded | RowDropped]:
        """The windows of each row with the answer's span in them."""
        for row, asked in zip(rows, self._ask(rows), strict=True):
            try:
                if isinstance(asked, RowDropped):
                    raise asked
                yield self._labelled(row, asked)
            except RowDropped as dropped:
                yield dropped

    def encode_prompt(self, row: Mapping[str, Any], room: int = 0) -> WindowedQuestion:
        """The row's windows; an answer needs no `room` in them."""
        (asked,) = self._ask([row])
        if isinstance(asked, RowDropped):
            raise asked
        return asked

    def _labelled(self, row: Mapping[str, Any], asked: WindowedQuestion) -> Encoded:
        assert self.template.answer_field is not None
        answer = text_of(row, self.template.answer_field)
        held = asked.tokens_of(*_answer_span(row, asked.context, answer))
        if held is None:
            raise RowDropped("answer has no tokens")
        spans = asked.spans(*held)
        if all(span == NOWHERE for span in spans):
            raise RowDropped(f"no window of {self.length} holds the whole answer")
        examples = [
            Example(window.tokens, token_types=window.token_types, span=span)
            for window, span in zip(asked.windows, spans, strict=True)
        ]
        return Encoded(examples, cut=False)

    def _ask(self, rows: Sequence[Mapping[str, Any]]) -> list[WindowedQuestion | RowDropped]:
        """Question and context of each row in windows."""
        # Space before a question would only shorten the windows, as HF's run_qa notes.
        questions = [text_of(row, "question").strip() for row in rows]
        contexts = [text_of(row, "context") for row in rows]
        asked: list[WindowedQuestion | RowDropped] = []
        by_stride: dict[int, list[int]] = {}
        lengths = self.tokenizer(questions, add_special_tokens=False)["input_ids"] if rows else []
        for number, tokens in enumerate(lengths):
            room = self.limit - self.specials - len(tokens)
            reason = f"question leaves no room for context in {self.length}"
            asked.append(RowDropped(reason))
            if room > 0:
                # Windows of a few tokens could not share so many.
                by_stride.setdefault(min(DOC_STRIDE, room // 2), []).append(number)
        for stride, numbers in by_stride.items():
            pairs = [(questions[number], contexts[number]) for number in numbers]
            for number, windowed in zip(numbers, self._windowed(pairs, stride), strict=True):
                asked[number] = windowed if windowed.windows else RowDropped("empty context")
        return asked

    def _windowed(self, pairs: list[tuple[str, str]], stride: int) -> list[WindowedQuestion]:
        """(question, context) pairs in windows of which neighbours share `stride` tokens."""
        encoded = self.tokenizer(
            [question for question, _ in pairs],
            [context for _, context in pairs],
            truncation="only_second",
            max_length=self.limit,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        windowed = [WindowedQuestion(context, [], []) for _, context in pairs]
        for number, row in enumerate(encoded["overflow_to_sample_mapping"]):
            here = [n for n, part in enumerate(encoded.sequence_ids(number)) if part == 1]
            if not here:
                continue
            whole = windowed[row]
            begin = max(len(whole.offsets) - stride, 0)
            offsets = encoded["offset_mapping"][number]
            whole.offsets[begin:] = [tuple(offsets[n]) for n in here]
            types = encoded["token_type_ids"][number] if self.typed else None
            tokens = encoded["input_ids"][number]
            whole.windows.append(Window(tokens, types, here[0], begin, len(here)))
        return windowed


def _answer_span(row: Mapping[str, Any], context: str, answer: str) -> Span:
    """Where the answer is in the context, in characters, without the space around it.

    At the row's `answer_start`, else where the context has it first, in any case of letters.
    """
    text = answer.strip()
    if not text:
        raise RowUnlabelled("empty answer")
    start = row.get("answer_start")
    if start is None:
        found = re.search(re.escape(text), context) or re.search(
            re.escape(text), context, re.IGNORECASE
        )
        if found is None:
            raise RowDropped("answer not in the context")
        return found.span()
    if isinstance(start, int):
        start += len(answer) - len(answer.lstrip())
        if context[start : start + len(text)] == text:
            return start, start + len(text)
    raise RowDropped("answer_start is not where the context has the answer")
