"""Task templates: what they accept, and how a row becomes text."""

import pytest

from graftwerk.data.templates import RowError, TaskTemplate
from graftwerk.errors import UserError

SQUAD = {
    "taskname": "squad",
    "prompt_template": "context: {context} question: {question} answer: {answer}",
    "total_virtual_tokens": 0,
    "virtual_token_splits": [],
    "truncate_field": None,
    "answer_only_loss": True,
    "answer_field": "answer",
}
ROW = {"context": "c", "question": "q", "answer": "a"}


def test_the_published_entry_is_read_and_rendered():
    template = TaskTemplate.from_config(SQUAD)
    assert template.render(ROW) == ("context: c question: q answer:", " a")


def test_prompt_and_answer_together_are_the_filled_template():
    template = TaskTemplate.from_config(SQUAD)
    row = {"context": " c {x} ", "question": "q\n", "answer": " a "}
    assert "".join(template.render(row)) == "context:  c {x}  question: q\n answer:  a "


def test_a_prompt_without_its_answer_is_that_of_training():
    template = TaskTemplate.from_config(SQUAD)
    without = {"context": "c", "question": "q"}
    assert template.render(without, answer=False)[0] == template.render(ROW)[0]


def test_doubled_braces_are_braces():
    template = TaskTemplate("t", "{{{question}}} {answer}")
    assert template.render(ROW) == ("{q}", " a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_template": "q: {question} a: {answer}."}, ["answer_field", "last"]),
        ({"prompt_template": "{answer} {question}"}, ["answer_field", "last"]),
        ({"prompt_template": "q: {question}"}, ["answer_field", "'answer'", "question"]),
        ({"prompt_template": "no field"}, ["prompt_template", "no field"]),
        ({"prompt_template": "{question} {question} {answer}"}, ["question", "twice"]),
        ({"prompt_template": "{question {answer}"}, ["prompt_template"]),
        ({"prompt_template": "{question!r} {answer}"}, ["prompt_template", "question"]),
        ({"prompt_template": ""}, ["prompt_template"]),
        ({"taskname": None}, ["taskname"]),
        ({"truncate_field": "contxt"}, ["truncate_field", "contxt", "context"]),
        ({"truncate_field": "answer"}, ["truncate_field", "never cut"]),
        ({"virtual_token_splits": [10]}, ["virtual_token_splits", "0 placeholders"]),
        ({"answer_field": None}, ["answer_field", "answer_only_loss"]),
        ({"truncate_feild": "context"}, ["truncate_feild", "did you mean truncate_field"]),
    ],
)
def test_a_wrong_entry_is_refused_by_key(changes, words):
    with pytest.raises(UserError) as error:
        TaskTemplate.from_config(SQUAD | changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "c", "qestion": "q", "answer": "a"}, ["question", "did you mean 'qestion'"]),
        ({"context": "c", "question": ["q"], "answer": "a"}, ["question", "list"]),
        ({"context": None, "question": "q", "answer": "a"}, ["context", "NoneType"]),
    ],
)
def test_a_wrong_row_is_refused_by_field(row, words):
    with pytest.raises(RowError) as error:
        TaskTemplate.from_config(SQUAD).render(row)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_numbers_are_written_out():
    template = TaskTemplate("t", "{question} {answer}")
    assert template.render({"question": 1.5, "answer": 3}) == ("1.5", " 3")
