"""Which rows each step trains on, over ranks, epochs and a stop in between."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from graftwerk.data.datamodule import AnswerDataModule, longest_row
from graftwerk.data.micro_batches import MicroBatches
from graftwerk.data.sampler import Step, StepSampler
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

sizes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 40),
        "micro_batch_size": st.integers(1, 4),
        "world_size": st.sampled_from([1, 2, 4]),
        "seed": st.integers(0, 3),
        "shuffle": st.booleans(),
    }
)


class Numbers(MicroBatches):
    """Row numbers in the place of batches."""

    def lines(self, rows):
        return rows

    def batch(self, lines):
        return lines


def dealt(rows, micro_batch_size, world_size, **_):
    """What each rank gets of a step."""
    how = {"micro_batch_size": micro_batch_size, "world_size": world_size}
    return [Numbers(None, 0, 1, rank=rank, **how)[Step(rows, 0)] for rank in range(world_size)]


def flat(step):
    return [row for micro_batch in step for row in micro_batch]


@given(sizes)
def test_every_row_of_a_step_is_on_one_rank(sizes):
    rows = list(range(sizes["rows"]))
    assert sorted(row for part in dealt(**sizes | {"rows": rows}) for row in flat(part)) == rows


@given(sizes)
def test_ranks_have_as_many_micro_batches_of_at_most_their_size(sizes):
    parts = dealt(**sizes | {"rows": list(range(sizes["rows"]))})
    assert len({len(part) for part in parts}) == 1
    assert all(len(micro) <= sizes["micro_batch_size"] for part in parts for micro in part)
    counts = [len(flat(part)) for part in parts]
    assert max(counts) - min(counts) <= 1


def sampler_of(rows, micro_batch_size, world_size, seed, shuffle):
    return StepSampler(rows, micro_batch_size * world_size, seed, shuffle)


@given(sizes)
def test_an_epoch_gives_every_row_once(sizes):
    assert sorted(row for step in sampler_of(**sizes) for row in step.rows) == [
        *range(sizes["rows"])
    ]


@given(sizes, st.integers(0, 30))
def test_a_resumed_run_goes_on_with_the_very_next_step(sizes, done):
    whole, resumed = sampler_of(**sizes), sampler_of(**sizes)
    everything = [step for _ in range(4) for step in whole]
    done %= 2 * len(whole)
    resumed.set_consumed(resumed.samples_after(done))
    rest_and_next = [step for _ in range(2) for step in resumed]
    assert rest_and_next == everything[done : (done // len(whole) + 2) * len(whole)]


def test_consumed_rows_count_a_short_last_step_as_it_is():
    sampler = StepSampler(rows=10, step_rows=4)
    assert [sampler.samples_after(steps) for steps in range(8)] == [0, 4, 8, 10, 14, 18, 20, 24]


def test_each_epoch_has_its_own_order_and_a_seed_repeats_them():
    def epochs(seed):
        sampler = StepSampler(rows=50, step_rows=5, seed=seed)
        return [[step.rows for step in sampler] for _ in range(2)]

    first, second = epochs(1)
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2) != [first, second]


def test_without_shuffling_rows_come_in_the_order_of_the_file():
    sampler = StepSampler(rows=7, step_rows=4, shuffle=False)
    assert list(sampler) == [([0, 1, 2, 3], 0), ([4, 5, 6], 4)]
    assert list(sampler) == [([0, 1, 2, 3], 7), ([4, 5, 6], 11)]


def test_drop_last_leaves_out_the_short_step():
    sampler = StepSampler(rows=7, step_rows=4, drop_last=True)
    assert [len(step.rows) for step in sampler] == [4]
    assert len(sampler) == 1


tokenizer = build_tokenizer("word", [" ".join(f"w{n}" for n in range(100)) + " yes q"])


@pytest.fixture
def config(tmp_path):
    def row(n):
        return {"taskname": "squad", "question": f"w{n}", "answer": "yes", "context": "q"}

    for name, first, count in (("train", 0, 21), ("val", 50, 5)):
        rows = [row(first + n) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "empty.jsonl").write_text("")
    return OmegaConf.create(
        {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "encoder_seq_length": 32,
            "existing_tasks": [],
            "new_tasks": ["squad"],
            "task_templates": [
                {
                    "taskname": "squad",
                    "prompt_template": "context: {context} question: {question} answer: {answer}",
                    "total_virtual_tokens": 0,
                    "virtual_token_splits": [],
                    "truncate_field": None,
                    "answer_only_loss": True,
                    "answer_field": "answer",
                }
            ],
            "data": {
                "train_ds": [str(tmp_path / "train.jsonl")],
                "validation_ds": [str(tmp_path / "val.jsonl")],
                "add_eos": True,
                "shuffle": True,
                "num_workers": 0,
                "pin_memory": True,
            },
        }
    )


def questions(step):
    """The w-words that a step's batches ask about."""
    words = [
        word for batch in step for word in tokenizer.convert_ids_to_tokens(batch.tokens.flatten())
    ]
    return [word for word in words if word.startswith("w")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_is_a_list_of_micro_batches_and_an_epoch_all_rows(config, workers):
    config.data.num_workers = workers
    module = AnswerDataModule(config, tokenizer, seed=1)
    loader = module.train_dataloader()
    steps = list(loader)
    assert [[batch.num_rows for batch in step] for step in steps] == [[2] * 4, [2] * 4, [2, 2, 1]]
    assert len(loader) == module.steps_per_epoch == 3
    first = [word for step in steps for word in questions(step)]
    assert sorted(first) == sorted(f"w{n}" for n in range(21))
    second = [word for step in loader for word in questions(step)]
    assert sorted(second) == sorted(first)
    assert second != first


def test_resuming_gives_the_rest_of_the_epoch_then_the_next(config):
    whole = AnswerDataModule(config, tokenizer, seed=1).train_dataloader()
    expected = [questions(step) for _ in range(2) for step in whole]
    module = AnswerDataModule(config, tokenizer, seed=1)
    module.set_consumed(module.samples_after(2))
    loader = module.train_dataloader()
    assert [questions(step) for _ in range(2) for step in loader] == expected[2:]


def chances_of(config, micro_batch_size=2, seed=1, done=0, **layout):
    """What dropout draws from, by question, of each step of two epochs over all ranks."""
    config.micro_batch_size = micro_batch_size
    found = [{} for _ in range(6 - done)]
    for rank in range(layout.get("world_size", 1)):
        module = AnswerDataModule(config, tokenizer, seed=seed, rank=rank, **layout)
        module.set_consumed(module.samples_after(done))
        loader = module.train_dataloader()
        for place, step in zip(found, [step for _ in range(2) for step in loader], strict=False):
            for batch in step:
                pairs = zip(questions([batch]), batch.chance.tolist(), strict=False)  # or a filler
                place |= dict(pairs)
    return found


def test_what_dropout_draws_from_is_a_rows_own_in_any_layout_and_after_resuming(config):
    config.global_batch_size = 8
    one = chances_of(config)
    assert [len(step) for step in one] == [8, 8, 5] * 2
    assert len({chance for step in one for chance in step.values()}) == 42
    assert chances_of(config, 8) == one
    assert chances_of(config, 1, world_size=4) == one
    assert chances_of(config, done=4) == one[4:]
    other = chances_of(config, seed=2)
    assert not {c for step in one for c in step.values()} & {c for s in other for c in s.values()}


def test_ranks_that_run_out_of_rows_get_fillers(config):
    config.global_batch_size = 16
    modules = [AnswerDataModule(config, tokenizer, seed=1, rank=r, world_size=8) for r in range(8)]
    last = [list(module.train_dataloader())[-1] for module in modules]
    assert [[batch.num_rows for batch in step] for step in last] == [
        [n] for n in (1, 1, 1, 1, 1, 0, 0, 0)
    ]


def test_a_global_batch_is_the_same_rows_on_any_number_of_ranks(config):
    def steps(world_size):
        modules = [
            AnswerDataModule(config, tokenizer, seed=1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        parts = zip(*(module.train_dataloader() for module in modules), strict=True)
        return [sorted(word for part in step for word in questions(part)) for step in parts]

    one = steps(1)
    assert [len(step) for step in one] == [8, 8, 5]
    assert steps(2) == steps(4) == one


def test_accumulation_makes_a_step_of_several_global_batches(config):
    module = AnswerDataModule(config, tokenizer, seed=1, accumulate=2)
    assert [len(step) for step in module.train_dataloader()] == [8, 3]


def test_validation_goes_through_all_rows_in_order_each_time(config):
    loader = AnswerDataModule(config, tokenizer, seed=1).val_dataloader()
    for _ in range(2):
        assert [questions(step) for step in loader] == [[f"w{n}" for n in range(50, 55)]]


def test_without_validation_rows_there_is_no_validation(config, tmp_path):
    config.data.validation_ds = [str(tmp_path / "empty.jsonl")]
    assert AnswerDataModule(config, tokenizer, seed=1).val_dataloader() == []
    config.data.validation_ds = []
    assert AnswerDataModule(config, tokenizer, seed=1).val_dataloader() == []


def test_padding_to_a_multiple_reaches_the_batches(config):
    module = AnswerDataModule(config, tokenizer, seed=1, pad_multiple=16)
    assert all(b.tokens.shape[1] == 16 for step in module.train_dataloader() for b in step)


def test_the_report_counts_what_was_cut_and_dropped(config):
    config.encoder_seq_length = 8
    with pytest.raises(
        UserError, match=r"nothing to train on.*21 longer than encoder_seq_length 8"
    ):
        AnswerDataModule(config, tokenizer, seed=1)
    config.encoder_seq_length = 32
    report = AnswerDataModule(config, tokenizer, seed=1).report
    assert report["train"].as_dict() | {"dropped": None} == {
        "rows": 21, "kept": 21, "cut": 0, "examples": 21, "dropped": None,
        "tokens": 21 * 10, "labels": 21 * 2, "longest": 10,
    }  # fmt: skip
    assert report["validation"].rows == 5


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("global_batch_size", 9, ["global_batch_size 9", "multiple", "2 x 1"]),
        ("micro_batch_size", 0, ["micro_batch_size", "at least 1"]),
        ("encoder_seq_length", None, ["encoder_seq_length", "None"]),
        ("new_tasks", ["sqad"], ["new_tasks", "'sqad'", "squad"]),
        ("task_templates", [], ["task_templates", "empty"]),
        ("data.train_ds", ["/nowhere/x.jsonl"], ["train_ds", "/nowhere/x.jsonl", "data_prep"]),
        ("data.train_ds", [], ["nothing to train on"]),
        ("data.share_prefixes", 1, ["share_prefixes=1", "auto, true, false"]),
    ],
)
def test_a_wrong_config_is_refused_by_key(config, key, value, words):
    OmegaConf.update(config, key, value, merge=False)
    with pytest.raises(UserError) as error:
        AnswerDataModule(config, tokenizer, seed=1)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_drop_last_with_too_few_rows_is_refused(config):
    config.global_batch_size = 32
    config.data.drop_last = True
    with pytest.raises(UserError, match="drop_last"):
        AnswerDataModule(config, tokenizer, seed=1)


def test_existing_tasks_are_trained_on_too(config):
    config.existing_tasks, config.new_tasks = ["squad"], []
    assert len(AnswerDataModule(config, tokenizer, seed=1).train_set) == 21


def test_lightning_takes_the_steps_as_they_are(config):
    from pytorch_lightning import LightningModule, Trainer

    class Recorder(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.automatic_optimization = False
            self.seen = []

        def training_step(self, step):
            self.seen.append([batch.num_rows for batch in step])

        def validation_step(self, step):
            self.seen.append(sum(batch.num_rows for batch in step))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    recorder = Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(recorder, datamodule=AnswerDataModule(config, tokenizer, seed=1))
    assert recorder.seen == [[2] * 4, [2] * 4, [2, 2, 1], 5] * 2


def shape(**changes):
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8}
    base = {"vocab_size": len(tokenizer), "max_position_embeddings": 64} | sizes
    return TransformerConfig(**(base | changes))


def test_a_length_that_is_left_out_is_the_models(config):
    config.encoder_seq_length = None
    assert longest_row(config, shape()) == 64
    assert longest_row(config, shape(max_position_embeddings=0)) == 512
    del config["encoder_seq_length"]
    assert longest_row(config, shape(architecture="t5", max_position_embeddings=0)) == 512
    assert len(AnswerDataModule(config, tokenizer, seed=1, shape=shape()).train_set) == 21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 31}, "encoder_seq_length=32 is longer than the 31 positions"),
        (
            {"max_position_embeddings": 8, "position_embedding_type": "rope"},
            "model.data.train_ds: the longest row needs 9 positions, the model has 8",
        ),
        ({"vocab_size": 100}, "the tokenizer does not fit the model: it has tokens up to"),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        AnswerDataModule(config, tokenizer, seed=1, shape=shape(**changes))
    fits = {"max_position_embeddings": 32, "vocab_size": len(tokenizer)}
    AnswerDataModule(config, tokenizer, seed=1, shape=shape(**fits))


