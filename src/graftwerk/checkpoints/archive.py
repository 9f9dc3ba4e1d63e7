"""Files of a checkpoint inside a tar or a folder, for readers that trust neither.

A plain tar is never unpacked: a member is a range of bytes of the tar, read through a window or
mapped. A gzip-compressed one is first turned into a plain tar in a temporary folder. Nothing is
ever written under a name that comes from the archive.
"""

import gzip
import io
import mmap
import os
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from graftwerk.errors import UserError

HEADER_LIMIT = 1 << 20  # bytes of one tar header; long names and pax records are far smaller
MEMBER_LIMIT = 200_000  # a zarr checkpoint has a file for each chunk
GZIP_RATIO = 50  # weights hardly shrink; settings and zeros do
GZIP_FLOOR = 1 << 28  # bytes that any gzip file may unpack to, whatever its ratio
DISK_RESERVE = 1 << 28  # bytes of a disk that are left alone
BLOCK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One file: `size` bytes of `path` from `offset` on."""

    path: Path
    offset: int
    size: int


class Window(io.RawIOBase):
    """A member as a file that can be read and searched, without unpacking it."""

    def __init__(self, member: Member):
        self._member = member
        self._file = open(member.path, "rb")  # noqa: SIM115 - closed with the window
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._member.size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        left = max(0, self._member.size - self._position)
        self._file.seek(self._member.offset + self._position)
        count = self._file.readinto(view[:left])
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class BoundedReads:
    """A file whose single reads are small, so that no size claimed by the file costs memory."""

    def __init__(self, file, limit: int):
        self._file, self._limit = file, limit

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(size, self._limit + 1) if size >= 0 else self._limit + 1)
        if len(content) > self._limit:
            raise ValueError(f"a header of more than {self._limit} bytes")
        return content

    def __getattr__(self, name: str):
        return getattr(self._file, name)


class Files:
    """The files of an opened checkpoint by name; names use `/` and have no leading `./`.

    A context manager. Closing forgets the maps and removes what was unpacked; tensors that are
    still held keep their own.
    """

    def __init__(
        self, path: Path, members: dict[str, Member], temporary: tempfile.TemporaryDirectory | None
    ):
        self.path, self.members, self._temporary = path, members, temporary
        self._maps: dict[Path, tuple[mmap.mmap, Tensor]] = {}

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets the maps and removes the temporary folder."""
        self._maps.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    def open(self, name: str) -> Window:
        """A file that reads the member `name`."""
        return Window(self._member(name))

    def read(self, name: str, limit: int) -> bytes:
        """The content of a small member.

        Raises:
            UserError: where there is none, or it has more than `limit` bytes.
        """
        member = self._member(name)
        if member.size > limit:
            raise UserError(
                f"{self.path}: {name} has {member.size} bytes; at most {limit} are expected"
            )
        with Window(member) as window:
            return window.readall()

    def map(self, name: str) -> Tensor:
        """The bytes of a member as a view of the mapped file: uint8 [size], not to be written to.

        The sizes were checked against the file's when it was opened.
        """
        member = self._member(name)
        if not member.size:
            return torch.empty(0, dtype=torch.uint8)
        if member.path not in self._maps:
            with open(member.path, "rb") as file:  # a private map: nothing is ever written back
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[member.path] = mapped, torch.frombuffer(mapped, dtype=torch.uint8)
        _, whole = self._maps[member.path]
        if member.offset + member.size > len(whole):
            raise UserError(f"{member.path} became shorter while it was read")
        return whole[member.offset : member.offset + member.size]

    def release(self, view: Tensor) -> None:
        """Lets go of the pages of a view of a map; a later touch reads them again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, size = view.data_ptr(), view.numel() * view.element_size()
        for mapped, whole in self._maps.values():
            first = start - whole.data_ptr()
            if 0 <= first <= first + size <= len(whole):
                inside = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
                if end > inside:
                    mapped.madvise(mmap.MADV_DONTNEED, inside, end - inside)

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise UserError(f"{self.path}: {name} is missing")
        return self.members[name]


def open_files(paths: Iterable[Path]) -> Files:
    """Files by their own names, all of one folder.

    Raises:
        UserError: where one is missing.
    """
    paths = list(paths)
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path.parent}: the file {path.name!r} is missing")
    members = {path.name: Member(path, 0, path.stat().st_size) for path in paths}
    return Files(paths[0] if len(paths) == 1 else paths[0].parent, members, None)


def open_folder(folder: Path) -> Files:
    """All files of a folder and the folders in it."""
    members = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_file():
                inside = path.relative_to(folder).as_posix()
                members[inside] = Member(path, 0, path.stat().st_size)
    return Files(folder, members, None)


def open_tar(path: Path) -> Files:
    """The regular files of a tar, plain or gzip.

    Raises:
        UserError: where it is damaged, holds a member that leads out of it, a link or a device, or
            would unpack to more than the disk or reason allows.
    """
    temporary = None
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        plain = path
        if compressed:
            temporary = tempfile.TemporaryDirectory(prefix="graftwerk-")
            plain = Path(temporary.name, "archive.tar")
            _gunzip(path, plain)
        return Files(path, _tar_members(path, plain), temporary)
    except BaseException as error:
        if temporary is not None:
            temporary.cleanup()
        if isinstance(error, (OSError, EOFError, zlib.error)):
            raise UserError(f"{path} cannot be read: {error}") from None
        raise


def free_space(folder: Path) -> int:
    """Bytes that may be written to the disk of a folder."""
    return max(0, shutil.disk_usage(folder).free - DISK_RESERVE)


def _gunzip(path: Path, plain: Path) -> None:
    """Writes the plain tar; bytes are counted as they come, since gzip's own count can lie."""
    compressed = path.stat().st_size
    reason = max(GZIP_FLOOR, GZIP_RATIO * compressed)
    space = free_space(plain.parent)
    if compressed > space:
        raise UserError(_no_space(path, plain.parent, space))
    written = 0
    with gzip.open(path) as source, open(plain, "wb") as target:
        while block := source.read(BLOCK):
            written += len(block)
            if written > reason:
                raise UserError(
                    f"{path}: {compressed} compressed bytes unpack to more than {reason}: "
                    f"no weights shrink like that, it was not unpacked"
                )
            if written > space:
                raise UserError(_no_space(path, plain.parent, space))
            target.write(block)


