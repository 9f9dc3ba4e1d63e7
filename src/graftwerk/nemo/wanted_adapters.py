"""`model.load_adapters`: adapters of a file by name or configuration, or of a run's checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graftwerk.adapters import AdapterModel
from graftwerk.checkpoints import load_adapters, read_adapters
from graftwerk.checkpoints.resume import DamagedCheckpoint, read_checkpoint
from graftwerk.errors import UserError
from graftwerk.nemo.peft_config import PEFTConfig

Wanted = PEFTConfig | str
# What may differ between a file and a configuration: it changes nothing once weights are there.
FREE = ("dropout", "column_init_method", "row_init_method", "init_std")


def load_wanted(model: AdapterModel, path: str | Path, wanted: Sequence[Wanted] | None) -> None:
    """Adds those adapters of a file that are wanted, not active; None wants all.

    Raises:
        UserError: for one that the file does not hold, or holds with other settings, and where it
            does not fit the model. The model stays as it was.
    """
    if Path(path).suffix == ".ckpt":
        _load_checkpoint(model, path, wanted)
        return
    saved = {adapter.name: adapter.config for adapter in read_adapters(path).on(model).adapters}
    names = set(saved) if wanted is None else {_name(one) for one in wanted}
    if unknown := names - set(saved):
        raise UserError(f"{path} holds no adapter {min(unknown)!r}: it has {', '.join(saved)}")
    for one in wanted or ():
        if isinstance(one, PEFTConfig):
            _check_alike(path, one, saved[one.name])
    for name in load_adapters(model, path):
        if name not in names:
            model.delete_adapter(name)


def _name(one: Wanted) -> str:
    return one if isinstance(one, str) else one.name


def _check_alike(path: str | Path, wanted: PEFTConfig, saved: dict[str, Any]) -> None:
    own = {"method": type(wanted.method).__name__, **asdict(wanted.method)}
    other = {
        key: (saved[key], value)
        for key, value in own.items()
        if key not in FREE and key in saved and _listed(saved[key]) != _listed(value)
    }
    if other:
        said = ", ".join(
            f"{key} {has!r} instead of {value!r}" for key, (has, value) in other.items()
        )
        raise UserError(
            f"{path} holds an adapter {wanted.name!r} with {said}: change model.peft to match, or "
            f"leave the configuration out"
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _load_checkpoint(
    model: AdapterModel, path: str | Path, wanted: Sequence[Wanted] | None
) -> None:
    """Weights of a checkpoint, which says nothing of the methods that they are of."""
    configs: Sequence[Any] = wanted or ()
    if not configs or not all(isinstance(one, PEFTConfig) for one in configs):
        raise UserError(f"{path} is a checkpoint: give the PEFT configurations of its adapters too")
    try:
        state = read_checkpoint(path)["state_dict"]
    except DamagedCheckpoint as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    before = {id(parameter) for parameter in model.parameters()}
    added = []
    try:
        for one in configs:
            model.add_adapter(one.name, one.method)
            added.append(one.name)
        own = {n: p for n, p in model.named_parameters() if id(p) not in before}
        shapes = {name: parameter.shape for name, parameter in own.items()}
        if shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise UserError(f"{path} holds other weights than {', '.join(added)} on this model has")
    except Exception:
        for name in added:
            model.delete_adapter(name)
        raise
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
