"""Checkpoints of the Hugging Face Hub, by name, from its cache on this machine or by download.

`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_ENDPOINT` are read by `huggingface_hub` itself. Its
cache locks each file while it is written, so that the processes of a node download it once.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from graftwerk.errors import UserError

# One organisation or person, one repository; what has another form can only be a path.
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Configuration, tokenizer and weights of the top folder: no code, no other framework's weights.
WANTED = ("*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors")
PICKLED = "pytorch_model*.bin"  # where there are no safetensors; read as tensors alone


def is_hub_name(name: str) -> bool:
    """Whether a text that is no path here looks like `org/name`."""
    looks = NAME.fullmatch(name) is not None and len(name) <= 96 and ".." not in name
    return looks and not name.endswith(".nemo")


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The path itself, or the folder of a Hub repository's files, downloaded unless cached.

    Args:
        revision: a branch, tag or commit of the repository; None: its main branch. Paths have none.

    Raises:
        UserError: where a repository is not there, not allowed, or out of reach and not cached.
    """
    path = Path(name_or_path).expanduser()
    name = str(name_or_path)
    if path.exists() or not is_hub_name(name):
        if revision is not None:
            raise UserError(f"revision={revision} goes with a name of the Hub, not the path {path}")
        return path
    return folder_of(name, revision)


@cache  # a job reads tokenizer and weights of one commit, even if the branch moves meanwhile
def folder_of(name: str, revision: str | None) -> Path:
    """The folder of a base model's files, by its name on the Hub; errors as in `resolve`."""
    folder = snapshot(name, revision, list(WANTED))
    if not any(folder.glob("model*.safetensors")):
        folder = snapshot(name, revision, [*WANTED, PICKLED])
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: the Hub's repository (in {folder}) has no config.json: no checkpoint of "
            "transformers"
        )
    return folder


def snapshot(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder of a repository's files that match one of the patterns; errors as in `resolve`."""
    from huggingface_hub import errors, snapshot_download

    at = f"{name} (revision {revision})" if revision else name
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["*/*"],
                tqdm_class=_bar(),
            )
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{at} is gated on the Hub: accept its terms there and set HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name} has no revision {revision} on the Hub: give a branch, a tag or a commit of it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such path, and no such repository on the Hub (a private one needs "
            "HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{at}: {_out_of_reach(error)}") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{at} cannot be read from the Hub: {reason}") from None


def _out_of_reach(error: Exception) -> str:
    """Why a repository that is not (wholly) in the cache did not come."""
    from huggingface_hub import constants

    partly = "only in part" if type(error).__name__ == "IncompleteSnapshotError" else "not"
    cached = f"{partly} in the cache of the Hub ({constants.HF_HUB_CACHE}, below HF_HOME)"
    variables = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    if constants.HF_HUB_OFFLINE:
        by = next((name for name in variables if os.environ.get(name)), variables[0])
        return f"no such path, {cached}, and {by} forbids to download it: set {by}=0"
    return f"no such path, {cached}, and the Hub ({constants.ENDPOINT}) is out of reach"


def _bar() -> Any:
    """The library's progress bar on the terminal of a node's first process; silence elsewhere."""
    from huggingface_hub.utils import tqdm

    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    if sys.stderr.isatty() and rank == "0":
        return tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **{**keywords, "disable": True})

    return Silent
