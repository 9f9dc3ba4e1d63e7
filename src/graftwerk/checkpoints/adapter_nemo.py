"""Adapters in NeMo's container, a tar of `model_config.yaml` and `model_weights.ckpt`, read.

NeMo's own files have its names and a section `peft`; their shards are joined. Ours have them too,
and our settings in a section `graftwerk`; what NeMo cannot say lies in the same container in our
own form, marked `format: graftwerk`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.configs import SCHEMES, SPELLINGS, SelectiveConfig
from graftwerk.adapters.configs import method_of as method_of_block
from graftwerk.checkpoints import nemo_config
from graftwerk.checkpoints.adapter_form import (
    FORMAT,
    AdapterFile,
    SavedAdapter,
    apart,
    check_kinds,
    listed,
)
from graftwerk.checkpoints.adapter_names import (
    DEAD,
    MARK,
    adapter_split,
    first_layers,
    from_nemo,
    scheme_of,
    variant_of,
)
from graftwerk.checkpoints.nemo import config_of, open_container, weights_of
from graftwerk.checkpoints.nemo_config import Layout, Settings, Variant
from graftwerk.checkpoints.nemo_shards import LAYER, WholeTensors
from graftwerk.checkpoints.nemo_tables import heads_of, is_no_weight, nemo_table, split_of
from graftwerk.errors import UserError
from graftwerk.models.config import TransformerConfig

IDLE = ("a2a_experimental", "network_alpha")  # keys of NeMo's that change nothing here
Base = Callable[[], tuple[TransformerConfig, Layout]]  # raises where the file does not describe it


def read_nemo_adapters(path: Path) -> AdapterFile:
    """The adapters of a `.nemo` file, or of the folder of an unpacked one.

    Raises:
        UserError: where it is damaged or hostile, holds no adapter, or one that we do not have.
    """
    with open_container(path) as files:
        settings = config_of(files)
        with weights_of(files, _depth(path, settings)) as source:
            if is_own_form(settings):
                own = _Reader(path, source)
                return apart(path, settings, {name: own.read(name) for name in source.names})
            return _NemoFile(path, settings, source).read()


def is_own_form(settings: Mapping[str, Any]) -> bool:
    """Whether a container's tensors have our names."""
    return "method" in settings or isinstance(settings.get("adapters"), list)


