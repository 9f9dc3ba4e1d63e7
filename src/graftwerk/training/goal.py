"""What a learning stage trains: the whole model, or adapters and fusions under a composition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from graftwerk.adapters import FusionConfig, MethodConfig, Stack, methods_from_config
from graftwerk.adapters.composition import (
    BatchSplit,
    Composition,
    Fuse,
    MultiTask,
    Parallel,
    below,
    columns,
    fusions,
    names,
    parse,
)
from graftwerk.adapters.configs import FUSION, schemes
from graftwerk.checkpoints.adapter_form import AdapterFile
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig
from graftwerk.training.adapter_drop import LayerChoice
from graftwerk.training.frozen import columns_of, read_frozen
from graftwerk.training.sweep import Point, points_of

KEY = "model.peft.composition"
UNFIT: dict[type[Composition], str] = {
    BatchSplit: "its numbers are those of one batch, and a stage has batches of several sizes",
    MultiTask: "it needs the task of each row, which no stage gives",
}


@dataclass(frozen=True)
class Goal:
    """What a run trains. Where there are no `methods` and no `fusion`, it is the whole model.

    Args:
        methods: the adapters that are trained, by name.
        fusion: how fusions are made that are trained; None: none is.
        frozen: files of adapters and fusions of earlier stages, by name.
        composition: what is active in training.
        drop: the layers in which adapters do nothing.
        sweep: the points of a sweep in one pass, which are all that is trained.
    """

    methods: list[tuple[str, MethodConfig]]
    fusion: FusionConfig | None = None
    frozen: Mapping[str, str] = field(default_factory=dict)
    composition: Composition | str | None = None
    drop: LayerChoice | None = None
    sweep: tuple[Point, ...] = ()

    @classmethod
    def of(cls, model: Any, stage: str) -> "Goal":
        """By the `model` section of a stage; no file is looked at yet.

        Raises:
            UserError: for keys and values that do not go together.
        """
        sweep = points_of(model) if stage == "peft" else ()
        methods = [(point.name, point.method) for point in sweep]
        methods = methods or methods_from_config(model, stage)
        peft = (model.get("peft") or {}) if stage == "peft" else {}
        fusion = None
        if FUSION in (schemes(peft) if stage == "peft" else ()):
            fusion = fusion_of(peft.get("fusion_tuning"))
        items = peft.get("adapters") or []
        frozen = {str(each["name"]): str(each["path"]) for each in items}
        given = peft.get("composition")
        goal = cls(
            methods,
            fusion,
            frozen,
            None if given is None else parse(str(given)),
            _drop(peft.get("adapter_drop"), model.get("seed", 0)),
            sweep,
        )
        if len(frozen) < len(items):
            raise UserError("model.peft.adapters: two of them have one name: name each once")
        return goal._checked()

    @property
    def whole(self) -> bool:
        """Whether the whole model is trained."""
        return not self.methods and self.fusion is None

    @property
    def trained(self) -> list[str]:
        """The names of the adapters that are trained."""
        return [name for name, _ in self.methods]

    @cached_property
    def files(self) -> dict[str, AdapterFile]:
        """What the files of `frozen` hold; they are read once.

        Raises:
            UserError: where one cannot be read, or is not of the adapter that is named.
        """
        return read_frozen(self.frozen, "model.peft.adapters")

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens its adapters put before each row."""
        own = {name: getattr(method, "virtual_tokens", 0) for name, method in self.methods}
        lengths = {**dict.fromkeys(names(self.composition), 0), **columns_of(self.files), **own}
        return columns(self.composition, lengths)

    def fusions_to_train(self) -> list[str]:
        """The fusions of the composition that no file brings."""
        if self.fusion is None:
            return []
        loaded = {fusion.name for file in self.files.values() for fusion in file.fusions}
        found = dict.fromkeys(fuse.name for fuse in fusions(self.composition))
        new = [name for name in found if name not in loaded]
        if not new:
            raise UserError(
                f"model.peft.peft_scheme names fusion, but each fusion in {self.composition} is "
                f"in a file of model.peft.adapters and stays as it is: take that file out, or "
                f"name it in model.restore_path to go on training"
            )
        return new

    def _checked(self) -> "Goal":
        """This goal with its composition, the given one or that which goes without saying."""
        trained, frozen = self.trained, list(self.frozen)
        if self.whole:
            for key in ("composition", "frozen", "drop"):
                if getattr(self, key):
                    name = {"frozen": "adapters", "drop": "adapter_drop.layers"}.get(key, key)
                    raise UserError(
                        f"model.peft.{name}: the whole model is trained, which has no adapters: "
                        f"name a method in model.peft.peft_scheme"
                    )
            return self
        if both := sorted(set(trained) & set(frozen)):
            raise UserError(
                f"model.peft.adapters: {both[0]!r} is the name of an adapter that is trained here: "
                f"give one of them another name (model.peft.adapter_names)"
            )
        goal = self if self.composition is not None else self._with(self._plain())
        goal._check_members()
        return goal

    def _plain(self) -> Composition | str:
        """What is meant by no composition: frozen adapters, then trained ones, in one `Stack`.

        Those of a sweep are side by side.
        """
        members = [*self.frozen, *self.trained]
        if self.fusion is not None:
            if self.trained or not self.frozen:
                raise UserError(
                    f"{KEY} is missing: peft_scheme names fusion, and it says what is fused, such "
                    f'as "Fuse(a, b)"'
                )
            return Fuse(*members)
        if self.sweep:
            beside = Parallel(*self.trained)
            return Stack(*self.frozen, beside) if self.frozen else beside
        return members[0] if len(members) == 1 else Stack(*members)

    def _with(self, composition: Composition | str) -> "Goal":
        return replace(self, composition=composition)

    def _check_members(self) -> None:
        trained, frozen, used = self.trained, list(self.frozen), list(names(self.composition))
        check_blocks(self.composition, KEY)
        for name in used:
            if name not in (*trained, *frozen):
                have = ", ".join([*trained, *frozen])
                raise UserError(
                    f"{KEY}={self.composition}: {name!r} is neither trained here nor in "
                    f"model.peft.adapters: there are {have or 'none'}"
                )
        if idle := [name for name in trained if name not in used]:
            raise UserError(
                f"{KEY}={self.composition}: {idle[0]!r} is trained and not in it: name it there, "
                f"or take its method out of model.peft.peft_scheme"
            )
        if self.fusion is not None and not list(fusions(self.composition)):
            raise UserError(
                f"{KEY}={self.composition}: peft_scheme names fusion, and there is no Fuse in it"
            )


