"""Small tokenizers for models that are trained from scratch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # tokens 0, 1, 2


def build_tokenizer(
    type: str, texts: Iterable[str], vocab_size: int | None = None
) -> "PreTrainedTokenizerFast":
    """A tokenizer with pad, eos and unk, the same for the same texts.

    Args:
        type: `word`: the words and punctuation marks of `texts`, the most frequent first, equally
            frequent ones in alphabetical order. `byte`: the 256 bytes; `texts` are not looked at.
        texts: what the model will be trained on.
        vocab_size: the most tokens, the three special ones included; words that do not fit are
            unknown. None keeps every word. `byte` has 259 and takes no other.
    """
    if type == "word":
        return _word_tokenizer(texts, vocab_size)
    if type == "byte":
        return _byte_tokenizer(vocab_size)
    raise UserError(f"tokenizer type {type!r} is not known; allowed: word, byte")


def _word_tokenizer(texts: Iterable[str], vocab_size: int | None) -> "PreTrainedTokenizerFast":
    from collections import Counter

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    if vocab_size is not None:
        if vocab_size < 4:
            raise UserError(f"tokenizer vocab_size must be at least 4, not {vocab_size}")
        ranked = ranked[: vocab_size - 3]
    vocab = {word: token for token, word in enumerate([PAD, EOS, UNK, *ranked])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = split  # type: ignore[assignment]
    # Words come back with a space between them, as in the texts of the synthetic tasks.
    tokenizer.decoder = decoders.WordPiece(prefix="\0", cleanup=False)  # type: ignore[assignment]
    return _wrap(tokenizer)


def _byte_tokenizer(vocab_size: int | None) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: token for token, letter in enumerate([PAD, EOS, UNK, *letters])}
    if vocab_size not in (None, len(vocab)):
        raise UserError(f"a byte tokenizer has {len(vocab)} tokens; leave vocab_size null")
    # A BPE without merges: every byte is a token.
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _wrap(tokenizer)


def _wrap(tokenizer) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
