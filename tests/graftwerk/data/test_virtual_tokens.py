"""Placeholders of virtual tokens: the model fills them, before every row."""

import pytest
from omegaconf import OmegaConf

from graftwerk.data.tasks import encoders_from_config
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError

tokenizer = build_tokenizer("word", ["a b c d q :"])
PUBLISHED = {
    "taskname": "squad",
    "prompt_template": "<|VIRTUAL_PROMPT_0|> q: {question} {answer}",
    "total_virtual_tokens": 10,
    "virtual_token_splits": [10],
}


def config(length=32, **changes):
    template = PUBLISHED | changes
    return OmegaConf.create({"encoder_seq_length": length, "task_templates": [template]})


def test_placeholders_that_open_the_template_are_no_part_of_its_text():
    two = {
        "prompt_template": "<|VIRTUAL_PROMPT_0|><|VIRTUAL_PROMPT_1|>q: {question} {answer}",
        "virtual_token_splits": [3, 7],
    }
    template = TaskTemplate.from_config(PUBLISHED | two)
    assert template.render({"question": "a", "answer": "b"}) == ("q: a", " b")
    assert TaskTemplate.from_config(PUBLISHED).render({"question": "a", "answer": "b"}) == (
        " q: a",
        " b",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_template": "q: <|VIRTUAL_PROMPT_0|> {answer}"}, "must open the template"),
        ({"prompt_template": "<|VIRTUAL_PROMPT_1|>{answer}"}, "must open the template"),
        ({"virtual_token_splits": [5, 5]}, "has 2 numbers, the template 1 placeholders"),
        ({"virtual_token_splits": []}, "has 0 numbers, the template 1 placeholders"),
        ({"virtual_token_splits": [9]}, "sum is total_virtual_tokens, which is 10"),
        (
            {
                "prompt_template": "<|VIRTUAL_PROMPT_0|><|VIRTUAL_PROMPT_1|>{answer}",
                "virtual_token_splits": [10, 0],
            },
            "numbers above 0",
        ),
        ({"total_virtual_tokens": 0}, "which is 0"),
    ],
)
def test_wrong_placeholders_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TaskTemplate.from_config(PUBLISHED | changes)


def test_a_template_and_the_adapters_must_agree():
    for given in (0, 9):
        with pytest.raises(UserError, match=f"=10, but the run's adapters put {given} virtual"):
            encoders_from_config(config(), tokenizer, virtual_tokens=given)
    encoders_from_config(config(), tokenizer, virtual_tokens=10)
    free = {"prompt_template": "{question} {answer}", "virtual_token_splits": []}
    encoders_from_config(config(**free, total_virtual_tokens=0), tokenizer, virtual_tokens=9)


def test_what_is_evaluated_leaves_room_for_the_most_virtual_tokens():
    def room(given):
        cfg = config(length=20)
        (encoder,) = encoders_from_config(
            cfg, tokenizer, key="test_ds", virtual_tokens=given
        ).values()
        return encoder.limit  # pyright: ignore

    assert [room(0), room(10), room(12)] == [10, 10, 8]


def test_virtual_tokens_count_in_the_length_of_a_row():
    row = {"question": "a b", "answer": "c d"}  # with q and : and the end token 7 tokens

    def outcome(length):
        encoders = encoders_from_config(config(length), tokenizer, virtual_tokens=10)
        return next(iter(encoders["squad"].encode_all([row])))

    assert outcome(17).examples[0].labels  # pyright: ignore
    reason = "longer than encoder_seq_length 16 less 10 virtual tokens, truncate_field is null"
    assert str(outcome(16)) == reason


def test_virtual_tokens_without_room_for_a_row_are_refused():
    with pytest.raises(UserError, match="encoder_seq_length=11 has no room for a row behind 10"):
        encoders_from_config(config(11), tokenizer, virtual_tokens=10)
