"""Task templates: a row of fields becomes a prompt and an answer.

A template is text with fields in braces, the answer's field last:
`context: {context} question: {question} answer: {answer}`. Everything before the answer is the
prompt. Prompt and answer are tokenised apart, and the space between them belongs to the answer, so
that a prompt has the same tokens in training, where an answer follows, and in generation, where
none does.
"""

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from graftwerk.errors import UserError

Piece = tuple[str, str | None]  # literal text, then the field that follows it


class RowError(ValueError):
    """One row that cannot be used as the template asks; the reason, without file and line."""


@dataclass(frozen=True)
class TaskTemplate:
    """One entry of `task_templates`, under the published launcher's keys."""

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

    def _parse(self) -> list[Piece]:
        try:
            parsed = list(string.Formatter().parse(self.prompt_template))
        except ValueError as error:
            raise UserError(
                f"{self._key('prompt_template')}: {error} in {self.prompt_template!r}; "
                f"a field is written {{name}}, a brace itself {{{{ or }}}}"
            ) from None
        for _, name, spec, conversion in parsed:
            if name is not None and (spec or conversion or not name.isidentifier()):
                raise UserError(
                    f"{self._key('prompt_template')}: {{{name}}} is no field name: letters, digits "
                    f"and underscores alone, without formats"
                )
        return [(literal, name) for literal, name, _, _ in parsed]

    def _check(self) -> None:
        if self.total_virtual_tokens or self.virtual_token_splits:
            raise UserError(
                f"{self._key('total_virtual_tokens')}: virtual tokens belong to prompt learning, "
                f"which is not there yet; set total_virtual_tokens: 0 and virtual_token_splits: []"
            )
        if not self.fields:
            raise UserError(
                f"{self._key('prompt_template')} has no field; write one as {{question}}"
            )
        repeated = [name for name, count in Counter(self.fields).items() if count > 1]
        if repeated:
            raise UserError(
                f"{self._key('prompt_template')} has {{{repeated[0]}}} twice; use each field once"
            )
        if self.answer_field is None:
            if self.answer_only_loss:
                raise UserError(
                    f"{self._key('answer_field')} is null, but answer_only_loss is True: "
                    f"name the field that holds the answer"
                )
        else:
            self._check_field("answer_field", self.answer_field)
            if self.pieces[-1][1] != self.answer_field:
                raise UserError(
                    f"{self._key('answer_field')}: {{{self.answer_field}}} must be the last thing "
                    f"in the prompt_template, which is {self.prompt_template!r}"
                )
        if self.truncate_field is not None:
            self._check_field("truncate_field", self.truncate_field)
            if self.truncate_field == self.answer_field:
                raise UserError(
                    f"{self._key('truncate_field')}: the answer is never cut; name another field"
                )

    def _check_field(self, key: str, name: str) -> None:
        if name not in self.fields:
            raise UserError(
                f"{self._key(key)}: {name!r} is no field of the prompt_template; "
                f"it has {', '.join(self.fields)}"
            )

    def _key(self, key: str) -> str:
        return f"task_templates entry {self.taskname!r}: {key}"

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
