"""Packed and shared rows in a learning stage: the same run, by fewer tokens."""

import json
import random
from pathlib import Path

import pytest

from graftwerk.adapters import (
    BatchSplit,
    HubLoRAConfig,
    LoRAConfig,
    PromptTuningConfig,
    ReftConfig,
    Stack,
)
from graftwerk.checkpoints.adapter import read_adapters
from graftwerk.data.datamodule import AnswerDataModule
from graftwerk.errors import Exit, UserError
from graftwerk.stages import learning
from graftwerk.training.learner import open_base, tokenizer_of
from tests.graftwerk.learning_stage import WORDS, base, cfg, elsewhere, read_metrics, rows
from tests.graftwerk.stages.test_layouts import (
    as_layout,
    assert_alike,
    at,
    columns,
    of_family,
    peft,
    run_on,
    weights,
)
from tests.graftwerk.tiny import tiny_gpt

__all__ = ["base", "cfg", "peft", "rows"]
QUESTIONS = 3


@pytest.fixture
def paragraphs(cfg, tmp_path):
    """The stage with three questions of each of eight paragraphs, dropout off, three steps."""
    random_words = random.Random(0)
    found = []
    for _ in range(8):
        context = random_words.choices(WORDS, k=18)
        for question in random_words.sample(WORDS, QUESTIONS):
            row = {"taskname": "first", "context": " ".join(context), "question": question}
            found.append({**row, "answer": context[0]})
    path = tmp_path / "paragraphs.jsonl"
    path.write_text("\n".join(map(json.dumps, found)))
    cfg.model.data.train_ds = cfg.model.data.validation_ds = [str(path)]
    cfg.model.adapter_tuning.adapter_dropout = 0.0
    cfg.model.global_batch_size = 8
    cfg.trainer.max_epochs = 1
    return cfg


def run(cfg, folder, **data):
    """The metrics and the adapter of a run with these keys of `model.data`."""
    other = elsewhere(cfg, folder)
    other.model.data.update(data)
    assert learning.run("adapter_learning", other) == Exit.DONE
    adapter = read_adapters(other.model.nemo_path).adapters[0].state
    summary = json.loads((Path(other.exp_manager.explicit_log_dir) / "summary.json").read_text())
    return read_metrics(other), adapter, summary


def assert_same_run(one, other):
    for key in ("train_loss", "val_loss", "grad_norm"):
        found = [float(row[key]) for row in one[0] if row.get(key)]
        expected = [float(row[key]) for row in other[0] if row.get(key)]
        assert found == pytest.approx(expected, rel=1e-4), key
    assert one[1].keys() == other[1].keys()
    for key, value in other[1].items():
        assert (one[1][key] - value).norm() <= 1e-3 * value.norm().clamp(min=1), key


def test_a_packed_run_is_the_padded_one(paragraphs, tmp_path):
    padded = run(paragraphs, tmp_path / "padded")
    packed = run(paragraphs, tmp_path / "packed", packed_sequence_size=64, share_prefixes=False)
    assert_same_run(packed, padded)
    assert padded[2]["packing"] is None
    assert packed[2]["packing"]["shares"] is False


def test_a_shared_run_is_the_packed_one_in_its_order(paragraphs, tmp_path, capsys):
    paragraphs.model.data.shuffle = False
    padded = run(paragraphs, tmp_path / "padded")
    shared = run(paragraphs, tmp_path / "shared", packed_sequence_size=64)
    assert_same_run(shared, padded)
    said = capsys.readouterr().out
    assert "packing: rows of 64 tokens" in said
    assert "shuffling: rows of a tree stay together" in said
    report = shared[2]["packing"]
    assert report["shared"] < 0.6 * report["packed"] <= 0.6 * report["padded"]


