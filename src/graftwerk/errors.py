"""How a process ends: its exit codes, and exceptions with a message in place of a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """The exit codes of a stage; the scripts of jobs go by them."""

    DONE = 0
    FAILED = 1
    WRONG_INPUT = 2
    REQUEUE = 75  # stopped in time, to go on later (EX_TEMPFAIL of sysexits.h)
    LOST_PEER = 76  # another process of the run was killed, or is gone with its host


class UserError(Exception):
    """Bad configuration, data or file: one line that names it, what is allowed and what to do.

    `python3 -m graftwerk` prints the message without a traceback and exits with code 2.
    """


class StorageError(Exception):
    """A file that cannot be written: one line that names it and the reason. Exit code 1."""


class Ended(SystemExit):
    """One of several processes ends with a code; what there was to say has been said."""


# What a disk, a quota or a server of files may do to a program that is right.
STORAGE = tuple(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "EFBIG", "EACCES", "EPERM")
    if hasattr(errno, name)
)


@contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Within it an OSError, also one that a library turned into its own, is a `StorageError`.

    Not so one that names a file of another folder: it was read.
    """
    try:
        yield
    except (UserError, StorageError):
        raise
    except Exception as error:
        cause = _cause(error, Path(path).parent)
        if cause is None:
            raise
        raise StorageError(f"{path} cannot be written: {cause}") from None


def _cause(error: BaseException | None, folder: Path) -> str | None:
    while error is not None:
        if isinstance(error, OSError):
            named = error.filename
            other = isinstance(named, str) and folder not in (Path(named), Path(named).parent)
            return None if other else error.strerror or str(error)
        if "(os error " in str(error):  # safetensors, tokenizers: Rust's words
            return str(error)
        error = error.__context__
    return None


def is_storage(error: BaseException) -> bool:
    """Whether a disk is at fault: full, read-only, gone."""
    return isinstance(error, StorageError) or (
        isinstance(error, OSError) and error.errno in STORAGE
    )


def one_line(error: BaseException) -> str:
    """What is said of an error that is no fault of the program's."""
    return f"error: {' '.join(str(error).split())}"
