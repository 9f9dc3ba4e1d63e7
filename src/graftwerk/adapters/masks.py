"""Dropout whose masks follow from where a number stands, not from what was drawn before it.

Each row of a batch has a *chance*, a hash of the run's seed and of the row's number in the order of
training. Whether a number is dropped is a hash of its row's chance, its column, the module's key
and its feature. So masks do not depend on how rows are dealt out to processes and passes, how they
are padded, or how layers, columns and features lie over devices, and nothing has to be saved in
order to make them again.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from graftwerk.adapters.slots import Flow, Site

# MurmurHash3's finaliser with the shifts and multipliers that hash-prospector found (16, 15, 15;
# github.com/skeeto/hash-prospector, issue 19). The second one lacks its highest bit, so that no
# product of a number below 2^32 leaves int64.
ONE, TWO = 0x21F0AAAD, 0x735A2D97
BITS = 0xFFFFFFFF
HALF = 1 << 31


def mixed(x: Tensor) -> Tensor:
    """int64 from 0 to 2^32 - 1, each to another of them that tells nothing of it."""
    x = ((x >> 16) ^ x) * ONE & BITS
    x = ((x >> 15) ^ x) * TWO & BITS
    return (x >> 15) ^ x


def hashed(base: Tensor | int, numbers: Tensor) -> Tensor:
    """One of 2^32 values for each pair of a base, which is a hash, and a number."""
    return mixed(mixed(numbers & BITS) ^ base)


def chances(seed: int, numbers: Sequence[int]) -> Tensor:
    """[B] int64: the chances of rows, by their numbers in the order of training."""
    rows = torch.tensor(numbers, dtype=torch.int64)
    base = hashed(hashed(0, torch.tensor(seed & BITS)), torch.tensor(seed >> 32))
    return hashed(hashed(base, rows), rows >> 32)


class Chance:
    """What the masks of one pass follow from: `rows` [B], the chance of each row."""

    def __init__(self, rows: Tensor):
        self.rows = rows
        self._made: dict[tuple[int, int], Tensor] = {}

    def of(self, change: Callable[[Tensor], Tensor | None]) -> "Chance":
        """That of other rows, which `change` makes of these."""
        rows = change(self.rows)
        assert rows is not None
        return Chance(rows)

    def again(self) -> "Chance":
        """For what a pass goes through a second time: other masks."""
        return Chance(mixed(self.rows ^ 1))

    def tokens(self, first: int, count: int) -> Tensor:
        """A hash for each of `count` columns from the one numbered `first`: [B, count] int32."""
        if (first, count) not in self._made:
            columns = torch.arange(first, first + count, device=self.rows.device)
            self._made[first, count] = narrow(hashed(self.rows[:, None], columns))
        return self._made[first, count]


def narrow(x: Tensor) -> Tensor:
    """Hashes as int32."""
    return (x - HALF).to(torch.int32)


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws from the chances of a pass; without them, from torch's random state.

    Args:
        p: the share that is dropped.
        key: tells its masks from those of other modules; `name_dropouts` sets it for a part's.
        of: whether it acts on what goes into a part or on what comes out, which says how features
            are split over devices.
    """

    def __init__(self, p: float = 0.5, key: str = "", of: Literal["input", "output"] = "output"):
        super().__init__(p)
        self.key, self.of = key, of
        self._numbers: Tensor | None = None  # of the features, where others lie elsewhere
        self._features: Tensor | None = None

    def share(self, site: "Site", cut: Callable[[Tensor, int], Tensor]) -> None:
        """Lets it know which features it sees; `cut(numbers, blocks)` gives this rank's."""
        if self.of == "input" and site.split == "row":
            self._numbers = cut(torch.arange(site.in_features), 1)
        elif self.of == "output" and site.split == "column":
            self._numbers = cut(torch.arange(site.out_features), site.blocks)
        self._features = None

    def rename(self, key: str) -> None:
        """Makes its masks those of another key."""
        self.key, self._features = key, None

    @property
    def lacks_hashes(self) -> bool:
        """Whether its next pass makes what the later ones draw from."""
        return self.training and self.p not in (0.0, 1.0) and self._features is None

    def forward(
        self, input: Tensor, flow: "Flow | None" = None, first: int | None = None
    ) -> Tensor:
        """[B, S, F] -> [B, S, F]; the number of the first column is the flow's, if not `first`."""
        chance = None if flow is None else flow.chance
        if flow is None or chance is None or not self.training or self.p in (0.0, 1.0):
            return super().forward(input)
        tokens = chance.tokens(flow.offset if first is None else first, input.shape[1])
        drawn = tokens[..., None] ^ self._hashes(input.shape[2], input.device)
        # Two hashes joined by xor alone would tell of each other. In int32, whose products wrap.
        drawn.mul_(ONE)
        drawn.bitwise_xor_(drawn >> 15).mul_(TWO)
        dropped = drawn < min(round(self.p * 2 * HALF), 2 * HALF - 1) - HALF
        return input.masked_fill(dropped, 0.0) * (1 / (1 - self.p))

    def _hashes(self, count: int, device: torch.device) -> Tensor:
        """Of each feature, [F] int32: the same in all passes."""
        made = self._features
        if made is None or made.shape[0] != count or made.device != device:
            numbers = torch.arange(count) if self._numbers is None else self._numbers
            made = self._features = narrow(hashed(crc32(self.key.encode()), numbers.to(device)))
        return made


def dropouts(module: nn.Module) -> list[tuple[str, Dropout]]:
    """The dropouts in a module, with their paths."""
    return [(path, one) for path, one in module.named_modules() if isinstance(one, Dropout)]


def name_dropouts(module: nn.Module, key: str) -> None:
    """Tells the dropouts in a module from each other and from those elsewhere, by its key."""
    for path, dropout in dropouts(module):
        dropout.rename(f"{key}.{path}")
