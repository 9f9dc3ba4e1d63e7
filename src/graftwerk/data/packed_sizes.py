"""What `model.data` says of packing, held against the rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graftwerk.data.dataset import AnswerDataset
from graftwerk.errors import UserError

SIZE, SHARE = "model.data.packed_sequence_size", "model.data.share_prefixes"
ROOM = 1.25  # of a T5's targets, over what goes with sources that fill their rows


@dataclass(frozen=True)
class Packing:
    """How rows are packed.

    Args:
        size: tokens of a packed row.
        share: rows that begin alike are computed once: `auto`, where the adapters allow it.
    """

    size: int
    share: bool | Literal["auto"] = "auto"

    @classmethod
    def of(cls, data: Mapping[Any, Any]) -> "Packing | None":
        """What the section `model.data` asks for; None where rows are padded.

        Raises:
            UserError: for values that are not known or do not go together.
        """
        size, share = data.get("packed_sequence_size"), data.get("share_prefixes", "auto")
        if not isinstance(share, bool) and share != "auto":
            raise UserError(f"{SHARE}={share!r}; allowed: auto, true, false")
        if size is None:
            if share is True:
                raise UserError(
                    f"{SHARE}=True shares tokens of packed rows, and {SIZE} is null: set it"
                )
            return None
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{SIZE}={size!r}; allowed: a whole number from 1, or null")
        return cls(size, share)

    def room(self, rows: AnswerDataset, key: str, prompt: int = 0) -> tuple[int, ...]:
        """Tokens of a packed row: of a T5 those of its targets, then those of its sources.

        `prompt`: virtual tokens that each row has of its own, before a T5's source.

        Raises:
            UserError: where a row is longer.
        """
        if rows.longest + prompt > self.size:
            virtual = f" and its prompt {prompt}" if prompt else ""
            raise UserError(
                f"{SIZE}={self.size}: the longest row of model.data.{key} has {rows.longest} "
                f"tokens{virtual}: raise it to that, or bound rows by model.encoder_seq_length"
            )
        if rows.lengths.shape[1] == 1 or not len(rows):
            return (self.size,)
        tokens, sources = rows.lengths.T
        targets = ROOM * self.size * tokens.sum() / (sources + prompt).sum()
        return (min(max(int(targets), tokens.max()), self.size), self.size)
