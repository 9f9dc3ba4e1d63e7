"""Where a text ends: the end of text, and strings that end it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftwerk.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens in front of those that can hold an end string. The first of a decoded run may lose its
# space or be a piece of a character.
MARGIN = 8


class Ending:
    """Tells of a row of tokens whether its last one ended it, and cuts what ended it.

    `ids` are tokens that end a row: the end of text, and end strings that are special tokens of
    the tokenizer, which its text never shows. The other end strings are looked for in the text.
    One counts only where a token behind the first `min_tokens_to_generate` completes it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", sampling: Sampling):
        self.tokenizer, self.hold = tokenizer, sampling.min_tokens_to_generate
        end_strings = sampling.end_strings
        special = {
            str(token): number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        eos = tokenizer.eos_token_id
        self.ids = frozenset(
            [special[end] for end in end_strings if end in special]
            + ([eos] if isinstance(eos, int) else [])
        )
        self.strings = tuple(end for end in end_strings if end not in special)
        self.unseen = frozenset(special.values())
        # A token that the text shows holds a byte of it at least.
        self.longest = max((len(end.encode()) for end in self.strings), default=0)

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completed an end string; reads only the row's tail."""
        return self._completed(tokens, self.longest + MARGIN) is not None

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a row, without the end string that its last token completed."""
        end = self._completed(tokens, len(tokens))
        return self._decode(self._tail(tokens, len(tokens)))[:end]

    def _completed(self, tokens: Sequence[int], width: int) -> int | None:
        """Where the first end string that the last token completed starts in the text.

        The text is that of the last `width` tokens; None: there is no such string.
        """
        if not self.strings or len(tokens) <= self.hold or tokens[-1] in self.unseen:
            return None
        tail = self._tail(tokens, width)
        text = self._decode(tail)
        if not any(end in text for end in self.strings):
            return None
        # A string that was whole before the last token stands in what both texts share.
        shared = _shared(text, self._decode(tail[:-1]))
        starts = [text.find(end, max(shared - len(end) + 1, 0)) for end in self.strings]
        return min((start for start in starts if start >= 0), default=None)

    def _tail(self, tokens: Sequence[int], width: int) -> list[int]:
        """The last `width` tokens that the text shows."""
        tail: list[int] = []
        for token in reversed(tokens):
            if len(tail) == width:
                break
            if token not in self.unseen:
                tail.append(token)
        return tail[::-1]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
