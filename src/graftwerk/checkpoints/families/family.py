"""What one `model_type` of Hugging Face is to us: its configuration and its table, both ways."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from graftwerk.checkpoints.layout import AS_IS, Entry, Heads, Reshape, Table
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig
from graftwerk.models.config import RotaryScaling

# Hugging Face's names of activations, and those that say the same twice.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "relu2": "squared_relu",
}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


class Raw:
    """A `config.json` whose values are asked for by key.

    Raises:
        UserError: for keys that are missing and values that cannot be honoured.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, tensors: Set[str]):
        self.values, self.path, self.tensors = values, path, tensors

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            self.refuse(f"the key {key!r} is missing")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value; the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, what: str) -> NoReturn:
        """Raises the error that names the file."""
        raise UserError(f"{self.path}: {what}")

    def activation(self, key: str, default: str, gated: bool = False) -> str:
        """Our name of an activation, or of the gated one built on it."""
        name = self.get(key, default)
        ours = ACTIVATIONS.get(name) if isinstance(name, str) else None
        if ours is None or (gated and ours not in GATED):
            known = [theirs for theirs, our in ACTIVATIONS.items() if not gated or our in GATED]
            self.refuse(f"{key}={name!r} is not known: one of {', '.join(known)}")
        return GATED[ours] if gated else ours

    def rotary(self, base: str = "rope_theta", share: str = "partial_rotary_factor") -> dict:
        """The rotary fields of a `TransformerConfig`; old and new spellings."""
        rope = {**(self.get("rope_scaling", {})), **(self.get("rope_parameters", {}))}
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaling = None
        if kind == "linear":
            scaling = RotaryScaling(kind="linear", factor=float(rope["factor"]))
        elif kind == "llama3":
            scaling = RotaryScaling(
                kind="llama3",
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
            )
        elif kind != "default":
            self.refuse(f"rotary scaling {kind!r} is not supported; default, linear and llama3 are")
        fields: dict[str, Any] = {
            "position_embedding_type": "rope",
            "rotary_base": float(rope.get("rope_theta", self.get(base, 10000.0))),
            "rotary_scaling": scaling,
        }
        percentage = rope.get("partial_rotary_factor", self.get(share))
        if percentage is not None:
            fields["rotary_percentage"] = float(percentage)
        return fields


def hugging_face_activation(config: TransformerConfig) -> str:
    """Hugging Face's name of a config's activation, without its gate."""
    ours = next((plain for plain, gated in GATED.items() if gated == config.activation), None)
    ours = ours or config.activation
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def rope_keys(config: TransformerConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the spelling that all versions of transformers read."""
    keys: dict[str, Any] = {"rope_theta": config.rotary_base}
    scaling = config.rotary_scaling
    if scaling is not None and scaling.kind == "linear":
        keys["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        keys["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return keys


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Args:
        root: the module that holds the bare model; files of the bare model leave it out.
        classes: transformers' class for each head of ours; a GPT or T5 has the one of no head.
        to_config: a `config.json` to ours.
        from_config: ours to a `config.json`, without checking that it can say all.
        table: where each of our parameters lies, under the names with the root.
        ignored: names in files that are no weights: masks, tied copies.
    """

    model_type: str
    root: str
    classes: Mapping[str | None, str]
    to_config: Callable[[Raw], TransformerConfig]
    from_config: Callable[[TransformerConfig], dict[str, Any]]
    table: Callable[[TransformerConfig], Table]
    ignored: Callable[[str], bool] = lambda name: False


def heads_of(config: TransformerConfig, **how: bool) -> Heads:
    """The reshape of queries, keys and values."""
    per_group = config.num_attention_heads // config.num_query_groups
    return Heads((per_group, 1, 1), config.num_query_groups, config.kv_channels, **how)


def entries(
    ours: str, *theirs: str, bias: bool = True, reshape: Reshape = AS_IS
) -> dict[str, Entry]:
    """The weight of a module, and its bias where it has one."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {
        f"{ours}.{kind}": Entry(tuple(f"{name}.{kind}" for name in theirs), reshape)
        for kind in kinds
    }
