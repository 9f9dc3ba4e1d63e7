"""`.nemo` files and their unpacked folders: opened as a `Checkpoint`, and written (TP = PP = 1)."""

import io
import os
import re
import tarfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import yaml
from torch import Tensor

from graftwerk.checkpoints import nemo_tokenizer
from graftwerk.checkpoints.archive import Files, open_folder, open_tar
from graftwerk.checkpoints.base import Checkpoint, cast, replace_path
from graftwerk.checkpoints.distributed import DistributedSource
from graftwerk.checkpoints.nemo_config import Layout, Variant, from_config, to_config
from graftwerk.checkpoints.nemo_shards import WholeTensors
from graftwerk.checkpoints.nemo_tables import CLASSIC, T5, is_no_weight, nemo_table, split_of
from graftwerk.checkpoints.settings import SETTINGS_LIMIT, parse_settings
from graftwerk.checkpoints.shards import bytes_of, check_space
from graftwerk.checkpoints.torch_files import TorchSource
from graftwerk.checkpoints.torch_writer import TorchWriter
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig, build_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, WEIGHTS, DISTRIBUTED = "model_config.yaml", "model_weights.ckpt", "model_weights"
TENSOR_RANK = re.compile(rf"mp_rank_(\d+)/{re.escape(WEIGHTS)}")
BOTH_RANKS = re.compile(rf"tp_rank_(\d+)_pp_rank_(\d+)/{re.escape(WEIGHTS)}")
WORDS: dict[Variant, str] = {
    "t5": f"{T5}.encoder_embedding.word_embeddings.weight",
    "classic": f"{CLASSIC}.embedding.word_embeddings.weight",
    "mcore": "model.embedding.word_embeddings.weight",
}


def open_nemo(path: Path) -> Checkpoint:
    """Opens a `.nemo` file, or the folder of an unpacked one; nothing but its config is read.

    Raises:
        UserError: where it is damaged or hostile, holds no base model, or a key of its config
            cannot be honoured.
    """
    files = open_container(path)
    try:
        values = config_of(files)
        source = weights_of(files)
    except BaseException:
        files.close()
        raise
    try:
        return _checkpoint(path, files, values, source)
    except BaseException:
        source.__exit__(None, None, None)
        raise


def open_container(path: Path) -> Files:
    """The files of a `.nemo`, or of the folder of an unpacked one.

    Raises:
        UserError: where it is damaged or hostile, or has no config.
    """
    files = open_folder(path) if path.is_dir() else open_tar(path)
    if CONFIG not in files.members:
        files.close()
        raise UserError(f"{path} is no .nemo that can be read: {CONFIG} is missing in it")
    return files


def config_of(files: Files) -> dict[str, Any]:
    """The values of its `model_config.yaml`."""
    return parse_settings(files.read(CONFIG, SETTINGS_LIMIT), f"{files.path}: {CONFIG}")


def weights_of(files: Files, depth: int | None = None) -> WholeTensors:
    """The whole tensors of whatever form the weights have.

    `depth`: layers of a pipeline stage, where not every layer need have tensors.
    """
    where = str(files.path)
    if WEIGHTS in files.members:
        return WholeTensors([[TorchSource(files, [WEIGHTS])]], where)
    if any(name.startswith(f"{DISTRIBUTED}/") for name in files.members):
        return WholeTensors([[DistributedSource(files, DISTRIBUTED)]], where)
    ranks: dict[tuple[int, int], str] = {}
    for name in files.members:
        if match := BOTH_RANKS.fullmatch(name):
            ranks[int(match[2]), int(match[1])] = name
        elif match := TENSOR_RANK.fullmatch(name):
            ranks[0, int(match[1])] = name
    if not ranks:
        raise UserError(
            f"{where}: there are no weights: {WEIGHTS}, {DISTRIBUTED}/, mp_rank_XX/ or "
            f"tp_rank_XX_pp_rank_XXX/ is missing"
        )
    stages, size = (max(key[n] for key in ranks) + 1 for n in (0, 1))
    if len(ranks) != stages * size:
        lost = next((p, t) for p in range(stages) for t in range(size) if (p, t) not in ranks)
        raise UserError(
            f"{where}: of {stages} x {size} (pipeline x tensor) shards only {len(ranks)} are "
            f"there: that of tensor rank {lost[1]} and pipeline rank {lost[0]} is missing"
        )
    return WholeTensors(
        [[TorchSource(files, [ranks[p, t]]) for t in range(size)] for p in range(stages)],
        where,
        depth,
    )


