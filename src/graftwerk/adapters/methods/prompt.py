"""Prompts: trained vectors in the place of virtual tokens before every row.

Prompt tuning trains the vectors themselves (Lester et al. 2021, arXiv:2104.08691). P-tuning makes
them by a small network from smaller ones (Liu et al. 2021, arXiv:2103.10385; NeMo's
`PromptEncoderAdapter`). They replace the embedding of a virtual token, its position included.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.part import MethodSettings, Part
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(MethodSettings):
    """`virtual_tokens` trained vectors of the hidden size h: v h parameters."""

    virtual_tokens: int = 10
    init_std: float = 0.023

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tokens(self.virtual_tokens)

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        return PromptTuning(site.out_features, self) if site.name == "embedding" else None


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(MethodSettings):
    """`virtual_tokens` vectors of `embedding_dim` through a network to the hidden size h.

    `mlp`: a bottleneck of `bottleneck_dim` with tanh-gelu; v e + e b + b + b h + h parameters.
    `lstm`: two bidirectional layers of e / 2 each way, then e -> e -> h with relu.
    """

    virtual_tokens: int = 10
    embedding_dim: int = 1024
    bottleneck_dim: int = 1024
    encoder: Literal["mlp", "lstm"] = "mlp"
    init_std: float = 0.023

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tokens(self.virtual_tokens)
        if self.encoder not in ("mlp", "lstm"):
            raise UserError(f"model.p_tuning.encoder={self.encoder!r}: use 'mlp' or 'lstm'")
        if self.encoder == "lstm" and self.embedding_dim % 2:
            raise UserError(
                f"model.p_tuning.embedding_dim={self.embedding_dim}: an lstm needs an even number"
            )

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        return PTuning(site.out_features, self) if site.name == "embedding" else None


def _check_tokens(count: int) -> None:
    if count < 1:
        raise UserError(f"model.peft.virtual_tokens={count}: must be at least 1")


class Prompt(Part):
    """Fills its virtual columns, from `start` on, with `vectors()` [v, h]."""

    start = 0  # set with the active composition

    def vectors(self) -> Tensor:
        """The prompt, [v, h]."""
        raise NotImplementedError

    def forward(self, call: SlotCall) -> Tensor:
        if not call.virtual:
            return call.output
        vectors = self.vectors().to(call.output.dtype)
        rows = vectors.expand(call.output.shape[0], -1, -1)
        end = self.start + vectors.shape[0]
        return torch.cat([call.output[:, : self.start], rows, call.output[:, end:]], 1)


class PromptTuning(Prompt):
    """The vectors are the parameters."""

    def __init__(self, hidden_size: int, config: PromptTuningConfig):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.virtual_tokens, hidden_size))
        nn.init.normal_(self.embedding, std=config.init_std)

    def vectors(self) -> Tensor:
        return self.embedding


class PTuning(Prompt):
    """The vectors come out of an MLP, or an LSTM and an MLP."""

    def __init__(self, hidden_size: int, config: PTuningConfig):
        super().__init__()
        inner = config.embedding_dim
        self.embedding = nn.Parameter(torch.empty(config.virtual_tokens, inner))
        nn.init.normal_(self.embedding, std=config.init_std)
        self.lstm = None
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(inner, inner // 2, 2, bidirectional=True, batch_first=True)
        middle = inner if config.encoder == "lstm" else config.bottleneck_dim
        self.first = nn.Linear(inner, middle)
        self.second = nn.Linear(middle, hidden_size)

    def vectors(self) -> Tensor:
        if self.lstm is None:
            return self.second(F.gelu(self.first(self.embedding), approximate="tanh"))
        states, _ = self.lstm(self.embedding[None])
        return self.second(F.relu(self.first(states[0])))
