"""AdapterHub's configuration classes.

What a method computes is the engine's affair; a configuration here is AdapterHub's words for it,
and `to_dict` gives the dictionary that its files hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from graftwerk.adapterhub.config_base import CLASSES, AdapterConfig

LeaveOut = list[int]


@dataclass(frozen=True, eq=False)
class BnConfig(AdapterConfig):
    """Bottlenecks behind attention (`mh_adapter`), MLP (`output_adapter`), cross-attention."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | Mapping[str, float]  # of the hidden size; or by layer and "default"
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0  # or "learned", "channel"
    use_gating: bool = False
    residual_before_ln: bool | str = True  # or "post_add"
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None  # "nice" or "glow", on the embeddings
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: LeaveOut = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool | None = True
    shared_W_phm: bool | None = False
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    phm_c_init: str | None = "normal"
    phm_init_range: float | None = 0.0001
    learn_phm: bool | None = True
    hypercomplex_nonlinearity: str | None = "glorot-uniform"
    phm_rank: int | None = 1
    phm_bias: bool | None = True
    stochastic_depth: float | None = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AdapterConfig:
        values = dict(config)
        values.pop("architecture", None)
        if "invertible_adapter" in values:  # of files before version 2
            old = values.pop("invertible_adapter") or {}
            values["inv_adapter"] = old.get("block_type")
            values["inv_adapter_reduction_factor"] = old.get("reduction_factor")
        return super().of(values)


@dataclass(frozen=True, eq=False)
class SeqBnConfig(BnConfig):
    """One bottleneck a layer, behind the MLP (Pfeiffer et al. 2020, arXiv:2005.00247)."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = True


@dataclass(frozen=True, eq=False)
class SeqBnInvConfig(SeqBnConfig):
    """And an invertible adapter on the embeddings (MAD-X, arXiv:2005.00052)."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass(frozen=True, eq=False)
class DoubleSeqBnConfig(BnConfig):
    """Two bottlenecks a layer (Houlsby et al. 2019, arXiv:1902.00751)."""

    mh_adapter: bool = True
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "swish"


@dataclass(frozen=True, eq=False)
class DoubleSeqBnInvConfig(DoubleSeqBnConfig):
    """And an invertible adapter on the embeddings."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass(frozen=True, eq=False)
class ParBnConfig(BnConfig):
    """A bottleneck beside the MLP (He et al. 2021, arXiv:2110.04366)."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 2
    non_linearity: str = "relu"
    init_weights: str = "mam_adapter"
    is_parallel: bool = True
    scaling: float | str = 4.0


@dataclass(frozen=True, eq=False)
class AdapterPlusConfig(BnConfig):
    """A bottleneck with a scale for each feature (Adapter+, arXiv:2406.06820)."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 96
    non_linearity: str = "gelu"
    original_ln_before: bool = True
    original_ln_after: bool = False
    residual_before_ln: bool | str = False
    stochastic_depth: float | None = 0.1
    init_weights: str = "houlsby"
    scaling: float | str = "channel"


@dataclass(frozen=True, eq=False)
class CompacterConfig(DoubleSeqBnConfig):
    """Two bottlenecks of Kronecker products (Mahabadi et al. 2021, arXiv:2106.04647)."""

    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str = "gelu"
    phm_layer: bool = True


@dataclass(frozen=True, eq=False)
class CompacterPlusPlusConfig(SeqBnConfig):
    """One such bottleneck a layer."""

    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str = "gelu"
    phm_layer: bool = True


@dataclass(frozen=True, eq=False)
class PrefixTuningConfig(AdapterConfig):
    """Keys and values in front of each attention (Li and Liang 2021, arXiv:2101.00190)."""

    architecture: str | None = "prefix_tuning"
    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: LeaveOut = field(default_factory=list)
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    use_gating: bool = False
    shared_gating: bool = True
    init_weights_seed: int | None = None


@dataclass(frozen=True, eq=False)
class PromptTuningConfig(AdapterConfig):
    """Embeddings in front of each row (Lester et al. 2021, arXiv:2104.08691)."""

    unsaved: ClassVar[Mapping[str, Any]] = {"random_uniform_scale": 0.5}

    architecture: str | None = "prompt_tuning"
    prompt_length: int = 10
    prompt_init: str = "random_uniform"  # or "from_string"
    prompt_init_text: str | None = None
    combine: str = "prefix"  # or "prefix_after_bos"
    init_weights_seed: int | None = None
    random_uniform_scale: float = 0.5


@dataclass(frozen=True, eq=False)
class LoRAConfig(AdapterConfig):
    """Low-rank updates beside projections (Hu et al. 2021, arXiv:2106.09685)."""

    architecture: str | None = "lora"
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: LeaveOut = field(default_factory=list)
    r: int = 8
    alpha: int = 8
    dropout: float = 0.0
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    composition_mode: str = "add"  # or "scale"
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    use_dora: bool = False
    dtype: str | None = None


@dataclass(frozen=True, eq=False)
class IA3Config(LoRAConfig):
    """Learned scales of keys, values and the MLP's inside (Liu et al. 2022, arXiv:2205.05638)."""

    intermediate_lora: bool = True
    r: int = 1
    alpha: int = 1
    attn_matrices: list[str] = field(default_factory=lambda: ["k", "v"])
    composition_mode: str = "scale"
    init_weights: str = "ia3"


