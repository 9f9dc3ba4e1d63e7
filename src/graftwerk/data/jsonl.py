"""JSON Lines: one row a line, read with line numbers in errors, written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from graftwerk.errors import UserError, storing

Row = dict[str, Any]


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, row) of a JSONL file, one line in memory at a time.

    Blank lines are passed over. Raises `UserError` for a file that cannot be read, and for a
    line that is not a JSON object; the message names file and line.
    """
    try:
        # Bytes, so that only "\n" ends a line: text mode would also stop at a lone "\r".
        file = open(path, "rb")  # noqa: SIM115 (closed below; `open` alone may raise OSError)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
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
            yield number, row


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
