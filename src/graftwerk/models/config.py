"""The shape of a transformer, in the field names of Megatron and NeMo."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from graftwerk.errors import UserError

ARCHITECTURES = ("gpt", "t5", "bert")
ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "relu",
    "silu",
    "squared_relu",
    "swiglu",
    "geglu",
    "geglu_tanh",
    "reglu",
)
NORMALIZATIONS = ("layernorm", "layernorm1p", "rmsnorm")
POSITIONS = ("learned_absolute", "rope", "relative", "none")
POSITIVE = ("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
LARGEST = {"num_layers": 1000, "decoder_num_layers": 1000}  # models have some hundred at most
LARGEST_SIZE = 1 << 31
LARGEST_NUMBER = 1e12
HEADS = ("masked_lm", "classification", "tagging", "question_answering")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are changed for longer texts.

    `linear`: positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3`: only
    wave lengths above `original_max_position_embeddings / high_freq_factor` are stretched, fully
    from `original_max_position_embeddings / low_freq_factor` on (LLaMA 3.1's model card).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder (`gpt`), an encoder and a decoder (`t5`), or an encoder (`bert`).

    Sizes count features; every one is of the whole model. `kv_channels` is the size of one head,
    `num_query_groups` the number of key and value heads. Activations that end in `glu` are gated:
    the first MLP projection holds gate and up together.

    Raises:
        UserError: for sizes that do not fit each other and names that are not known.
    """

    architecture: Literal["gpt", "t5", "bert"] = "gpt"
    vocab_size: int
    num_layers: int  # of the encoder in a t5
    decoder_num_layers: int = 0  # t5 only; 0: as many as the encoder has
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    max_position_embeddings: int  # tokens that positions reach; 0: no limit
    num_query_groups: int = 0  # 0: as many as heads
    kv_channels: int = 0  # 0: hidden_size / num_attention_heads

    # The layer.
    transformer_block_type: Literal["pre_ln", "post_ln"] = "pre_ln"
    parallel_residual: bool = False  # attention and MLP side by side
    shared_layernorm: bool = False  # ... both behind one norm
    normalization: Literal["layernorm", "layernorm1p", "rmsnorm"] = "layernorm"
    layernorm_epsilon: float = 1e-5
    final_layernorm: bool = True
    activation: str = "gelu_tanh"
    bias: bool = True  # on the attention's output projection
    qkv_bias: bool = True
    mlp_bias: bool | None = None  # None: as `bias`
    qk_layernorm: bool = False  # RMS norm of each query and key head
    normalize_attention_scores: bool = True  # divide scores by sqrt(kv_channels)
    scale_by_layer: bool = False  # ... and by the layer's number from 1
    window_size: int = 0  # tokens that a query sees back, itself included; 0: all
    window_layers: tuple[int, ...] | None = None  # layers with the window; None: all

    # Positions.
    position_embedding_type: Literal["learned_absolute", "rope", "relative", "none"] = (
        "learned_absolute"
    )
    position_offset: int = 0  # rows of the table before that of position 0
    rotary_base: float = 10000.0
    rotary_percentage: float = 1.0  # of a head's features
    rotary_interleaved: bool = False  # neighbours are turned, not halves
    rotary_scaling: RotaryScaling | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    # Into the layers and out of them.
    embedding_size: int = 0  # of word embeddings; 0: hidden_size, otherwise projected to it
    embedding_layernorm: bool = False
    num_token_types: int = 0
    share_embeddings_and_output_weights: bool = True
    output_bias: bool = False
    output_scale: float = 1.0  # of hidden states before the output layer
    pooler: bool = False
    head: str | None = None  # bert only: one of HEADS
    num_labels: int = 0  # of the heads `classification` and `tagging`
    decoder_start_token_id: int = 0  # t5 only: what a target's decoder reads first

    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_numbers()
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
        if self.mlp_bias is None:
            object.__setattr__(self, "mlp_bias", self.bias)
        if self.architecture == "t5" and not self.decoder_num_layers:
            object.__setattr__(self, "decoder_num_layers", self.num_layers)
        self._check_name("architecture", ARCHITECTURES)
        self._check_name("activation", ACTIVATIONS)
        self._check_name("normalization", NORMALIZATIONS)
        self._check_name("position_embedding_type", POSITIONS)
        self._check_name("transformer_block_type", ("pre_ln", "post_ln"))
        self._check_name("head", (None, *HEADS))

    def _check_numbers(self) -> None:
        """Numbers and switches come from files: each must be of its kind, and none absurd."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                least = 1 if field.name in POSITIVE else 0
                most = LARGEST.get(field.name, LARGEST_SIZE)
                right = type(value) is int and least <= value <= most
                needed = f"a whole number from {least} to {most}"
            elif field.type is float:
                most = 1.0 if field.name.endswith("dropout") else LARGEST_NUMBER
                right = isinstance(value, int | float) and 0 <= value <= most
                needed = f"a number from 0 to {most:g}"
            elif field.type is bool:
                right, needed = isinstance(value, bool), "true or false"
            else:
                continue
            if not right:
                raise UserError(f"model.{field.name}={value!r} must be {needed}")

    def _check_name(self, field: str, allowed: tuple[str | None, ...]) -> None:
        if getattr(self, field) not in allowed:
            value, names = getattr(self, field), ", ".join(str(name) for name in allowed)
            raise UserError(f"model.{field}={value!r} is not known: use one of {names}")

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with a second projection."""
        return self.activation.removesuffix("_tanh").endswith("glu")

    @property
    def rotary_size(self) -> int:
        """Features of a head that rotary positions turn."""
        return int(self.kv_channels * self.rotary_percentage)

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
        values = asdict(self)
        if self.window_layers is not None:
            values["window_layers"] = list(self.window_layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransformerConfig":
        """The config that holds these values; keys that it does not know are left aside."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in values.items() if key in known}
        if values.get("rotary_scaling") is not None:
            values["rotary_scaling"] = RotaryScaling(**values["rotary_scaling"])
        if values.get("window_layers") is not None:
            values["window_layers"] = tuple(values["window_layers"])
        return cls(**values)
