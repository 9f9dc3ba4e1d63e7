"""Selective tuning: some of the base's own parameters, trained as they are (NeMo's `selective`)."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from graftwerk.adapters.part import MethodSettings, Part
from graftwerk.adapters.slots import Site
from graftwerk.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(MethodSettings):
    """Parameters of the base whose names match one of the patterns (`*` stands for anything).

    The adapter holds copies: while it is active they stand in for the originals.
    """

    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parameters:
            raise UserError(
                "model.peft.selective_tuning.tunable_base_param_names is empty: name parameters of "
                "the base, such as '*.mlp.linear_fc2.bias' or '*layernorm*'"
            )

    def places_asked(self) -> str:
        said = f"{super().places_asked()} and the names {', '.join(self.parameters)}"
        return f"{said} (of parameters: whole parts of their names, or patterns with *)"

    def create(self, site: Site) -> Part | None:
        """None: the method has no parts."""
        return None

    def replaces(self, name: str) -> bool:
        """Whether the adapter has its own copy of this parameter of the base."""
        layer = name.partition(".layers.")[2].partition(".")[0]
        chosen = self.layer_selection
        if layer.isdecimal() and chosen is not None and int(layer) + 1 not in chosen:
            return False
        return any(fnmatchcase(name, pattern) for pattern in self.parameters)
