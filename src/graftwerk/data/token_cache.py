"""Encoded files kept on disk, by what they are made of: encoded once, mapped by all who read them.

An entry is a folder that is named by a checksum of a file's bytes and of all that decides how its
rows are encoded. It holds Arrow files and `entry.json`, which has their checksums; it is built
beside its place and renamed, so it is whole or not there. Nothing in it is ever executed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftwerk.data.columns import FIELDS, Chunk, Column
from graftwerk.data.encoding import RowReport
from graftwerk.data.fingerprint import fingerprint
from graftwerk.data.jsonl import write_json
from graftwerk.data.prepared import file_identity
from graftwerk.data.tokenized import Advance, Encoding, Path_, check_not_empty, write_encoded
from graftwerk.errors import StorageError, UserError

FORMAT = 1  # raised when the same rows and settings are encoded otherwise
ENTRY = "entry.json"
PATIENCE = 5.0  # seconds that processes give the first of their host to begin
NAPS = 0.05

Identity = tuple[int, int]  # of a file or folder as it is: inode, time of the last change
Bar = Callable[[str, int], contextlib.AbstractContextManager[Advance]]


class Damaged(Exception):
    """An entry that is not what was written."""


@dataclass(frozen=True)
class EncodedFile:
    """A file's examples, in its order, and what became of its rows."""

    chunks: list[Chunk]
    report: RowReport


def encoded_in_memory(encoding: Encoding, path: Path_) -> EncodedFile:
    """Encodes a file into this process's memory."""
    report = RowReport()
    chunks: list[Chunk] = [
        {name: Column.of(sequences) for name, sequences in block.items()}
        for block in encoding.blocks(path, report)
    ]
    check_not_empty(path, report)
    return EncodedFile(chunks, report)


@dataclass
class TokenCache:
    """A folder of encoded files, which several processes, jobs and hosts may use at once.

    Where it cannot be used (no right to write, a full disk) rows stay in memory, and one line says
    so.

    Args:
        folder: made where it is not there; None: rows stay in memory.
        leads: whether this process goes first on its host. The others let it encode, and encode
            by themselves only if it has not begun after some seconds.
        say: takes a line for the log.
        bar: shows how far encoding is, by a name and the bytes in all.
    """

    folder: Path | None
    leads: bool = True
    say: Callable[[str], None] = lambda line: None
    bar: Bar = lambda name, total: contextlib.nullcontext(lambda size: None)

    def read(self, encoding: Encoding, path: Path_) -> EncodedFile:
        """A file's examples, encoded now or before.

        Raises:
            UserError: for a file that cannot be read, and for a row that cannot be used.
        """
        if self.folder is not None:
            identity, key = _identity(path), cache_key(encoding, path)
            try:
                return self._mapped(self.folder, key, encoding, path, identity)
            except (OSError, StorageError) as error:
                self.say(f"{self.folder} cannot keep encoded rows, they stay in memory: {error}")
                self.folder = None
        return encoded_in_memory(encoding, path)

    def _mapped(
        self, folder: Path, key: str, encoding: Encoding, path: Path_, source: Identity | None
    ) -> EncodedFile:
        entry = folder / key
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if not _there(entry):
                with self._turn(entry, path) as alone:
                    if not _there(entry):
                        self._make(entry, encoding, path, source, alone)
            identity = _identity(entry)
            try:
                return open_entry(entry, encoding)
            except Damaged as error:
                self.say(f"{entry} is damaged and made anew: {error}")
                if _identity(entry) == identity:  # no other process was quicker
                    _remove(entry)
        raise OSError(f"{entry} is damaged each time that it is made")

    @contextlib.contextmanager
    def _turn(self, entry: Path, path: Path_) -> Iterator[bool]:
        """One process at a time, and whether that is sure: a file system may have no locks.

        Then several do the same work, and the last to finish finds it done.
        """
        first = time.monotonic() + (0 if self.leads else PATIENCE)
        while time.monotonic() < first and not _there(entry):
            time.sleep(NAPS)
        with open(entry.with_name(f"{entry.name}.lock"), "ab") as lock:
            waits = False
            # Polled: a wait within the kernel would keep this process from being told to end.
            while (alone := _locked(lock.fileno())) is False:
                if not waits:
                    self.say(f"{path}: waiting for another process, which encodes it")
                waits = True
                time.sleep(NAPS)
            yield alone is not None

    def _make(
        self, entry: Path, encoding: Encoding, path: Path_, source: Identity | None, alone: bool
    ) -> None:
        for left in entry.parent.glob(f".{entry.name}.*") if alone else ():
            _remove(left)  # of a process that was killed
        beside = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:12]}")
        beside.mkdir()
        start = time.monotonic()
        try:
            with self.bar(f"encoding {Path(path).name}", os.path.getsize(path)) as advance:
                files, report = write_encoded(encoding, path, beside, advance)
            parts = {file.name: file_identity(file) for file in files}
            write_json(beside / ENTRY, _description(path, encoding, parts, report))
            if _identity(path) != source:  # so that the name may be of other rows
                raise OSError(f"{path} changed while it was read")
            _rename(beside, entry)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        seconds = time.monotonic() - start
        self.say(f"{path}: {report.rows} rows encoded in {seconds:.1f} s, kept in {entry.parent}")