def _checkpoint(
    path: Path, files: Files, values: Mapping[str, Any], source: WholeTensors
) -> Checkpoint:
    variant = _variant(path, values, source)
    words = WORDS[variant]
    if words not in source.names:
        raise UserError(f"{path}: the weights do not fit: missing {words}")
    # How ranks cut tensors hangs on the config, and the rows of the vocabulary on that.
    layout = Layout(
        variant,
        rows=0,
        norms_apart="model.decoder.layers.0.input_layernorm.weight" in source.names,
    )
    said = _said_by_names(variant, source)
    if variant == "t5" and (start := nemo_tokenizer.start_token(values, files)) is not None:
        said["decoder_start_token_id"] = start
    config, layout = to_config({**said, **values}, path, layout, 1)
    source.cut_by(lambda name: split_of(name, config, layout))
    shape = source.shape(words)
    if not shape:
        raise UserError(f"{path}: the weights do not fit: {words} is a single number")
    layout = replace(layout, rows=shape[0])
    config = replace(config, vocab_size=_vocabulary(values, files, shape[0]))
    _check_layers(path, config, variant, source)
    return Checkpoint(
        path=path,
        format="nemo",
        variant=variant,
        config=config,
        table=nemo_table(config, layout),
        source=source,
        ignored=is_no_weight(config),
        files=[path] if path.is_file() else _weight_files(files),
        tokenizer=path if nemo_tokenizer.artifacts(values, files) else None,
    )


def _variant(path: Path, values: Mapping[str, Any], source: WholeTensors) -> Variant:
    names, target = source.names, str(values.get("target", ""))
    if "bert" in target.lower():
        raise UserError(f"{path}: target={target!r}: of NeMo's models only GPT and T5 are read")
    if names and all(".adapter_layer." in name for name in names):
        raise UserError(f"{path} holds an adapter, not a base model")
    starts: dict[str, Variant] = {
        f"{T5}.": "t5",
        f"{CLASSIC}.": "classic",
        "model.decoder.": "mcore",
        "model.embedding.": "mcore",
    }
    for start, variant in starts.items():
        if any(name.startswith(start) for name in names):
            return variant
    raise UserError(f"{path}: its tensors have no names of NeMo's GPT or T5")


def _said_by_names(variant: Variant, source: WholeTensors) -> dict[str, Any]:
    """What a config that leaves out these keys must mean, given the tensors that there are."""
    if variant == "t5":
        return {
            "share_decoder_tokens_head_embeddings": f"{T5}.tokens_head.weight" not in source.names,
            "tokens_head_bias": f"{T5}.tokens_head.bias" in source.names,
        }
    output = (
        f"{CLASSIC}.output_layer.weight" if variant == "classic" else "model.output_layer.weight"
    )
    return {"share_embeddings_and_output_weights": output not in source.names}


