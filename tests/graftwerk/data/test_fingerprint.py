"""Each setting that decides how rows are encoded makes another fingerprint."""

import copy
import inspect
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from graftwerk.data.chat import ChatEncoder
from graftwerk.data.encoding import Encoder
from graftwerk.data.fingerprint import fingerprint
from graftwerk.data.question_answering import SpanEncoder
from graftwerk.data.seq2seq import Seq2SeqEncoder
from graftwerk.data.templates import SFTTemplate, TaskTemplate
from graftwerk.data.token_cache import cache_key
from graftwerk.data.tokenized import Encoding
from graftwerk.data.tokenizers import build_tokenizer
from tests.graftwerk.tiny_families import TEMPLATE, bert_tokenizer


def word_tokenizer(words="a b c d", **attributes):
    made = build_tokenizer("word", [words])
    made.bos_token, made.sep_token, made.chat_template = "<eos>", "<unk>", "{{ messages }}"
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


word, bert = word_tokenizer(), bert_tokenizer(["a", "b"])
TASK = {"taskname": "t", "prompt_template": TEMPLATE, "truncate_field": "context"}
task, other_task = TaskTemplate(**TASK), TaskTemplate(**TASK | {"truncate_field": "question"})
sft = {"prompt_template": "{a} {b} {output}", "truncation_fields": ("a",)}
COMMON = {"template": other_task, "encoder_seq_length": 31, "add_bos": True, "add_eos": False}
# Of each encoder: what it is given, and another value for every one of its settings.
ENCODERS = {
    Encoder: (
        {"template": task, "tokenizer": word, "encoder_seq_length": 32},
        {
            **COMMON,
            "tokenizer": word_tokenizer("a b c e"),
            "add_sep": True,
            "tokens_to_generate": 3,
            "virtual_tokens": 1,
            "over_long": "drop",
        },
    ),
    Seq2SeqEncoder: (
        {"template": task, "tokenizer": word, "encoder_seq_length": 32, "start": 0},
        {**COMMON, "tokenizer": word_tokenizer("a b c e"), "start": 1},
    ),
    SpanEncoder: (
        {
            "template": TaskTemplate("t", TEMPLATE),
            "tokenizer": bert,
            "encoder_seq_length": 32,
            "num_token_types": 2,
        },
        {
            "template": TaskTemplate("u", TEMPLATE),
            "tokenizer": bert_tokenizer(["a", "c"]),
            "encoder_seq_length": 31,
            "num_token_types": 0,
            "virtual_tokens": 1,
        },
    ),
    ChatEncoder: (
        {"tokenizer": word, "encoder_seq_length": 32},
        {
            "tokenizer": word_tokenizer(chat_template="{{ messages[0] }}"),
            "encoder_seq_length": 31,
            "answer_only_loss": False,
            "tokens_to_generate": 3,
            "virtual_tokens": 1,
            "over_long": "cut",
            "truncation_method": "left",
        },
    ),
}
TEMPLATES = {
    TaskTemplate: (
        TASK,
        {
            "taskname": "u",
            "prompt_template": TEMPLATE + " ",
            "total_virtual_tokens": 2,
            "virtual_token_splits": (2,),
            "truncate_field": "question",
            "answer_only_loss": False,
            "answer_field": None,
        },
    ),
    SFTTemplate: (
        sft,
        {
            "prompt_template": "{a} {b}  {output}",
            "truncation_fields": ("b",),
            "truncation_method": "left",
        },
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_each_setting_of_an_encoder_makes_another_fingerprint(kind):
    given, changes = ENCODERS[kind]
    own = inspect.signature(kind.__init__).parameters.values()
    named = {p.name for p in own if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    assert named == set(changes), "every setting is to be tried"
    made = [fingerprint(kind(**given | {name: value})) for name, value in changes.items()]
    assert len({fingerprint(kind(**given)), *made}) == 1 + len(changes)
    assert fingerprint(kind(**given)) == fingerprint(kind(**given))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_each_field_of_a_template_makes_another_fingerprint(kind):
    given, changes = TEMPLATES[kind]
    own = {f.name for f in fields(kind) if f.init}
    inherited = set() if kind is TaskTemplate else {f.name for f in fields(TaskTemplate)}
    assert own - inherited <= set(changes), "every field is to be tried"
    seen = {fingerprint(kind(**given))}
    for name, value in changes.items():
        template = copy.copy(kind(**given))
        object.__setattr__(template, name, value)  # some go only with others
        seen.add(fingerprint(template))
    assert len(seen) == 1 + len(changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token", "<unk>"),
        ("chat_template", "x"),
        ("truncation_side", "left"),
        ("split_special_tokens", True),
    ],
)
def test_what_a_tokenizer_has_beside_its_words_counts(name, value):
    assert fingerprint(word_tokenizer(**{name: value})) != fingerprint(word)


def test_what_a_tokenizer_was_last_used_for_does_not_count():
    before = fingerprint(bert)
    bert("a b", truncation=True, max_length=3, padding="max_length")
    assert fingerprint(bert) == before


def test_all_of_an_encoding_counts_and_the_bytes_of_the_file(tmp_path):
    (tmp_path / "x").write_text("{}")
    (tmp_path / "y").write_text("{} ")
    coder = Encoder(task, word, 32)
    keys = [
        cache_key(Encoding({"t": coder}), tmp_path / "x"),
        cache_key(Encoding({"t": coder}), tmp_path / "y"),
        cache_key(Encoding({"u": coder}), tmp_path / "x"),
        cache_key(Encoding({"t": coder}, drop_unlabelled=True), tmp_path / "x"),
        cache_key(Encoding({"t": coder, "u": coder}), tmp_path / "x"),
        cache_key(Encoding({"u": coder, "t": coder}), tmp_path / "x"),
    ]
    assert len(set(keys)) == len(keys)


def test_what_has_no_content_is_refused():
    with pytest.raises(TypeError, match="no fingerprint of a function"):
        fingerprint({"x": lambda: 0})


CODE = """
import sys
from graftwerk.data.encoding import Encoder
from graftwerk.data.fingerprint import fingerprint
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenized import Encoding
from graftwerk.data.tokenizers import build_tokenizer

tokenizer = build_tokenizer("word", ["d c b a context : question answer"])
template = TaskTemplate("t", "{context} {question} {answer}", truncate_field="context")
print(fingerprint(Encoding({"t": Encoder(template, tokenizer, 32)})), "torch" in sys.modules)
"""


def test_another_process_finds_the_same_and_needs_no_torch(capsys):
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, torch = run.stdout.split()
    exec(CODE, {})
    assert capsys.readouterr().out.split()[0] == found
    assert torch == "False"
