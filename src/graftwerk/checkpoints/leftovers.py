"""Temporaries that a killed process has left: `.NAME.PID.partial` and its kin, beside NAME."""

import os
import re
import shutil
import time
from collections.abc import Container
from pathlib import Path

OURS = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(partial|tmp|old)")


def remove_leftovers(folder: Path, names: Container[str] | None = None) -> list[Path]:
    """Removes the temporaries in a folder whose processes have ended on this host.

    A folder that processes of other hosts write to needs `names`, of files that are this run's
    alone. What may not be removed stays.

    Args:
        folder: it need not exist; folders in it are not looked into.
        names: of the files that the temporaries were to become; None: any.
    """
    gone = []
    for path in sorted(folder.glob(".*.*")) if folder.is_dir() else ():
        match = OURS.fullmatch(path.name)
        if match is None or not (names is None or match["name"] in names):
            continue
        if _writing(int(match["pid"]), path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        gone.append(path)
    return gone


def _writing(pid: int, path: Path) -> bool:
    """Whether the process that made a temporary lives: the number may be another's by now."""
    if pid == os.getpid():  # nothing has been written yet; containers give the same numbers again
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        return _started(pid) <= path.lstat().st_mtime + 1
    except (OSError, ValueError, IndexError):  # no /proc here
        return True


def _started(pid: int) -> float:
    """When a process was started, in seconds since the epoch (Linux: proc(5), `starttime`)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + since_boot