def module_of(cfg, **data):
    cfg.model.data.update(data)
    tokenizer = tokenizer_of(cfg.model, open_base("adapter_learning", cfg.model))
    return AnswerDataModule(cfg.model, tokenizer, seed=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"packed_sequence_size": 16}, ["packed_sequence_size=16", "longest row", "encoder_seq"]),
        ({"packed_sequence_size": 0}, ["packed_sequence_size=0", "from 1"]),
        ({"packed_sequence_size": "8"}, ["packed_sequence_size='8'", "whole number"]),
        ({"share_prefixes": "yes"}, ["share_prefixes='yes'", "auto, true, false"]),
        ({"share_prefixes": True}, ["share_prefixes=True", "packed_sequence_size is null"]),
    ],
)
def test_values_of_packing_that_do_not_fit_are_refused(paragraphs, data, words):
    with pytest.raises(UserError) as error:
        module_of(paragraphs, **data)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_packed_rows_need_no_global_batch_that_micro_batches_divide(paragraphs):
    paragraphs.model.global_batch_size = 7
    module = module_of(paragraphs, packed_sequence_size=64)
    steps = list(module.train_dataloader())
    assert [sum(batch.num_rows for batch in step) for step in steps] == [7, 7, 7, 3]


def with_adapters(composition=None, **methods):
    model = tiny_gpt()
    for name, method in methods.items():
        model.add_adapter(name, method)
    model.set_active(composition or next(iter(methods)))
    return model


LORA = LoRAConfig(dim=2)


def test_a_method_that_looks_ahead_is_packed_unshared_and_the_log_says_so(paragraphs):
    module = module_of(paragraphs, packed_sequence_size=64)
    (said, *_) = module.arrange(with_adapters(late=ReftConfig(suffix_positions=1)))
    assert "adapter 'late' reads what comes behind a token" in said
    assert not module.shares
    assert module.groups == 0
    module.arrange(with_adapters(early=ReftConfig()))
    assert module.shares
    assert module.groups == 8


def test_true_insists_on_sharing(paragraphs):
    module = module_of(paragraphs, packed_sequence_size=64, share_prefixes=True)
    with pytest.raises(UserError, match="share_prefixes=True: adapter 'late' reads what comes"):
        module.arrange(with_adapters(late=ReftConfig(suffix_positions=1)))


BY_ROWS = BatchSplit("a", "b", batch_sizes=[4, 4])


def test_what_needs_a_text_a_row_gets_padded_rows_and_the_log_says_so(paragraphs):
    expected = list(module_of(paragraphs).train_dataloader())
    module = module_of(paragraphs, packed_sequence_size=64)
    (said,) = module.arrange(with_adapters(BY_ROWS, a=LORA, b=LORA))
    assert "padded in spite of model.data.packed_sequence_size=64" in said
    assert "BatchSplit gives adapter 'a' rows of a batch" in said
    found = list(module.train_dataloader())
    assert module.packing_report is None
    for step, other in zip(found, expected, strict=True):
        assert all((a.tokens == b.tokens).all() for a, b in zip(step, other, strict=True))


def test_beside_a_gate_texts_have_room_for_prompts_of_their_own(paragraphs):
    module = module_of(paragraphs, packed_sequence_size=64)
    prompt, gated = PromptTuningConfig(virtual_tokens=2), HubLoRAConfig(use_gating=True)
    module.arrange(with_adapters(Stack("p", "g"), p=prompt, g=gated))
    for step in module.train_dataloader():
        assert all(int((batch.positions < 0).sum()) == 2 * batch.num_rows for batch in step)


def test_rows_that_cannot_be_packed_must_fill_micro_batches(paragraphs):
    paragraphs.model.global_batch_size, paragraphs.model.micro_batch_size = 7, 2
    module = module_of(paragraphs, packed_sequence_size=64)
    words = "BatchSplit gives .*global_batch_size 7 must be a multiple of micro_batch_size 2"
    with pytest.raises(UserError, match=words):
        module.arrange(with_adapters(BY_ROWS, a=LORA, b=LORA))


