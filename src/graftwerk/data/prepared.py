"""What every kind of data preparation shares: sound rows only, four files, one report.

A *plan* says which rows come from where. Its rows pass a *sieve*, which drops and counts what is
not sound, and are written to `<prefix>_{train,val,test,test_ground_truth}.jsonl`. The report beside
them holds a fingerprint of configuration and source and the files' checksums, by which a second run
knows that there is nothing to do.
"""

import hashlib
import json
import math
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from graftwerk.data.jsonl import replacing, write_json
from graftwerk.data.splits import SPLITS
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # raised when the same configuration and source give other files
FILES = (*SPLITS, "test_ground_truth")
ROWS_AT_ONCE = 512


@dataclass(slots=True)
class Question:
    """A sound row on its way to the files.

    `splits` are those that it goes to (val and test may be the same rows), `fields` all that the
    prompt holds, `answers` every gold answer, of which training takes the first.
    """

    splits: Sequence[str]
    fields: dict[str, str]
    answers: list[str]
    id: str


@dataclass
class Sieve:
    """Passes each sound row once; counts what it does not, by reason."""

    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: dict[int, str] = field(default_factory=dict)
    _ids: set[str] = field(default_factory=set)

    def drop(self, reason: str) -> bool:
        """Count a row that was read and does not pass."""
        self.rows_in += 1
        self.dropped[reason] += 1
        return False

    def withdraw(self, reason: str) -> None:
        """Count a row that has passed as dropped after all."""
        self.dropped[reason] += 1

    def passes(self, split: str, fields: Mapping[str, Any], answers: Any) -> bool:
        """Whether a row is sound and new: text in every field, an answer, not seen before."""
        reason = _fault(fields, answers)
        if reason is not None:
            return self.drop(reason)
        where = self._first_seen(split, fields)
        if where is not None:
            return self.drop("duplicate" if where == split else f"also in {where}")
        self.rows_in += 1
        return True

    def is_new(self, split: str, fields: Mapping[str, str]) -> bool:
        """Whether a sound row was not seen before; one that was is not counted at all."""
        if self._first_seen(split, fields) is not None:
            return False
        self.rows_in += 1
        return True

    def _first_seen(self, split: str, fields: Mapping[str, Any]) -> str | None:
        # The hash instead of the text, so that a streamed source stays out of memory.
        key = hash(tuple(fields.values()))
        where = self._seen.get(key)
        if where is None:
            self._seen[key] = split
        return where

    def own_id(self, given: Any, otherwise: str) -> str:
        """A test row's id: the source's where it has one and it is new."""
        name = str(given) if isinstance(given, str | int) and given != "" else otherwise
        while name in self._ids:
            name += "+"
        self._ids.add(name)
        return name


def _fault(fields: Mapping[str, Any], answers: Any) -> str | None:
    for name, value in fields.items():
        if not isinstance(value, str):
            return f"{name} is missing" if value is None else f"{name} is not a text"
        if not value or value.isspace():
            return f"{name} is empty"
    if not isinstance(answers, list):
        return "answer is missing" if answers is None else "answer is not a text"
    if not answers:
        return "no answer"
    for answer in answers:
        if not isinstance(answer, str):
            return "answer is missing" if answer is None else "answer is not a text"
    if not answers[0] or answers[0].isspace():
        return "answer is empty"
    return None


