"""Windows over a context, the answer's span in them, and the best span's text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from graftwerk.data.dataset import AnswerDataset, collate
from graftwerk.data.encoding import RowDropped
from graftwerk.data.question_answering import DOC_STRIDE, NOWHERE, SpanEncoder
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from tests.graftwerk.tiny_families import TEMPLATE, bert_tokenizer, write_lines

bert = bert_tokenizer(["alpha", "beta", "gamma", "delta", "q", "?"])
CLS, SEP = bert.cls_token_id, bert.sep_token_id


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes in RoBERTa's form: `<s> a </s> </s> b </s>`, offsets without the space."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {piece: number for number, piece in enumerate([*special, *letters])}
    core = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)


roberta = roberta_tokenizer()


def encoder(tokenizer=bert, limit=64, types=2, **template) -> SpanEncoder:
    entry = {"taskname": "t", "prompt_template": TEMPLATE} | template
    return SpanEncoder(TaskTemplate.from_config(entry), tokenizer, limit, types)


def only(coder: SpanEncoder, row: dict):
    (outcome,) = coder.encode_all([row])
    return outcome


def row(context: str, answer: str, question: str = "q ?", **more) -> dict:
    return {"context": context, "question": question, "answer": answer, **more}


def ids(text: str) -> list[int]:
    return bert.encode(text, add_special_tokens=False)


def test_question_and_context_stand_in_berts_form_with_their_types():
    (example,) = only(encoder(), row("alpha beta gamma", "beta")).examples
    assert example.tokens == [CLS, *ids("q ?"), SEP, *ids("alpha beta gamma"), SEP]
    assert example.token_types == [0] * 4 + [1] * 4
    assert example.span == (5, 5)
    assert example.labels == ()


def test_question_and_context_stand_in_robertas_form_without_types():
    (example,) = only(encoder(roberta, types=1), row("ab cd", "cd", "q")).examples
    first = len(roberta.encode("q", add_special_tokens=False)) + 3
    assert example.tokens[0] == roberta.cls_token_id
    assert example.tokens[first - 2 : first] == [2, 2]
    assert example.token_types is None
    assert example.span == (first + 3, first + 4)


def test_a_context_that_fits_is_one_window_and_one_token_more_makes_two():
    context = " ".join(["alpha"] * 9)
    limit = 9 + len(ids("q ?")) + 3
    assert len(only(encoder(limit=limit), row(context, "alpha")).examples) == 1
    assert len(only(encoder(limit=limit - 1), row(context, "alpha")).examples) == 2


def test_windows_share_128_tokens_and_those_without_the_answer_point_at_cls():
    words = ["alpha"] * 400
    words[250] = "beta"
    found = only(encoder(limit=305), row(" ".join(words), "beta")).examples
    # 300 tokens of context a window: from 0 and from 300 - 128 = 172.
    assert [len(example.tokens) for example in found] == [305, 5 + 400 - (300 - DOC_STRIDE)]
    assert [example.span for example in found] == [(254, 254), (254 - 172, 254 - 172)]
    words[250], words[20] = "alpha", "beta"
    found = only(encoder(limit=305), row(" ".join(words), "beta")).examples
    assert [example.span for example in found] == [(24, 24), NOWHERE]


def test_answer_start_chooses_among_several_places():
    context = "beta alpha beta"
    assert only(encoder(), row(context, "beta")).examples[0].span == (4, 4)
    assert only(encoder(), row(context, "beta", answer_start=11)).examples[0].span == (6, 6)
    with pytest.raises(RowDropped, match="answer_start is not where"):
        raise only(encoder(), row(context, "beta", answer_start=3))


def test_an_answer_in_other_letters_is_found():
    assert only(encoder(), row("Alpha Beta", "beta")).examples[0].span == (5, 5)


def test_a_row_is_cut_out_by_characters_not_by_words():
    """`gam` lies within the token gamma; the whole token is the label."""
    assert only(encoder(), row("alpha gamma", "gam")).examples[0].span == (5, 5)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (row("alpha beta", "gamma"), "answer not in the context"),
        (row("alpha beta", " "), "empty answer"),
        (row("", "alpha"), "empty context"),
        (row(" ".join(["alpha"] * 40), " ".join(["alpha"] * 30)), "holds the whole answer"),
        (row("alpha", "alpha", "alpha " * 30), "question leaves no room"),
    ],
)
def test_a_row_without_a_span_is_dropped_with_its_reason(wrong, reason):
    with pytest.raises(RowDropped, match=reason):
        raise only(encoder(limit=24), wrong)


def test_rows_of_windows_of_several_sizes_come_back_in_order():
    coder = encoder(limit=24)
    rows = [row("alpha " * n, "alpha", "q " * (n % 7 + 1)) for n in range(1, 30)]
    assert list(coder.encode_all(rows)) == [only(coder, each) for each in rows]


words = st.lists(
    st.sampled_from(["alpha", "beta", "GAMMA", "délta", "x", "日本", "?", "ab"]), min_size=1
)


@settings(deadline=None, max_examples=150)
@given(
    words=words,
    place=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    limit=st.integers(12, 40),
    family=st.sampled_from(["bert", "roberta"]),
    given_start=st.booleans(),
)
def test_every_answer_in_the_context_is_labelled_and_slices_back(
    words, place, limit, family, given_start
):
    context = "  ".join(words)
    first, last = sorted(number % len(words) for number in place)
    answer = "  ".join(words[first : last + 1])
    start = len("  ".join(words[:first])) + (2 if first else 0)
    given = {"answer_start": start} if given_start else {}
    coder = encoder(bert if family == "bert" else roberta, limit)
    asked = coder.encode_prompt(row(context, answer))
    outcome = only(coder, row(context, answer, **given))
    if isinstance(outcome, RowDropped):
        held = asked.tokens_of(start, start + len(answer))
        assert held is not None
        count = held[1] - held[0] + 1
        # Windows of n tokens that share s hold every run of s + 1.
        room = max(window.count for window in asked.windows)
        assert count > min(DOC_STRIDE, room // 2) + 1
        return
    assert len(outcome.examples) == len(asked.windows)
    assert any(example.span != NOWHERE for example in outcome.examples)
    for number, example in enumerate(outcome.examples):
        assert len(example.tokens) <= limit
        if example.span != NOWHERE:
            assert asked.text(number, *example.span) == answer


@settings(deadline=None, max_examples=50)
@given(words=st.lists(st.sampled_from(["alpha", "beta", "x"]), min_size=1, max_size=80))
def test_windows_together_hold_the_whole_context(words):
    asked = encoder(limit=16).encode_prompt(row(" ".join(words), "x"))
    tokens = {
        w.begin + index: token
        for w in asked.windows
        for index, token in enumerate(w.tokens[w.first : w.first + w.count])
    }
    assert [tokens[index] for index in range(len(tokens))] == ids(" ".join(words))


def test_windows_are_those_of_the_tokenizer_asked_for_one_row_at_a_time():
    """The call that HF's run_qa makes."""
    context = " ".join(["alpha", "beta", "gamma", "x"] * 100)
    found = encoder(limit=300).encode_prompt(row(context, "x"))
    expected = bert(
        "q ?",
        context,
        truncation="only_second",
        max_length=300,
        stride=128,
        return_overflowing_tokens=True,
    )
    assert [window.tokens for window in found.windows] == expected["input_ids"]