def test_rotary_positions_bound_rows_not_the_key(config):
    AnswerDataModule(
        config,
        tokenizer,
        seed=1,
        shape=shape(max_position_embeddings=9, position_embedding_type="rope"),
    )


def test_ranks_of_a_t5_that_run_out_of_rows_get_fillers_of_its_kind(config):
    config.global_batch_size = 16
    t5 = shape(architecture="t5", max_position_embeddings=0)
    modules = [
        AnswerDataModule(config, tokenizer, seed=1, rank=r, world_size=8, shape=t5)
        for r in range(8)
    ]
    last = [list(module.train_dataloader())[-1][0] for module in modules]
    assert {batch.num_rows for batch in last} == {0, 1}
    assert all(batch.source is not None for batch in last)


@pytest.mark.parametrize("off", [None, False])
def test_key_cache_dir_keeps_encoded_rows_for_the_next_run(config, tmp_path, off, monkeypatch):
    config.data.cache_dir = str(tmp_path / "cache")
    lines: list[str] = []
    first = AnswerDataModule(config, tokenizer, seed=1, say=lines.append)
    assert len(list((tmp_path / "cache").glob("*/entry.json"))) == len(lines) == 2
    expected = [questions(step) for step in first.train_dataloader()]
    with monkeypatch.context() as patch:
        patch.setattr("graftwerk.data.encoding.Encoder.encode_all", None)
        again = AnswerDataModule(config, tokenizer, seed=1)
    assert [questions(step) for step in again.train_dataloader()] == expected
    config.data.cache_dir = off
    config.encoder_seq_length -= 1  # not kept yet
    AnswerDataModule(config, tokenizer, seed=1)
    assert len(list((tmp_path / "cache").glob("*/entry.json"))) == 2


def test_cache_dir_true_is_no_folder(config):
    config.data.cache_dir = True
    with pytest.raises(UserError, match="cache_dir=True; allowed: a folder, or null"):
        AnswerDataModule(config, tokenizer, seed=1)


def test_on_a_gpu_batches_are_made_ahead_in_locked_memory_unless_a_key_says_no(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def loader(device, **keys):
        config.data = {**config.data, "num_workers": None, "pin_memory": None, **keys}
        made = AnswerDataModule(config, tokenizer, seed=1, device=device).train_dataloader()
        return made.num_workers, made.prefetch_factor, made.pin_memory

    assert loader("cuda") == (2, 2, True)
    assert loader("cpu") == (0, None, False)
    assert loader("cuda", num_workers=0, pin_memory=False) == (0, None, False)
