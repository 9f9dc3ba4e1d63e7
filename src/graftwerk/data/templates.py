"""Task templates: a row of fields becomes a prompt and an answer.

A template is text with fields in braces, the answer's field last:
`context: {context} question: {question} answer: {answer}`. Everything before the answer is the
prompt. Prompt and answer are tokenised apart, and the space between them belongs to the answer, so
that a prompt has the same tokens in training, where an answer follows, and in generation, where
none does.

`SFTTemplate` is the same in the words of NeMo's supervised fine-tuning, with its rules for spaces.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from graftwerk.errors import UserError

Piece = tuple[str, str | None]  # literal text, then the field that follows it
PLACEHOLDER = re.compile(r"<\|VIRTUAL_PROMPT_(\d+)\|>")


class RowError(ValueError):
    """One row that cannot be used as the template asks; the reason, without file and line."""


@dataclass(frozen=True)
class TaskTemplate:
    """One entry of `task_templates`, under the published launcher's keys.

    Virtual tokens are put before every row by the model itself. Placeholders that ask for them
    (`<|VIRTUAL_PROMPT_0|>`) open the template, and are no part of its text.
    """

    taskname: str
    prompt_template: str
    total_virtual_tokens: int = 0
    virtual_token_splits: Sequence[int] = ()
    truncate_field: str | None = None
    answer_only_loss: bool = True
    answer_field: str | None = "answer"
    pieces: tuple[Piece, ...] = field(init=False, repr=False, compare=False)

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> "TaskTemplate":
        """Read a YAML entry (dict or DictConfig); `UserError` for a missing or unknown key."""
        known = [name for name, spec in cls.__dataclass_fields__.items() if spec.init]
        named = f"task_templates entry {entry.get('taskname')!r}"
        for key in entry:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(known)}"
                raise UserError(f"{named}: unknown key {key!r}{hint}")
        for key in ("taskname", "prompt_template"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise UserError(f"{named}: {key} must be a text, not {entry.get(key)!r}")
        values = dict(entry)
        values["virtual_token_splits"] = tuple(values.get("virtual_token_splits") or ())
        return cls(**values)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self._parse()))
        self._check()

    @property
    def fields(self) -> list[str]:
        """The fields that the template names, in order, the answer's included."""
        return [name for _, name in self.pieces if name is not None]

    @property
    def cut_fields(self) -> tuple[str, ...]:
        """The fields that may be cut where a row is too long."""
        return () if self.truncate_field is None else (self.truncate_field,)

    def _parse(self) -> list[Piece]:
        text = self.prompt_template
        while placeholder := PLACEHOLDER.match(text):
            text = text[placeholder.end() :]
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(
                f"{self.key('prompt_template')}: {error} in {self.prompt_template!r}; "
                f"a field is written {{name}}, a brace itself {{{{ or }}}}"
            ) from None
        for _, name, spec, conversion in parsed:
            if name is not None and (spec or conversion or not name.isidentifier()):
                raise UserError(
                    f"{self.key('prompt_template')}: {{{name}}} is no field name: letters, digits "
                    f"and underscores alone, without formats"
                )
        return [(literal, name) for literal, name, _, _ in parsed]

    def _check(self) -> None:
        self._check_virtual_tokens()
        if not self.fields:
            raise UserError(
                f"{self.key('prompt_template')} has no field; write one as {{question}}"
            )
        repeated = [name for name, count in Counter(self.fields).items() if count > 1]
        if repeated:
            raise UserError(
                f"{self.key('prompt_template')} has {{{repeated[0]}}} twice; use each field once"
            )
        if self.answer_field is None:
            if self.answer_only_loss:
                raise UserError(
                    f"{self.key('answer_field')} is null, but answer_only_loss is True: "
                    f"name the field that holds the answer"
                )
        else:
            self._check_field("answer_field", self.answer_field)
            if self.pieces[-1][1] != self.answer_field:
                raise UserError(
                    f"{self.key('answer_field')}: {{{self.answer_field}}} must be the last thing "
                    f"in the prompt_template, which is {self.prompt_template!r}"
                )
        for name in self.cut_fields:
            self._check_field("truncate_field", name)
            if name == self.answer_field:
                raise UserError(
                    f"{self.key('truncate_field')}: the answer is never cut; name another field"
                )

    def _check_virtual_tokens(self) -> None:
        text, splits = self.prompt_template, list(self.virtual_token_splits)
        numbers = [int(number) for number in PLACEHOLDER.findall(text)]
        opening = "".join(f"<|VIRTUAL_PROMPT_{n}|>" for n in range(len(numbers)))
        if numbers and not text.startswith(opening):
            raise UserError(
                f"{self.key('prompt_template')}: virtual tokens stand before the whole row, so "
                f"{opening} must open the template, with nothing before or between, not {text!r}"
            )
        if len(numbers) != len(splits):
            raise UserError(
                f"{self.key('virtual_token_splits')} has {len(splits)} numbers, the template "
                f"{len(numbers)} placeholders <|VIRTUAL_PROMPT_n|>: each placeholder needs its "
                f"number of virtual tokens"
            )
        if splits and (min(splits) < 1 or sum(splits) != self.total_virtual_tokens):
            raise UserError(
                f"{self.key('virtual_token_splits')}: {splits} must be numbers above 0 whose sum "
                f"is total_virtual_tokens, which is {self.total_virtual_tokens}"
            )

    def _check_field(self, key: str, name: str) -> None:
        if name not in self.fields:
            raise UserError(
                f"{self.key(key)}: {name!r} is no field of the prompt_template; "
                f"it has {', '.join(self.fields)}"
            )

    def key(self, key: str) -> str:
        """What to call a key of this template in a message."""
        return f"task_templates entry {self.taskname!r}: {self.short_key(key)}"

    def short_key(self, key: str) -> str:
        """The key's own name."""
        return key

    def render(self, row: Mapping[str, Any], answer: bool = True) -> tuple[str, str]:
        """The prompt and the answer of a row as text; their concatenation is the filled template.

        The space before the answer is the answer's. With `answer` False the row needs no answer
        and the second text is empty. Raises `RowError` for a field that is missing or no text.
        """
        pieces = self.pieces[:-1] if self.answer_field is not None else self.pieces
        prompt = "".join(
            literal + (text_of(row, name) if name is not None else "") for literal, name in pieces
        )
        if self.answer_field is None:
            return prompt, ""
        prompt += self.pieces[-1][0]
        bare = prompt.rstrip()
        if not answer:
            return bare, ""
        return bare, prompt[len(bare) :] + text_of(row, self.answer_field)


