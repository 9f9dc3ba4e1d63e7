"""AdapterHub's folders as such: what lies in them, without a model.

An adapter, a head and a fusion are each a JSON file and a file of weights; a folder holds one of
each at most. A setup is a folder of such folders and `adapter_setup.json`. Weights are safetensors
or a torch file, of which nothing but tensors is unpickled.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graftwerk.adapters import composition as blocks
from graftwerk.adapters.composition import Composition
from graftwerk.checkpoints.adapterhub_heads import numbered
from graftwerk.checkpoints.tensors import SafeTensors
from graftwerk.checkpoints.torch_files import TorchFiles
from graftwerk.checkpoints.torch_writer import TorchWriter
from graftwerk.errors import UserError

VERSION = "adapters.1.3.0"
JSON_LIMIT = 1 << 22  # bytes; the longest configurations have some 10 kB
SETUP = "adapter_setup.json"


@dataclass(frozen=True)
class Kind:
    """The file names of one kind of thing: its JSON, its torch file, its safetensors."""

    config: str
    pickled: str
    safe: str


ADAPTER = Kind("adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors")
HEAD = Kind("head_config.json", "pytorch_model_head.bin", "model_head.safetensors")
FUSION = Kind(
    "adapter_fusion_config.json",
    "pytorch_model_adapter_fusion.bin",
    "model_adapter_fusion.safetensors",
)


@dataclass(frozen=True)
class HubPart:
    """An adapter, a head or a fusion of a folder; a head of transformers' has no name.

    `config` is what the JSON has under that key, `about` all that is beside it (model_name,
    model_type, hidden_size, version, ...), `tensors` the weights under their names there; those of
    a head without `heads.<name>.`: `<i>.<parameter>`.
    """

    name: str
    config: dict[str, Any]
    about: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class HubFolder:
    """What a folder holds, or a folder of such folders; `setup` and `head_setup` of a setup."""

    path: Path
    adapters: list[HubPart] = field(default_factory=list)
    fusions: list[HubPart] = field(default_factory=list)
    heads: list[HubPart] = field(default_factory=list)
    setup: Composition | str | None = None
    head_setup: str | list[Any] | None = None


# ---- reading


def is_adapterhub(path: str | Path) -> bool:
    """Whether a folder holds something of AdapterHub's; peft's file of the same name is none."""
    path = Path(path)
    if any((path / name).is_file() for name in (SETUP, HEAD.config, FUSION.config)):
        return True
    if (path / ADAPTER.config).is_file():
        return "peft_type" not in read_json(path / ADAPTER.config)
    return path.is_dir() and any(
        (folder / ADAPTER.config).is_file() and is_adapterhub(folder) for folder in path.iterdir()
    )


def read_adapterhub(
    path: str | Path,
    kinds: Sequence[Kind] = (ADAPTER, FUSION, HEAD),
    safetensors: bool = True,
) -> HubFolder:
    """What lies in a folder, or in the folders of a setup or of several adapters.

    Args:
        kinds: what is read; the rest is left aside.
        safetensors: which weights are read where both forms are there; False: the torch file.

    Raises:
        UserError: where it is missing, damaged, or holds nothing of AdapterHub's.
    """
    path = Path(path)
    found = HubFolder(path)
    inside: dict[str, Any] = {}
    if (path / SETUP).is_file():
        settings = read_json(path / SETUP)
        inside["setup"] = setup_of(settings.get("adapter_setup"), str(path / SETUP))
        inside["head_setup"] = _head_setup(settings.get("head_setup"), str(path / SETUP))
    folders = sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
    for folder in [path, *folders]:
        for kind, parts in (
            (ADAPTER, found.adapters),
            (FUSION, found.fusions),
            (HEAD, found.heads),
        ):
            there = kind in kinds and (folder / kind.config).is_file()
            if there:
                parts.append(_read_part(folder, kind, safetensors))
    if not found.adapters + found.fusions + found.heads:
        wanted = " or ".join(kind.config for kind in kinds)
        raise UserError(f"{path} holds nothing of AdapterHub's: a folder with {wanted} is needed")
    return HubFolder(path, found.adapters, found.fusions, found.heads, **inside)


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Raises:
        UserError: where it cannot be read, is too large, or is none.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(JSON_LIMIT + 1)
        if len(content) > JSON_LIMIT:
            raise ValueError(f"it has more than {JSON_LIMIT} bytes")
        values = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold keys and values")
    return values


def _read_part(folder: Path, kind: Kind, safetensors: bool) -> HubPart:
    path = folder / kind.config
    values = read_json(path)
    if "peft_type" in values:
        raise UserError(f"{path}: this adapter is peft's, not AdapterHub's")
    name, config = values.pop("name", None), values.pop("config", None)
    if kind is HEAD and config is None:
        return _fixed_head(path, values, _read_tensors(folder, kind, safetensors))
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: name={name!r}: the name that the weights are under is needed")
    if kind is FUSION and isinstance(config, str):
        config = {} if config == "dynamic" else {"static": config}
    if not isinstance(config, dict):
        raise UserError(f"{path}: config={config!r}: must hold keys and values")
    tensors = _read_tensors(folder, kind, safetensors)
    if kind is HEAD:
        start = f"heads.{name}."
        tensors = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    return HubPart(name, config, values, tensors)


def _fixed_head(path: Path, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> HubPart:
    """A head of one of transformers' classes; it has no name."""
    config, named = numbered(about, tensors, str(path))
    return HubPart("", config, about, named)


