"""What a checkpoint is, from headers alone: `python3 -m graftwerk inspect PATH`."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from graftwerk.checkpoints import peft
from graftwerk.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from graftwerk.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from graftwerk.checkpoints.adapter import form_of
from graftwerk.checkpoints.adapter_form import FORMAT, listed, listed_fusions
from graftwerk.checkpoints.adapter_nemo import is_own_form, peft_section
from graftwerk.checkpoints.adapterhub_files import ADAPTER as HUB_ADAPTER
from graftwerk.checkpoints.adapterhub_files import is_adapterhub, read_adapterhub
from graftwerk.checkpoints.base import (
    Checkpoint,
    find_checkpoint,
    load_tokenizer,
    open_checkpoint,
)
from graftwerk.checkpoints.layout import Entry
from graftwerk.checkpoints.nemo import CONFIG as NEMO_CONFIG
from graftwerk.checkpoints.nemo import config_of, open_container, weights_of
from graftwerk.checkpoints.settings import read_settings
from graftwerk.checkpoints.tensors import SafeTensors, TensorSource
from graftwerk.checkpoints.tfew import is_torch_file
from graftwerk.checkpoints.torch_files import TorchFiles
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig, build_model

# What a reader wants to know of a model's form, in this order; what is 0 or absent is left out.
SIZES = (
    "num_layers",
    "decoder_num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "window_size",
)
FORM = (
    "position_embedding_type",
    "normalization",
    "activation",
    "transformer_block_type",
    "share_embeddings_and_output_weights",
    "head",
)
FOREIGN = {"peft": "peft (folder)", "adapterhub": "AdapterHub (folder)", "tfew": "T-Few (.pt)"}
Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: TransformerConfig) -> Shapes:
    """The parameters of a model of this form, with their sizes."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}


def faults(checkpoint: Checkpoint) -> list[str]:
    """What is missing, unknown or of another shape in a checkpoint's files. Reads no tensor."""
    source, table = checkpoint.source, checkpoint.table
    have, used = source.names, {name for entry in table.values() for name in entry.names}
    found = [f"missing {name}" for name in sorted(used - have)]
    found += [f"unknown {n}" for n in sorted(have - used) if not checkpoint.ignored(n)]
    for name, shape in shapes_of(checkpoint.config).items():
        entry = table.get(name)
        if entry is not None and have.issuperset(entry.names):
            made = _made_shape(checkpoint, entry)
            if made != shape:
                found.append(f"{' + '.join(entry.names)} gives {made}, not {list(shape)}")
    return found


def _made_shape(checkpoint: Checkpoint, entry: Entry) -> tuple[int, ...] | str:
    """The sizes of a parameter made of the file's tensors, reckoned on tensors without content."""
    tensors = [torch.empty(checkpoint.source.shape(name), device="meta") for name in entry.names]
    try:
        return tuple(entry.reshape.join(entry.reshape.parts(tensors)).shape)
    except (RuntimeError, ValueError, IndexError):
        return " + ".join(str(list(tensor.shape)) for tensor in tensors)


@dataclass
class Report:
    """What `inspect` says of a base or an adapter; what does not apply is None or empty."""

    kind: str  # base, adapter
    path: str
    format: str
    parameters: int
    dtypes: dict[str, int]  # type -> parameters of it
    file_bytes: int
    shards: int
    architecture: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    faults: list[str] = field(default_factory=list)


def inspect(path: str | Path, revision: str | None = None) -> Report:
    """Describes a checkpoint of any format, or an adapter, without reading its weights.

    Raises:
        UserError: where there is none that can be read, and where files of it are missing.
    """
    found = find_checkpoint(path, revision, key="")
    if _is_foreign(found):
        return _foreign(found)
    settings = _adapter_settings(found)
    if settings is not None:
        return _adapter(found, settings)
    with open_checkpoint(found) as checkpoint:
        return _base(checkpoint)


def _base(checkpoint: Checkpoint) -> Report:
    config, source = checkpoint.config, checkpoint.source
    weights = {name for entry in checkpoint.table.values() for name in entry.names}
    values = config.to_dict()
    return Report(
        kind="base",
        path=str(checkpoint.path),
        format=f"{checkpoint.format} ({checkpoint.variant})",
        architecture=config.architecture,
        parameters=sum(prod(shape) for shape in shapes_of(config).values()),
        dtypes=_dtypes(source, weights & source.names),
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        shards=len(checkpoint.files),
        tokenizer=_tokenizer(checkpoint),
        sizes={key: values[key] for key in (*SIZES, *FORM) if values[key] not in (0, None)},
        faults=faults(checkpoint),
    )