@dataclass(frozen=True)
class SFTTemplate(TaskTemplate):
    """`model.data.prompt_template` and what goes with it, in the words of NeMo's SFT data.

    `label_key` is `answer_field` here, `truncation_field` is `truncation_fields`. The spaces before
    a field belong to the field, so that each piece can be tokenised apart.

    Args:
        truncation_method: the side on which a field loses tokens, `left` or `right`.
    """

    taskname: str = "*"
    prompt_template: str = "{input} {output}"
    answer_field: str | None = "output"
    truncation_fields: tuple[str, ...] = ()
    truncation_method: str = "right"

    @property
    def cut_fields(self) -> tuple[str, ...]:
        return self.truncation_fields

    def _check_virtual_tokens(self) -> None:
        if PLACEHOLDER.search(self.prompt_template):
            raise UserError(
                f"{self.key('prompt_template')}: the model puts virtual tokens before each row by "
                f"itself: leave <|VIRTUAL_PROMPT_n|> out"
            )

    def key(self, key: str) -> str:
        return f"model.data.{self.short_key(key)}"

    def short_key(self, key: str) -> str:
        own = {"answer_field": "label_key", "truncate_field": "truncation_field"}
        return own.get(key, key)

    def render(self, row: Mapping[str, Any], answer: bool = True) -> tuple[str, str]:
        """The prompt and the answer; only the spaces before the answer's field go with it."""
        parts = self.parts(row, answer)
        return "".join(text for text, _ in parts[:-1]), parts[-1][0] if answer else ""

    def parts(self, row: Mapping[str, Any], answer: bool = True) -> list[tuple[str, str | None]]:
        """The pieces of a filled template: (text, the field that it is of); the answer's is last.

        Without `answer` its text is empty.
        """
        parts: list[tuple[str, str | None]] = []
        for literal, name in self.pieces:
            bare = literal.rstrip(" ")
            if bare:
                parts.append((bare, None))
            assert name is not None  # the answer's field is the last thing in the template
            wanted = answer or name != self.answer_field
            value = text_of(row, name) if wanted else ""
            parts.append((literal[len(bare) :] + value if value else "", name))
        return parts


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A field of a row as text; numbers are written out. Raises `RowError` for anything else."""
    if name not in row:
        near = get_close_matches(name, [str(key) for key in row], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RowError(f"no field {name!r}; the row has {', '.join(map(repr, row))}{hint}")
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"field {name!r} must be a text, not {type(value).__name__}")
