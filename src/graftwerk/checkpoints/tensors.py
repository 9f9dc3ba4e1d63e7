"""Tensors from safetensors files, one at a time, and their way into a model on the meta device."""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graftwerk.errors import UserError


class TensorReader:
    """The tensors of a folder: one `model.safetensors`, or shards listed by an index file.

    Files are mapped, and a tensor is read when it is asked for.

    Raises:
        UserError: where files are missing or damaged.
    """

    def __init__(self, folder: Path):
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            shards = ["model.safetensors"]
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise UserError(f"{folder}: the weights file {shard!r} is missing")
            try:
                file: Any = safe_open(folder / shard, framework="pt")
                self._files.update(dict.fromkeys(self._stack.enter_context(file).keys(), file))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / shard} cannot be read: {error}") from None

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """All tensors that the files hold."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor in the file's type."""
        return self._files[name].get_tensor(name)


@dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from: file tensors and what makes one of them all."""

    names: tuple[str, ...]
    build: Callable[..., Tensor] = lambda tensor: tensor


def fill(
    model: nn.Module,
    sources: dict[str, Source],
    reader: TensorReader,
    path: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Puts file tensors in place of a meta-device model's parameters, one at a time.

    Raises:
        UserError: naming every missing, unknown and wrongly shaped tensor in one message.
    """
    parameters = dict(model.named_parameters())
    missing = [n for s in sources.values() for n in s.names if n not in reader.names]
    used = {n for source in sources.values() for n in source.names}
    mistakes = [f"missing {name}" for name in missing]
    mistakes += [f"unknown {name}" for name in sorted(reader.names - used) if not ignore(name)]
    _refuse(path, mistakes)
    for name, parameter in parameters.items():
        source = sources[name]
        try:
            tensor = source.build(*(reader.read(n) for n in source.names))
        except RuntimeError as error:
            mistakes.append(f"{' + '.join(source.names)}: {error}")
            continue
        if tensor.shape != parameter.shape:
            shapes = f"{list(tensor.shape)}, not {list(parameter.shape)}"
            mistakes.append(f"{' + '.join(source.names)} gives {shapes}")
            continue
        owner, _, leaf = name.rpartition(".")
        filled = nn.Parameter(tensor.to(device=device, dtype=dtype).contiguous())
        setattr(model.get_submodule(owner), leaf, filled)
    _refuse(path, mistakes)


def _refuse(path: Path, mistakes: Iterable[str]) -> None:
    mistakes = list(mistakes)
    if mistakes:
        more = f"; and {len(mistakes) - 8} more" if len(mistakes) > 8 else ""
        raise UserError(f"{path}: the weights do not fit: {'; '.join(mistakes[:8])}{more}")
