"""Prompts: trained vectors in the place of virtual tokens before every row.

Prompt tuning trains the vectors themselves (Lester et al. 2021, arXiv:2104.08691). P-tuning makes
them by a small network from smaller ones (Liu et al. 2021, arXiv:2103.10385; NeMo's
`PromptEncoderAdapter`). In the slot `embedding` they replace all that an embedding is, position
and norm included (NeMo, AdapterHub); in `word_embedding` the word alone (peft).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.part import MethodSettings, Part
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError

PLACES = ("embedding", "word_embedding")
Place = Literal["embedding", "word_embedding"]


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(MethodSettings):
    """`virtual_tokens` v trained vectors of the hidden size h: v h parameters.

    Args:
        place: the slot, `embedding` or `word_embedding`.
        shifts_positions: the row's own tokens stand behind the prompt; False: learned positions
            are as without it (AdapterHub).
        prompt_init: how vectors are born. `normal`: with deviation `init_std`; `random_uniform`
            (AdapterHub): from -0.5 to 0.5; `from_string`: the embeddings of the tokens of
            `prompt_init_text`, which whoever adds the adapter gives to `PromptTuning.begin_with`.
        spare_tokens: rows behind the prompt that nothing reads: peft keeps as many as the prompt
            has for a T5's decoder, which has none.
        combine: AdapterHub's: before a row, or behind its first token. Without shifted positions
            an encoder makes the same of both; no other model takes `prefix_after_bos`.
    """

    virtual_tokens: int = 10
    init_std: float = 0.023
    place: Place = "embedding"
    shifts_positions: bool = True
    prompt_init: Literal["normal", "random_uniform", "from_string"] = "normal"
    prompt_init_text: str | None = None
    combine: Literal["prefix", "prefix_after_bos"] = "prefix"
    spare_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompt(self.virtual_tokens, self.init_std, self.place)
        inits = ("normal", "random_uniform", "from_string")
        if self.prompt_init not in inits:
            raise UserError(f"prompt_init={self.prompt_init!r}: use one of {', '.join(inits)}")
        if self.prompt_init == "from_string" and not self.prompt_init_text:
            raise UserError("prompt_init='from_string' has no prompt_init_text: say the words")
        if self.spare_tokens < 0:
            raise UserError(f"spare_tokens={self.spare_tokens}: must not be negative")
        if self.combine not in ("prefix", "prefix_after_bos"):
            raise UserError(f"combine={self.combine!r}: use prefix or prefix_after_bos")
        if self.combine == "prefix_after_bos" and self.shifts_positions:
            raise UserError("combine='prefix_after_bos' needs shifts_positions=False")

    @property
    def shift(self) -> int:
        return self.virtual_tokens if self.shifts_positions else 0

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        if site.name != self.place:
            return None
        if self.combine == "prefix_after_bos" and site.stack != "encoder":
            raise UserError("combine='prefix_after_bos' is for encoders: use combine='prefix'")
        return PromptTuning(site.out_features, self)


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(MethodSettings):
    """`virtual_tokens` vectors of `embedding_dim` through a network to the hidden size h.

    `mlp`: a bottleneck of `bottleneck_dim` with tanh-gelu; v e + e b + b + b h + h parameters.
    `lstm`: two bidirectional layers of e / 2 each way, then e -> e -> h with relu. Of peft's
    networks b is the `encoder_hidden_size`: `peft_mlp` is e -> b -> b -> h with relu, `peft_lstm`
    two bidirectional layers of b each way, then 2 b -> 2 b -> h. `place` and `shifts_positions`
    are as in `PromptTuningConfig`.
    """

    virtual_tokens: int = 10
    embedding_dim: int = 1024
    bottleneck_dim: int = 1024
    encoder: Literal["mlp", "lstm", "peft_mlp", "peft_lstm"] = "mlp"
    init_std: float = 0.023
    place: Place = "embedding"
    shifts_positions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompt(self.virtual_tokens, self.init_std, self.place)
        for key in ("embedding_dim", "bottleneck_dim"):
            if getattr(self, key) < 1:
                raise UserError(f"model.peft.p_tuning.{key}={getattr(self, key)}: at least 1")
        encoders = ("mlp", "lstm", "peft_mlp", "peft_lstm")
        if self.encoder not in encoders:
            raise UserError(
                f"model.peft.p_tuning.encoder={self.encoder!r}: use one of {', '.join(encoders)}"
            )
        if self.encoder == "lstm" and self.embedding_dim % 2:
            raise UserError(
                f"model.peft.p_tuning.embedding_dim={self.embedding_dim}: an lstm needs an even "
                f"number"
            )

    @property
    def shift(self) -> int:
        return self.virtual_tokens if self.shifts_positions else 0

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        return PTuning(site.out_features, self) if site.name == self.place else None


def _check_prompt(count: int, std: float, place: str) -> None:
    if count < 1:
        raise UserError(f"model.peft.virtual_tokens={count}: must be at least 1")
    if std < 0:
        raise UserError(f"init_std={std}: must not be negative")
    if place not in PLACES:
        raise UserError(f"place={place!r}: use one of {', '.join(PLACES)}")


class Prompt(Part):
    """Fills its virtual columns, from a row's or a text's `start` on, with `vectors()` [v, h]."""

    unsuited: ClassVar[dict[str, str]] = {"Split": "a prompt stands before all tokens of a row"}

    def vectors(self) -> Tensor:
        """The prompt, [v, h]."""
        raise NotImplementedError

    def forward(self, call: SlotCall) -> Tensor:
        texts = call.flow.texts
        if texts is None and not call.virtual:
            return call.output
        vectors = self.vectors().to(call.output.dtype)
        if texts is not None:  # each may have columns of its own
            place = (texts.place - call.start)[..., None]
            own = vectors[place.squeeze(-1).clamp(0, len(vectors) - 1)]
            return torch.where((place >= 0) & (place < len(vectors)), own, call.output)
        rows = vectors.expand(call.output.shape[0], -1, -1)
        end = call.start + vectors.shape[0]
        return torch.cat([call.output[:, : call.start], rows, call.output[:, end:]], 1)


class PromptTuning(Prompt):
    """The vectors are the parameters."""

    def __init__(self, hidden_size: int, config: PromptTuningConfig):
        super().__init__()
        rows = config.virtual_tokens + config.spare_tokens
        self.count = config.virtual_tokens
        self.embedding = nn.Parameter(torch.empty(rows, hidden_size))
        if config.prompt_init == "normal":
            nn.init.normal_(self.embedding, std=config.init_std)
        else:
            nn.init.uniform_(self.embedding, -0.5, 0.5)

    @torch.no_grad()
    def begin_with(self, words: Tensor) -> None:
        """Sets the vectors to the embeddings [n, h] of a text, which starts again where it ends."""
        count = self.embedding.shape[0]
        self.embedding.copy_(words.repeat(-(-count // len(words)), 1)[:count])

    def vectors(self) -> Tensor:
        return self.embedding[: self.count]

    def spare(self) -> Tensor:
        """The rows that nothing reads."""
        return self.embedding.detach()[self.count :]


class PTuning(Prompt):
    """The vectors come out of an MLP, or an LSTM and an MLP."""

    def __init__(self, hidden_size: int, config: PTuningConfig):
        super().__init__()
        inner = config.embedding_dim
        self.embedding = nn.Parameter(torch.empty(config.virtual_tokens, inner))
        nn.init.normal_(self.embedding, std=config.init_std)
        self.lstm = self.between = None
        middle = config.bottleneck_dim
        if config.encoder in ("lstm", "peft_lstm"):
            each = inner // 2 if config.encoder == "lstm" else middle
            self.lstm = nn.LSTM(inner, each, 2, bidirectional=True, batch_first=True)
            inner = middle = 2 * each
        elif config.encoder == "peft_mlp":
            self.between = nn.Linear(middle, middle)
        self.first = nn.Linear(inner, middle)
        self.second = nn.Linear(middle, hidden_size)

    def vectors(self) -> Tensor:
        if self.between is not None:
            inner = F.relu(self.first(self.embedding))
            return self.second(F.relu(self.between(inner)))
        if self.lstm is None:
            return self.second(F.gelu(self.first(self.embedding), approximate="tanh"))
        states, _ = self.lstm(self.embedding[None])
        return self.second(F.relu(self.first(states[0])))