def _vocabulary(values: Mapping[str, Any], files: Files, rows: int) -> int:
    """The vocabulary without the rows that pad it, where what travels along explains them."""
    override = values.get("override_vocab_size")
    if type(override) is int and 0 < override <= rows:
        return override
    size = nemo_tokenizer.vocabulary_size(values, files)
    unit = values.get("make_vocab_size_divisible_by") or 128
    ranks = values.get("tensor_model_parallel_size") or 1
    if size is None or type(unit) is not int or type(ranks) is not int or unit * ranks < 1:
        return rows
    return size if -(-size // (unit * ranks)) * unit * ranks == rows else rows


def _check_layers(
    path: Path, config: TransformerConfig, variant: Variant, source: WholeTensors
) -> None:
    """The table has entries for each layer that the config claims: those must be there."""
    stacks = {f"{CLASSIC}.encoder.layers.": config.num_layers}
    if variant == "mcore":
        stacks = {"model.decoder.layers.": config.num_layers}
    elif variant == "t5":
        sides = {"encoder": config.num_layers, "decoder": config.decoder_num_layers}
        stacks = {f"{T5}.{T5}.{side}.model.layers.": count for side, count in sides.items()}
    for stack, count in stacks.items():
        if (found := source.layers.get(stack, 0)) != count:
            raise UserError(
                f"{path}: the weights do not fit: num_layers={count} in {CONFIG}, and {found} "
                f"layers {stack}*"
            )


def _weight_files(files: Files) -> list[Path]:
    names = [n for n in files.members if n.endswith(WEIGHTS) or n.startswith(f"{DISTRIBUTED}/")]
    return sorted({files.members[name].path for name in names})


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that travels in a `.nemo` file or lies in the folder of an unpacked one.

    Raises:
        UserError: where there is none, or none that transformers reads.
    """
    with open_container(path) as files:
        return nemo_tokenizer.load(config_of(files), files)


def write_nemo(
    config: TransformerConfig,
    read: Callable[[str], Tensor],
    path: str | Path,
    tokenizer: str | Path | None,
    mcore: bool,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], object] = lambda name: None,
) -> str:
    """Writes a GPT or T5 as a `.nemo` file (TP = PP = 1) and returns its variant.

    Written beside the path first, tensor by tensor, and renamed when it is whole.

    Args:
        read: one whole parameter of ours by name.
        tokenizer: the folder whose tokenizer files travel along.
        mcore: names of Megatron core; a T5 has none.
        dtype: of the written weights; None: as read.
        progress: is called with each name that is written.

    Raises:
        UserError: where NeMo has no key for something of the model, or the disk is too small.
    """
    path, mark = Path(path), uuid.uuid4().hex
    values = from_config(config, mcore)
    variant: Variant = "t5" if config.architecture == "t5" else "mcore" if mcore else "classic"
    _, layout = to_config(values, path, Layout(variant, config.vocab_size), config.vocab_size)
    table = nemo_table(config, layout)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}
    check_space(path, bytes_of(shapes, dtype or read(next(iter(table))).dtype))
    values["tokenizer"], artifacts = nemo_tokenizer.section_for(
        None if tokenizer is None else Path(tokenizer), mark
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def put(writer: TorchWriter) -> None:
        for ours, entry in table.items():
            tensors = entry.reshape.split(cast(read(ours), dtype))
            for name, tensor in zip(entry.names, tensors, strict=True):
                writer.add(name, tensor)
                if name.startswith(f"{T5}.encoder_embedding."):  # NeMo's module has both names
                    writer.alias(name.replace(".encoder_", ".decoder_"), name)
                progress(name)

    try:
        write_container(partial, values, artifacts, put)
        replace_path(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return variant


def write_container(
    path: Path,
    values: Mapping[str, Any],
    artifacts: Mapping[str, Path],
    put: Callable[[TorchWriter], None],
) -> None:
    """Writes a tar of a `model_config.yaml`, files that travel along, and `model_weights.ckpt`.

    `put` adds the tensors.
    """
    with open(path, "wb") as file:
        tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        _add(tar, CONFIG, yaml.safe_dump(dict(values), sort_keys=False).encode())
        for member, artifact in artifacts.items():
            _add(tar, member, artifact.read_bytes())
        _add_weights(tar, file, put)
        tar.close()
        file.flush()
        os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(f"./{name}")
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _add_weights(tar: tarfile.TarFile, file: BinaryIO, put: Callable[[TorchWriter], None]) -> None:
    """The weights behind the other members; their size is known, and written, last."""
    start = tar.offset
    file.write(bytes(tarfile.BLOCKSIZE))
    writer = TorchWriter(file)
    try:
        put(writer)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    end = file.seek(0, os.SEEK_END)
    info = tarfile.TarInfo(f"./{WEIGHTS}")
    info.size = end - start - tarfile.BLOCKSIZE
    file.write(bytes(-end % tarfile.BLOCKSIZE))
    tar.offset = file.tell()
    file.seek(start)
    file.write(info.tobuf(tarfile.GNU_FORMAT))
    file.seek(tar.offset)
