"""Downloads that go on where they broke off and are verified before they take their name."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graftwerk.errors import UserError

CHUNK = 1 << 20
PATIENCE = 4  # tries in a row that bring no byte


@dataclass(frozen=True)
class RemoteFile:
    """A file of known size (bytes) and sha256 (hexadecimal)."""

    url: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


class DownloadError(Exception):
    """What kept a file from arriving."""


def fetch(
    remote: RemoteFile,
    folder: Path,
    advice: str,
    say: Callable[[str], None] = print,
    pause: float = 1.0,
) -> Path:
    """The path of the file in `folder`, downloaded unless it is there already and right.

    A partial file, `<name>.part` or under its final name, is completed by a range request. Proxies
    are those of the environment (`https_proxy`, `no_proxy`).

    Args:
        advice: the end of the error message: what to do without a network.
        say: takes lines that tell what goes on.
        pause: seconds before the second try; doubled with each further one in a row.

    Raises `UserError` where the file does not arrive or is not the one expected.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if path.exists():
        if _digest(path) == remote.sha256:
            return path
        say(f"{path} is not the published file ({path.stat().st_size} of {remote.bytes} bytes)")
        os.replace(path, part)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _complete(remote, part, say, pause)
    except DownloadError as error:
        raise UserError(f"{remote.url}: {error}; {advice}") from None
    os.replace(part, path)
    return path


def _complete(remote: RemoteFile, part: Path, say: Callable[[str], None], pause: float) -> None:
    """Bring `part` to its full, verified content."""
    restarted = False
    failures = 0
    while True:
        before = _size(part)
        if before > remote.bytes:
            part.unlink()
            before = 0
        if before == remote.bytes:
            if _digest(part) == remote.sha256:
                return
            part.unlink()
            if restarted:
                raise DownloadError(
                    f"the content is not the expected one (sha256 is not {remote.sha256})"
                )
            restarted, before = True, 0
            say(f"{remote.name}: wrong checksum, starting anew")
        try:
            say(f"downloading {remote.url}: {before} of {remote.bytes} bytes are there")
            _receive(remote, part, before)
            problem = f"the connection ended after {_size(part)} of {remote.bytes} bytes"
        except (OSError, http.client.HTTPException) as error:
            problem = _describe(error)
        failures = 0 if _size(part) > before else failures + 1
        if failures >= PATIENCE:
            raise DownloadError(f"download failed: {problem}")
        if _size(part) < remote.bytes:
            say(f"{remote.name}: {problem}; trying again")
            time.sleep(pause * 2**failures if failures else 0)


def _receive(remote: RemoteFile, part: Path, start: int) -> None:
    """Append what comes from byte `start` on; a server that ignores `start` sends it all anew."""
    request = urllib.request.Request(remote.url, headers={"User-Agent": "graftwerk"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    # An opener of its own: the common one keeps the proxies that it first found.
    with urllib.request.build_opener().open(request, timeout=60) as response:
        continues = response.status == 206
        with open(part, "ab" if continues else "wb") as file:
            # `read1` gives what has arrived, so that a break loses no byte.
            while chunk := response.read1(CHUNK):
                file.write(chunk)


def _describe(error: Exception) -> str:
    """One line for what went wrong; raises where another try cannot help."""
    if isinstance(error, urllib.error.HTTPError):
        text = f"HTTP {error.code} {error.reason}"
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise DownloadError(text)
        return text
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
