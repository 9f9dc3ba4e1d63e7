"""Adapters and fusions of earlier stages: a list of names and files, put on a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graftwerk.adapters.composition import Composition, fusions, names
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.adapter import load_from, read_adapters
from graftwerk.checkpoints.adapter_form import AdapterFile, method_of
from graftwerk.errors import UserError

Files = Mapping[str, AdapterFile]  # by the names of their adapters here


def read_frozen(paths: Mapping[str, str], key: str = "model.adapters") -> dict[str, AdapterFile]:
    """The files of a list of adapters, `paths` by name, each cut to the adapter that is meant.

    A file of one adapter is of that, whatever it is called there; one of several is of the adapter
    of that name. Fusions keep their names, which are those of what they fuse.

    Raises:
        UserError: where a file cannot be read, or has several adapters and none of that name.
    """
    return {name: _meant(name, path, read_adapters(path), key) for name, path in paths.items()}


def _meant(name: str, path: str, file: AdapterFile, key: str) -> AdapterFile:
    if len(file.adapters) < 2:
        return file
    own = [adapter for adapter in file.adapters if adapter.name == name]
    if not own:
        have = ", ".join(adapter.name for adapter in file.adapters)
        raise UserError(f"{key}: {path} holds no adapter {name!r}: it has {have}; name one of them")
    return replace(file, adapters=own)


def columns_of(files: Files) -> dict[str, int]:
    """How many virtual tokens each file's adapter puts before a row."""
    return {
        name: getattr(method_of(file.adapters[0].config, name), "virtual_tokens", 0)
        for name, file in files.items()
        if file.adapters
    }


def add_frozen(
    model: AdapterModel,
    paths: Mapping[str, str],
    files: Files,
    compositions: Sequence[Composition | str | None],
    key: str = "model.adapters",
) -> None:
    """Adds to a model what the compositions need of some files, not active.

    Raises:
        UserError: where a file does not fit the model, or holds nothing that is needed.
    """
    needed = {name for composition in compositions for name in names(composition)}
    fused = {fuse.name for composition in compositions for fuse in fusions(composition)}
    useful: set[str] = set()
    for name in (name for name, file in files.items() if file.adapters and name in needed):
        load_from(model, paths[name], replace(files[name], fusions=[]), name)
        useful.add(name)
    for name, file in files.items():  # behind all the adapters that they fuse
        own = [fusion for fusion in file.fusions if fusion.name in fused]
        new = [fusion for fusion in own if fusion.name not in model.fusions]
        if new:
            load_from(model, paths[name], replace(file, adapters=[], fusions=new))
        useful |= {name} if own else set()
    if idle := [name for name in files if name not in useful]:
        said = ", ".join(str(composition) for composition in compositions)
        raise UserError(
            f"{key}: nothing of {idle[0]!r}, {paths[idle[0]]}, is in {said}: take it out of the "
            f"list, or use it there"
        )


def check_fusions(
    model: AdapterModel, compositions: Sequence[Composition | str | None], key: str, advice: str
) -> None:
    """Raises a UserError where a composition has a `Fuse` whose fusion the model does not have."""
    for composition in compositions:
        for fuse in fusions(composition):
            if fuse.name not in model.fusions:
                raise UserError(f"{key}={composition}: there is no fusion of {fuse.name}: {advice}")
