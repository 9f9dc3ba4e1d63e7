"""Rows to tokens and labels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.encoding import Encoder, Label, RowDropped
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError

WORDS = "a b c d e f g h context question answer :"
TEMPLATE = "context: {context} question: {question} answer: {answer}"
word = build_tokenizer("word", [WORDS])
byte = build_tokenizer("byte", [])
EOS = word.eos_token_id


def encoder(limit=64, tokenizer=word, add_bos=False, add_eos=True, **template):
    entry = {"taskname": "t", "prompt_template": TEMPLATE} | template
    return Encoder(TaskTemplate.from_config(entry), tokenizer, limit, add_bos, add_eos)


def ids(text):
    return word.encode(text, add_special_tokens=False)


def whole(example):
    """The tokens of the text: the input and the last label."""
    return [*example.tokens, example.labels[-1].token]


ROW = {"context": "a b c d", "question": "e f", "answer": "g h"}


def test_labels_are_the_answer_and_the_end_token_at_the_positions_before_them():
    example, cut = encoder().encode(ROW)
    prompt = ids("context: a b c d question: e f answer:")
    g, h = ids("g h")
    assert example.tokens == [*prompt, g, h]
    last = len(prompt) - 1
    assert example.labels == [Label(last, g), Label(last + 1, h), Label(last + 2, EOS)]
    assert not cut


def test_without_an_end_token_the_answer_is_all():
    example, _ = encoder(add_eos=False).encode(ROW)
    assert [label.token for label in example.labels] == ids("g h")


def test_a_start_token_comes_first():
    word_with_bos = build_tokenizer("word", [WORDS])
    word_with_bos.bos_token = "<eos>"
    bare = encoder().encode_prompt(ROW)
    assert encoder(tokenizer=word_with_bos, add_bos=True).encode_prompt(ROW) == [EOS, *bare]


def test_a_special_token_that_the_tokenizer_lacks_is_refused():
    with pytest.raises(UserError, match="add_bos"):
        encoder(add_bos=True)


def test_without_answer_only_loss_every_next_token_is_a_label():
    example, _ = encoder(answer_only_loss=False).encode(ROW)
    tokens = whole(example)
    assert example.labels == [Label(i, tokens[i + 1]) for i in range(len(tokens) - 1)]


def test_without_an_answer_field_the_whole_text_is_learned():
    coder = encoder(prompt_template="{text}", answer_field=None, answer_only_loss=False)
    example, _ = coder.encode({"text": "a b c"})
    assert whole(example) == [*ids("a b c"), EOS]
    assert len(example.labels) == 3


# context : a b c d question : e f answer : g h, and the end token: 15 tokens.
def test_a_row_that_just_fits_is_whole_and_one_token_less_cuts_one_token():
    full, cut = encoder(limit=15, truncate_field="context").encode(ROW)
    assert len(whole(full)) == 15
    assert not cut
    example, cut = encoder(limit=14, truncate_field="context").encode(ROW)
    assert cut
    assert whole(example) == [*ids("context: a b c question: e f answer: g h"), EOS]
    assert [label.token for label in example.labels] == [*ids("g h"), EOS]


def test_a_field_may_be_cut_to_nothing_but_the_rest_must_fit():
    example, _ = encoder(limit=11, truncate_field="context").encode(ROW)
    assert whole(example) == [*ids("context: question: e f answer: g h"), EOS]
    with pytest.raises(RowDropped, match="longer than encoder_seq_length 10 without its context"):
        encoder(limit=10, truncate_field="context").encode(ROW)


def test_without_a_field_to_cut_a_long_row_is_dropped():
    encoder(limit=15).encode(ROW)
    with pytest.raises(RowDropped, match="truncate_field is null"):
        encoder(limit=14).encode(ROW)


def test_an_empty_answer_is_dropped():
    with pytest.raises(RowDropped, match="empty answer"):
        encoder().encode(ROW | {"answer": " "})


def test_a_prompt_leaves_room_for_its_answer():
    coder = encoder(limit=14, truncate_field="context")
    assert len(coder.encode_prompt(ROW, room=3)) == 11
    assert coder.encode_prompt(ROW, room=5) == ids("context: a question: e f answer:")


def test_many_rows_at_once_are_encoded_as_one_by_one():
    coder = encoder(limit=13, truncate_field="context")
    rows = [ROW, ROW | {"context": "a"}, ROW | {"answer": ""}, ROW | {"answer": "a b c d e f g"}]
    outcomes = list(coder.encode_all(rows))
    assert outcomes[:2] == [([e], cut) for e, cut in map(coder.encode, rows[:2])]
    assert [str(outcome) for outcome in outcomes[2:]] == [
        "empty answer",
        "longer than encoder_seq_length 13 without its context",
    ]


texts = st.text(alphabet="ab cé日.:\n", max_size=30)


@given(
    context=texts,
    question=texts,
    answer=texts.filter(lambda text: text.strip()),
    limit=st.integers(30, 160),
    add_eos=st.booleans(),
)
def test_a_cut_row_is_as_long_as_allowed_and_keeps_answer_and_prompt(
    context, question, answer, limit, add_eos
):
    row = {"context": context, "question": question, "answer": answer}
    coder = encoder(limit, byte, add_eos=add_eos, truncate_field="context")
    free = encoder(10_000, byte, add_eos=add_eos)
    try:
        example, cut = coder.encode(row)
    except RowDropped:
        without = whole(free.encode(row | {"context": ""})[0])
        assert len(without) > limit
        return
    complete, _ = free.encode(row)
    assert cut == (len(whole(complete)) > limit)
    tokens = whole(example)
    assert len(tokens) <= limit
    # A character of this alphabet has at most three bytes, and is kept whole or not at all.
    assert not cut or len(tokens) > limit - 3
    assert [x.token for x in example.labels] == [x.token for x in complete.labels]
    assert [x.position for x in example.labels] == list(
        range(len(tokens) - len(example.labels) - 1, len(tokens) - 1)
    )
    kept = len(context)
    while cut and whole(free.encode(row | {"context": context[:kept]})[0]) != tokens:
        kept -= 1
        assert kept >= 0, "the cut row is no row with a shorter context"


@given(context=texts, question=texts, answer=texts.filter(lambda text: text.strip()))
def test_generation_sees_the_prompt_of_training(context, question, answer):
    row = {"context": context, "question": question, "answer": answer}
    coder = encoder(10_000, byte)
    prompt = coder.encode_prompt({"context": context, "question": question})
    example, _ = coder.encode(row)
    assert list(example.tokens[: len(prompt)]) == prompt
    assert example.labels[0].position == len(prompt) - 1


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "stories260k"])
def test_real_tokenizers_read_the_answer_as_in_running_text(shared, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / name)
    row = {"context": "Once upon a time.", "question": "Who was there?", "answer": "a little girl"}
    example, _ = encoder(200, tokenizer).encode(row)
    text = TEMPLATE.format(**row)
    assert whole(example)[:-1] == tokenizer.encode(text, add_special_tokens=False)


def test_a_real_tokenizer_cuts_to_the_last_token(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / "gpt2_tokenizer")
    row = {"context": "Once upon a time there was. " * 30, "question": "Who?", "answer": "a girl"}
    for limit in (40, 41, 42, 43, 44):
        example, cut = encoder(limit, tokenizer, truncate_field="context").encode(row)
        assert cut
        assert len(whole(example)) == limit
        assert tokenizer.decode(example.tokens).endswith("question: Who? answer: a girl")
