"""Adapter files: our folder of YAML and safetensors, NeMo's tar of YAML and a torch dict.

A path that ends in `.nemo` gets NeMo's form, any other our folder. Reading tells forms apart by
what is there, and takes those of AdapterHub, peft and T-Few too. All hold adapter weights and
settings only, never the base; on a model with a head for labels an adapter's own head too. A file
of the first two forms holds one adapter or several.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwerk.adapters.configs import MethodConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints import peft
from graftwerk.checkpoints.adapter_form import (
    AdapterFile,
    SavedAdapter,
    SavedFusion,
    apart,
    joined,
    method_of,
)
from graftwerk.checkpoints.adapter_nemo import read_nemo_adapters
from graftwerk.checkpoints.adapter_nemo_writer import write_nemo_adapters
from graftwerk.checkpoints.adapter_shapes import shapes_of
from graftwerk.checkpoints.adapterhub_adapter import read_adapter_file
from graftwerk.checkpoints.adapterhub_files import is_adapterhub
from graftwerk.checkpoints.base import replace_path
from graftwerk.checkpoints.nemo import CONFIG as NEMO_CONFIG
from graftwerk.checkpoints.reft_rows import without_bases
from graftwerk.checkpoints.settings import read_settings
from graftwerk.checkpoints.tfew import is_torch_file, read_tfew
from graftwerk.errors import UserError

CONFIG, WEIGHTS = "adapter_config.yaml", "adapter.safetensors"


# ---- writing


def save_adapters(
    model: AdapterModel,
    names: Sequence[str],
    path: str | Path,
    extra: Mapping[str, Any] | None = None,
    fusions: Sequence[str] = (),
    strict: bool = False,
) -> int:
    """Writes adapters into one file or folder and returns its bytes on disk.

    Written beside the path first, then renamed.

    Args:
        names: adapters of the model, in the order in which a reader finds them.
        extra: plain values that are kept beside the settings (the base's path, say).
        fusions: fusions of the model, by their names (`a,b`), with or without what they fuse.
        strict: a `.nemo` file holds what NeMo reads, or is not written.

    Raises:
        UserError: for no names, the same one twice, or one that no adapter or fusion has.
    """
    if not (names or fusions) or len(set(names)) < len(names) or len(set(fusions)) < len(fusions):
        given = [*names, *fusions]
        raise UserError(f"{path}: names of adapters to save: {given}; one or several, once")
    saved = [_saved(model, name) for name in names]
    fused = [
        SavedFusion(key, model.fusions[key], _on_cpu(model.fusion_state(key))) for key in fusions
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".nemo":
            write_nemo_adapters(partial, model, saved, extra or {}, fused, strict)
        else:
            config, state = joined(saved, extra or {}, fused)
            partial.mkdir()
            save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
            (partial / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
        size = _size(partial)
        replace_path(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(True)
    return size


def save_adapter(
    model: AdapterModel, name: str, path: str | Path, extra: Mapping[str, Any] | None = None
) -> int:
    """Writes one adapter; see `save_adapters`."""
    return save_adapters(model, [name], path, extra)


def _saved(model: AdapterModel, name: str) -> SavedAdapter:
    state = without_bases(_on_cpu(model.adapter_state(name)))
    return SavedAdapter(name, model.adapter_config(name), state)


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.cpu().contiguous() for key, value in state.items()}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


# ---- loading


def load_adapters(
    model: AdapterModel, path: str | Path, rename: Mapping[str, str] | str | None = None
) -> list[str]:
    """Adds the adapters of a file to a model, not active, and returns their names in order.

    Its fusions are added too; what they fuse must be in the file, or on the model already. Nothing
    of the model changes where the file does not fit.

    Args:
        rename: new names by those in the file; a single name for a file of one adapter. A fusion is
            called after what it fuses.

    Raises:
        UserError: where the file is missing, damaged, or made for another model, and for names
            that are taken or that the file does not have.
    """
    return load_from(model, path, read_adapters(path), rename)


def load_from(
    model: AdapterModel,
    path: str | Path,
    file: AdapterFile,
    rename: Mapping[str, str] | str | None = None,
) -> list[str]:
    """Adds the adapters of a file that was read; see `load_adapters`."""
    saved = file.on(model).adapters
    names = _names(path, [adapter.name for adapter in saved], rename)
    new = dict(zip((adapter.name for adapter in saved), names, strict=True))
    methods = [_fitting(model, path, adapter) for adapter in saved]
    for name in names:
        if name in model.adapters:
            raise UserError(f"{path}: the model has an adapter {name!r} already: give another name")
    before, fused_before = set(model.adapters), set(model.fusions)
    try:
        for name, method, adapter in zip(names, methods, saved, strict=True):
            _add(model, name, method, adapter)
        for fusion in file.fusions:
            key = model.add_fusion([new.get(n, n) for n in fusion.name.split(",")], fusion.config)
            model.load_fusion_state(key, fusion.state)
    except Exception as error:
        for key in set(model.fusions) - fused_before:
            model.delete_fusion(key)
        for name in set(model.adapters) - before:
            model.delete_adapter(name)
        said = str(error).partition("\n")[0]
        raise UserError(f"{path}: {said}") from None
    return names


def load_adapter(model: AdapterModel, path: str | Path, name: str | None = None) -> str:
    """Adds the one adapter of a file to a model, not active, and returns its name.

    Raises:
        UserError: as `load_adapters`, and for a file of several.
    """
    file = read_adapters(path)
    return load_from(model, path, file, name or _only(path, file).name)[0]


def _names(path: str | Path, own: list[str], rename: Mapping[str, str] | str | None) -> list[str]:
    if isinstance(rename, str):
        if len(own) != 1:
            have = f"{len(own)} adapters ({', '.join(own)})" if own else "no adapter"
            raise UserError(f"{path} holds {have}: say which of them is to be called {rename!r}")
        return [rename]
    new = dict(rename or {})
    if unknown := new.keys() - set(own):
        raise UserError(f"{path} holds no adapter {min(unknown)!r}: it has {', '.join(own)}")
    names = [new.get(name, name) for name in own]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two adapters would have one name: {', '.join(names)}")
    return names


def _fitting(model: AdapterModel, path: str | Path, adapter: SavedAdapter) -> MethodConfig:
    """The method of a saved adapter, whose weights are those that it makes for the model.

    What it makes is reckoned without memory, so that no size in a stranger's settings costs any.
    """
    method, head = method_of(adapter.config, path), adapter.config.get("head")
    if head not in (None, model.label_head):
        raise UserError(
            f"{path} holds an adapter with a head for {head}, but the model's head is "
            f"{model.label_head}: load the base with head {head}"
        )
    try:
        shapes = shapes_of(model, method)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{path}: {adapter.config['method']} cannot be made: {said}") from None
    mistakes = [f"missing {key}" for key in shapes.keys() - adapter.state.keys()]
    mistakes += [
        f"{key} is {list(adapter.state[key].shape)}, not {list(shape)}"
        for key, shape in shapes.items()
        if key in adapter.state and adapter.state[key].shape != shape
    ]
    if mistakes:
        more = f"; and {len(mistakes) - 3} more" if len(mistakes) > 3 else ""
        raise UserError(
            f"{path}: the weights do not fit adapter {adapter.name!r} on this model: "
            f"{'; '.join(sorted(mistakes)[:3])}{more}"
        )
    return method


def _add(model: AdapterModel, name: str, method: MethodConfig, adapter: SavedAdapter) -> None:
    try:
        model.add_adapter(name, method, head=adapter.config.get("head") is not None)
    except Exception:
        model.adapters.setdefault(name, method)  # parts that were made before the error go too
        raise
    model.load_adapter_state(name, adapter.state)


# ---- reading


def read_adapters(path: str | Path) -> AdapterFile:
    """The adapters of a file of any form; nothing is unpickled but tensors.

    Those of AdapterHub, peft and T-Few have their own names until `AdapterFile.on` a model.

    Raises:
        UserError: where the file is missing, damaged, or holds no adapter.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no adapter at {path}")
    try:
        match form_of(path):
            case "graftwerk":
                return apart(path, read_settings(path / CONFIG), load_file(path / WEIGHTS))
            case "peft":
                return peft.read_peft(path)
            case "adapterhub":
                return read_adapter_file(path)
            case "tfew":
                return read_tfew(path)
            case _:
                return read_nemo_adapters(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no adapter that can be read: {error}") from None


def form_of(path: Path) -> str:
    """Which form an adapter's file or folder has, by what is in it.

    Raises:
        UserError: where a folder holds no adapter.
    """
    if path.is_file():
        return "tfew" if is_torch_file(path) else "nemo"
    if (path / NEMO_CONFIG).is_file():
        return "nemo"
    if (path / CONFIG).is_file():
        return "graftwerk"
    if peft.is_peft(path):
        return "peft"
    if is_adapterhub(path):
        return "adapterhub"
    raise UserError(f"{path} holds no adapter: {CONFIG}, {NEMO_CONFIG} or {peft.CONFIG} is missing")


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings, with what lies beside them, and weights of a file of one adapter.

    Raises:
        UserError: as `read_adapters`, and for a file of several.
    """
    file = read_adapters(path)
    adapter = _only(path, file)
    return {**file.extra, "name": adapter.name, **adapter.config}, adapter.state


def _only(path: str | Path, file: AdapterFile) -> SavedAdapter:
    if not file.adapters:
        fused = " and ".join(fusion.name for fusion in file.fusions)
        raise UserError(f"{path} holds no adapter, only a fusion of {fused}")
    if len(file.adapters) > 1:
        names = ", ".join(adapter.name for adapter in file.adapters)
        raise UserError(f"{path} holds several adapters ({names}), and one is needed here")
    return file.adapters[0]
