"""Rows to sources and targets."""

import pytest

from graftwerk.data.dataset import AnswerDataset, collate
from graftwerk.data.encoding import Label, RowDropped
from graftwerk.data.seq2seq import Seq2SeqEncoder
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from tests.graftwerk.tiny_families import TEMPLATE, write_lines

word = build_tokenizer("word", ["a b c d e f g h context question answer :"])
EOS, START = word.eos_token_id, 7
ROW = {"context": "a b c d", "question": "e f", "answer": "g h"}


def encoder(limit=64, add_bos=False, add_eos=True, **template):
    entry = {"taskname": "t", "prompt_template": TEMPLATE} | template
    made = TaskTemplate.from_config(entry)
    return Seq2SeqEncoder(made, word, limit, START, add_bos, add_eos)


def ids(text):
    return word.encode(text, add_special_tokens=False)


def test_the_prompt_is_the_source_and_the_answer_the_target():
    example, cut = encoder().encode(ROW)
    g, h = ids("g h")
    assert example.source == [*ids("context: a b c d question: e f answer:"), EOS]
    assert example.tokens == [START, g, h]
    assert example.labels == [Label(0, g), Label(1, h), Label(2, EOS)]
    assert not cut
    assert encoder().encode_prompt(ROW) == example.source


def test_without_an_end_token_the_answer_is_all_and_the_source_keeps_its_own():
    example, _ = encoder(add_eos=False).encode(ROW)
    assert [label.token for label in example.labels] == ids("g h")
    assert example.source is not None
    assert example.source[-1] == EOS


# context : a b c d question : e f answer : and the end token: 13 tokens.
def test_a_long_source_is_cut_in_its_field_and_keeps_its_end():
    full, cut = encoder(limit=13, truncate_field="context").encode(ROW)
    assert not cut
    example, cut = encoder(limit=12, truncate_field="context").encode(ROW)
    assert cut
    assert example.source == [*ids("context: a b c question: e f answer:"), EOS]
    assert example.tokens == full.tokens
    with pytest.raises(RowDropped, match="truncate_field is null"):
        encoder(limit=12).encode(ROW)


def test_the_source_is_cut_alike_with_and_without_room_for_an_answer():
    coder = encoder(limit=12, truncate_field="context")
    assert coder.encode_prompt(ROW, room=8) == coder.encode(ROW)[0].source


def test_an_answer_that_is_too_long_is_dropped_not_cut():
    encoder(limit=13).encode(ROW | {"answer": "g " * 12})
    with pytest.raises(RowDropped, match="answer longer than encoder_seq_length 13"):
        encoder(limit=13).encode(ROW | {"answer": "g " * 13})
    with pytest.raises(RowDropped, match="empty answer"):
        encoder().encode(ROW | {"answer": " "})


@pytest.mark.parametrize(
    "template", [{"answer_only_loss": False}, {"answer_field": None, "answer_only_loss": False}]
)
def test_a_prompt_that_was_to_be_learned_is_refused(template):
    with pytest.raises(UserError, match="a T5 learns the answer alone"):
        encoder(**template)


def test_a_real_sentencepiece_target_is_a_text_of_its_own(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / "stories260k")
    template = TaskTemplate("t", TEMPLATE)
    row = {"context": "Once upon a time.", "question": "Who?", "answer": "a little girl"}
    example, _ = Seq2SeqEncoder(template, tokenizer, 200, 0).encode(row)
    expected = tokenizer.encode("a little girl", add_special_tokens=False)
    assert [label.token for label in example.labels] == [*expected, tokenizer.eos_token_id]


def test_sources_are_padded_on_their_own_and_say_where():
    coder = encoder()
    short = ROW | {"context": "a", "answer": "g g g"}
    batch = collate([coder.encode(ROW)[0], coder.encode(short)[0]], pad=0, multiple=2)
    assert batch.tokens.shape == (2, 4)
    assert batch.source is not None
    assert batch.source_documents is not None
    assert batch.source.shape == batch.source_documents.shape == (2, 14)
    assert (batch.source_documents == 0).sum(1).tolist() == [13, 10]
    assert not batch.source[batch.source_documents < 0].any()
    assert batch.label_positions is not None
    assert batch.label_positions.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert batch.num_tokens == 13 + 10 + 3 + 4
    assert collate([coder.encode(ROW)[0]]).source_documents is None


def test_a_filler_has_a_source_to_attend_to():
    filler = collate([], filler=encoder().filler)
    assert filler.inputs().keys() == {"tokens", "select", "source"}
    assert filler.source is not None
    assert (filler.source.tolist(), filler.tokens.tolist()) == ([[EOS]], [[START]])
    assert (filler.num_rows, filler.num_tokens, len(filler.labels)) == (0, 0, 0)


def test_examples_come_back_from_a_file_as_they_were_encoded(tmp_path):
    coder = encoder()
    rows = [ROW | {"context": "a " * n} for n in range(1, 9)]
    dataset = AnswerDataset([write_lines(tmp_path / "rows.jsonl", rows)], {"t": coder})
    assert [dataset[n] for n in range(8)] == [coder.encode(row)[0] for row in rows]
    assert dataset.report.longest == len(coder.encode_prompt(rows[-1])) + 3
    assert dataset.longest == len(coder.encode_prompt(rows[-1]))
