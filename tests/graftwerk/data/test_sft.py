"""Rows of supervised fine-tuning in NeMo's words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from graftwerk.data.encoding import Encoder, Label, RowDropped
from graftwerk.data.prompts import even_cuts
from graftwerk.data.seq2seq import Seq2SeqEncoder
from graftwerk.data.tasks import ANY_TASK, encoders_from_config, sft_template
from graftwerk.data.templates import RowError
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from tests.graftwerk.tiny_families import bert_shape, bert_tokenizer

word = build_tokenizer("word", ["a b c d e f g h User Assistant :"])
byte = build_tokenizer("byte", [])
EOS = word.eos_token_id


def encoder(limit=64, tokenizer=word, **settings):
    return make(Encoder, limit, tokenizer, settings)


def make(kind, limit, tokenizer, settings, *more):
    own = ("add_bos", "add_eos", "add_sep", "tokens_to_generate", "over_long", "virtual_tokens")
    given = {key: settings.pop(key) for key in own if key in settings}
    template = sft_template({"prompt_template": "{input} {output}"} | settings)
    return kind(template, tokenizer, limit, *more, **given)


def ids(text):
    return word.encode(text, add_special_tokens=False)


def whole(example):
    return [*example.tokens, example.labels[-1].token]


ROW = {"input": "a b c d e f", "output": "g h"}


def test_pieces_are_tokenised_apart_and_the_answer_is_learned():
    example, cut = encoder(prompt_template="User: {input} Assistant: {output}").encode(ROW)
    prompt = ids("User: a b c d e f Assistant:")
    assert whole(example) == [*prompt, *ids("g h"), EOS]
    last = len(prompt) - 1
    g, h = ids("g h")
    assert example.labels == [Label(last, g), Label(last + 1, h), Label(last + 2, EOS)]
    assert not cut


def test_bytes_are_those_of_the_filled_template_with_spaces_before_fields():
    coder = encoder(tokenizer=byte, prompt_template="Q:  {input}\n\nA: {output}")
    example, _ = coder.encode({"input": "x ", "output": "y"})
    text = byte.decode(example.tokens, skip_special_tokens=True)
    assert text == "Q:  x \n\nA: y"
    assert byte.decode(coder.encode_prompt({"input": "x "})) == "Q:  x \n\nA:"


def test_any_key_may_be_the_label():
    coder = encoder(prompt_template="{question} {reply}", label_key="reply")
    assert coder.encode({"question": "a", "reply": "b"})[0].labels[0].token == ids("b")[0]
    with pytest.raises(UserError, match=r"model.data.label_key: \{output\} must be the last"):
        encoder(prompt_template="{output} {input}")
    with pytest.raises(UserError, match=r"model.data.label_key: 'output' is no field"):
        encoder(prompt_template="{question} {reply}")


def test_a_row_without_its_fields_is_named():
    with pytest.raises(RowError, match="no field 'input'; the row has 'inptu'"):
        encoder().check({"inptu": "a", "output": "b"})


def test_other_keys_are_metadata():
    assert encoder().metadata(ROW | {"id": 7, "lang": "en"}) == {"id": 7, "lang": "en"}


def test_without_answer_only_loss_every_next_token_is_a_label():
    example, _ = encoder(answer_only_loss=False).encode(ROW)
    tokens = whole(example)
    assert example.labels == [Label(n, tokens[n + 1]) for n in range(len(tokens) - 1)]


def test_special_tokens_stand_where_they_belong():
    tokenizer = build_tokenizer("word", ["a b c d e f g h"])
    tokenizer.bos_token, tokenizer.sep_token = "a", "b"
    coder = encoder(tokenizer=tokenizer, add_bos=True, add_sep=True)
    a, b, c, d = tokenizer.encode("a b c d", add_special_tokens=False)
    example, _ = coder.encode({"input": "c", "output": "d"})
    assert whole(example) == [a, c, b, d, tokenizer.eos_token_id]
    assert [label.token for label in example.labels] == [d, tokenizer.eos_token_id]
    assert coder.encode_prompt({"input": "c"}) == [a, c, b]
    with pytest.raises(UserError, match=r"data.add_sep is True, but the tokenizer has no sep"):
        encoder(add_sep=True)


# a b c d e f, g h and the end token: 9 tokens.
@pytest.mark.parametrize(("method", "kept"), [("right", "a b c d"), ("left", "c d e f")])
def test_fields_are_cut_evenly_and_by_whole_tokens(method, kept):
    coder = encoder(7, truncation_field="input", truncation_method=method)
    example, cut = coder.encode(ROW)
    assert cut
    assert whole(example) == [*ids(f"{kept} g h"), EOS]
    assert example.labels[0] == Label(3, ids("g")[0])
    two = encoder(
        8, prompt_template="{x} {y} {output}", truncation_field="x, y", truncation_method=method
    )
    example, _ = two.encode({"x": "a b c d", "y": "e f g h", "output": "a"})
    expected = "a b c e f g a" if method == "right" else "b c d f g h a"
    assert whole(example)[:-1] == ids(expected)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 40))
def test_even_cuts_take_what_is_asked_and_from_longer_fields_no_less(lengths, excess):
    cuts = even_cuts(lengths, excess)
    if sum(lengths) < excess:
        assert cuts is None
        return
    assert cuts is not None
    assert sum(cuts) == excess
    assert all(0 <= cut <= length for cut, length in zip(cuts, lengths, strict=True))
    for one, first in zip(cuts, lengths, strict=True):
        for other in cuts:
            assert one == first or one >= other - 1


def test_a_cut_field_may_be_empty_but_the_rest_must_fit():
    coder = encoder(3, truncation_field="input")
    assert whole(coder.encode(ROW)[0]) == [*ids("g h"), EOS]
    with pytest.raises(RowDropped, match="longer than encoder_seq_length 2 without its input"):
        encoder(2, truncation_field="input").encode(ROW)


@pytest.mark.parametrize(
    ("field", "message"),
    [("output", "the answer is never cut"), ("inptu", "'inptu' is no field")],
)
def test_fields_that_cannot_be_cut_are_refused(field, message):
    with pytest.raises(UserError, match=f"model.data.truncation_field: .*{message}"):
        encoder(truncation_field=field)


def test_key_over_long_decides_between_cutting_and_dropping():
    def outcome(**settings):
        try:
            return encoder(8, **settings).encode(ROW)[1]
        except RowDropped as dropped:
            return str(dropped)

    assert outcome() == "longer than encoder_seq_length 8, truncation_field is null"
    assert outcome(truncation_field="input") is True
    assert outcome(truncation_field="input", over_long="cut") is True
    dropped = outcome(truncation_field="input", over_long="drop")
    assert dropped == "longer than encoder_seq_length 8"
    with pytest.raises(UserError, match=r"over_long=cut, but model.data.truncation_field is null"):
        encoder(over_long="cut")


texts = st.text(alphabet="ab cé.:\n", max_size=20)


@given(texts, texts.filter(str.strip), st.integers(12, 40), st.sampled_from(["left", "right"]))
def test_a_prompt_is_cut_alike_with_and_without_its_answer(source, answer, limit, side):
    coder = encoder(
        limit,
        byte,
        truncation_field="input",
        truncation_method=side,
        prompt_template="U: {input}\nA: {output}",
        tokens_to_generate=4,
    )
    try:
        example, _ = coder.encode({"input": source, "output": answer})
    except RowDropped:
        return
    start = example.labels[0].position + 1
    assert len(whole(example)) <= limit
    if len(byte.encode(" " + answer)) <= 4:
        assert coder.encode_prompt({"input": source}, room=4) == list(example.tokens[:start])
    answered = [label.token for label in example.labels]
    assert byte.decode(answered[:-1]) == " " + answer
    assert [label.position for label in example.labels] == list(
        range(start - 1, start - 1 + len(answered))
    )


def test_a_real_sentencepiece_reads_pieces_as_in_running_text(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / "stories260k")
    coder = encoder(200, tokenizer, prompt_template="Once {input} and {output}")
    example, _ = coder.encode({"input": "upon a time", "output": "a little girl"})
    text = "Once upon a time and a little girl"
    assert whole(example)[:-1] == tokenizer.encode(text, add_special_tokens=False)


def test_a_t5_reads_the_prompt_and_learns_the_answer():
    t5 = make(Seq2SeqEncoder, 5, word, {"truncation_field": "input", "virtual_tokens": 1}, 7)
    example, cut = t5.encode(ROW)
    assert cut
    assert example.source == [*ids("a b c"), EOS]
    assert [label.token for label in example.labels] == [*ids("g h"), EOS]
    for key in ("add_sep", "tokens_to_generate"):
        tokenizer = build_tokenizer("word", ["a"])
        tokenizer.sep_token = "a"
        with pytest.raises(UserError, match=f"model.data.{key} has no meaning for a T5"):
            make(Seq2SeqEncoder, 64, tokenizer, {key: 3}, 7)


def config(**data):
    return OmegaConf.create({"encoder_seq_length": 32, "task_templates": [], "data": data})


def test_the_configuration_makes_one_encoder_for_all_rows():
    cfg = config(prompt_template="{input} {output}", truncation_field=["input"], add_eos=False)
    encoders = encoders_from_config(cfg, word)
    assert list(encoders) == [ANY_TASK]
    (example,), _ = next(encoders[ANY_TASK].encode_all([ROW]))
    assert [label.token for label in example.labels] == ids("g h")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "model.task_templates is empty.*model.data.prompt_template"),
        (
            {"prompt_template": "{input} {output}", "chat": True},
            "prompt_template and model.data.ch",
        ),
        ({"prompt_template": "<|VIRTUAL_PROMPT_0|>{input} {output}"}, "leave .* out"),
        ({"prompt_template": "{input} {output}", "over_long": "cutt"}, "allowed: null, cut, drop"),
    ],
)
def test_a_wrong_description_of_rows_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        encoders_from_config(config(**data), word)


def test_templates_and_sft_rows_exclude_each_other():
    cfg = config(prompt_template="{input} {output}")
    cfg.task_templates = [{"taskname": "t", "prompt_template": "{question} {answer}"}]
    with pytest.raises(
        UserError, match=r"model.task_templates and model.data.prompt_template both"
    ):
        encoders_from_config(cfg, word)


def test_a_bert_that_marks_answers_reads_no_sft_rows():
    tokenizer = bert_tokenizer()
    shape = bert_shape(len(tokenizer), head="question_answering")
    with pytest.raises(UserError, match="prompt_template has no meaning for head question_answer"):
        encoders_from_config(config(prompt_template="{input} {output}"), tokenizer, shape)
