"""What every model with slots can do: hold adapters, compose them, give and take their weights."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.adapters.composition import (
    Composition,
    names,
    place_prompts,
    resolve,
    widening,
    width,
)
from graftwerk.adapters.configs import MethodConfig
from graftwerk.adapters.heads import Heads
from graftwerk.adapters.part import Part
from graftwerk.adapters.replacements import Replacements
from graftwerk.adapters.slots import Slot, slots_of
from graftwerk.errors import UserError


class AdapterModel(nn.Module):
    """A model whose layers own slots. What is active is one expression, held here."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, MethodConfig] = {}
        self.active: Composition | str | None = None
        self.width = 1  # copies of the batch that the active composition needs
        self.widen_at: int | None = None  # the layer before which the batch is repeated
        self.virtual_tokens = 0  # columns that active prompts put before every row
        self.replacements = Replacements()  # copies of the base's parameters that adapters train

    def add_adapter(self, name: str, config: MethodConfig, head: bool = True) -> None:
        """Creates an adapter's part in each slot that its method matches; activates nothing.

        Parts are float32 on the device of the model's weights. On a model with a head for labels
        the adapter gets its own copy of that, unless `head` is False.

        Raises:
            UserError: for a name that is taken or not usable.
        """
        if name in self.adapters:
            raise UserError(f"adapter {name!r} exists already: choose another name, or delete it")
        if not name.replace("-", "_").isidentifier() or hasattr(nn.ModuleDict, name):
            raise UserError(
                f"adapter name {name!r}: use letters, digits, '_' and '-', and no word of "
                f"torch.nn.ModuleDict such as 'keys' or 'train'"
            )
        device = next(self.parameters()).device
        made: list[tuple[Slot, Part]] = []
        for path, slot in slots_of(self).items():
            part = config.create(slot.site) if config.selects(slot.site) else None
            if part is not None:
                part.attach(self.get_submodule(path.rpartition(".")[0]))
                made.append((slot, part))
        config.tie([(slot.site, part) for slot, part in made])
        replaced = {key: p for key, p in self.base_parameters() if config.replaces(key)}
        if not made and not replaced:
            raise UserError(
                f"adapter {name!r}: {type(config).__name__} with layer_selection="
                f"{config.layer_selection} has no place in this model"
            )
        for slot, part in made:
            slot.adapter_layer[name] = part.to(device).train(slot.training)
        if replaced:
            self.replacements.add(name, replaced)
        if head and self.label_head is not None:
            heads = self._heads or Heads(self.get_submodule("head"))
            heads.add(name)
            self.head = heads
        self.adapters[name] = config

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter's parts; one that is active is switched off first."""
        self._check_known(name)
        if name in names(self.active):
            self.set_active(None)
        for slot in slots_of(self).values():
            if name in slot.adapter_layer:
                del slot.adapter_layer[name]
        self.replacements.remove(name)
        heads = self._heads
        if heads is not None and heads.remove(name):
            self.head = heads.own
        del self.adapters[name]

    def set_active(self, composition: Composition | str | None) -> None:
        """Makes a composition the active one: every slot learns what it has to do.

        Raises:
            UserError: for a name that no adapter has.
        """
        for name in names(composition):
            self._check_known(name)
        slots = slots_of(self).values()
        prompts = [self.prompt_length(name) for name in names(composition)]
        virtual = place_prompts(composition, dict(zip(names(composition), prompts, strict=True)))
        self.replacements.set_active(self, composition)
        for slot in slots:
            for name, part in slot.adapter_layer.items():
                if name in virtual.starts:
                    part.start = virtual.starts[name]  # type: ignore[assignment]
            slot.active = resolve(composition, dict(slot.adapter_layer.items()))
            slot.active_names = tuple(names(composition))
        if self._heads is not None:
            self._heads.set_active(composition)
        self.active = composition
        self.virtual_tokens = virtual.total
        self.width = width(composition)
        wide = widening(composition)
        layers = [slot.site.layer for slot in slots if wide & set(slot.adapter_layer)]
        self.widen_at = min(layers, default=0) if wide else None

    def parts(self, name: str) -> Iterator[tuple[str, Slot, Part]]:
        """(slot path, slot, part) for every slot in which the adapter has one."""
        self._check_known(name)
        for path, slot in slots_of(self).items():
            if name in slot.adapter_layer:
                part = slot.adapter_layer[name]
                assert isinstance(part, Part)
                yield path, slot, part

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's own parameters by name, whatever adapters stand in for them at the moment."""
        for name, parameter in self.named_parameters(remove_duplicate=False):  # a copy is in two
            if ".adapter_layer." not in name and not name.startswith("replacements."):
                yield name, self.replacements.originals.get(name, parameter)

    def prompt_length(self, name: str) -> int:
        """Virtual tokens of an adapter: 0 for methods that have none."""
        return int(getattr(self.adapters[name], "virtual_tokens", 0))

    @property
    def label_head(self) -> str | None:
        """The kind of head that adapters have copies of: one for labels, not one for words."""
        kind = getattr(getattr(self, "config", None), "head", None)
        return None if kind == "masked_lm" else kind

    @property
    def _heads(self) -> Heads | None:
        head = getattr(self, "head", None)
        return head if isinstance(head, Heads) else None

    def head_of(self, name: str) -> nn.Module | None:
        """The adapter's own head, if it has one."""
        heads = self._heads
        return (
            heads.adapter_layer[name] if heads is not None and name in heads.adapter_layer else None
        )

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """The adapter's weights by `<slot path>.<parameter>`, whatever the adapter is called.

        Those of its head are `head.<parameter>`.
        """
        state: dict[str, Tensor] = {}
        seen: set[int] = set()  # parameters that parts share are kept under the first name
        for path, _, part in self.parts(name):
            for key, value in part.state_dict(keep_vars=True).items():
                if id(value) not in seen:
                    seen.add(id(value))
                    state[f"{path}.{key}"] = value.detach()
        state |= {key: value.detach() for key, value in self.replacements.of(name).items()}
        head = self.head_of(name)
        if head is not None:
            state |= {key: value.detach() for key, value in head.state_dict().items()}
        return state

    def load_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Copies weights into an adapter.

        Raises:
            UserError: naming every tensor that is missing, unknown or of another shape.
        """
        own = self.adapter_state(name)
        mistakes = [f"missing {key}" for key in own.keys() - state.keys()]
        mistakes += [f"unknown {key}" for key in state.keys() - own.keys()]
        mistakes += [
            f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ]
        if mistakes:
            shown = "; ".join(sorted(mistakes)[:6])
            more = f"; and {len(mistakes) - 6} more" if len(mistakes) > 6 else ""
            raise UserError(f"the weights do not fit adapter {name!r} on this model: {shown}{more}")
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])

    def adapter_config(self, name: str) -> dict[str, Any]:
        """The adapter's method and settings as plain values, for a file; the kind of its head."""
        self._check_known(name)
        config: Any = self.adapters[name]
        head = {} if self.head_of(name) is None else {"head": self.label_head}
        return {"method": type(config).__name__, **asdict(config), **head}

    def freeze_base(self) -> None:
        """Freezes every weight that is not an adapter's; adapters' and their heads' become
        trainable."""
        self.requires_grad_(False)
        for name in self.adapters:
            for _, _, part in self.parts(name):
                part.requires_grad_(True)
            for parameter in self.replacements.of(name).values():
                parameter.requires_grad_(True)
            head = self.head_of(name)
            if head is not None:
                head.requires_grad_(True)

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise UserError(f"no adapter is called {name!r}: this model has {have}")
