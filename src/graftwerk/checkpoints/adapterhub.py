"""AdapterHub's folders on a model: adapters, fusions and setups, read and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.composition import Composition, fusions, names
from graftwerk.adapters.configs import MethodConfig, UnionConfig
from graftwerk.adapters.fusion import FusionConfig
from graftwerk.adapters.kinds import field_kinds, fits, words_for
from graftwerk.adapters.methods.reft import ReftConfig, orthonormal, with_base
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import Site
from graftwerk.checkpoints.adapter import load_from
from graftwerk.checkpoints.adapterhub_adapter import (
    adapter_file,
    check_model,
    cut,
    family_of,
    sites_of,
    table_of,
    without_root,
)
from graftwerk.checkpoints.adapterhub_config import hub_config
from graftwerk.checkpoints.adapterhub_files import (
    ADAPTER,
    FUSION,
    HEAD,
    VERSION,
    HubFolder,
    HubPart,
    read_adapterhub,
    write_part,
    write_setup,
)
from graftwerk.checkpoints.adapterhub_names import form_of, fusion_table, model_type_of, split_key
from graftwerk.checkpoints.huggingface import FAMILIES as HUGGING_FACE
from graftwerk.errors import UserError


@dataclass(frozen=True)
class About:
    """What a file says of the model that it belongs to.

    Args:
        model_name: where the base is from (`bert-base-uncased`).
        model_class: the class in transformers or AdapterHub; None: transformers' class of the model
            with the head that it has. It decides what stands before the names of weights.
    """

    model_name: str | None = None
    model_class: str | None = None

    def class_of(self, model: AdapterModel) -> str:
        """The model's class."""
        config = form_of(model)
        family = HUGGING_FACE[model_type_of(config)]
        return self.model_class or family.classes[config.head]

    def settings(self, model: AdapterModel, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """The whole of a JSON file."""
        form = form_of(model)
        return {
            "config": dict(config),
            "hidden_size": form.hidden_size,
            "model_class": self.class_of(model),
            "model_name": self.model_name,
            "model_type": model_type_of(form),
            "name": name,
            "version": VERSION,
        }

    def rooted(self, model: AdapterModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names that they have in files of this class of models."""
        root = family_of(model).root_of(self.class_of(model))
        return {f"{root}{name}": tensor for name, tensor in tensors.items()}


# ---- adapters


def load_adapterhub(
    model: AdapterModel,
    path: str | Path,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    leave_out: Sequence[int] = (),
    safetensors: bool = True,
) -> str:
    """Adds the adapter of a folder to a model, not active, and returns its name.

    Nothing of the model changes where it does not fit.

    Args:
        name: what it is called here; None: as in the file.
        config: keys of its configuration that get other values.
        leave_out: layers, numbered from 0, that get no part of it.
        safetensors: which weights are read where both forms are there; False: the torch file.

    Raises:
        UserError: where the folder holds no adapter or several, is damaged, or made for another
            model, and for a name that is taken.
    """
    part = only(read_adapterhub(path, [ADAPTER], safetensors).adapters, path)
    file = adapter_file(part, path, config, leave_out)
    return load_from(model, path, file, name)[0]


def only(parts: Sequence[HubPart], path: str | Path, what: str = "adapter") -> HubPart:
    """The one thing of a kind that a folder holds.

    Raises:
        UserError: where there is none, or several.
    """
    if len(parts) != 1:
        held = ", ".join(part.name for part in parts) or "none"
        raise UserError(f"{path}: one {what} is needed here, and it holds {held}")
    return parts[0]


def save_adapterhub(
    model: AdapterModel,
    name: str,
    path: str | Path,
    about: About | None = None,
    safetensors: bool = False,
) -> int:
    """Writes an adapter into a folder as the library does, and returns the bytes of its files.

    Raises:
        UserError: for an adapter that AdapterHub's files cannot hold, before anything is written.
    """
    about = about or About()
    state, method = model.adapter_state(name), model.adapters[name]
    config = hub_config(method, model)
    state = _with_bases(state, method, sites_of(model))
    tensors = table_of(model, method, name, state).join(state)
    settings = about.settings(model, name, config)
    return write_part(path, ADAPTER, settings, about.rooted(model, tensors), safetensors)


def _with_bases(
    state: Mapping[str, Tensor], method: MethodConfig, sites: Mapping[str, Site]
) -> dict[str, Tensor]:
    """LoReFT's rotations in the library's form: reflections of a base that the file holds."""
    own = method.configs if isinstance(method, UnionConfig) else (method,)
    if not any(
        isinstance(m, ReftConfig) and m.orthogonality and not m.orthogonal_base for m in own
    ):
        return dict(state)
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        path, leaf = split_key(key, sites)
        if sites[path].name == "layer_output" and leaf.endswith("projection.weight"):
            stem = f"{path}.{leaf.removesuffix('weight')}parametrizations.weight"
            original, base = with_base(orthonormal(tensor))
            made |= {f"{stem}.original": original, f"{stem}.0.base": base}
        else:
            made[key] = tensor
    return made


# ---- fusions


def load_adapterhub_fusion(model: AdapterModel, path: str | Path, name: str | None = None) -> str:
    """Adds the fusion of a folder to a model and returns its name, the adapters' by commas.

    Args:
        name: other adapters' names, as many as in the file: "x,y".

    Raises:
        UserError: as `load_adapterhub`; also where an adapter that it fuses is not there.
    """
    return add_fusion(
        model, only(read_adapterhub(path, [FUSION]).fusions, path, "fusion"), path, name
    )


def add_fusion(
    model: AdapterModel, part: HubPart, path: str | Path, name: str | None = None
) -> str:
    """Adds a fusion that was read; see `load_adapterhub_fusion`."""
    check_model(model, part, path)
    config = fusion_of(part.config, f"{path}: {FUSION.config}")
    key = name or part.name
    unused = f"adapter_fusion_layer.{part.name}.dense."  # what no pass reads, without matrices
    read = without_root(family_of(model), part.tensors)
    tensors = {k: v for k, v in read.items() if unused not in k}
    model.add_fusion(key, config)
    try:
        shapes = {k: v.shape for k, v in model.fusion_state(key).items()}
        table = fusion_table(family_of(model), sites_of(model), shapes, part.name)
        state = cut(table, tensors, shapes, f"{path}: the weights of fusion {part.name!r}")
        # files do not hold the temperature: it is what it is behind the training
        cooled = {k: torch.ones(()) for k in shapes if k.endswith(".temperature")}
        model.load_fusion_state(key, {**state, **cooled})
    except BaseException:
        model.delete_fusion(key)
        raise
    return key


def fusion_of(config: Mapping[str, Any], where: str) -> FusionConfig:
    """The fusion that a dictionary of AdapterHub's describes; `where` names it in errors.

    Raises:
        UserError: for a key that is not known and a value of another kind.
    """
    kinds = field_kinds(FusionConfig)
    for key, value in config.items():
        if key not in kinds:
            raise UserError(f"{where}: the key {key!r} is not known: it has {', '.join(kinds)}")
        if not fits(value, kinds[key]):
            raise UserError(f"{where}: {key}={value!r} must be {words_for(kinds[key])}")
    try:
        return FusionConfig(**config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def save_adapterhub_fusion(
    model: AdapterModel,
    name: str,
    path: str | Path,
    about: About | None = None,
    safetensors: bool = False,
) -> int:
    """Writes a fusion into a folder and returns the bytes of its files.

    Raises:
        UserError: for a fusion that the model does not have.
    """
    about, state = about or About(), model.fusion_state(name)
    config = {each.name: getattr(model.fusions[name], each.name) for each in fields(FusionConfig)}
    tensors = fusion_table(family_of(model), sites_of(model), state, name).join(state)
    settings = about.settings(model, name, config) | {"adapter_names": name.split(",")}
    return write_part(path, FUSION, settings, about.rooted(model, tensors), safetensors)


# ---- setups


def load_adapterhub_setup(
    model: AdapterModel, path: str | Path
) -> tuple[HubFolder, Composition | str | None]:
    """Adds the adapters and fusions of a setup, activates it; what was read, and the composition.

    The heads are in what was read. Where something does not fit, what was added is removed again.

    Raises:
        UserError: as `load_adapterhub`, and for a setup whose adapters are not all there.
    """
    folder = read_adapterhub(path)
    wanted = set(names(folder.setup))
    if missing := wanted - {part.name for part in folder.adapters} - model.adapters.keys():
        raise UserError(f"{path}: the setup uses {', '.join(sorted(missing))}, which is not there")
    before, held = set(model.adapters), set(model.fusions)
    try:
        for part in folder.adapters:
            load_from(model, path, adapter_file(part, path), part.name)
        for part in folder.fusions:
            add_fusion(model, part, path)
        model.set_active(folder.setup)
    except BaseException:
        for key in set(model.fusions) - held:
            model.delete_fusion(key)
        for name in set(model.adapters) - before:
            model.delete_adapter(name)
        raise
    return folder, folder.setup


def save_adapterhub_setup(
    model: AdapterModel,
    setup: Composition | str,
    path: str | Path,
    about: About | None = None,
    safetensors: bool = False,
    heads: Sequence[HubPart] = (),
    head_setup: str | list[Any] | None = None,
) -> None:
    """Writes a composition with all that it uses: a folder for each adapter and fusion.

    Args:
        heads: those that are written too, each into the folder of its name.
        head_setup: which of them are active.

    Raises:
        UserError: as `save_adapterhub`.
    """
    path = Path(path)
    for name in dict.fromkeys(names(setup)):
        save_adapterhub(model, name, path / name, about, safetensors)
    for key in dict.fromkeys(fuse.name for fuse in fusions(setup)):
        save_adapterhub_fusion(model, key, path / key, about, safetensors)
    for head in heads:
        save_adapterhub_head(model, head, path / head.name, about, safetensors)
    write_setup(path, setup, head_setup)


# ---- heads


def save_adapterhub_head(
    model: AdapterModel,
    head: HubPart,
    path: str | Path,
    about: About | None = None,
    safetensors: bool = False,
) -> int:
    """Writes a head, its `config` and its `tensors` (`<i>.<parameter>`), into a folder."""
    settings = (about or About()).settings(model, head.name, head.config)
    tensors = {f"heads.{head.name}.{key}": value for key, value in head.tensors.items()}
    return write_part(path, HEAD, settings, tensors, safetensors)
