"""`AdapterSetup`: adapters and heads for the passes within a `with` block, of this thread alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from graftwerk.adapters.composition import BatchSplit, Composition, Fuse, Parallel, Stack, parse
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.plan import Plan
from graftwerk.errors import UserError

Setup = Composition | str | Sequence[str | Composition | Sequence[str]] | None


def composition_of(setup: Setup) -> Composition | None:
    """A composition as AdapterHub's methods take it: a block, a name, or names to be stacked.

    A string with brackets is a composition in writing: `"Stack(a, Parallel(b, c))"`. Names within a
    list of their own are fused: `[["a", "b"]]`.

    Raises:
        UserError: for a string that is none.
    """
    if setup is None or isinstance(setup, Composition):
        return setup
    if isinstance(setup, str):
        block = parse(setup) if "(" in setup else setup
        return Stack(block) if isinstance(block, str) else block
    children = [child if isinstance(child, str) else _inner(child) for child in setup]
    return Stack(*children) if children else None


def _inner(child: Composition | Sequence[str]) -> Composition | str:
    """A list within a list is a `Fuse`, as in the oldest versions."""
    return child if isinstance(child, Composition) else Fuse(*child)


def last_name(composition: Composition | str) -> str:
    """The adapter that comes last in a composition."""
    while not isinstance(composition, str):
        composition = composition.children[-1]
    return composition


def heads_of(composition: Composition | str | None) -> list[str]:
    """The heads that go with a composition by name: that of its last adapter, or of each branch."""
    if composition is None:
        return []
    while isinstance(composition, Stack):
        composition = composition.children[-1]
    if isinstance(composition, Parallel | BatchSplit):
        return [last_name(child) for child in composition.children]
    return [composition] if isinstance(composition, str) else []


def head_names(heads: str | Sequence[str] | Composition | None) -> list[str]:
    """Heads as AdapterHub's methods take them: a name, names, or a block of names."""
    if heads is None or isinstance(heads, str):
        return [heads] if heads else []
    if isinstance(heads, Composition):
        return [last_name(child) for child in heads.children]
    return list(heads)


class AdapterSetup:
    """Within it these adapters and heads answer, in any model that is called in this thread.

    Models that lack one of the adapters or heads raise a `UserError` when they are called.

    Args:
        adapter_setup: a composition, or what `set_active_adapters` takes.
        head_setup: a head's name or several; None: the heads that go with the adapters by name,
            otherwise the model's active ones.
        ignore_empty: take None as no setup at all, instead of refusing it.
    """

    _open: ContextVar[tuple["AdapterSetup", ...]] = ContextVar("adapter_setups", default=())

    def __init__(
        self,
        adapter_setup: Setup,
        head_setup: str | Sequence[str] | Composition | None = None,
        ignore_empty: bool = False,
    ):
        self.composition = composition_of(adapter_setup)
        self.heads = head_names(head_setup)
        if self.composition is None and not ignore_empty:
            raise UserError("AdapterSetup(None): name an adapter, or set ignore_empty=True")
        self._plans: dict[tuple[Any, ...], Plan] = {}

    @classmethod
    def current(cls) -> "AdapterSetup | None":
        """The innermost setup of this thread that names adapters."""
        return next((each for each in reversed(cls._open.get()) if each.composition), None)

    def __enter__(self) -> "AdapterSetup":
        self._open.set((*self._open.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.set(self._open.get()[:-1])

    @contextmanager
    def active_in(self, base: AdapterModel) -> Iterator[None]:
        """Makes the setup's adapters a model's active ones for a while; they are resolved once."""
        own = [*base.adapters.items(), *base.fusions.items()]
        skipped = base.plan.skip_layers
        key = (id(base), skipped, *((name, id(config)) for name, config in own))
        if key not in self._plans:
            self._plans[key] = base.planned(self.composition, skipped)
        with base.under(self._plans[key]):
            yield