@dataclass(frozen=True, eq=False)
class VeraConfig(LoRAConfig):
    """Random frozen matrices and two trained vectors (Kopiczko et al. 2023, arXiv:2310.11454)."""

    vera_d: float | None = 0.1
    vera_b: float | None = 0.0
    init_weights: str = "vera"


@dataclass(frozen=True, eq=False)
class DoRAConfig(LoRAConfig):
    """Directions by LoRA, lengths trained apart (Liu et al. 2024, arXiv:2402.09353)."""

    use_dora: bool = True


@dataclass(frozen=True, eq=False)
class DvoRAConfig(VeraConfig):
    """DoRA with VeRA's matrices for the directions."""

    use_dora: bool = True


class MultiTaskConfig(AdapterConfig):
    """What methods for several tasks in one batch have in common; it has no keys of its own."""


@dataclass(frozen=True, eq=False)
class MTLLoRAConfig(LoRAConfig, MultiTaskConfig):
    """LoRA for several tasks in one batch (Yang et al. 2024, arXiv:2410.09437)."""

    architecture: str | None = "mtl_lora"
    n_up_projection: int = 1
    task_specific_matrix_type: Literal["singular_values", "linear"] = "singular_values"
    weights_sharpness: float = 0.05


@dataclass(frozen=True, eq=False)
class ReftConfig(AdapterConfig):
    """Edits of hidden states behind layers (Wu et al. 2024, arXiv:2404.03592)."""

    unsaved: ClassVar[Mapping[str, Any]] = {"subtract_projection": True}

    layers: Literal["all"] | list[int] = "all"
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool = True
    tied_weights: bool = False
    dropout: float = 0.05
    non_linearity: str | None = None
    dtype: str | None = None
    architecture: str | None = "reft"
    output_reft: bool = True
    init_weights_seed: int | None = None
    subtract_projection: bool = True


@dataclass(frozen=True, eq=False)
class LoReftConfig(ReftConfig):
    """In a subspace with an orthonormal basis."""


@dataclass(frozen=True, eq=False)
class NoReftConfig(ReftConfig):
    """In any subspace."""

    orthogonality: bool = False


@dataclass(frozen=True, eq=False)
class DiReftConfig(ReftConfig):
    """The projection of the state itself is not subtracted."""

    orthogonality: bool = False
    subtract_projection: bool = False


CLASSES.update(
    {
        None: BnConfig,
        "prefix_tuning": PrefixTuningConfig,
        "prompt_tuning": PromptTuningConfig,
        "lora": LoRAConfig,
        "mtl_lora": MTLLoRAConfig,
        "reft": ReftConfig,
    }
)
# Older names.
PfeifferConfig, PfeifferInvConfig = SeqBnConfig, SeqBnInvConfig
HoulsbyConfig, HoulsbyInvConfig = DoubleSeqBnConfig, DoubleSeqBnInvConfig
ParallelConfig = ParBnConfig
