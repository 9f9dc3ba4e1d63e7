"""What decides how rows are encoded, as one checksum: every setting that an encoder holds.

Nothing is chosen: all attributes of an encoder count, and of what these hold, so that an option
that comes later counts by itself. What cannot be told apart by its content is refused.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(value: Any) -> str:
    """The same for the same content, in any process: sha256 in hexadecimal.

    Raises:
        TypeError: for something whose content is not known (a function, a file).
    """
    return _digest(json.dumps(_Content().of(value)))


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


class _Content:
    """Values as what JSON can write. A tokenizer, which many objects hold, is read once."""

    def __init__(self) -> None:
        self._tokenizers: dict[int, str] = {}

    def of(self, value: Any) -> Any:
        from transformers import PreTrainedTokenizerBase

        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, Mapping):  # in its order, which decides what comes first
            return [[self.of(key), self.of(item)] for key, item in value.items()]
        if isinstance(value, list | tuple):
            return [self.of(item) for item in value]
        if isinstance(value, PreTrainedTokenizerBase):
            if id(value) not in self._tokenizers:
                self._tokenizers[id(value)] = _digest(tokenizer_content(value))
            return self._tokenizers[id(value)]
        if not hasattr(value, "__dict__") or callable(value):
            raise TypeError(f"no fingerprint of a {type(value).__qualname__}: {value!r}")
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return [kind, [[name, self.of(item)] for name, item in sorted(vars(value).items())]]


def tokenizer_content(tokenizer: "PreTrainedTokenizerBase") -> bytes:
    """All of a tokenizer that decides which tokens a text or a conversation gets."""
    told = [
        type(tokenizer).__qualname__,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        tokenizer.truncation_side,
        getattr(tokenizer, "split_special_tokens", None),
    ]
    return json.dumps(told, sort_keys=True).encode() + _vocabulary(tokenizer)


def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> bytes:
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer  # pyright: ignore
        # Each call sets both anew, so that what is left of the last one says nothing.
        backend.no_truncation()
        backend.no_padding()
        return backend.to_str().encode()
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return b"".join(path.name.encode() + path.read_bytes() for path in files)
