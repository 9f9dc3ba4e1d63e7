"""How a stage's model and batches lie on its devices: sizes that fit, before anything is queued."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from launcher_scripts.shapes import Shape
from launcher_scripts.tuning import schemes_of
from launcher_scripts.validate import Report

SPLIT = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")  # over tensor ranks


@dataclass(frozen=True)
class _Layout:
    """Devices, by tensor and pipeline; `key` is the stage's model section."""

    key: str
    devices: int
    num_nodes: int
    tensor: int
    pipeline: int
    model: dict[str, Any]

    @property
    def world(self) -> int:
        return self.devices * self.num_nodes

    @property
    def copies(self) -> int:
        """Data-parallel copies of the model; 0 where its devices do not divide all."""
        whole, rest = divmod(self.world, self.tensor * self.pipeline)
        return 0 if rest else whole

    def tensors(self, shape: Shape | None) -> list[int]:
        """Tensor-parallel sizes that devices and model have room for."""
        room = self.world // self.pipeline if self.world % self.pipeline == 0 else 0
        sizes = [size for size in (getattr(shape, field, None) for field in SPLIT) if size]
        return _divisors(gcd(room, *sizes))


def check_layout(
    name: str, stage: Any, shape: Shape | None, report: Report, notices: list[str]
) -> None:
    """Report sizes that do not go together: those of a stage's configuration and of its base."""
    try:
        trainer, model = stage["trainer"], stage["model"]
        sizes = [trainer["devices"], trainer["num_nodes"]]
        sizes += [model[f"{kind}_model_parallel_size"] for kind in ("tensor", "pipeline")]
    except (KeyError, TypeError):
        return
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return
    devices, num_nodes, tensor, pipeline = sizes
    layout = _Layout(f"{name}.model", devices, num_nodes, tensor, pipeline, model)
    _devices(layout, report)
    if layout.copies:
        _batches(layout, report)
    _sequence(layout, shape, report)
    if model.get("use_fsdp") is True:
        _shards(name, layout, report)
    if shape is not None:
        _features(layout, shape, report)
    _stages(layout, shape, report, notices)


def own_shape(model: dict[str, Any]) -> Shape:
    """The shape that a `training` configuration describes itself."""
    heads, hidden = _size(model, "num_attention_heads"), _size(model, "hidden_size")
    ffn = _size(model, "ffn_hidden_size") or (4 * hidden if hidden else None)
    groups = _size(model, "num_query_groups") or heads
    return Shape(_size(model, "num_layers"), heads, groups, ffn)


def _devices(layout: _Layout, report: Report) -> None:
    if layout.copies:
        return
    fit = layout.tensors(None)
    use = f"use {_any(fit)}" if fit else f"their product is one of {_any(_divisors(layout.world))}"
    report(
        f"{layout.key}.tensor_model_parallel_size",
        f"{layout.tensor} x pipeline_model_parallel_size {layout.pipeline} must divide the "
        f"{layout.world} devices (trainer.devices {layout.devices} x num_nodes "
        f"{layout.num_nodes}): {use}",
    )