def test_true_insists_on_sharing_where_rows_cannot_even_be_packed(paragraphs):
    module = module_of(paragraphs, packed_sequence_size=64, share_prefixes=True)
    with pytest.raises(UserError, match="share_prefixes=True: BatchSplit gives"):
        module.arrange(with_adapters(BY_ROWS, a=LORA, b=LORA))


def test_a_run_does_not_go_on_with_rows_in_another_order(paragraphs, tmp_path):
    paragraphs.trainer.max_steps = 2
    run(paragraphs, tmp_path / "one", packed_sequence_size=64)
    paragraphs.trainer.max_steps = 3
    with pytest.raises(UserError, match="rows in another order"):
        run(paragraphs, tmp_path / "one", packed_sequence_size=64, share_prefixes=False)
    run(paragraphs, tmp_path / "one", packed_sequence_size=64)


def test_a_shared_run_that_was_stopped_goes_on_to_the_same_weights(paragraphs, tmp_path):
    part = paragraphs.copy()
    part.trainer.max_steps = 1
    part.model.optim.sched = {"name": "constant"}
    paragraphs.model.optim.sched = {"name": "constant"}
    whole = run(paragraphs, tmp_path / "straight", packed_sequence_size=64)
    run(part, tmp_path / "stopped", packed_sequence_size=64)
    resumed = run(paragraphs, tmp_path / "stopped", packed_sequence_size=64)
    assert all((resumed[1][key] == value).all() for key, value in whole[1].items())


@pytest.mark.long
@pytest.mark.parametrize("share", [True, False])
def test_any_layout_learns_from_the_same_packed_rows_with_dropout(
    share, paragraphs, peft, tmp_path
):
    """Five methods on two processes, of which one may run out of packed rows."""
    peft.model.data.update({"packed_sequence_size": 64, "share_prefixes": share})
    peft.model.update({"global_batch_size": 5, "micro_batch_size": 1})
    peft.trainer.max_steps = 4
    alone, runs = learned_by_layouts(peft, tmp_path)
    for config in runs:
        assert_alike(weights(config), weights(alone), 1e-4)


def learned_by_layouts(cfg, folder):
    """The stage on one process and on two by each axis, which report the same; their settings."""
    alone = at(cfg, folder / "alone")
    layouts = ("data", "tensor", "sequence", "pipeline")
    runs = [as_layout(at(cfg, folder / name), name) for name in layouts]
    run_on(2, [("peft", config) for config in runs])
    assert learning.run("peft", alone) == Exit.DONE
    for config in runs:
        assert columns(config) == [pytest.approx(row, rel=1e-4) for row in columns(alone)]
    return alone, runs


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_packed_run_of_another_family_is_the_padded_one(family, peft, tmp_path):
    made = of_family(peft, family, tmp_path)
    made.model.peft.update({"peft_scheme": "lora,adapter,ia3"})
    for block in ("lora_tuning", "adapter_tuning"):
        made.model.peft[block].adapter_dropout = 0.0
    made.trainer.max_steps = 3
    padded, packed = at(made, tmp_path / "padded"), at(made, tmp_path / "packed")
    packed.model.data.packed_sequence_size = 48
    for config in (padded, packed):
        assert learning.run("peft", config) == Exit.DONE
    assert columns(packed) == [pytest.approx(row, rel=1e-4) for row in columns(padded)]
    assert_alike(moving(packed), moving(padded), 1e-3)


def moving(cfg):
    """What was trained, but for the bias of start and end scores, which moves no probability."""
    return {name: value for name, value in weights(cfg).items() if "out_proj.bias" not in name}


@pytest.mark.long
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_any_layout_learns_from_the_packed_rows_of_another_family(family, peft, tmp_path):
    made = of_family(peft, family, tmp_path)
    made.model.peft.update({"peft_scheme": "lora,adapter,ia3"})
    made.model.data.packed_sequence_size = 48
    made.model.update({"global_batch_size": 5, "micro_batch_size": 1})
    made.trainer.max_steps = 3
    alone, runs = learned_by_layouts(made, tmp_path)
    for config in runs:
        assert_alike(moving(config), moving(alone), 1e-3)