def _read_tensors(folder: Path, kind: Kind, safetensors: bool) -> dict[str, Tensor]:
    """The tensors of a folder's file of weights, each once where several names share one."""
    safe, pickled = folder / kind.safe, folder / kind.pickled
    if not safe.is_file() and not pickled.is_file():
        raise UserError(f"{folder}: its weights are missing: {kind.safe} or {kind.pickled}")
    chosen = safe.is_file() and (safetensors or not pickled.is_file())
    source = SafeTensors([safe]) if chosen else TorchFiles([pickled])
    read: dict[tuple[Any, ...], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    with source:
        for name in sorted(source.names):
            seen = source.read(name)
            if not seen.is_floating_point():
                raise UserError(f"{folder}: {name} is {seen.dtype}: weights are needed")
            place = (seen.data_ptr(), seen.shape, seen.stride(), seen.dtype)
            if place not in read:
                read[place] = seen.clone(memory_format=torch.contiguous_format)
            tensors[name] = read[place]
    return tensors


def setup_of(value: Any, where: str) -> Composition | str | None:
    """The composition that a file's tree of `type`, `children` and `kwargs` describes.

    Raises:
        UserError: for a tree that describes none.
    """
    if value is None:
        return None
    try:
        return _tree(value)
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: adapter_setup is no composition: {error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


NUMBERS = {"splits": int, "batch_sizes": int, "weights": float}


def _tree(value: Any) -> Composition | str:
    kind, children = value["type"], value["children"]
    if kind == "single":
        (name,) = children
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is no name")
        return name
    block = getattr(blocks, kind, None) if isinstance(kind, str) else None
    if not isinstance(block, type) or not issubclass(block, Composition) or block is Composition:
        raise TypeError(f"type {kind!r} is no block")
    kwargs: dict[str, Any] = {
        key: [NUMBERS[key](number) for number in numbers]
        for key, numbers in value.get("kwargs", {}).items()
    }
    if not set(kwargs) <= {block.argument}:
        raise TypeError(f"{kind} takes no {', '.join(kwargs)}")
    if "weights" in kwargs:
        kwargs["normalize_weights"] = False  # the library writes them normalized
    return block(*(_tree(child) for child in children), **kwargs)


def setup_dict(composition: Composition | str | None) -> dict[str, Any] | None:
    """The tree of a composition, as `adapter_setup.json` holds it; of a name that of a Stack."""
    if composition is None:
        return None
    if isinstance(composition, str):
        composition = blocks.Stack(composition)
    made: dict[str, Any] = {
        "type": type(composition).__name__,
        "children": [
            {"type": "single", "children": [each]} if isinstance(each, str) else setup_dict(each)
            for each in composition.children
        ],
    }
    if isinstance(composition, blocks.Average):
        made["kwargs"] = {"weights": list(composition.shares)}
    elif composition.argument is not None:
        made["kwargs"] = {composition.argument: list(getattr(composition, composition.argument))}
    return made


def _head_setup(value: Any, where: str) -> str | list[Any] | None:
    """The active head, or heads: a name, or a list of them."""
    plain = isinstance(value, list) and all(isinstance(each, str | None) for each in value)
    if not plain and not isinstance(value, str | None):
        if isinstance(value, dict) and isinstance(value.get("children"), list):
            return _head_setup(value["children"], where)  # BatchSplit's and Parallel's
        raise UserError(f"{where}: head_setup={value!r}: a name or a list of names is needed")
    return value


# ---- writing


def write_part(
    folder: str | Path,
    kind: Kind,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    safetensors: bool = False,
) -> int:
    """Writes an adapter, a head or a fusion into a folder and returns the bytes of both files.

    Each is written beside its place and renamed, the JSON last; weights of the other form, which
    would be of an earlier adapter, are removed. Other files of the folder stay. A tensor of several
    names is once in the file: safetensors have it under the first only.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, other = (kind.safe, kind.pickled) if safetensors else (kind.pickled, kind.safe)
    parts = [folder / f".{name}.{os.getpid()}.partial" for name in (weights, kind.config)]
    try:
        if safetensors:
            once = {id(tensor): name for name, tensor in reversed([*tensors.items()])}
            plain = {name: tensors[name].detach().cpu().clone() for name in once.values()}
            save_file({k: v.contiguous() for k, v in plain.items()}, parts[0], {"format": "pt"})
        else:
            _write_torch(parts[0], tensors)
        write_json(parts[1], settings)
        size = sum(part.stat().st_size for part in parts)
        os.replace(parts[0], folder / weights)
        (folder / other).unlink(missing_ok=True)
        os.replace(parts[1], folder / kind.config)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return size


def write_setup(
    folder: str | Path, setup: Composition | str | None, head_setup: str | list[Any] | None = None
) -> None:
    """Writes `adapter_setup.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{SETUP}.{os.getpid()}.partial"
    tree = {"adapter_setup": setup_dict(setup), "head_setup": head_setup, "version": VERSION}
    try:
        write_json(partial, tree)
        os.replace(partial, folder / SETUP)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """As the library writes them: keys in order, two spaces."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True))


def _write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """What is one tensor under several names stays one."""
    once = {id(tensor): name for name, tensor in reversed([*tensors.items()])}
    with open(path, "wb") as file:
        writer = TorchWriter(file)
        writer.add_all({name: tensors[name] for name in reversed(once.values())})
        for name, tensor in tensors.items():
            writer.alias(name, once[id(tensor)])
        writer.close()
