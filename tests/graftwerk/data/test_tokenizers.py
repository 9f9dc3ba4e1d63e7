"""Tokenizers for models that are trained from scratch."""

import pytest

from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError


def test_words_are_ranked_by_frequency_then_alphabet():
    tokenizer = build_tokenizer("word", ["b a , c", "b zoo"])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
        "<pad>", "<eos>", "<unk>", "b", ",", "a", "c", "zoo",
    ]  # fmt: skip


def test_words_beyond_the_vocabulary_are_unknown():
    tokenizer = build_tokenizer("word", ["b b a"], vocab_size=4)
    assert tokenizer.encode("b a") == [3, tokenizer.unk_token_id]


@pytest.mark.parametrize(("type", "text"), [("word", "Ann likes tea ."), ("byte", " Zoë\n日 <b>")])
def test_text_survives_saving_loading_and_the_way_there_and_back(tmp_path, type, text):
    from transformers import AutoTokenizer

    build_tokenizer(type, ["Ann likes tea ."]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("type", "size", "words"),
    [("bpe", None, ["bpe", "word, byte"]), ("byte", 300, ["259"]), ("word", 3, ["at least 4"])],
)
def test_a_wrong_request_is_refused(type, size, words):
    with pytest.raises(UserError) as error:
        build_tokenizer(type, ["a"], size)
    assert all(word in str(error.value) for word in words)