def peft_section(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The methods of an adapter with NeMo's names; None where it is no adapter."""
    peft = settings.get("peft")
    scheme = peft.get("peft_scheme") if isinstance(peft, dict) else None
    return peft if isinstance(scheme, str) and scheme not in ("none", "") else None


def _depth(path: Path, settings: Mapping[str, Any]) -> int | None:
    """Layers of a pipeline stage of a GPT, where the file says."""
    stages, layers = settings.get("pipeline_model_parallel_size"), settings.get("num_layers")
    if type(stages) is not int or type(layers) is not int or not 1 <= stages <= layers:
        return None
    return layers // stages


class _Reader:
    """Copies of tensors: the file may be replaced while they are in use.

    All together they are no larger than the file, however its tensors overlap.
    """

    def __init__(self, path: Path, source: WholeTensors):
        self.path, self.source = path, source
        files = path.rglob("*") if path.is_dir() else [path]
        self.left = 2 * sum(file.stat().st_size for file in files) + (1 << 20)
        if path.is_file():
            with open(path, "rb") as file:  # a gzip one: what it unpacks to is bounded elsewhere
                self.left *= 64 if file.read(2) == b"\x1f\x8b" else 1

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        tensor = self.source.read(name)
        self.left -= tensor.numel() * tensor.element_size()
        if self.left < 0:
            raise UserError(f"{self.path}: its tensors overlap: they are larger than the file")
        return tensor.clone()


class _NemoFile:
    """A file with NeMo's names on its way to ours."""

    def __init__(self, path: Path, settings: Mapping[str, Any], source: WholeTensors):
        variant = variant_of(source.names)
        if variant is None:
            raise UserError(f"{path}: its tensors have no names of adapters of NeMo's GPT or T5")
        self.path, self.settings, self.source = path, settings, source
        self.variant: Variant = variant
        self.base: Base = cache(self._base)
        self.reader = _Reader(path, source)
        if source.ranks > 1:
            config, layout = self.base()
            legacy, gated = layout.legacy_qkv, config.gated and not layout.split_glu
            qkv = (config.num_attention_heads, *[config.num_query_groups] * 2) if legacy else (1,)
            fc1 = (1, 1) if gated else (1,)
            source.cut_by(
                lambda name: (
                    adapter_split(name, qkv, fc1)
                    if MARK in name
                    else split_of(name, config, layout)
                )
            )

    def read(self) -> AdapterFile:
        """Adapters in the order of `peft_scheme`, called as their schemes, or as we called them."""
        names: dict[str, list[str]] = {}
        for name in sorted(self.source.names):
            scheme = scheme_of(name)
            if scheme is None:
                raise UserError(f"{self.path}: {name} is of an adapter that is not known")
            names.setdefault(scheme, []).append(name)
        known, extra = self._told(names)
        if lost := sorted(known.keys() ^ names.keys()):
            raise UserError(
                f"{self.path}: its settings are of {', '.join(known)}, and its weights of "
                f"{', '.join(names)}: {lost[0]} has only one of both"
            )
        saved = [
            SavedAdapter(name, config, self._state(scheme, config, names[scheme]))
            for scheme, (name, config) in known.items()
        ]
        for adapter in saved:
            if adapter.config["method"] == "SelectiveConfig" and "parameters" not in adapter.config:
                adapter.config.update(asdict(SelectiveConfig(parameters=tuple(adapter.state))))
        return AdapterFile(saved, extra)

    # ---- settings

    def _told(
        self, names: Mapping[str, list[str]]
    ) -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, Any]]:
        """Scheme -> (name of the adapter, its settings), and what lies beside them."""
        schemes = {method.__name__: scheme for scheme, (method, _) in reversed(SCHEMES.items())}
        section = self.settings.get(FORMAT)
        if isinstance(section, dict):
            told, extra = listed(self.path, section)
            return {schemes[config["method"]]: (name, config) for name, config in told}, extra
        peft = peft_section(self.settings)
        if peft is None:
            raise UserError(f"{self.path}: peft.peft_scheme in model_config.yaml names no adapter")
        known = {}
        for scheme in (word.strip() for word in str(peft["peft_scheme"]).split(",")):
            if scheme not in ("adapter", "ia3", "lora", "ptuning", "selective"):
                raise UserError(
                    f"{self.path}: peft.peft_scheme={scheme!r} is not known: adapter, ia3, lora, "
                    f"ptuning and selective are"
                )
            known[scheme] = scheme, self._block(scheme, peft)
        base = self.settings.get("restore_from_path")
        return known, {} if base is None else {"base": base}

    def _block(self, scheme: str, peft: Mapping[str, Any]) -> dict[str, Any]:
        """Our settings of a method by NeMo's block."""
        method, section = SCHEMES[scheme]
        if scheme == "selective":  # the parameters are those that the file holds
            return {"method": method.__name__}
        resolve = Settings(self.settings, self.path)  # blocks refer to other keys of the file
        given = peft.get(section)
        block = {
            str(key): resolve.resolved(value)
            for key, value in (given if isinstance(given, dict) else {}).items()
            if key not in IDLE
        }
        if scheme == "lora":
            block.setdefault("dropout_position", "post")  # NeMo's default
        spellings: dict[str, str] = {theirs: ours for ours, theirs in SPELLINGS.items()}
        config: dict[str, Any] = {spellings.get(key, key): value for key, value in block.items()}
        config = {key: value for key, value in config.items() if value is not None}
        check_kinds(method, config, f"{self.path}: peft.{section}")
        try:
            made = method_of_block(scheme, block, "peft")
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        if made.position_embedding_strategy is not None:
            raise UserError(
                f"{self.path}: peft.{section}.position_embedding_strategy="
                f"{made.position_embedding_strategy!r}: position embeddings of tied adapters are "
                f"not read from NeMo's files"
            )
        return {"method": method.__name__, **asdict(made)}

    def _base(self) -> tuple[TransformerConfig, Layout]:
        apart = "model.decoder.layers.0.input_layernorm.weight" in self.source.names
        layout = Layout(self.variant, rows=0, norms_apart=apart)
        return nemo_config.to_config(self.settings, self.path, layout, 1)

    # ---- weights

    def _state(self, scheme: str, config: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
        if scheme == "selective":
            return self._parameters(names)
        dead = [name for name in names if DEAD in name]
        names = [name for name in names if name not in dead and not _is_table(name)]
        if config.get("weight_tying") is True:
            names = self._untied(names)
        state: dict[str, Tensor] = {}
        for name in names:
            key = from_nemo(name, self.variant)
            if key is None:
                raise UserError(f"{self.path}: {name} is at a place that no adapter of ours has")
            state[key] = self._converted(key, self.reader.read(name))
        if scheme == "lora":
            self._add_across(state, dead)
        return state

    def _untied(self, names: list[str]) -> list[str]:
        """Of the copies that layers share only the first layer's."""
        first = first_layers(names)
        for name, owner in first.items():
            if name != owner and not torch.equal(self.source.read(name), self.source.read(owner)):
                raise UserError(f"{self.path}: weight_tying=True, and {name} differs from {owner}")
        return [name for name in names if first.get(name, name) == name]

    def _converted(self, key: str, tensor: Tensor) -> Tensor:
        """The rows of LoRA's last product in our order."""
        if self.variant == "mcore" or not key.endswith("linear_out.weight"):
            return tensor
        if "self_attention.qkv." in key:
            reshape, _ = heads_of(*self.base())
            try:
                return reshape.join(reshape.parts([tensor]))
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{self.path}: {key} does not fit: {error}") from None
        config, layout = self.base() if ".mlp.fc1." in key else (None, None)
        if config is None or layout is None or not layout.split_glu:
            return tensor
        if len(tensor) != config.ffn_hidden_size:
            return tensor
        # NeMo's LoRA changes only the gate where gate and up are two tensors.
        return torch.cat([tensor, torch.zeros_like(tensor)])

    def _add_across(self, state: dict[str, Tensor], dead: list[str]) -> None:
        """Our LoRA has parts at a T5's cross-attention too: they add nothing, as nothing did."""
        for key in [key for key in state if ".self_attention.qkv.linear_in" in key]:
            if self.variant != "t5" or not key.startswith("decoder."):
                continue
            config, _ = self.base()
            a, layer = state[key], key.partition(".self_attention.")[0]
            number = layer.rpartition(".")[2]
            own = [name for name in dead if f".layers.{number}.{DEAD}linear_in" in name]
            a = self.reader.read(own[0]) if own else a
            for slot, rows in (
                ("query", config.query_size),
                ("key", config.key_size),
                ("value", config.key_size),
            ):
                state[f"{layer}.cross_attention.{slot}.linear_in.weight"] = a.clone()
                state[f"{layer}.cross_attention.{slot}.linear_out.weight"] = a.new_zeros(
                    rows, a.shape[0]
                )

    def _parameters(self, names: list[str]) -> dict[str, Tensor]:
        """Parameters of the base under our names."""
        config, layout = self.base()
        layers = [int(m[2]) for name in names if (m := LAYER.fullmatch(name))]
        if max(layers, default=0) >= config.num_layers + config.decoder_num_layers:
            raise UserError(f"{self.path}: num_layers={config.num_layers}, and {max(layers)} is in")
        ignored, left = is_no_weight(config), set(names)
        state = {}
        for ours, entry in nemo_table(config, layout).items():
            if left.issuperset(entry.names):
                tensors = [self.reader.read(name) for name in entry.names]
                try:
                    state[ours] = entry.reshape.join(entry.reshape.parts(tensors))
                except (RuntimeError, ValueError, IndexError) as error:
                    raise UserError(f"{self.path}: {ours} does not fit: {error}") from None
                left.difference_update(entry.names)
        if unknown := sorted(name for name in left if not ignored(name)):
            raise UserError(f"{self.path}: {unknown[0]} is no whole parameter of its model")
        return state


def _is_table(name: str) -> bool:
    """Whether it is what P-tuning's network makes, which NeMo keeps beside the network."""
    return name.endswith("ptuning_adapter.inference_table")
