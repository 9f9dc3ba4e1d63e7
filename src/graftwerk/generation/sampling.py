"""How a next token is chosen from logits: the options, the filters, the draw.

The filters are those of `transformers`' logits processors, applied in its order: repetition
penalty, temperature, top-k, top-p. Shapes: B rows, V tokens of the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftwerk.errors import UserError


class OptionError(UserError):
    """An option that is out of range: `key`, its `value`, and `advice`."""

    def __init__(self, key: str, value: Any, advice: str, prefix: str = "model.inference."):
        super().__init__(f"{prefix}{key}={value}: {advice}")
        self.key, self.value, self.advice = key, value, advice


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text is continued, in NeMo's names.

    Raises:
        OptionError: for a value out of range.
    """

    greedy: bool = True  # the likeliest token; temperature, top_k and top_p are not looked at
    temperature: float = 1.0  # logits are divided by it
    top_k: int = 0  # the likeliest tokens that stay; 0: all
    top_p: float = 1.0  # the likeliest tokens that hold this share stay, one at least; 1: all
    repetition_penalty: float = 1.0  # makes tokens that were there less likely; 1: none
    min_tokens_to_generate: int = 0  # nothing ends a row before
    tokens_to_generate: int = 32  # at most
    end_strings: tuple[str, ...] = ()  # text that ends a row
    compute_logprob: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        factor = "give 0.001 to 1000; 1 changes nothing"
        self._check("temperature", 1e-3 <= self.temperature <= 1e3, factor)
        self._check("top_k", self.top_k >= 0, "give at least 1, or 0 for all tokens")
        self._check("top_p", 0 < self.top_p <= 1, "give more than 0 and at most 1, which is all")
        self._check("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, factor)
        most, least = self.tokens_to_generate, self.min_tokens_to_generate
        self._check("tokens_to_generate", most >= 1, "give at least 1")
        self._check("min_tokens_to_generate", least >= 0, "give at least 0")
        most_advice = f"give at most {most}, as many as there may be"
        self._check("min_tokens_to_generate", least <= most, most_advice)
        self._check("end_strings", all(self.end_strings), "an empty text would end every row")
        self._check("seed", 0 <= self.seed < 2**64, "give 0 to 2^64 - 1", "model.")

    def _check(self, key: str, holds: bool, advice: str, prefix: str = "model.inference.") -> None:
        if not holds:
            raise OptionError(key, getattr(self, key), advice, prefix)

    @classmethod
    def from_keys(cls, inference: Mapping[str, Any], seed: int) -> "Sampling":
        """The options that a stage's `model.inference` and `model.seed` hold."""
        values = {key: inference[key] for key in inference if key != "end_strings"}
        return cls(**values, end_strings=tuple(inference.get("end_strings") or ()), seed=seed)

    @property
    def idle(self) -> list[str]:
        """Options that are set and not looked at, since `greedy` is."""
        names = ("temperature", "top_k", "top_p") if self.greedy else ()
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def choose(self, logits: Tensor, seen: Tensor | None, uniforms: Tensor | None) -> Tensor:
        """The next token of each row, [B].

        Args:
            logits: [B, V], float32.
            seen: [B, V], the tokens that `repetition_penalty` is about; None: none.
            uniforms: [B] in [0, 1), what the draw makes of chance; None: greedy.
        """
        if uniforms is None:
            return self.penalised(logits, seen).argmax(-1)
        return draw(self.filtered(logits, seen), uniforms)

    def penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """The logits [B, V] of a greedy choice."""
        return logits if seen is None else penalise(logits, seen, self.repetition_penalty)

    def filtered(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """The logits [B, V] that tokens are drawn from."""
        logits = self.penalised(logits, seen) / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return logits


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones by it.

    Keskar et al. 2019, arXiv:1909.05858, section 4.1, which divides whatever the sign.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leaves the k largest logits of each row, and those equal to the k-th (Fan et al. 2018)."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Leaves the fewest largest logits whose probabilities sum to p, one at least.

    Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    ascending, order = logits.sort(-1)
    # The sum from below: what may go is what holds at most 1 - p.
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row [B] with the probabilities of the softmax of [B, V], by inverting their sum.

    In float64, where `u * total < total` for each u below 1, so that the token exists; one of
    probability 0 covers nothing and is never drawn.
    """
    sums = logits.double().softmax(-1).cumsum(-1)
    points = uniforms[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, points, right=True)[:, 0]


def uniforms_of(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """[rows, count] numbers in [0, 1), float64: a row's depend on the seed and its number alone.

    Philox counts under a key (Salmon et al. 2011): whatever stands beside a row, on whatever
    device, it meets the same numbers.
    """
    keys = [np.random.Philox(key=np.array([seed, row], dtype=np.uint64)) for row in rows]
    return torch.from_numpy(np.stack([np.random.Generator(key).random(count) for key in keys]))
