"""The shape of a transformer, in the field names of Megatron and NeMo."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from graftwerk.errors import UserError

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "geglu_tanh", "reglu")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer. Sizes count features; every one is of the whole model.

    `kv_channels` is the size of one head, `num_query_groups` the number of key and value heads.
    Activations that end in `glu` are gated: the first MLP projection holds gate and up together.

    Raises:
        UserError: for sizes that do not fit each other and names that are not known.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    max_position_embeddings: int
    num_query_groups: int = 0  # 0: as many as heads
    kv_channels: int = 0  # 0: hidden_size / num_attention_heads
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    layernorm_epsilon: float = 1e-5
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    rotary_base: float = 10000.0
    activation: str = "gelu_tanh"
    bias: bool = True  # on the output projections and in the MLP
    qkv_bias: bool = True
    share_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.num_query_groups:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if not self.kv_channels:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"model.hidden_size={self.hidden_size} does not divide by "
                    f"num_attention_heads={self.num_attention_heads}: change one or set kv_channels"
                )
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide by "
                f"num_query_groups={self.num_query_groups}"
            )
        self._check_name("activation", ACTIVATIONS)
        self._check_name("normalization", ("layernorm", "rmsnorm"))
        self._check_name("position_embedding_type", ("learned_absolute", "rope", "none"))

    def _check_name(self, field: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, field) not in allowed:
            value, names = getattr(self, field), ", ".join(allowed)
            raise UserError(f"model.{field}={value!r} is not known: use one of {names}")

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with a second projection."""
        return self.activation.removesuffix("_tanh").endswith("glu")

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_size(self) -> int:
        """Features of all key (or value) heads together."""
        return self.num_query_groups * self.kv_channels

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for a YAML file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransformerConfig":
        """The config that holds these values; keys that it does not know are left aside."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})