def token_cache(
    folder: str | bool | None, leads: bool, say: Callable[[str], None] | None
) -> TokenCache:
    """The cache that `model.data.cache_dir` asks for; null and false are none."""
    if not folder:
        return TokenCache(None)
    if not isinstance(folder, str):
        raise UserError(
            f"model.data.cache_dir={folder!r}; allowed: a folder, or null: rows stay in memory"
        )
    return TokenCache(Path(folder), leads, *([] if say is None else [say, progress_bar]))


@contextlib.contextmanager
def progress_bar(name: str, total: int) -> Iterator[Advance]:
    """A bar of bytes on a terminal, nothing elsewhere."""
    if not sys.stdout.isatty():
        yield lambda size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=total)
        yield lambda size: bar.advance(task, size)


def cache_key(encoding: Encoding, path: Path_) -> str:
    """What the entry of a file is called.

    Raises:
        UserError: for a file that cannot be read.
    """
    import tokenizers
    import transformers

    try:
        rows = file_identity(Path(path))["sha256"]
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    versions = [FORMAT, transformers.__version__, tokenizers.__version__]
    told = json.dumps([versions, fingerprint(encoding), rows])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def open_entry(entry: Path, encoding: Encoding) -> EncodedFile:
    """Maps an entry's files.

    Raises:
        Damaged: where they are not what was written, or no such files.
    """
    try:
        told = json.loads((entry / ENTRY).read_bytes())
        chunks: list[Chunk] = []
        for name, identity in told["parts"].items():
            if Path(name).name != name or file_identity(entry / name) != identity:
                raise Damaged(f"{name} has another checksum")
            chunks += _chunks(entry / name, encoding.fields)
        report = RowReport(**told["report"])
        report.dropped = Counter(report.dropped)
        if sum(len(chunk["tokens"].starts) - 1 for chunk in chunks) != report.examples:
            raise Damaged(f"it has not the {report.examples} examples that it names")
    except FileNotFoundError as error:
        raise Damaged(str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise Damaged(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    return EncodedFile(chunks, report)


def _chunks(file: Path, fields: Sequence[str]) -> list[Chunk]:
    """The numbers of an Arrow file where they are mapped: one chunk for each of its batches."""
    from datasets import Dataset

    table = Dataset.from_file(str(file)).data
    table.validate(full=True)  # that starts and lengths lie within the file
    if table.column_names != list(fields):
        raise Damaged(f"{file.name} has the fields {table.column_names}, not {list(fields)}")
    return [
        {name: _column(batch.column(name), name) for name in fields} for batch in table.to_batches()
    ]


def _column(array: Any, name: str) -> Column:
    flat = array.values.to_numpy(zero_copy_only=True)
    if flat.dtype != FIELDS[name] or array.null_count:
        raise Damaged(f"{name} holds {flat.dtype}")
    return Column(array.offsets.to_numpy(zero_copy_only=True), flat)


def _description(
    path: Path_, encoding: Encoding, parts: Mapping[str, Any], report: RowReport
) -> dict[str, Any]:
    return {
        "file": str(path),
        "tasks": list(encoding.encoders),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "parts": parts,
        "report": report.as_dict(),
    }


def _there(entry: Path) -> bool:
    return (entry / ENTRY).exists()


def _identity(path: Path_) -> Identity | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _locked(file: int) -> bool | None:
    """Whether this process has the lock now; None: there are none on this file system."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _rename(beside: Path, entry: Path) -> None:
    """Gives a finished entry its name, unless another process was quicker: that one is as good."""
    try:
        os.rename(beside, entry)
    except OSError:
        if not _there(entry):
            _remove(entry)  # what is left of one
            os.rename(beside, entry)


def _remove(path: Path) -> None:
    """Takes a folder out of the way at once, and away."""
    gone = path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex[:12]}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
