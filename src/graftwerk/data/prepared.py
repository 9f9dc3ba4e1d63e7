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
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain
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
BITS, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


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


class HashTable:
    """Small numbers (0 to 6) by the hash of what they are of: 11 to 23 bytes each, and no object.

    Of a hash 61 bits count, so that of a million keys that differ two are taken for one in one of
    four million runs. Open addressing with linear probing (Knuth, volume 3, section 6.4); what came
    last is in a dict, which alone is faster and enough for small data.
    """

    RECENT = 2**16

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._places, self._held = array("Q"), 0

    def put(self, key: int, number: int) -> int | None:
        """The number that a key has; None where it had none and has been given `number`."""
        held = self._recent.get(key)
        if held is None and self._held:
            entry = self._places[self._place(key << 3 & BITS)]
            held = (entry & 7) - 1 if entry else None
        if held is None:
            self._recent[key] = number
            if len(self._recent) == self.RECENT:
                self._spill()
        return held

    def _place(self, entry: int) -> int:
        """Where an entry's key is, or could be."""
        places, mask = self._places, len(self._places) - 1
        # The highest bits of the product hang on all of the key's.
        place = ((entry >> 3) * GOLDEN & BITS) >> 64 - mask.bit_length()
        while (held := places[place]) and held ^ entry >= 8:
            place = place + 1 & mask
        return place

    def _spill(self) -> None:
        """The dict's keys join the others; of all places 7 in 10 are held at most."""
        new, before = self._recent, array("Q")
        self._recent, self._held = {}, self._held + len(new)
        if 10 * self._held > 7 * len(self._places):
            before, size = self._places, max(2 * len(self._places), 2 * self.RECENT)
            self._places = array("Q", bytes(8 * size))
        entries = (key << 3 & BITS | number + 1 for key, number in new.items())
        for entry in chain(before, entries):
            if entry:
                self._places[self._place(entry)] = entry


@dataclass
class Sieve:
    """Passes each sound row once; counts what it does not, by reason."""

    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: HashTable = field(default_factory=HashTable)
    _ids: HashTable = field(default_factory=HashTable)
    _splits: list[str] = field(default_factory=list)

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
        if split not in self._splits:
            self._splits.append(split)
        # The hash instead of the text, so that a streamed source stays out of memory.
        before = self._seen.put(hash(tuple(fields.values())), self._splits.index(split))
        return None if before is None else self._splits[before]

    def own_id(self, given: Any, otherwise: str) -> str:
        """A test row's id: the source's where it has one and it is new."""
        name = str(given) if isinstance(given, str | int) and given != "" else otherwise
        while self._ids.put(hash(name), 0) is not None:
            name += "+"
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
        # How many have each length, by field: of a million rows a few thousand numbers.
        # None is the whole row.
        self._characters: dict[str | None, Counter[int]] = defaultdict(Counter)
        self._tokens: dict[str | None, Counter[int]] = defaultdict(Counter)
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
        lengths, row = self._characters, len(question.answers[0])
        lengths["answer"][row] += 1
        for name, text in question.fields.items():
            length = len(text)
            lengths[name][length] += 1
            row += length
        lengths[None][row] += 1
        if self._tokenizer is not None:
            self._waiting.append({**question.fields, "answer": question.answers[0]})
            if len(self._waiting) == ROWS_AT_ONCE:
                self._tokenize()

    def _tokenize(self) -> None:
        assert self._tokenizer is not None
        rows = [0] * len(self._waiting)
        for name in self._waiting[0] if self._waiting else ():
            texts = [row[name] for row in self._waiting]
            encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            lengths = [len(tokens) for tokens in encoded]
            self._tokens[name].update(lengths)
            rows = [row + length for row, length in zip(rows, lengths, strict=True)]
        self._tokens[None].update(rows)
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
            # The answer behind the other fields, the row behind all.
            for name in sorted(columns, key=lambda name: (name is None, name == "answer")):
                if columns[name]:
                    result.setdefault(name or "row", {})[unit] = _summary(columns[name])
        return result


def _summary(counts: Mapping[int, int]) -> dict[str, int]:
    """Median, 95th percentile and maximum, each a value that occurs (nearest rank)."""
    values = sorted(counts)
    ranks = list(accumulate(counts[value] for value in values))
    median = values[bisect_left(ranks, (ranks[-1] + 1) // 2)]
    p95 = values[bisect_left(ranks, math.ceil(0.95 * ranks[-1]))]
    return {"median": median, "p95": p95, "max": values[-1]}