def _dtypes(source: TensorSource, names: set[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name in names:
        counts[str(source.dtype(name)).removeprefix("torch.")] += prod(source.shape(name))
    return dict(counts.most_common())


def _tokenizer(checkpoint: Checkpoint) -> str | None:
    if checkpoint.tokenizer is None:
        return None
    try:
        tokenizer = load_tokenizer(checkpoint.tokenizer)
    except UserError as error:
        return f"cannot be read: {error}"
    return f"{len(tokenizer):,} tokens"


# ---- adapters


def _adapter_settings(path: Path) -> dict[str, Any] | None:
    """The settings of an adapter file or folder; None where it is no adapter."""
    if (path / ADAPTER_CONFIG).is_file():
        return read_settings(path / ADAPTER_CONFIG)
    if not path.is_file() and not (path / NEMO_CONFIG).is_file():
        return None
    with open_container(path) as files:
        settings = config_of(files)
    return settings if is_own_form(settings) or peft_section(settings) else None


def _is_foreign(path: Path) -> bool:
    """Whether it is an adapter of another library than NeMo: AdapterHub's, peft's, T-Few's."""
    if path.is_file():
        return is_torch_file(path)
    names = (ADAPTER_CONFIG, NEMO_CONFIG, "config.json")  # a model has its own
    if any((path / name).is_file() for name in names):
        return False
    return peft.is_peft(path) or is_adapterhub(path)


def _foreign(path: Path) -> Report:
    form = form_of(path)
    kinds = (peft.WEIGHTS, peft.PICKLED, HUB_ADAPTER.safe, HUB_ADAPTER.pickled)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.name in kinds)
    counts: Counter[str] = Counter()
    for file in files:
        safe = file.suffix == ".safetensors"
        source: TensorSource = SafeTensors([file]) if safe else TorchFiles([file])
        with source:
            counts.update(_dtypes(source, source.names))
    method, told, base = "IA3", {}, None
    if form == "peft":
        told = peft.read_json(path / peft.CONFIG)
        method, base = told.pop("peft_type"), told.pop("base_model_name_or_path", None)
    elif form == "adapterhub":
        parts = read_adapterhub(path, [HUB_ADAPTER]).adapters
        method = ", ".join(str(p.config.get("architecture") or "bottleneck") for p in parts)
        told = parts[0].config if len(parts) == 1 else {part.name: part.config for part in parts}
        base = parts[0].about.get("model_name")
    return Report(
        kind="adapter",
        path=str(path),
        format=FOREIGN[form],
        parameters=sum(counts.values()),
        dtypes=dict(counts.most_common()),
        file_bytes=sum(file.stat().st_size for file in files),
        shards=len(files),
        method=str(method),
        settings={k: v for k, v in told.items() if v not in (None, False, "", {}, [])},
        base=_text(base),
    )


def _adapter(path: Path, settings: dict[str, Any]) -> Report:
    folder = (path / ADAPTER_CONFIG).is_file()
    if folder:
        files = [path / ADAPTER_WEIGHTS]
        source: TensorSource = SafeTensors(files)
    else:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        source = weights_of(open_container(path))
    with source:
        counts = _dtypes(source, source.names)
    ours = folder or is_own_form(settings)
    method, told, base = _told(path, settings, ours)
    return Report(
        kind="adapter",
        path=str(path),
        format=("graftwerk" if ours else "nemo") + (" (folder)" if path.is_dir() else " (.nemo)"),
        parameters=sum(counts.values()),
        dtypes=counts,
        file_bytes=sum(file.stat().st_size for file in files),
        shards=len(files),
        method=method,
        settings=told,
        base=base,
    )


def _told(
    path: Path, settings: dict[str, Any], ours: bool
) -> tuple[str, dict[str, Any], str | None]:
    """The methods, their settings and the base; of several adapters and fusions by name."""
    section = settings if ours else settings.get(FORMAT)
    if not isinstance(section, dict):  # NeMo's own
        peft = peft_section(settings) or {}
        told = {key: value for key, value in peft.items() if key != "peft_scheme"}
        return str(peft["peft_scheme"]), told, _text(settings.get("restore_from_path"))
    adapters, beside = listed(path, section)
    base = _text(beside.pop("base", None))
    values = {
        name: {key: value for key, value in config.items() if key != "method"}
        for name, config in adapters
    }
    methods = [config["method"] for _, config in adapters]
    for name, fusion in listed_fusions(path, section).items():
        values[name] = asdict(fusion)
        methods.append(type(fusion).__name__)
    return (
        ", ".join(methods),
        {**(next(iter(values.values())) if len(values) == 1 else values), **beside},
        (base),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


# ---- the command


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 where the files do not hold what their configuration says.

    Raises:
        UserError: as `inspect`.
    """
    parser = argparse.ArgumentParser(
        prog="python3 -m graftwerk inspect",
        description="Say what a checkpoint or an adapter is, without loading it.",
    )
    parser.add_argument("path", help="a folder, a .nemo file, or a name of the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a name of the Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(list(argv))
    report = inspect(arguments.path, arguments.revision)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2, default=str))
    else:
        show(report)
    return 2 if report.faults else 0


def show(report: Report) -> None:
    """Prints a report as aligned lines."""
    lines: list[tuple[str, str]] = [(report.kind, report.path), ("format", report.format)]
    lines += [("architecture", report.architecture)] if report.architecture else []
    lines += [("method", report.method)] if report.method else []
    lines += [("trained on", report.base)] if report.base else []
    shares = [f"{name} {count:,}" for name, count in report.dtypes.items()]
    lines += [
        ("parameters", f"{report.parameters:,}"),
        ("dtype", ", ".join(shares) if len(shares) > 1 else "".join(report.dtypes)),
        ("size", f"{report.file_bytes / 1e6:,.1f} MB in {report.shards} file"),
    ]
    if report.shards != 1:
        lines[-1] = ("size", f"{lines[-1][1]}s")
    if report.kind == "base":
        lines.append(("tokenizer", report.tokenizer or "none"))
    values = {**report.sizes, **report.settings}
    lines += [(key, str(value)) for key, value in values.items() if value is not None]
    width = max(len(name) for name, _ in lines)
    print(*(f"{name:<{width}}  {value}" for name, value in lines), sep="\n")
    if report.faults:
        shown, more = report.faults[:12], len(report.faults) - 12
        print(f"\nthe files do not hold this model ({len(report.faults)} faults):")
        print(*(f"  {fault}" for fault in shown), *([f"  and {more} more"] * (more > 0)), sep="\n")