def _batches(layout: _Layout, report: Report) -> None:
    total, micro = (layout.model.get(f"{kind}_batch_size") for kind in ("global", "micro"))
    if not (isinstance(total, int) and isinstance(micro, int)) or min(total, micro) < 1:
        return
    data = layout.model.get("data")
    if isinstance(data, Mapping) and data.get("packed_sequence_size"):
        return  # how many micro-batches rows come to is not known from their number
    unit = micro * layout.copies
    if total % unit:
        near = [n for n in (total // unit * unit, (total // unit + 1) * unit) if n]
        report(
            f"{layout.key}.global_batch_size",
            f"{total} must be a multiple of micro_batch_size {micro} x {layout.copies} "
            f"data-parallel copies of the model (devices by tensor and pipeline size), that "
            f"is of {unit}: use {_any(near)}",
        )


def _sequence(layout: _Layout, shape: Shape | None, report: Report) -> None:
    if layout.model.get("sequence_parallel") is not True or layout.tensor > 1:
        return
    fit = [size for size in layout.tensors(shape) if size > 1]
    use = f"set tensor_model_parallel_size to {_any(fit)}" if fit else "use more devices"
    report(
        f"{layout.key}.sequence_parallel",
        f"True splits rows over tensor-parallel devices, and tensor_model_parallel_size is 1; "
        f"{use}, or set it to False",
    )


def _shards(name: str, layout: _Layout, report: Report) -> None:
    """A sharded base is frozen, whole on no device, and there are copies of it to share."""
    key = f"{layout.key}.use_fsdp"
    peft = layout.model.get("peft")
    schemes = schemes_of(peft.get("peft_scheme")) if isinstance(peft, dict) else []
    if name in ("training", "fine_tuning") or schemes == ["none"]:
        report(key, "True shards the frozen base under adapters; the whole model is trained here")
    if "qlora" in schemes:
        report(key, "True does not go with peft_scheme qlora, whose base is held in 4 bits")
    if layout.pipeline > 1:
        report(
            key, f"True goes with pipeline_model_parallel_size 1, not {layout.pipeline}; set one"
        )
    if layout.copies == 1 and layout.pipeline == 1:
        report(
            key,
            f"True shards the base over data-parallel copies of the model, of which there is one; "
            f"use {2 * layout.tensor} devices or more, or set it to False",
        )


def _features(layout: _Layout, shape: Shape, report: Report) -> None:
    sizes = {field: getattr(shape, field) for field in SPLIT}
    wrong = [f"{field} {size}" for field, size in sizes.items() if size and size % layout.tensor]
    if wrong:
        fit = layout.tensors(shape) or [1]
        report(
            f"{layout.key}.tensor_model_parallel_size",
            f"{layout.tensor} must divide the model's {', '.join(wrong)}: use {_any(fit)}",
        )


def _stages(layout: _Layout, shape: Shape | None, report: Report, notices: list[str]) -> None:
    """Each stage of a pipeline has a layer; a T5's decoder begins with a stage."""
    pipeline, layers = layout.pipeline, shape.num_layers if shape else None
    key = f"{layout.key}.pipeline_model_parallel_split_rank"
    split = layout.model.get("pipeline_model_parallel_split_rank")
    if pipeline == 1:
        return
    decoder = shape.decoder_num_layers if shape else None
    if shape is not None and not decoder and split is not None:
        notices.append(f"{key} has no effect: the model has no encoder and decoder to part")
    elif split is not None and not 0 < split < pipeline:
        fit = f"1 to {pipeline - 1}" if pipeline > 2 else "1"
        report(
            key,
            f"{split} is not {fit}, the stages on which a T5's decoder may begin with "
            f"pipeline_model_parallel_size {pipeline}; null: in the middle",
        )
        return
    if layers is None:
        return
    if not decoder:
        if pipeline > layers:
            _too_many(layout, f"num_layers {layers}", layers, report)
        return
    if pipeline > layers + decoder:
        both = f"num_layers {layers} + decoder_num_layers {decoder}"
        _too_many(layout, both, layers + decoder, report)
        return
    place = pipeline // 2 if split is None else split
    fit = [n for n in range(1, pipeline) if n <= layers and pipeline - n <= decoder]
    if place not in fit:
        report(
            key,
            f"{place} leaves {place} stages to the encoder's {layers} layers and "
            f"{pipeline - place} to the decoder's {decoder}, one of them without a layer: use "
            f"{_any(fit)}",
        )


def _too_many(layout: _Layout, what: str, most: int, report: Report) -> None:
    report(
        f"{layout.key}.pipeline_model_parallel_size",
        f"{layout.pipeline} stages are more than the model's {what}: use at most {most}",
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _any(numbers: list[int]) -> str:
    """Numbers in words: 1, 2 or 4."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _size(values: dict[str, Any], key: str) -> int | None:
    """A size where it is one; what is none is reported elsewhere."""
    size = values.get(key)
    return size if isinstance(size, int) and size > 0 else None