@dataclass(frozen=True)
class Plan:
    """One set of files to prepare.

    `inputs` is all that the files depend on, as plain values: the configuration and what
    identifies the source. `rows` yields the rows, each of them passed by the sieve. `may_be_empty`:
    the configuration asks for no training rows.
    """

    prefix: str
    inputs: dict[str, Any]
    rows: Callable[[Sieve], Iterator[Question]]
    may_be_empty: bool = False

    @property
    def fingerprint(self) -> str:
        text = json.dumps({"format": FORMAT, **self.inputs}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def finished_report(plan: Plan, output_dir: Path) -> dict[str, Any] | None:
    """The report of an earlier run whose files are there, unharmed, and what `plan` would write."""
    try:
        report = json.loads(report_path(plan.prefix, output_dir).read_text("utf-8"))
        if report["fingerprint"] != plan.fingerprint:
            return None
        for name, file in report["files"].items():
            if file_identity(output_dir / name) != {k: file[k] for k in ("bytes", "sha256")}:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report


def prepare(
    plan: Plan, output_dir: Path, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> dict[str, Any]:
    """Write the plan's files, all or none, and their report; returns the report."""
    started = time.perf_counter()
    sieve, writers = Sieve(), {}
    with ExitStack() as files:
        for name in FILES:
            file = files.enter_context(replacing(output_dir / f"{plan.prefix}_{name}.jsonl"))
            writers[name] = _Writer(file, plan.prefix, name, tokenizer)
        for question in plan.rows(sieve):
            for split in question.splits:
                writers[split].write(question)
            if "test" in question.splits:
                writers["test_ground_truth"].write(question)
        for writer in writers.values():
            writer.finish()
        if not writers["train"].rows and not plan.may_be_empty:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sieve.dropped.items())
            raise UserError(
                f"data_prep.source: nothing to train on among {sieve.rows_in} rows"
                + (f"; dropped: {reasons}" if reasons else "")
            )
    report = {
        "prefix": plan.prefix,
        "fingerprint": plan.fingerprint,
        "inputs": plan.inputs,
        "rows_in": sieve.rows_in,
        "rows_out": {name: writers[name].rows for name in SPLITS},
        "dropped": dict(sieve.dropped),
        "lengths": {name: writers[name].lengths() for name in SPLITS},
        "files": {
            f"{plan.prefix}_{name}.jsonl": {"rows": w.rows, "bytes": w.bytes, "sha256": w.sha256}
            for name, w in writers.items()
        },
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_json(report_path(plan.prefix, output_dir), report)
    return report


def report_path(prefix: str, output_dir: Path) -> Path:
    return output_dir / f"{prefix}_report.json"


def file_identity(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


# ASCII: no reader can take a U+2028 inside a text for the end of a line. Remembered, since several
# questions in a row share a context.
_quoted = lru_cache(maxsize=32)(json.encoder.encode_basestring_ascii)


class _Writer:
    """One of the files: its rows, its checksum, and the lengths of its fields."""

    def __init__(
        self,
        file: IO[bytes],
        taskname: str,
        name: str,
        tokenizer: "PreTrainedTokenizerBase | None",
    ) -> None:
        self.rows = self.bytes = 0
        self._file, self._name = file, name
        self._head = f'{{"taskname": {_quoted(taskname)}'
        self._sha = hashlib.sha256()
        self._tokenizer = tokenizer
        self._characters: dict[str, array[int]] = defaultdict(lambda: array("I"))
        self._tokens: dict[str, array[int]] = defaultdict(lambda: array("I"))
        self._lines: list[str] = []
        self._waiting: list[dict[str, str]] = []

    def write(self, question: Question) -> None:
        texts = [f'"{name}": {_quoted(text)}' for name, text in question.fields.items()]
        if self._name == "test_ground_truth":
            texts.append(f'"answer": [{", ".join(map(_quoted, question.answers))}]')
        elif self._name != "test":
            texts.append(f'"answer": {_quoted(question.answers[0])}')
        if self._name.startswith("test"):
            texts.append(f'"id": {_quoted(question.id)}')
        self._lines.append(f"{self._head}, {', '.join(texts)}}}\n")
        self.rows += 1
        if len(self._lines) == ROWS_AT_ONCE:
            self._flush()
        if self._name != "test_ground_truth":
            self._measure(question)

    def _flush(self) -> None:
        chunk = "".join(self._lines).encode("ascii")
        self._file.write(chunk)
        self._sha.update(chunk)
        self.bytes += len(chunk)
        self._lines.clear()

    def _measure(self, question: Question) -> None:
        lengths = self._characters
        for name, text in question.fields.items():
            lengths[name].append(len(text))
        lengths["answer"].append(len(question.answers[0]))
        if self._tokenizer is not None:
            self._waiting.append({**question.fields, "answer": question.answers[0]})
            if len(self._waiting) == ROWS_AT_ONCE:
                self._tokenize()

    def _tokenize(self) -> None:
        assert self._tokenizer is not None
        for name in self._waiting[0] if self._waiting else ():
            texts = [row[name] for row in self._waiting]
            encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            self._tokens[name].extend(len(tokens) for tokens in encoded)
        self._waiting.clear()

    def finish(self) -> None:
        """Write what waits; `bytes`, `sha256` and `lengths` are whole after it."""
        self._flush()
        if self._tokenizer is not None:
            self._tokenize()
        self.sha256 = self._sha.hexdigest()

    def lengths(self) -> dict[str, dict[str, dict[str, int]]]:
        """{field or "row": {"characters" or "tokens": {median, p95, max}}}; a row is its fields."""
        result: dict[str, dict[str, dict[str, int]]] = {}
        for unit, columns in (("characters", self._characters), ("tokens", self._tokens)):
            rows = array("I", map(sum, zip(*columns.values(), strict=True)))
            for name, values in [*columns.items(), ("row", rows)] if columns else ():
                result.setdefault(name, {})[unit] = _summary(values)
        return result


def _summary(values: array) -> dict[str, int]:
    """Median, 95th percentile and maximum, each a value that occurs (nearest rank)."""
    ranked = sorted(values)
    p95 = ranked[math.ceil(0.95 * len(ranked)) - 1]
    return {"median": ranked[(len(ranked) - 1) // 2], "p95": p95, "max": ranked[-1]}
