"""`model.inference` of the eval stage: each key changes the answers as it says."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import DictConfig

from graftwerk.checkpoints import load_base, load_tokenizer
from graftwerk.data.jsonl import read_rows
from graftwerk.errors import UserError
from graftwerk.evaluation.predict import Answerer
from graftwerk.generation import OptionError, Sampling, complete
from graftwerk.stages.eval import run
from launcher_scripts.schema import Inference
from launcher_scripts.validate import check, default_of, fields_of
from tests.graftwerk.learning_stage import base  # noqa: F401
from tests.graftwerk.stages.test_eval import (
    cfg,  # noqa: F401
    predictions,
)


@pytest.fixture
def alone(cfg: DictConfig) -> DictConfig:  # noqa: F811
    """The base alone, with answers of eight tokens."""
    cfg.model.adapters = []
    cfg.model.inference.tokens_to_generate = 8
    return cfg


def answers(cfg: DictConfig, seed: int = 1, **inference) -> dict[str, str]:  # noqa: F811
    changed = cfg.copy()
    changed.model.seed = seed
    changed.model.inference.update(inference)
    run(changed)
    return predictions(changed, "base")


DRAWING = [{"temperature": 0.05}, {"top_k": 2}, {"top_p": 0.05}]


@pytest.mark.parametrize("option", DRAWING)
def test_a_key_that_draws_changes_drawn_answers_and_no_greedy_ones(alone, option, capsys):
    greedy, drawn = answers(alone), answers(alone, greedy=False)
    assert greedy != drawn
    assert answers(alone, greedy=False, **option) != drawn
    assert "no effect" not in capsys.readouterr().out
    assert answers(alone, **option) == greedy
    assert f"greedy=True: {next(iter(option))} has no effect" in capsys.readouterr().out


def test_key_seed_changes_drawn_answers_alone(alone: DictConfig):
    drawn = answers(alone, greedy=False)
    assert answers(alone, greedy=False) == drawn
    assert answers(alone, seed=2, greedy=False) != drawn
    assert answers(alone, seed=2) == answers(alone)


def test_drawn_answers_do_not_depend_on_the_batch(alone: DictConfig):
    drawn = answers(alone, greedy=False)
    alone.model.data.batch_size = 1
    assert answers(alone, greedy=False) == drawn


def test_key_repetition_penalty_changes_greedy_answers(alone: DictConfig):
    plain, penalised = answers(alone), answers(alone, repetition_penalty=50.0)

    def repeats(found: dict[str, str]) -> int:
        return sum(len(text.split()) - len(set(text.split())) for text in found.values())

    assert repeats(plain) > repeats(penalised)


def test_key_min_tokens_to_generate_lengthens_answers(alone: DictConfig):
    free = answers(alone)
    ends = sorted({text.split()[0] for text in free.values() if text})
    short = answers(alone, end_strings=ends)
    assert not any(short.values())
    held = answers(alone, end_strings=ends, min_tokens_to_generate=3)
    assert min(len(text.split()) for text in held.values()) >= 3


def test_key_compute_logprob_writes_tokens_and_their_log_probabilities(alone: DictConfig):
    texts = answers(alone, compute_logprob=True)
    path = Path(alone.exp_manager.explicit_log_dir) / "base" / "predictions.jsonl"
    rows = [row for _, row in read_rows(path)]
    assert len(rows) == 6
    for row in rows:
        assert len(row["tokens"]) == len(row["logprobs"]) > 0
        assert max(row["logprobs"]) < 0
        assert row["pred"].split()[0] == row["tokens"][0]
    assert answers(alone) == texts
    assert all("logprobs" not in json.loads(line) for line in path.read_text().splitlines()), (
        "they are written unasked"
    )


def test_an_answer_carries_the_log_probabilities_of_its_tokens(alone: DictConfig):
    model, tokenizer = (
        load(alone.model.language_model_path) for load in (load_base, load_tokenizer)
    )
    sampling = Sampling(tokens_to_generate=4, compute_logprob=True)
    prompt = tokenizer.encode("w1 w2 w3", add_special_tokens=False)
    (row,) = complete(model, [prompt], sampling)
    (answer,) = Answerer(tokenizer, sampling).answer(model, [prompt])
    assert answer.tokens == tokenizer.convert_ids_to_tokens(row.tokens)
    assert answer.logprobs == row.logprobs


def test_wrong_options_are_refused_before_anything_is_written(alone: DictConfig):
    with pytest.raises(UserError, match=r"model\.inference\.min_tokens_to_generate=9: .* 8"):
        answers(alone, min_tokens_to_generate=9)
    assert not Path(alone.exp_manager.explicit_log_dir).exists()


def test_the_launcher_has_the_defaults_of_the_job():
    ours = {field.name: field.default for field in fields(Sampling)}
    for name, (_, field) in fields_of(Inference).items():
        default = default_of(field)
        assert (tuple(default) if isinstance(default, list) else default) == ours[name], name


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("temperature", [0, 0.0009, 0.001, 1, 1000, 1001, math.nan, math.inf]),
        ("top_k", [-1, 0, 1, 10**6]),
        ("top_p", [0, 1e-9, 1, 1.0001, math.nan]),
        ("repetition_penalty", [-1, 0, 0.001, 1, 1000, 1001]),
        ("min_tokens_to_generate", [-1, 0, 32]),
        ("tokens_to_generate", [0, 1, 10**6]),
        ("end_strings", [[], ["\n"], [""], ["a", ""]]),
    ],
)
def test_the_launcher_refuses_what_the_job_refuses(key: str, values: list):
    mistakes: list[str] = []
    for value in values:
        mistakes.clear()
        check({key: value}, Inference, "", lambda key, what: mistakes.append(what))
        try:
            Sampling.from_keys({key: value}, seed=1)
        except OptionError:
            assert mistakes, value
        else:
            assert not mistakes, value