def _no_space(path: Path, folder: Path, space: int) -> str:
    return (
        f"{path}: not enough disk space to unpack it: {space} bytes are free in {folder}; "
        f"free some, set TMPDIR to a larger disk, or unpack it with gunzip first"
    )


def _tar_members(path: Path, plain: Path) -> dict[str, Member]:
    size = plain.stat().st_size
    members: dict[str, Member] = {}
    with open(plain, "rb") as file:
        try:
            for info in _headers(file):
                _check_member(path, info, size, members)
                if info.isreg():
                    name = posixpath.normpath(info.name)
                    members[name] = Member(plain, info.offset_data, info.size)
        except UserError:
            raise
        except Exception as error:  # tarfile raises many kinds for a damaged header
            raise UserError(f"{path} is no tar that can be read: {error}") from None
    if not members:
        raise UserError(f"{path} is no tar that can be read: it holds no files")
    return members


def _headers(file: BinaryIO) -> Iterable[tarfile.TarInfo]:
    reader = BoundedReads(file, HEADER_LIMIT)
    with tarfile.open(fileobj=reader, mode="r:") as tar:  # type: ignore[arg-type]
        count = 0
        while (info := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            count += 1
            if count > MEMBER_LIMIT:
                raise ValueError(f"it has more than {MEMBER_LIMIT} members")
            yield info


def _check_member(path: Path, info: tarfile.TarInfo, size: int, known: dict[str, Member]) -> None:
    why = None
    if info.name.startswith("/"):
        why = "has an absolute path"
    elif ".." in info.name.split("/"):
        why = "leads out of the archive"
    elif info.issym() or info.islnk():
        why = "is a link"
    elif info.issparse() or not (info.isreg() or info.isdir()):
        why = "is no regular file"
    elif info.size < 0 or info.offset_data + info.size > size:
        why = "reaches past the end of the file"
    elif info.isreg() and posixpath.normpath(info.name) in known:
        why = "is there twice"
    if why is not None:
        raise UserError(
            f"{path}: the member {info.name!r} {why}: nothing of it was read or unpacked"
        )