def check_blocks(composition: Composition | str | None, key: str) -> None:
    """Raises a UserError for blocks that need what a stage's batches do not have."""
    for block, reason in UNFIT.items():
        if below(composition, block):
            raise UserError(f"{key}={composition}: no {block.__name__} in a stage: {reason}")


def check_layers(config: TransformerConfig, layers: Sequence[int], key: str) -> None:
    """Raises a UserError for layers, numbered from 0, that the model does not have."""
    depth = _depth(config)
    if beyond := [layer for layer in layers if layer >= depth]:
        raise UserError(f"{key}: {beyond} are beyond the model's layers, 0 to {depth - 1}")


def check_selection(config: TransformerConfig, method: MethodConfig) -> None:
    """Raises a UserError for layers of `layer_selection` that the model does not have."""
    depth = _depth(config)
    if unknown := [n for n in method.layer_selection or () if not 1 <= n <= depth]:
        raise UserError(
            f"layer_selection of {type(method).__name__}: {unknown} are none of the model's "
            f"layers, 1 to {depth}"
        )


def _depth(config: TransformerConfig) -> int:
    return config.num_layers + (config.decoder_num_layers if config.architecture == "t5" else 0)


def fusion_of(block: Mapping[Any, Any] | None) -> FusionConfig:
    """The configuration of a `fusion_tuning` section: the preset's, with what is not null.

    Raises:
        UserError: for keys and values that are not known.
    """
    given = {key: value for key, value in (block or {}).items() if value is not None}
    preset = FusionConfig.named(given.pop("preset", "dynamic"))
    known = {each.name: getattr(preset, each.name) for each in fields(FusionConfig)}
    for key in given:
        if key not in known:
            raise UserError(
                f"model.peft.fusion_tuning.{key} is not known: use preset, {', '.join(known)}"
            )
    return FusionConfig(**{**known, **given})


def _drop(block: Mapping[Any, Any] | None, seed: int) -> LayerChoice | None:
    layers = (block or {}).get("layers")
    if layers is None:
        return None
    return LayerChoice(layers if isinstance(layers, int) else list(layers), seed)
