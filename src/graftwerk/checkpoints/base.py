"""Base models in any layout that we know, told apart by what the folder or file holds."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import yaml
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from graftwerk.checkpoints.layout import Entry, Table
from graftwerk.checkpoints.quantize import quantize as quantize_projections
from graftwerk.checkpoints.quantize import quantizer
from graftwerk.checkpoints.settings import read_settings
from graftwerk.checkpoints.tensors import SafeTensors, TensorSource, fill, put, weight_files
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, TransformerConfig, build_model
from graftwerk.parallel.tensor import parallelize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_CONFIG, OWN_FORMAT = "model_config.yaml", "graftwerk"
OWN_WEIGHTS = "model.safetensors"
SHARD_BYTES = 5 << 30


@dataclass
class Checkpoint:
    """An opened base model, of which nothing is read yet but its configuration.

    `variant` is the kind within the format: Hugging Face's `model_type`, NeMo's `classic` or
    `mcore`. `table` says where each parameter of ours lies in `source`; `ignored` which tensors of
    the files are no weights (masks, tied copies). `tokenizer` is what `load_tokenizer` reads.
    """

    path: Path
    format: str
    variant: str
    config: TransformerConfig
    table: Table
    source: TensorSource
    ignored: Callable[[str], bool] = field(default=lambda name: False)
    files: list[Path] = field(default_factory=list)
    tokenizer: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.source.__exit__(*error)


def find_checkpoint(
    path: str | Path, revision: str | None = None, key: str = "model.language_model_path="
) -> Path:
    """The checkpoint at a path, looked for with and without a `results` folder before its name.

    The published launcher's documentation has both. A name such as `org/name` that is no path is
    looked up on the Hugging Face Hub, at `revision`, or in its cache. `key` is what an error says
    of where the path was given.

    Raises:
        UserError: where there is none.
    """
    from graftwerk.checkpoints import hub

    path = Path(path)
    parent = path.parent.parent if path.parent.name == "results" else path.parent / "results"
    other = parent / path.name
    for candidate in (path, other):
        if candidate.exists():
            return candidate
    if hub.is_hub_name(str(path)):
        return hub.resolve(str(path), revision)
    raise UserError(
        f"{key}{path}: no checkpoint there, nor at {other}: give a folder in "
        f"Hugging Face layout, a Hub name, a .nemo file, or what the stage `training` made"
    )


def open_checkpoint(path: str | Path, revision: str | None = None) -> Checkpoint:
    """Opens a base model of any format; use it as a context manager.

    Raises:
        UserError: where it is missing, of no known format or architecture, or damaged.
    """
    from graftwerk.checkpoints import huggingface

    found = find_checkpoint(path, revision)
    if (found / "config.json").is_file():
        return huggingface.open_folder(found)
    if (found / OWN_CONFIG).is_file():
        values = read_settings(found / OWN_CONFIG)
        if values.get("format") == OWN_FORMAT:
            return _open_own(found, values)
    if found.is_file() or (found / OWN_CONFIG).is_file():
        from graftwerk.checkpoints import nemo

        return nemo.open_nemo(found)
    raise UserError(
        f"{found} is no checkpoint that can be read: a folder with `config.json` (Hugging Face) or "
        f"`{OWN_CONFIG}` (ours, unpacked NeMo), or a .nemo file is needed"
    )


def _open_own(folder: Path, values: dict[str, Any]) -> Checkpoint:
    try:
        config = TransformerConfig.from_dict(values)
    except TypeError as error:
        raise UserError(f"{folder / OWN_CONFIG}: {error}") from None
    files = weight_files(folder, OWN_WEIGHTS)
    if not files:
        raise UserError(f"{folder}: the weights file '{OWN_WEIGHTS}' is missing")
    with torch.device("meta"):
        names = [name for name, _ in build_model(config).named_parameters()]
    return Checkpoint(
        path=folder,
        format=OWN_FORMAT,
        variant=config.architecture,
        config=config,
        table={name: Entry((name,)) for name in names},
        source=SafeTensors(files),
        files=files,
        tokenizer=folder if has_tokenizer(folder) else None,
    )


def load_base(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    head: str | None = None,
    num_labels: int = 0,
    revision: str | None = None,
    mesh: DeviceMesh | None = None,
    seed: int = 0,
    quantize: str | None = None,
    wanted: Callable[[str], bool] | None = None,
    sequence: bool = False,
) -> GPT | T5 | BERT:
    """Reads a base model; the result is in eval mode.

    The model is built on the meta device and its tensors are read one at a time, by views of mapped
    files: weights that change neither type nor device stay views. Over a one-dimensional `mesh` a
    rank reads the share that it keeps.

    Args:
        path: a folder, a `.nemo` file or a Hub name, at `revision`.
        head: for a BERT: one of `models.config.HEADS`. Where the file's head is another one, the
            model gets a fresh one with `num_labels`, random by `seed`.
        quantize: `nf4` holds the projections in 4 bits, by `bitsandbytes`; the rest is `dtype`.
        wanted: whether a parameter is read; the others stay on the meta device. None: all are.
        sequence: between sublayers the ranks of `mesh` share rows by their columns.

    Raises:
        UserError: where the checkpoint is missing, of an unknown architecture, or does not fit, and
            where it cannot be quantised here.
    """
    if quantize is not None:
        quantizer(quantize)
        if mesh is not None or wanted is not None:
            raise UserError(
                f"quantize={quantize}: 4-bit weights are not split over devices: set "
                f"model.tensor_model_parallel_size and pipeline_model_parallel_size to 1"
            )
    place = device if quantize is None else "cpu"
    with open_checkpoint(path, revision) as checkpoint:
        config = checkpoint.config
        if head is not None:
            config = _with_head(config, head, num_labels, checkpoint.path)
        with torch.device("meta"):
            model = build_model(config)
        if mesh is not None:
            parallelize(model, mesh, sequence)
        if wanted is not None:
            _type_absent(model, wanted, dtype)
        own = {name for name, _ in model.named_parameters() if wanted is None or wanted(name)}
        table = {name: entry for name, entry in checkpoint.table.items() if name in own}
        others = {n for k, e in checkpoint.table.items() if k not in own for n in e.names}
        fill(
            model,
            table,
            checkpoint.source,
            checkpoint.path,
            dtype,
            place,
            lambda name: name in others or checkpoint.ignored(name),
            None if mesh is None else mesh.get_group(),
        )
        _fill_fresh(model, own - table.keys(), dtype, place, seed)
        if quantize is not None:
            quantize_projections(model, quantize, device, dtype)
    return model.eval()


def _type_absent(model: torch.nn.Module, wanted: Callable[[str], bool], dtype: torch.dtype) -> None:
    """Gives what is not read the type of what is."""
    for name, parameter in list(model.named_parameters()):
        if not wanted(name):
            parameter.data = parameter.data.to(dtype)


def _with_head(
    config: TransformerConfig, head: str, num_labels: int, path: Path
) -> TransformerConfig:
    if config.architecture != "bert":
        raise UserError(
            f"{path} is a {config.architecture} model: model.head={head} is for BERT and RoBERTa"
        )
    if config.head == head and num_labels in (0, config.num_labels):
        return config
    pooler = config.pooler or head == "classification"
    return replace(config, head=head, num_labels=num_labels, pooler=pooler)


def _fill_fresh(
    model: torch.nn.Module,
    names: set[str],
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int,
) -> None:
    """Random weights (normal, zero biases) for parameters that the file does not have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        if name in names:
            tensor = torch.zeros(parameter.shape)
            if parameter.ndim > 1:
                tensor.normal_(0.0, 0.02, generator=generator)
            elif not name.endswith("bias"):
                tensor.fill_(1.0)
            put(model, name, tensor.to(device=device, dtype=dtype))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the forms that transformers reads."""
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names)


def load_tokenizer(path: str | Path, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies in a checkpoint's folder or file. Runs no code from it.

    Raises:
        UserError: where there is none.
    """
    from transformers import AutoTokenizer

    found = find_checkpoint(path, revision)
    if found.is_file() or _is_nemo_folder(found):
        from graftwerk.checkpoints import nemo

        return nemo.load_tokenizer(found)
    try:
        return AutoTokenizer.from_pretrained(
            str(found), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises whatever its parsers do
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{found}: no tokenizer can be read there: {line}") from None


def _is_nemo_folder(folder: Path) -> bool:
    config = folder / OWN_CONFIG
    return config.is_file() and read_settings(config).get("format") != OWN_FORMAT


def save_base(
    model: GPT | T5 | BERT, tokenizer: "PreTrainedTokenizerBase | None", path: str | Path
) -> None:
    """Writes a model in our own layout: beside the path first, renamed when it is whole."""
    parameters = dict(model.named_parameters())
    write_own(model.config, lambda name: parameters[name].detach(), path, tokenizer)


def write_own(
    config: TransformerConfig,
    read: Callable[[str], Tensor],
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model in our own layout from a function that gives its parameters by name."""
    from graftwerk.checkpoints.shards import write_shards

    path = Path(path)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_shards(partial, shapes, lambda name: cast(read(name), dtype), SHARD_BYTES)
        values = {"format": OWN_FORMAT, **config.to_dict()}
        (partial / OWN_CONFIG).write_text(yaml.safe_dump(values, sort_keys=False))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        replace_path(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another floating type; None keeps its own."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def replace_path(new: Path, path: Path) -> None:
    """Moves a whole file or folder to its place; what was there goes only when the new one is."""
    if not path.is_dir():
        os.replace(new, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)
