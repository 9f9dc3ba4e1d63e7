"""AdapterHub's methods for adapters and fusions, on a model with heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graftwerk.adapterhub.combining import average
from graftwerk.adapterhub.config_base import AdapterConfig
from graftwerk.adapterhub.config_strings import DEFAULT_ADAPTER_CONFIG
from graftwerk.adapterhub.context import Setup, composition_of, heads_of
from graftwerk.adapterhub.fusion_configs import AdapterFusionConfig
from graftwerk.adapterhub.hub_names import find_model
from graftwerk.adapterhub.model import HeadedModel
from graftwerk.adapters.composition import Composition, Fuse, fusions, names
from graftwerk.adapters.configs import MethodConfig, PromptTuningConfig
from graftwerk.adapters.merge import Merge, merge
from graftwerk.adapters.methods.prompt import PromptTuning
from graftwerk.adapters.sharing import share_matrices
from graftwerk.checkpoints import load_tokenizer
from graftwerk.checkpoints.adapterhub_config import hub_config, method_of
from graftwerk.errors import UserError


class AdapterMethods(HeadedModel):
    """Adding, activating, training, combining and merging."""

    _merged: Merge | None = None

    # ---- adding and deleting

    def add_adapter(
        self,
        adapter_name: str,
        config: Mapping[str, Any] | str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Adds an adapter with fresh weights.

        Args:
            config: a configuration, its name or string, or a dictionary; None: `seq_bn`.
            overwrite_ok: replace an adapter of this name.
            set_active: activate it, too.

        Raises:
            UserError: for a name that is taken, and a configuration that does not fit the model.
        """
        said = AdapterConfig.load(DEFAULT_ADAPTER_CONFIG if config is None else config)
        method = method_of(said.to_dict(), self.base)
        if overwrite_ok and adapter_name in self.base.adapters:
            self.base.delete_adapter(adapter_name)
        seed = said.get("init_weights_seed")
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.base.add_adapter(adapter_name, method, head=False)
        self._begin_with_text(adapter_name)
        if set_active:
            self.set_active_adapters(adapter_name)

    def _begin_with_text(self, name: str) -> None:
        """Prompts that begin as a text get the embeddings of its tokens."""
        method = self.base.adapters[name]
        for config in getattr(method, "configs", (method,)):
            if not isinstance(config, PromptTuningConfig) or config.prompt_init != "from_string":
                continue
            tokenizer = load_tokenizer(find_model(self.config.name_or_path))
            ids = tokenizer.encode(config.prompt_init_text or "", add_special_tokens=False)
            words = self.base.embedding.word_embeddings.weight[ids]
            for _, _, part in self.base.parts(name):
                if isinstance(part, PromptTuning):
                    part.begin_with(words)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and the fusions with it; its head stays."""
        self.base.delete_adapter(adapter_name)

    def add_adapter_fusion(
        self,
        adapter_names: Setup,
        config: Mapping[str, Any] | str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
        *,
        name: str | None = None,
    ) -> None:
        """Adds a fusion of adapters: names, one string of them joined by commas, or a `Fuse`.

        Args:
            config: "dynamic" (the default), "static", or a dictionary of `AdapterFusionConfig`.
            name: what it is called anyway, the adapters' names joined by commas.

        Raises:
            UserError: for another name, a fusion that is there already, and unknown adapters.
        """
        members = _members(adapter_names)
        key = self._fusion_key(adapter_names)
        if name not in (None, key):
            raise UserError(
                f"name={name!r}: a fusion is called after what it fuses: leave it out, or say "
                f"{key!r}"
            )
        if overwrite_ok and key in self.base.fusions:
            self.base.delete_fusion(key)
        self.base.add_fusion(members, AdapterFusionConfig.load(config))
        if set_active:
            self._activate_fusion(key)

    def delete_adapter_fusion(self, adapter_names: Setup) -> None:
        """Removes a fusion, named as in `add_adapter_fusion`."""
        self.base.delete_fusion(self._fusion_key(adapter_names))

    def _fusion_key(self, adapter_names: Setup) -> str:
        return ",".join(_members(adapter_names))

    def _activate_fusion(self, key: str) -> None:
        self.set_active_adapters(Fuse(*key.split(",")))

    # ---- what is active

    @property
    def active_adapters(self) -> Composition | str | None:
        """The composition that is active; set it to any that `set_active_adapters` takes."""
        return self.base.active

    @active_adapters.setter
    def active_adapters(self, adapter_setup: Setup) -> None:
        self.set_active_adapters(adapter_setup)

    def set_active_adapters(
        self, adapter_setup: Setup, skip_layers: Sequence[int] | None = None
    ) -> None:
        """Activates adapters, and the heads that are called as they are, where there are such.

        Args:
            adapter_setup: a name, names (a stack), a block, or its writing; None: no adapter.
            skip_layers: layers, numbered from 0, in which adapters do nothing.

        Raises:
            UserError: for unknown names and compositions that have no meaning.
        """
        composition = composition_of(adapter_setup)
        self.base.set_active(composition, tuple(skip_layers or ()))
        heads = heads_of(composition)
        if heads and all(name in self.heads for name in heads):
            self.active_head = heads

    # ---- what is trained

    def train_adapter(self, adapter_setup: Setup) -> None:
        """Activates adapters and freezes all but them and the prediction heads."""
        composition = composition_of(adapter_setup)
        self.set_active_adapters(composition)
        self.base.train_only(adapters=tuple(dict.fromkeys(names(composition))))
        self.heads.requires_grad_(True)

    def train_adapter_fusion(self, adapter_setup: Setup, unfreeze_adapters: bool = False) -> None:
        """Activates a fusion and freezes all but it and the prediction heads.

        Args:
            adapter_setup: a composition that holds a `Fuse`; a list of names is one.
            unfreeze_adapters: train the adapters too.

        Raises:
            UserError: where there is no fusion in it.
        """
        composition = _fused(adapter_setup)
        self.set_active_adapters(composition)
        adapters = tuple(dict.fromkeys(names(composition))) if unfreeze_adapters else ()
        keys = tuple(dict.fromkeys(fuse.name for fuse in fusions(composition)))
        self.base.train_only(adapters=adapters, fusions=keys)
        self.heads.requires_grad_(True)

    # The names of older versions.
    add_fusion = add_adapter_fusion
    train_fusion = train_adapter_fusion
    delete_fusion = delete_adapter_fusion

    def freeze_model(self, freeze: bool = True) -> None:
        """Freezes the base's own weights, or makes them trainable."""
        for _, parameter in self.base.base_parameters():
            parameter.requires_grad_(not freeze)

    def share_parameters(
        self, adapter_names: Setup, reference_adapter_name: str | None = None
    ) -> None:
        """Gives adapters of several tasks (MTL-LoRA) one A and one B in each place.

        Args:
            reference_adapter_name: whose these are; None: the first one's.
        """
        share_matrices(self.base, _members(adapter_names), reference_adapter_name)

    # ---- where weights are

    def adapter_to(
        self,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Moves an adapter, and the head that is called as it is, to a device and a type."""
        for _, _, part in self.base.parts(name):
            part.to(device=device, dtype=dtype)
        if name in self.heads:
            self.heads[name].to(device=device, dtype=dtype)

    def adapter_fusion_to(
        self,
        adapter_names: Setup,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Moves a fusion, named as in `add_adapter_fusion`, to a device and a type."""
        for _, _, layer in self.base.fusion_layers(self._fusion_key(adapter_names)):
            layer.to(device=device, dtype=dtype)

    # ---- combining and merging

    def average_adapter(
        self,
        adapter_name: str,
        adapter_list: Sequence[str],
        weights: Sequence[float] | None = None,
        combine_strategy: str = "linear",
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
        svd_rank: int | None = None,
    ) -> None:
        """Adds an adapter whose weights are a mean of others' of one configuration.

        Args:
            weights: one an adapter; None: equal ones.
            combine_strategy: `linear`; of LoRA also `lora_linear_only_negate_b` (negative weights
                negate B alone) and `lora_delta_w_svd` (the best approximation of the mean of BA).
            normalize_weights: divide the weights by their sum.
            svd_rank: of `lora_delta_w_svd`'s result; None: the adapters' own.

        Raises:
            UserError: for adapters of different configurations, and a strategy that does not fit.
        """
        method, state = average(
            self.base, adapter_list, weights, combine_strategy, normalize_weights, svd_rank
        )
        if overwrite_ok and adapter_name in self.base.adapters:
            self.base.delete_adapter(adapter_name)
        self.base.add_adapter(adapter_name, method, head=False)
        self.base.load_adapter_state(adapter_name, state)
        if set_active:
            self.set_active_adapters(adapter_name)

    def merge_adapter(self, name: str) -> None:
        """Computes an adapter (LoRA, IA3) into the base's weights; what was active goes inactive.

        Raises:
            UserError: where one is merged already, or it cannot be.
        """
        if self._merged is not None:
            raise UserError(f"{self._merged.active} is merged already: call reset_adapter() first")
        self.set_active_adapters(name)
        self._merged = merge(self.base)

    def reset_adapter(self) -> None:
        """Puts the base's weights back, to the bit, and makes the merged adapter active again."""
        if self._merged is None:
            raise UserError("no adapter is merged: merge_adapter(name) comes first")
        self._merged.undo()
        self._merged = None

    # ---- telling

    def adapter_summary(self, as_dict: bool = False) -> str | list[dict[str, Any]]:
        """A table of the adapters and the whole model: sizes, what is active and trained.

        Args:
            as_dict: a list of dictionaries instead of text.
        """
        whole = sum(parameter.numel() for _, parameter in self.base.base_parameters())
        active = set(names(self.active_adapters))
        rows = []
        for name, method in self.base.adapters.items():
            parameters = {
                id(p): p for _, _, part in self.base.parts(name) for p in part.parameters()
            }
            size = sum(parameter.numel() for parameter in parameters.values())
            rows.append(
                {
                    "name": name,
                    "architecture": self._architecture(method),
                    "#param": size,
                    "%param": 100 * size / whole,
                    "active": name in active,
                    "train": any(p.requires_grad for p in parameters.values()),
                }
            )
        trained = any(parameter.requires_grad for _, parameter in self.base.base_parameters())
        last = {"name": "Full model", "architecture": "", "#param": whole, "%param": 100.0}
        rows.append({**last, "active": True, "train": trained})
        return rows if as_dict else _table(rows)

    def _architecture(self, method: MethodConfig) -> str:
        """AdapterHub's word for a method; our own for one that it does not have."""
        try:
            return hub_config(method, self.base).get("architecture") or "bottleneck"
        except UserError:
            return type(method).__name__.removesuffix("Config")


def _members(adapter_names: Setup) -> list[str]:
    if isinstance(adapter_names, str):
        return [name.strip() for name in adapter_names.split(",")]
    if isinstance(adapter_names, Composition):
        found = list(fusions(adapter_names))
        return found[0].name.split(",") if found else list(names(adapter_names))
    return list(names(composition_of(adapter_names)))


def _fused(adapter_setup: Setup) -> Composition:
    """The composition of a fusion's training: a list of names is a `Fuse`."""
    composition = composition_of(adapter_setup)
    plain = not isinstance(adapter_setup, Composition | str)
    if plain and composition is not None and not any(fusions(composition)):
        composition = Fuse(*composition)
    if composition is None or not any(fusions(composition)):
        raise UserError(f"{adapter_setup}: there is no Fuse in it, whose weights would be trained")
    return composition


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    line = "{:<24} {:<20} {:>13} {:>9} {:>6} {:>5}"
    bar = "=" * 82
    head = line.format("Name", "Architecture", "#Param", "%Param", "Active", "Train")
    body = [
        line.format(
            row["name"],
            row["architecture"],
            f"{row['#param']:,}",
            f"{row['%param']:.3f}",
            int(row["active"]),
            int(row["train"]),
        )
        for row in rows
    ]
    return "\n".join([bar, head, "-" * 82, *body[:-1], "-" * 82, body[-1], bar])
