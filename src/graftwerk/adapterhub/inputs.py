"""`transformers`' names of inputs in the engine's terms, and the state that stands for a row."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5


@dataclass(frozen=True)
class Tokens:
    """The ids of a model's special tokens; None: it has none."""

    pad: int | None
    eos: int | None
    start: int = 0  # of a T5's decoder


@dataclass(frozen=True)
class Inputs:
    """What a caller gave, rows in front: [B, S] each, of a T5 [B, E] and [B, S] of the decoder."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None

    def arguments(self, base: GPT | T5 | BERT, tokens: Tokens) -> dict[str, Any]:
        """The arguments of the engine's `hidden_states`."""
        mask = self.attention_mask
        if isinstance(base, BERT):
            return {
                "tokens": self.input_ids,
                "positions": self._positions(base, tokens),
                "documents": None if mask is None else (mask != 0).long() - 1,
                "token_types": self.token_type_ids,
            }
        if isinstance(base, GPT):
            positions = _of_all_rows(self.position_ids, self.input_ids)
            return {"tokens": self.input_ids, "positions": positions, "end": ends(mask)}
        assert self.decoder_input_ids is not None
        return {
            "tokens": self.decoder_input_ids,
            "end": ends(self.decoder_attention_mask),
            "source": self.input_ids,
            "source_documents": None if mask is None else (mask != 0).long() - 1,
        }

    def _positions(self, base: BERT, tokens: Tokens) -> Tensor | None:
        """RoBERTa's padding has the row of positions that lies before the first."""
        if self.position_ids is not None:
            return _of_all_rows(self.position_ids, self.input_ids) - base.config.position_offset
        if not base.config.position_offset or tokens.pad is None:
            return None
        real = self.input_ids != tokens.pad
        return (real.cumsum(1) * real) - 1

    def pooled(self, base: GPT | T5 | BERT, x: Tensor, tokens: Tokens) -> Tensor:
        """The state [n B, h] of each row that stands for it, of hidden states [n B, S, h].

        A BERT's is the first; a GPT's that of the last token that is no padding; a T5's that of the
        last end-of-sequence token, where its decoder has read the source itself.

        Raises:
            UserError: where a T5 has no such token.
        """
        if isinstance(base, BERT):
            return x[:, 0]
        place = self._last(tokens) if isinstance(base, GPT) else self._end(x, tokens)
        copies = len(x) // len(place)
        return x[torch.arange(len(x), device=x.device), place.repeat(copies)]

    def _last(self, tokens: Tokens) -> Tensor:
        ids = self.input_ids
        index = torch.arange(ids.shape[1], device=ids.device)
        if self.attention_mask is not None:
            real = self.attention_mask != 0
        elif tokens.pad is not None:
            real = ids != tokens.pad
        else:
            real = torch.ones_like(ids, dtype=torch.bool)
        return (index * real).max(1).values

    def _end(self, x: Tensor, tokens: Tokens) -> Tensor:
        ids = self.input_ids
        if x.shape[1] != ids.shape[1]:
            raise UserError(
                f"a T5's head for rows reads the state at the source's last end-of-sequence token: "
                f"decoder_input_ids must be as long as input_ids ({ids.shape[1]}), not {x.shape[1]}"
            )
        found = ids == tokens.eos
        if tokens.eos is None or not bool(found.any(1).all()):
            raise UserError(
                f"a T5's head for rows reads the state at the last end-of-sequence token "
                f"({tokens.eos}): every row of input_ids needs one"
            )
        return (torch.arange(ids.shape[1], device=ids.device) * found).max(1).values


def ends(mask: Tensor | None) -> Tensor | None:
    """The engine's `end` [B, S] of a mask [B, S] with 1 for tokens and 0 for padding.

    Nobody sees padding, but for itself where no token stands before it: a query must see something.
    """
    if mask is None or bool((mask != 0).all()):
        return None
    real = mask != 0
    after = torch.arange(1, mask.shape[1] + 1, device=mask.device).expand_as(mask)
    alone = real.cumsum(1) == 0
    forever = torch.iinfo(torch.int64).max
    return torch.where(real, forever, torch.where(alone, after, 0))


def shifted(tokens: Tensor, start: int, pad: int | None) -> Tensor:
    """A decoder's inputs [B, S] for its outputs: a start token in front, the last one left out."""
    moved = F.pad(tokens[:, :-1], (1, 0), value=start)
    return moved.masked_fill(moved == -100, start if pad is None else pad)


def _of_all_rows(positions: Tensor | None, ids: Tensor) -> Any:
    return None if positions is None else positions.expand(len(ids), -1)
