"""JSON Lines: one row a line, read with line numbers in errors, written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from graftwerk.errors import UserError, storing

Row = dict[str, Any]
BLOCK = 2**20  # bytes that are looked through at once


class Part(NamedTuple):
    """Whole lines of a file: from byte `start` up to byte `stop`, the first of them numbered."""

    start: int
    stop: int
    first_line: int


def parts_of(path: str | os.PathLike[str], count: int) -> list[Part]:
    """At most `count` parts of about as many bytes, in order; none of an empty file."""
    with _reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        parts, line = [], 1
        for number in range(1, count + 1):
            start, goal, first = file.tell(), size * number // count, line
            while (rest := goal - file.tell()) > 0:
                line += file.read(min(rest, BLOCK)).count(b"\n")
            line += file.readline().endswith(b"\n")
            if file.tell() > start:
                parts.append(Part(start, file.tell(), first))
        return parts


def read_rows(
    path: str | os.PathLike[str],
    part: Part | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, row) of a JSONL file or a part of it, a line in memory at a time.

    Blank lines are passed over. Raises `UserError` for a file that cannot be read, and for a
    line that is not a JSON object; the message names file and line. `advance` is told the bytes of
    each line.
    """
    start, stop, first = part or (0, None, 1)
    with _reading(path) as file:
        place = file.seek(start)
        for number, line in enumerate(file, first):
            if stop is not None and place >= stop:
                return
            place += len(line)
            advance(len(line))
            if not line.isspace():
                yield number, _row(path, number, line)


def _reading(path: str | os.PathLike[str]) -> IO[bytes]:
    try:
        # Bytes, so that only "\n" ends a line: text mode would also stop at a lone "\r".
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None


def _row(path: str | os.PathLike[str], number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
            f"a JSONL file holds one object a line"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, line {number}: a JSON {type(row).__name__}, not an object; "
            f'a row looks like {{"question": "...", "answer": "..."}}'
        )
    return row


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` for writing; when the block succeeds it takes `path`'s name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "wb") as file:
                yield file
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
