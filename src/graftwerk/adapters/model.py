"""What every model with slots can do: hold adapters, compose them, give and take their weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.adapters.composition import (
    Composition,
    Parallel,
    Split,
    below,
    columns,
    fusions,
    names,
    width,
)
from graftwerk.adapters.configs import MethodConfig, settings_of
from graftwerk.adapters.fusion import FusionConfig
from graftwerk.adapters.heads import Heads
from graftwerk.adapters.masks import Chance, name_dropouts
from graftwerk.adapters.part import Part
from graftwerk.adapters.plan import Plan, resolve_slot, unplaced_layers
from graftwerk.adapters.ranks import ALONE, Ranks
from graftwerk.adapters.replacements import Replacements
from graftwerk.adapters.slots import Action, Flow, Record, Slot, slots_of
from graftwerk.adapters.texts import Texts
from graftwerk.errors import UserError

# Compositions that hold in one thread only, by the identity of their model.
_setups: ContextVar[Mapping[int, Plan]] = ContextVar("setups", default={})  # noqa: B039


class AdapterModel(nn.Module):
    """A model whose layers own slots. What is active is one expression, held here."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, MethodConfig] = {}
        self.fusions: dict[str, FusionConfig] = {}
        self.replacements = Replacements()  # copies of the base's parameters that adapters train
        self.ranks: Ranks = ALONE  # the devices among which features are split
        self._plan = Plan()

    @property
    def device(self) -> torch.device:
        """Where its weights are; those that lie on other processes are on the meta device."""
        devices = [parameter.device for parameter in self.parameters()]
        return next((device for device in devices if device.type != "meta"), devices[0])

    @property
    def plan(self) -> Plan:
        """What the active composition comes to, in this thread."""
        return _setups.get().get(id(self), self._plan)

    @property
    def active(self) -> Composition | str | None:
        """The active composition."""
        return self.plan.composition

    @property
    def width(self) -> int:
        """Copies of the batch that the active composition needs."""
        return self.plan.width

    @property
    def virtual_tokens(self) -> int:
        """Columns that active prompts put before every row."""
        return self.plan.virtual_tokens

    def flow(
        self,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        rows: Tensor | None = None,
        offset: int = 0,
        chance: Tensor | None = None,
        texts: Texts | None = None,
    ) -> Flow:
        """What the slots of one pass are told; see `Flow`."""
        plan = self.plan
        return Flow(
            plan.actions,
            offset,
            rows,
            task_ids,
            record,
            plan.distances,
            plan.unplaced,
            chance=None if chance is None else Chance(chance),
            texts=texts,
        )

    def add_adapter(self, name: str, config: MethodConfig, head: bool = True) -> None:
        """Creates an adapter's part in each slot that its method matches; activates nothing.

        Parts are float32 on the device of the model's weights. On a model with a head for labels
        the adapter gets its own copy of that, unless `head` is False.

        Raises:
            UserError: for a name that is taken or not usable.
        """
        if name in self.adapters:
            raise UserError(f"adapter {name!r} exists already: choose another name, or delete it")
        usable = name.replace("-", "_").isidentifier() and not name.startswith("-")
        if not usable or hasattr(nn.ModuleDict, name):
            raise UserError(
                f"adapter name {name!r}: use letters, digits, '_' and '-', and no word of "
                f"torch.nn.ModuleDict such as 'keys' or 'train'"
            )
        device = self.device
        made: list[tuple[str, Slot, Part]] = []
        for path, slot in slots_of(self).items():
            part = config.create(slot.site) if config.selects(slot.site) else None
            if part is not None:
                part.site = slot.site
                made.append((path, slot, part.to(device)))
        config.tie([(slot.site, part) for _, slot, part in made])
        split = self.ranks.splitter()
        for path, slot, part in made:
            split(part, slot)
            part.attach(self.get_submodule(path.rpartition(".")[0]))
        replaced = {key: p for key, p in self.base_parameters() if config.replaces(key)}
        if not made and not replaced:
            raise UserError(f"adapter {name!r}: {config.places_asked()} has no place in this model")
        for _, slot, part in made:
            part.adapter = name
            name_dropouts(part, f"{slot.key}.{name}")
            slot.adapter_layer[name] = part.train(slot.training)
        if replaced:
            self.replacements.add(name, replaced)
        if head and self.label_head is not None:
            heads = self._heads or Heads(self.get_submodule("head"))
            heads.add(name)
            self.head = heads
        self.adapters[name] = config

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter's parts and fusions; one that is active is switched off first."""
        self._check_known(name)
        if name in names(self._plan.composition):
            self.set_active(None)
        for key in [key for key in self.fusions if name in key.split(",")]:
            self.delete_fusion(key)
        for slot in slots_of(self).values():
            if name in slot.adapter_layer:
                del slot.adapter_layer[name]
        self.replacements.remove(name)
        heads = self._heads
        if heads is not None and heads.remove(name):
            self.head = heads.own
        del self.adapters[name]

    def set_active(
        self, composition: Composition | str | None, skip_layers: Sequence[int] = ()
    ) -> None:
        """Makes a composition the active one.

        Args:
            skip_layers: layers, numbered from 0, in which no adapter does anything (AdapterDrop,
                Rueckle et al. 2021, arXiv:2010.11918).

        Raises:
            UserError: for a name that no adapter has, and a block that has no meaning for one.
        """
        plan = self._resolved(composition, skip_layers)
        self.replacements.set_active(self, composition)
        for slot in slots_of(self).values():
            slot.active = plan.actions.get(slot.key)
            slot.active_names = tuple(names(composition))
        self._plan = plan

    @contextmanager
    def setup(
        self, composition: Composition | str | None, skip_layers: Sequence[int] = ()
    ) -> Iterator[None]:
        """Within it a composition is the active one, for this thread (and async task) alone.

        Raises:
            UserError: as `planned`.
        """
        with self.under(self.planned(composition, skip_layers)):
            yield

    def planned(
        self, composition: Composition | str | None, skip_layers: Sequence[int] = ()
    ) -> Plan:
        """A composition resolved, to be used by `under` as often as wanted.

        It holds as long as no adapter of it is deleted.

        Raises:
            UserError: as `set_active`, and for adapters that train the base's own parameters.
        """
        for name in set(names(composition)) | set(names(self._plan.composition)):
            if self.replacements.of(name):
                raise UserError(
                    f"{composition}: adapter {name!r} trains parameters of the base itself, which "
                    f"all threads share: use set_active"
                )
        return self._resolved(composition, skip_layers)

    @contextmanager
    def under(self, plan: Plan) -> Iterator[None]:
        """Within it a plan of this model holds, for this thread (and async task) alone."""
        token = _setups.set({**_setups.get(), id(self): plan})
        try:
            yield
        finally:
            _setups.reset(token)

    def _resolved(self, composition: Composition | str | None, skip_layers: Sequence[int]) -> Plan:
        for name in names(composition):
            self._check_known(name)
        self.replacements.check(composition)
        methods = {name: self.adapters[name] for name in names(composition)}
        lengths = {name: method.columns for name, method in methods.items()}
        slots = [s for s in slots_of(self).values() if s.site.layer not in set(skip_layers)]
        wide, copies = below(composition, Parallel), width(composition)
        layers = [slot.site.layer for slot in slots if wide & set(slot.adapter_layer)]
        widen_at = min(layers, default=0) if wide else None
        actions = {}
        for slot in slots:
            widened = widen_at is not None and slot.site.layer >= widen_at
            action = resolve_slot(composition, slot, lengths, copies if widened else 1)
            if action is not None:
                actions[slot.key] = action
        parts = [part for name in methods for _, _, part in self.parts(name)]
        shape, virtual = getattr(self, "config", None), columns(composition, lengths)
        whole_text = any(part.whole_text for part in parts)
        both_ways = getattr(shape, "architecture", "gpt") != "gpt"
        own_prompts = bool(virtual) and (both_ways or whole_text)
        distances = self._distances(composition, methods)
        placed = distances != "none" and getattr(shape, "position_embedding_type", "") == "relative"
        split = bool(below(composition, Split))
        return Plan(
            composition,
            tuple(skip_layers),
            actions,
            None if self._heads is None else self._heads.resolve(composition),
            copies,
            widen_at,
            virtual,
            columns(composition, {name: method.shift for name, method in methods.items()}),
            any(part.whole_row for part in parts),
            whole_text or split or own_prompts or placed,
            own_prompts,
            distances,
            self._unplaced(methods, actions),
        )

    def _unplaced(
        self, methods: Mapping[str, MethodConfig], actions: Mapping[str, Action]
    ) -> frozenset[int]:
        """What the library that a single adapter is from does where layers have no prefix of it.

        Several follow what AdapterHub documents.
        """
        if len(methods) != 1:
            return frozenset()
        (method,) = methods.values()
        whole = method.distances != "keys"
        return frozenset() if whole else unplaced_layers(actions, slots_of(self).values())

    def _distances(
        self, composition: Composition | str | None, methods: Mapping[str, MethodConfig]
    ) -> str:
        """What the active prefixes' own settings say of a T5's table of distances."""
        kinds = {m.distances for m in methods.values() if m.distances is not None}
        config = getattr(self, "config", None)
        if len(kinds) > 1 and getattr(config, "position_embedding_type", None) == "relative":
            raise UserError(
                f"{composition}: its prefixes do not agree on a T5's distances, relative_positions "
                f"is {' and '.join(sorted(kinds))}: use prefixes of one kind"
            )
        return min(kinds, default="none")

    # ---- fusions

    def add_fusion(self, members: str | Iterable[str], config: FusionConfig | None = None) -> str:
        """Creates a fusion of adapters wherever one of them has a part; returns its name, `a,b`.

        Raises:
            UserError: for unknown adapters, fewer than one, a fusion that is there already, and
                adapters without a part that can be fused.
        """
        wanted = members.split(",") if isinstance(members, str) else list(members)
        for name in wanted:
            self._check_known(name)
        key, config = ",".join(wanted), config or FusionConfig()
        if key in self.fusions:
            raise UserError(f"fusion {key!r} exists already: delete it first")
        device = self.device
        made = {
            slot: config.create(slot.site)
            for slot in slots_of(self).values()
            if any(
                hasattr(slot.adapter_layer[n], "begin") for n in wanted if n in slot.adapter_layer
            )
        }
        if not made:
            raise UserError(
                f"fusion {key!r}: none of its adapters is a bottleneck, which is what can be fused"
            )
        split = self.ranks.splitter()
        for slot, module in made.items():
            module.name = key
            name_dropouts(module, f"{slot.key}.{key}")
            slot.fusion_layer[key] = module.to(device).train(slot.training)
            split(module, slot)
        self.fusions[key] = config
        return key

    def delete_fusion(self, key: str) -> None:
        """Removes a fusion; a composition that uses it is switched off first."""
        if key not in self.fusions:
            have = ", ".join(self.fusions) or "none"
            raise UserError(f"no fusion is called {key!r}: this model has {have}")
        if key in {fuse.name for fuse in fusions(self._plan.composition)}:
            self.set_active(None)
        for slot in slots_of(self).values():
            if key in slot.fusion_layer:
                del slot.fusion_layer[key]
        del self.fusions[key]

    def fusion_layers(self, key: str) -> Iterator[tuple[str, Slot, nn.Module]]:
        """(slot path, slot, fusion layer) for every slot in which the fusion has one."""
        if key not in self.fusions:
            have = ", ".join(self.fusions) or "none"
            raise UserError(f"no fusion is called {key!r}: this model has {have}")
        for path, slot in slots_of(self).items():
            if key in slot.fusion_layer:
                yield path, slot, slot.fusion_layer[key]

    def fusion_state(self, key: str) -> dict[str, Tensor]:
        """A fusion's weights by `<slot path>.<parameter>`."""
        return {
            f"{path}.{name}": value.detach()
            for path, _, layer in self.fusion_layers(key)
            for name, value in layer.state_dict(keep_vars=True).items()
        }

    def load_fusion_state(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Copies weights into a fusion.

        Raises:
            UserError: as `load_adapter_state`.
        """
        _copy_state(self.fusion_state(key), state, f"fusion {key!r}")

    def fusion_loss(self) -> Tensor:
        """The regularisation of the active fusions' value matrices, a scalar."""
        layers = [
            layer
            for key in {fuse.name for fuse in fusions(self.active)}
            for _, _, layer in self.fusion_layers(key)
            if next(layer.parameters()).device.type != "meta"  # it lies on another process
        ]
        return sum((layer.loss() for layer in layers), start=torch.zeros((), device=self.device))  # type: ignore[operator]

    # ---- parts

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
            own = ".adapter_layer." in name or ".fusion_layer." in name
            if not own and not name.startswith("replacements."):
                yield name, self.replacements.originals.get(name, parameter)

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

        Those of its head are `head.<parameter>`. Where features are split over devices, all of them
        ask at once, and each gets the whole tensors.
        """
        return {key: self.ranks.whole(value) for key, value in self._adapter_tensors(name).items()}

    def _adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """The same, as they lie on this device."""
        state: dict[str, Tensor] = {}
        seen: set[int] = set()  # parameters that parts share are kept under the first name
        for path, _, part in self.parts(name):
            for key, value in part.state_dict(keep_vars=True).items():
                if id(value) not in seen:
                    seen.add(id(value))
                    state[f"{path}.{key}"] = value
        head = self.head_of(name)
        own = {} if head is None else head.state_dict(keep_vars=True)
        return {**state, **self.replacements.of(name), **own}

    def load_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Copies weights, whole ones, into an adapter.

        Raises:
            UserError: naming every tensor that is missing, unknown or of another shape.
        """
        _copy_state(self._adapter_tensors(name), state, f"adapter {name!r}", self.ranks)

    def adapter_config(self, name: str) -> dict[str, Any]:
        """The adapter's method and settings as plain values, for a file; the kind of its head."""
        self._check_known(name)
        head = {} if self.head_of(name) is None else {"head": self.label_head}
        return {**settings_of(self.adapters[name]), **head}

    def freeze_base(self) -> None:
        """Freezes every weight that is not an adapter's; adapters' and their heads' become
        trainable."""
        self.train_only(self.adapters)

    def train_only(self, adapters: Iterable[str] = (), fusions: Iterable[str] = ()) -> None:
        """Makes the parameters of these adapters, their heads and these fusions trainable, and
        freezes everything else."""
        self.requires_grad_(False)
        for name in adapters:
            for _, _, part in self.parts(name):
                part.unfreeze()
            for parameter in self.replacements.of(name).values():
                parameter.requires_grad_(True)
            head = self.head_of(name)
            if head is not None:
                head.requires_grad_(True)
        for key in fusions:
            for _, _, layer in self.fusion_layers(key):
                layer.requires_grad_(True)

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise UserError(f"no adapter is called {name!r}: this model has {have}")


def _copy_state(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, ranks: Ranks = ALONE
) -> None:
    """Copies `state` into `own`; a UserError names what is missing, unknown or of another shape."""
    mistakes = [f"missing {key}" for key in own.keys() - state.keys()]
    mistakes += [f"unknown {key}" for key in state.keys() - own.keys()]
    mistakes += [
        f"{key} is {list(state[key].shape)}, not {list(ranks.shape(own[key]))}"
        for key in own.keys() & state.keys()
        if state[key].shape != ranks.shape(own[key])
    ]
    if mistakes:
        shown = "; ".join(sorted(mistakes)[:6])
        more = f"; and {len(mistakes) - 6} more" if len(mistakes) > 6 else ""
        raise UserError(f"the weights do not fit {what} on this model: {shown}{more}")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(ranks.own(value, state[key]))
