"""Where a row of tokens ends: the tail that is read against the whole text."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.generation import Ending, Sampling


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, some pieces of several, an end of text and a special token more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = [("a", "b"), ("ab", "c"), ("Ċ", "Ċ"), ("Ġ", "a"), ("a", "a"), ("aa", "aa")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})  # pyright: ignore
    return tokenizer


BYTES = byte_level()


def first_end(ending: Ending, tokens: Sequence[int]) -> int | None:
    """How many tokens the whole text needs until it holds an end string behind the held ones."""
    held = 0
    for count in range(1, len(tokens) + 1):
        text = ending.tokenizer.decode(list(tokens[:count]), skip_special_tokens=True)
        assert isinstance(text, str)
        found = sum(
            text.startswith(end, place) for end in ending.strings for place in range(len(text))
        )
        if count > ending.hold and found > held:
            return count
        held = found
    return None


def stopped(ending: Ending, tokens: Sequence[int]) -> int | None:
    """How many tokens a row has when `ending` ends it."""
    return next((n for n in range(1, len(tokens) + 1) if ending(tokens[:n])), None)


PIECES = [*range(len(BYTES))]
ENDS = ["a", "aa", "abc", "\n\n", " a", "é", "日本", "b c", "aaaaaaaaa", "c\n"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_tail_says_what_the_whole_text_says(data: st.DataObject):
    text = "".join(data.draw(st.lists(st.sampled_from([*"abc \né日本"]), max_size=40)))
    tokens = BYTES.encode(text)
    if data.draw(st.booleans()):  # pieces that no text is cut into, special ones among them
        tokens = data.draw(
            st.lists(st.sampled_from([*tokens, PIECES[-1], PIECES[-2]]), max_size=40)
        )
    ends = data.draw(st.lists(st.sampled_from(ENDS), min_size=1, max_size=3, unique=True))
    hold = data.draw(st.integers(0, 6))
    sampling = Sampling(end_strings=tuple(ends), min_tokens_to_generate=hold)
    ending = Ending(BYTES, sampling)
    assert stopped(ending, tokens) == first_end(ending, tokens)


def test_the_tail_is_bounded_by_the_end_string(monkeypatch: pytest.MonkeyPatch):
    ending = Ending(BYTES, Sampling(end_strings=("日本", "xy")))
    decoded: list[int] = []
    plain = BYTES.decode

    def counting(tokens, **options):
        decoded.append(len(tokens))
        return plain(tokens, **options)

    monkeypatch.setattr(BYTES, "decode", counting)
    assert not ending(BYTES.encode("b" * 500))
    assert max(decoded) <= 6 + 8
    assert len(decoded) == 1


def test_a_text_is_cut_where_the_first_end_string_starts():
    ending = Ending(BYTES, Sampling(end_strings=("\n\n", "b\n")))
    tokens = BYTES.encode("aab\n\n")
    assert ending(tokens)
    assert ending.text(tokens) == "aa"
    assert ending.text(BYTES.encode("aab")) == "aab"


def test_an_end_string_among_the_first_tokens_is_text():
    ending = Ending(BYTES, Sampling(end_strings=("b",), min_tokens_to_generate=3))
    tokens = BYTES.encode("bcbcb")
    assert len(tokens) == 5
    assert [n for n in range(1, 6) if ending(tokens[:n])] == [5]
    assert ending.text(tokens) == "bcbc"


def test_an_end_string_that_is_a_special_token_ends_by_its_id():
    ending = Ending(BYTES, Sampling(end_strings=("<|turn|>", "a")))
    turn = BYTES.convert_tokens_to_ids("<|turn|>")
    assert ending.ids == {BYTES.eos_token_id, turn}
    assert ending.strings == ("a",)
    assert Ending(BYTES, Sampling()).ids == {BYTES.eos_token_id}


def test_special_tokens_behind_a_held_end_string_complete_nothing():
    ending = Ending(BYTES, Sampling(end_strings=("b",), min_tokens_to_generate=1))
    tokens = [*BYTES.encode("b"), BYTES.convert_tokens_to_ids("<|turn|>")]
    assert not ending(tokens)
    assert ending.text(tokens) == "b"


@pytest.mark.parametrize("end", ["dog", "the dog", " dog", "!"])
def test_sentencepiece_texts_end_too(shared: Path, end: str):
    from graftwerk.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(shared / "data" / "models" / "stories260k")
    tokens = tokenizer.encode("Once upon a time the dog ran! The dog ran", add_special_tokens=False)
    ending = Ending(tokenizer, Sampling(end_strings=(end,)))
    count = stopped(ending, tokens)
    assert count is not None
    assert count == first_end(ending, tokens)
    assert (
        ending.text(tokens[:count]).strip() == "Once upon a time the dog ran".split(end)[0].strip()
    )


def test_words_end_where_one_of_them_does():
    tokenizer = build_tokenizer("word", ["one two three"])
    ending = Ending(tokenizer, Sampling(end_strings=("two",)))
    tokens = tokenizer.encode("one two three", add_special_tokens=False)
    assert stopped(ending, tokens) == first_end(ending, tokens)
    assert ending.text(tokens[: stopped(ending, tokens)]).strip() == "one"
