"""Golden cases: inputs and outputs of the libraries on tiny models, as they wrote them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import SHARED


@dataclass(frozen=True)
class Case:
    """One case of a library's `index.json`; paths are relative to `folder`."""

    folder: Path
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str) -> Any:
        """A value, None where the case has none."""
        return self.values.get(key)

    @property
    def files(self) -> dict[str, Any]:
        """The case's files by kind."""
        return self.values["files"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Inputs and outputs."""
        return load_file(self.folder / self.files["tensors"])

    def outputs(self, prefix: str) -> dict[str, Tensor]:
        """The kept tensors whose names begin with a prefix."""
        return {key: value for key, value in self.tensors.items() if key.startswith(prefix)}


def cases(library: str) -> list[Case]:
    """All cases of a library, in the order of its index; none where the data is absent."""
    folder = SHARED / "golden" / library
    if not (folder / "index.json").is_file():
        return []
    listed = json.loads((folder / "index.json").read_text())["cases"]
    return [Case(folder, each | _beside(folder / each["path"] / "case.json")) for each in listed]


def _beside(path: Path) -> dict[str, Any]:
    """What a case's own file has beyond the index."""
    return json.loads(path.read_text()) if path.is_file() else {}
