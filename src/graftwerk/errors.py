"""Exceptions that end a process with a message of their own instead of a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Bad configuration, data or file: one line that names it, what is allowed and what to do.

    `python3 -m graftwerk` prints the message without a traceback and exits with code 2.
    """


class StorageError(Exception):
    """A file that cannot be written: one line that names it and the reason. Exit code 1."""


class Ended(SystemExit):
    """One of several processes ends with a code; what there was to say has been said."""


# What a disk, a quota or a server of files may do to a program that is right.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)


@contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Within it an OSError is a `StorageError` about `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None


def is_storage(error: BaseException) -> bool:
    """Whether a disk is at fault: full, read-only, gone."""
    return isinstance(error, OSError) and error.errno in STORAGE


def one_line(error: BaseException) -> str:
    """What is said of an error that is no fault of the program's."""
    return f"error: {' '.join(str(error).split())}"
