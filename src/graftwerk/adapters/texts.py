"""The texts of packed rows, for what reads a whole text or counts its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Texts:
    """Where the texts of packed rows stand; padding is one more text.

    `number` [B, S]: that of each column's text in its row, below `count`. `place` [B, S]: which
    column of a row of its own it would be; the first `prompt` of those are virtual tokens.
    """

    number: Tensor
    place: Tensor
    count: int
    prompt: int = 0

    @classmethod
    def of(cls, documents: Tensor, place: Tensor, prompt: int = 0) -> "Texts":
        """Of texts that `documents` [B, S] numbers from 0, -1 for padding."""
        most = documents.shape[1]  # how many there are a GPU would have to be asked
        return cls(documents.masked_fill(documents < 0, most), place, most + 2, prompt)

    @property
    def beyond(self) -> int:
        """The number of what is no column of a row."""
        return self.count - 1

    def each(self, change: Callable[[Tensor], Tensor | None]) -> "Texts":
        """Those of other rows or columns, which `change` makes of these."""
        number, place = change(self.number), change(self.place)
        assert number is not None
        assert place is not None
        return replace(self, number=number, place=place)

    def cut(self, stops: Sequence[int]) -> tuple[Tensor, "Texts"]:
        """Texts cut before the tokens of these places: which of its text's pieces each column is
        in, [B, S], and the pieces as texts."""
        piece = torch.zeros_like(self.place)
        for stop in stops:
            piece += self.place >= self.prompt + stop
        pieces = len(stops) + 1
        number = self.number * pieces + piece
        return piece, replace(self, number=number, count=self.count * pieces)

    def members(self) -> Tensor:
        """Whether a column is of a text, [B, S, T], for as many texts as the fullest row has."""
        number = self.number.masked_fill(self.number >= self.count - 2, -1)  # padding
        return number[..., None] == torch.arange(int(number.max()) + 1, device=number.device)

    def sums(self, x: Tensor) -> Tensor:
        """Sums over the columns of each text, in float32 at least, and how many they are.

        [B, S, n] -> [B, count, n + 1].
        """
        x = F.pad(x, (0, 1), value=1.0).to(torch.promote_types(x.dtype, torch.float32))
        sums = x.new_zeros(len(x), self.count, x.shape[2])
        return sums.scatter_add(1, self._index(x.shape[2]), x)

    def spread(self, values: Tensor) -> Tensor:
        """What each text has, at all its columns: [B, count, n] -> [B, S, n]."""
        return values.gather(1, self._index(values.shape[2]))

    def _index(self, features: int) -> Tensor:
        return self.number[..., None].expand(-1, -1, features)