def test_a_batch_has_starts_then_ends_and_marks_padding():
    coder = encoder()
    examples = only(coder, row("alpha beta gamma", "beta gamma")).examples
    examples += only(coder, row("alpha", "alpha")).examples
    batch = collate(examples)
    assert batch.labels.tolist() == [5, 4, 6, 4]
    assert batch.weights.tolist() == [1.0] * 4
    assert batch.label_positions is None
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0] * 8, [0] * 6 + [-1] * 2]
    assert batch.token_types is not None
    assert batch.token_types.tolist() == [[0] * 4 + [1] * 4, [0] * 4 + [1, 1, 0, 0]]
    assert set(batch.inputs()) == {"tokens", "documents", "token_types"}
    assert collate(examples[:1]).documents is None


def test_a_filler_weighs_nothing():
    filler = collate([], filler=encoder().filler)
    assert filler.labels.tolist() == [0, 0]
    assert filler.weights.tolist() == [0.0, 0.0]
    assert (filler.num_rows, filler.num_tokens) == (0, 0)


def test_a_file_becomes_its_rows_windows(tmp_path):
    coder = encoder(limit=24)
    rows = [row("alpha " * n + "beta", "beta") for n in (3, 40, 5)]
    dataset = AnswerDataset([write_lines(tmp_path / "rows.jsonl", rows)], {"t": coder})
    expected = [example for each in coder.encode_all(rows) for example in each.examples]
    assert [
        (e.tokens, e.token_types, e.span) for e in (dataset[n] for n in range(len(dataset)))
    ] == [(e.tokens, e.token_types, e.span) for e in expected]
    assert dataset.report.kept == 3
    assert dataset.report.examples == len(expected) > 3
    assert f"3 kept in {len(expected)} windows" in str(dataset.report)
    assert dataset.report.labels == 2 * len(expected)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"prompt_template": "{question} {answer}"}, "the fields {context}, {question}"),
        ({"prompt_template": "{title} {context} {question} {answer}"}, "not title"),
        ({"truncate_field": "context"}, "truncate_field='context' has no meaning"),
        ({"answer_only_loss": False}, "answer_only_loss: False has no meaning"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template, message):
    with pytest.raises(UserError, match=message):
        encoder(**template)


def test_a_tokenizer_that_does_not_mark_the_start_is_refused():
    with pytest.raises(UserError, match="begin with its cls token"):
        encoder(build_tokenizer("byte", []))


def test_padding_gets_no_score_and_changes_none():
    from graftwerk.models import build_model
    from tests.graftwerk.tiny import shake
    from tests.graftwerk.tiny_families import bert_shape

    torch.manual_seed(0)
    model = build_model(bert_shape(len(bert), "question_answering")).eval()
    shake(model)
    coder = encoder()
    examples = only(coder, row("alpha beta gamma", "beta")).examples
    examples += only(coder, row("beta", "beta")).examples
    with torch.no_grad():
        together = model(**collate(examples).inputs())
        alone = [model(**collate([example]).inputs()) for example in examples]
    for number, scores in enumerate(alone):
        width = scores.shape[1]
        pair = together[[number, number + 2]]
        torch.testing.assert_close(pair[:, :width], scores)
        assert (pair[:, width:] == float("-inf")).all()
