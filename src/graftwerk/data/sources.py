"""Which files a learning stage reads, how much of each, and under which settings.

`model.data.train_ds` and its like are a path, a list of paths, a list of files with weights
(`{path: ..., weight: 0.3}`), or NeMo's mapping of `file_names`, `concat_sampling_probabilities`
and settings of its own.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from graftwerk.errors import UserError

# Settings that a mapping may have beside its files; they come before those of `model.data`.
SETTINGS = (
    "prompt_template",
    "label_key",
    "truncation_field",
    "truncation_method",
    "add_bos",
    "add_eos",
    "add_sep",
    "tokens_to_generate",
    "max_seq_length",
    "shuffle",
    "drop_last",
    "num_workers",
    "pin_memory",
)
BATCHES = ("global_batch_size", "micro_batch_size")  # a mapping may repeat the model's


@dataclass(frozen=True)
class Source:
    """Files that are read as one.

    Args:
        files: paths of JSONL files.
        name: what metrics call them.
        weight: their share of the rows of training, relative to the others'; None: as many rows as
            there are.
    """

    files: tuple[str, ...]
    name: str
    weight: float | None = None


def sources_of(model_cfg: DictConfig, key: str) -> list[Source]:
    """The files of `model.data.<key>`.

    Raises:
        UserError: for a file that is not there, and for weights and names that do not fit.
    """
    value = OmegaConf.select(model_cfg, f"data.{key}")
    where = f"model.data.{key}"
    if value is None:
        return []
    given: Any = (
        OmegaConf.to_container(value, resolve=True) if not isinstance(value, str) else value
    )
    if isinstance(given, Mapping):
        items = _of_mapping(given, where)
    else:
        items = [given] if isinstance(given, str) else list(given)
    sources = [_source(item, f"{where}[{number}]") for number, item in enumerate(items)]
    _check_weights([weight for _, _, weight in sources], key)
    names = _names([(files, name) for files, name, _ in sources], where)
    return [Source(files, name, w) for (files, _, w), name in zip(sources, names, strict=True)]


def data_files(model_cfg: DictConfig, key: str) -> list[str]:
    """The paths of `model.data.<key>`, in order."""
    return [path for source in sources_of(model_cfg, key) for path in source.files]


def settings_of(model_cfg: DictConfig, key: str) -> dict[str, Any]:
    """`model.data` without its files, under what `model.data.<key>` sets for itself.

    Keys that are null are left out.
    """
    data = OmegaConf.select(model_cfg, "data")
    common: Any = OmegaConf.to_container(data, resolve=True) if data is not None else {}
    own = common.get(key)
    settings = {k: v for k, v in common.items() if not k.endswith("_ds") and v is not None}
    if isinstance(own, Mapping):
        settings |= {k: own[k] for k in SETTINGS if own.get(k) is not None}
        for name in BATCHES:
            if own.get(name) not in (None, model_cfg.get(name)):
                raise UserError(
                    f"model.data.{key}.{name}={own[name]} is not model.{name}={model_cfg[name]}, "
                    f"which is what counts: set that one"
                )
    return settings


def _of_mapping(given: Mapping[str, Any], where: str) -> list[Any]:
    """NeMo's mapping as a list of files."""
    files = given.get("file_names") or []
    files = [files] if isinstance(files, str) else list(files)
    names, weights = given.get("names"), given.get("concat_sampling_probabilities")
    names = [names] if isinstance(names, str) else names
    for key, values in (("names", names), ("concat_sampling_probabilities", weights)):
        if values is not None and len(values) != len(files):
            raise UserError(
                f"{where}.{key} has {len(values)} values, file_names has {len(files)}: give one "
                f"for each file"
            )
    if weights is not None and abs(sum(weights) - 1) > 0.01:
        raise UserError(
            f"{where}.concat_sampling_probabilities sum to {sum(weights):g}: they must sum to 1"
        )
    return [
        {
            "path": path,
            "name": None if names is None else names[number],
            "weight": None if weights is None else weights[number],
        }
        for number, path in enumerate(files)
    ]


def _source(item: Any, where: str) -> tuple[tuple[str, ...], str | None, float | None]:
    """(files, name, weight) of a path or a mapping."""
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: {item!r} is no path")
    files = [item.get("path"), item.get("file_names")]
    given = [value for value in files if value]
    if len(given) != 1:
        raise UserError(f"{where} must name its files by one of path and file_names")
    paths = [given[0]] if isinstance(given[0], str) else list(given[0])
    for path in paths:
        if not isinstance(path, str):
            raise UserError(f"{where}: {path!r} is no path")
        if not os.path.isfile(path):
            key = where.split("[")[0]
            raise UserError(f"{key}: {path} does not exist; the data_prep stage writes such files")
    return tuple(paths), item.get("name"), item.get("weight")


def _check_weights(weights: Sequence[float | None], key: str) -> None:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return
    where = f"model.data.{key}"
    if key != "train_ds":
        raise UserError(f"{where}: weights are for train_ds; here every row is read once")
    if len(given) < len(weights):
        raise UserError(f"{where}: give a weight to each of its {len(weights)} entries, or to none")
    if min(given) < 0 or not sum(given) > 0:
        raise UserError(f"{where}: weights must not be negative, and not all 0: {given}")


def _names(sources: Sequence[tuple[tuple[str, ...], str | None]], where: str) -> list[str]:
    """Given names, or those of the files; told apart by their folders where they are the same."""
    given = [name for _, name in sources if name is not None]
    twice = [name for name, count in Counter(given).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the name {twice[0]!r} stands for two of its entries")
    paths = [files[0] if files else "" for files, _ in sources]
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    names: list[str] = []
    for (_, name), path, stem in zip(sources, paths, stems, strict=True):
        if name is None:
            folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
            name = stem if stems.count(stem) == 1 and stem not in given else f"{folder}_{stem}"
            if name in names or name in given:
                name = f"{name}_{len(names)}"
        names.append(name)
    return names
