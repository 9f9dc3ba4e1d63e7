"""Conversations under chat templates of the shapes that real models have."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from graftwerk.data.chat import ChatEncoder, without_oldest_turn
from graftwerk.data.encoding import RowDropped, RowUnlabelled
from graftwerk.data.tasks import encoders_from_config
from graftwerk.data.templates import RowError
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from tests.graftwerk.tiny_families import t5_shape

# A header and an end for each turn.
MARKUP = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# The same, and a system's turn where there is none.
DEFAULT_SYSTEM = (
    """{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}"""
    + MARKUP
)
# Questions in brackets, the system's words in the first of them, no generation prompt, stripping.
BRACKETS = """{% set sys = '' %}{% if messages[0].role == 'system' %}
{%- set sys = '<<' + messages[0].content + '>> ' %}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') }}
{{- m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}
{%- endif %}{% endfor %}"""
# The system's words in the last question, so that earlier prompts look otherwise.
SYSTEM_LAST = """{% set sys = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}{% if m.role == 'user' %}
{{- '[INST]' + (sys + '\\n' if loop.index >= loop.length - 1 else '') + m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
# Reasoning is shown in the last turn alone, empty where it has none.
THINKING = """{% for m in messages %}{% set c = m.content %}
{%- if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1] %}
{%- elif m.role == 'assistant' and '</think>' not in c %}{% set c = '<think>\\n</think>\\n' + c %}
{%- endif %}{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# The generation prompt opens reasoning, which no turn keeps; the end of text at the very end alone.
OPENED = """{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content.split('</think>')[-1] + '\\n\\n' }}
{%- else %}{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: <think>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
# Says itself which words are the assistant's.
MARKS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}
{{- m.content + '<|im_end|>' }}{% endgeneration %}{% else %}
{{- m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# What the assistant says in a turn, after each template's own fashion.
ENDS = {
    "markup": (MARKUP, "{}<|im_end|>\n"),
    "default system": (DEFAULT_SYSTEM, "{}<|im_end|>\n"),
    "brackets": (BRACKETS, " {} <eos>"),
    "system last": (SYSTEM_LAST, "{}<eos>"),
    "thinking": (THINKING, "<think>\n</think>\n{}<|im_end|>\n"),
    "opened": (OPENED, "{}\n\n"),
    "marks": (MARKS, "{}<|im_end|>"),
}


def tokenizer_of(template):
    tokenizer = build_tokenizer("byte", [])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<s>"}
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: tokenizer_of(template) for name, (template, _) in ENDS.items()}


def encoder(name="markup", limit=10_000, **settings):
    return ChatEncoder(TOKENIZERS[name], limit, **settings)


def conversation(questions, answers, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in zip(questions, answers, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def learned(name, example):
    return TOKENIZERS[name].decode([label.token for label in example.labels])


def text(name, example):
    last = example.labels[-1]
    tail = [last.token] if last.position == len(example.tokens) - 1 else []
    return TOKENIZERS[name].decode([*example.tokens, *tail])


words = st.text(alphabet="ab é.:[/", min_size=1, max_size=9).map(lambda t: f"x{t}x")
talks = st.lists(st.tuples(words, words), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", list(ENDS))
@given(talk=talks, system=st.none() | words)
def test_the_assistants_turns_are_learned_and_nothing_else(name, talk, system):
    row = conversation(*zip(*talk, strict=True), system)
    (outcome,) = encoder(name).encode_all([row])
    assert not isinstance(outcome, RowDropped)
    said = [ENDS[name][1].format(answer) for _, answer in talk]
    got = [learned(name, example) for example in outcome.examples]
    # The end of text, which "opened" has behind a last turn alone, depends on how it is split.
    assert "".join(got).replace("<eos>", "") == "".join(said).replace("<eos>", "")
    assert name == "opened" or "".join(got) == "".join(said)
    for example in outcome.examples:
        tokens = [*example.tokens, None]
        for label in example.labels:
            following = tokens[label.position + 1]
            assert following in (label.token, None)


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", [name for name in ENDS if name != "opened"])
@given(talk=talks, system=st.none() | words)
def test_a_prompt_has_the_tokens_that_precede_the_last_turn_in_training(name, talk, system):
    row = conversation(*zip(*talk, strict=True), system)
    coder = encoder(name)
    (outcome,) = coder.encode_all([row])
    assert not isinstance(outcome, RowDropped)
    prompt = coder.encode_prompt(row)
    assert list(outcome.examples[-1].tokens[: len(prompt)]) == prompt
    assert prompt == coder.encode_prompt({"messages": row["messages"][:-1]})
    rendered = TOKENIZERS[name].apply_chat_template(
        row["messages"][:-1], tokenize=False, add_generation_prompt=True
    )
    assert TOKENIZERS[name].decode(prompt) == rendered


@pytest.mark.parametrize(
    ("name", "examples"),
    [("markup", 1), ("brackets", 1), ("marks", 1), ("system last", 2), ("thinking", 2)],
)
def test_templates_that_show_earlier_turns_otherwise_make_an_example_of_each(name, examples):
    row = conversation(["one", "two"], ["uno", "dos"], "S")
    (outcome,) = encoder(name).encode_all([row])
    assert len(outcome.examples) == examples
    render = TOKENIZERS[name].apply_chat_template
    expected = [row["messages"][:3], row["messages"]] if examples == 2 else [row["messages"]]
    for example, messages in zip(outcome.examples, expected, strict=True):
        assert text(name, example).startswith(render(messages, tokenize=False).rstrip("\n"))


def test_segments_have_the_tokens_of_the_whole_text_under_a_real_tokenizer(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / "gpt2_tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = MARKUP
    row = conversation(["Who is there?", "Why?"], ["A little girl.", "(nobody knows)"], "Be kind.")
    (outcome,) = ChatEncoder(tokenizer, 500).encode_all([row])
    (example,) = outcome.examples
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    expected = tokenizer.encode(whole, add_special_tokens=False)
    assert [*example.tokens, example.labels[-1].token] == expected


def test_an_assistant_that_begins_is_learned_from_its_words_on():
    row = {"messages": [{"role": "assistant", "content": "Hello"}]}
    (outcome,) = encoder("default system").encode_all([row])
    assert learned("default system", outcome.examples[0]) == "Hello<|im_end|>\n"


def test_without_answer_only_loss_all_tokens_are_learned():
    row = conversation(["a"], ["b"])
    (outcome,) = encoder(answer_only_loss=False).encode_all([row])
    whole = TOKENIZERS["markup"].apply_chat_template(row["messages"], tokenize=False)
    assert learned("markup", outcome.examples[0]) == whole.removeprefix("<|im_start|>")


def test_tools_go_to_the_template():
    tokenizer = tokenizer_of("{% if tools %}{{ tools[0].function.name }}: {% endif %}" + MARKUP)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = conversation(["a"], ["b"]) | {"tools": [tool]}
    assert tokenizer.decode(ChatEncoder(tokenizer, 500).encode_prompt(row)).startswith("add: <|im")


def test_other_keys_are_metadata():
    row = conversation(["a"], ["b"]) | {"id": 3, "tools": []}
    assert encoder().metadata(row) == {"id": 3}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "no field 'messages'"),
        ([], "no field 'messages'"),
        ([{"content": "a"}], r"messages\[0\] must be"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content must be a text, not list"),
        ([{"role": "user", "content": None}], r"content must be a text, not NoneType"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(RowError, match=message):
        encoder().check({"messages": messages})


def test_what_the_template_refuses_is_told_in_its_words():
    row = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(RowError, match="the chat template refuses the messages: roles must alt"):
        list(encoder("brackets").encode_all([row]))


def test_a_conversation_without_the_assistant_has_nothing_to_learn():
    (outcome,) = encoder().encode_all([{"messages": [{"role": "user", "content": "a"}]}])
    assert isinstance(outcome, RowUnlabelled)


def test_a_conversation_that_is_too_long_is_dropped_or_cut_as_the_configuration_says():
    row = conversation(["aaa", "bbb", "ccc"], ["uno", "dos", "tres"], "S")
    size = len(encoder().encode_prompt({"messages": row["messages"]})) + len("tres") + 2

    def outcome(limit, **settings):
        (result,) = encoder(limit=limit, **settings).encode_all([row])
        if isinstance(result, RowDropped):
            return str(result)
        return result.cut, learned("markup", result.examples[0])

    everything = "uno<|im_end|>\ndos<|im_end|>\ntres<|im_end|>\n"
    assert outcome(size) == (False, everything)
    assert outcome(size - 1) == f"longer than encoder_seq_length {size - 1}"
    assert outcome(size - 1, over_long="drop") == outcome(size - 1)
    assert outcome(size - 1, over_long="cut") == (True, everything[:-1])
    left = {"over_long": "cut", "truncation_method": "left"}
    assert outcome(size - 1, **left) == (True, "dos<|im_end|>\ntres<|im_end|>\n")
    assert "before the assistant speaks" in outcome(10, over_long="cut")
    assert "in its last turns alone" in outcome(10, **left)


def test_a_prompt_that_is_too_long_loses_its_oldest_turns():
    row = conversation(["aaa", "bbb"], ["uno", "dos"], "S")
    short = {"messages": [row["messages"][0], *row["messages"][3:]]}
    prompt = encoder().encode_prompt(short)
    coder = encoder(limit=len(prompt) + 5, over_long="cut")
    assert coder.encode_prompt(row, room=5) == prompt
    with pytest.raises(RowDropped, match="longer than"):
        coder.encode_prompt(row, room=6)
    with pytest.raises(RowDropped, match="longer than"):
        encoder(limit=len(prompt) + 5).encode_prompt(row, room=5)
    assert without_oldest_turn(short["messages"]) is None


def config(**data):
    return OmegaConf.create({"encoder_seq_length": 32, "data": {"chat": True, **data}})


def test_models_that_hold_no_conversations_are_refused():
    with pytest.raises(UserError, match="the base's tokenizer has no chat template"):
        encoders_from_config(config(), build_tokenizer("byte", []))
    tokenizer = TOKENIZERS["markup"]
    with pytest.raises(UserError, match="chat=True: a t5 model reads no conversations"):
        encoders_from_config(config(), tokenizer, t5_shape(len(tokenizer)))
    with pytest.raises(UserError, match="add_bos, add_eos and add_sep have no meaning"):
        encoders_from_config(config(add_bos=True), tokenizer)
    (coder,) = encoders_from_config(config(over_long="cut"), tokenizer, virtual_tokens=4).values()
    assert isinstance(coder, ChatEncoder)
    assert (coder.limit, coder.cuts) == (28, True)
