"""Wrong input: one line for each mistake, all at once, code 2, nothing written."""

import json

import pytest

from launcher_scripts.schema import Dependency, MaxTime, TimeLimit
from launcher_scripts.shapes import Shape, read_shape
from launcher_scripts.validate import check

A = "adapter_learning"
LEARN = "stages=adapter_learning"


def refused(answer, *said: str) -> None:
    """Each of `said` is in a line of its own, and there are no other lines."""
    assert answer.code == 2
    assert answer.out == ""
    assert answer.written() == []
    assert len(answer.lines) == len(said), answer.lines
    for line, part in zip(answer.lines, said, strict=True):
        assert part in line


# ---- names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages=bogus"], "stages=bogus: no such stage; there are data_prep, training"),
        (["stages=[bogus]"], "stages=bogus: no such stage; there are data_prep, training"),
        (["stages=adaptr_learning"], "did you mean adapter_learning?"),
        (["stages=data_preparation"], "it is called data_prep here"),
        (["stages=evaluation"], "it is called eval here"),
        (["stages=prompt_learning"], "prompt_learning: it is not here; there are data_prep"),
        (["stages=[]"], "must name at least one stage"),
        (["stages=null"], "must name at least one stage"),
        (["stages=a,b"], "write [a,b] for a list"),
        (["adapter_learning"], "did you mean stages=adapter_learning?"),
        ([LEARN, f"{A}=null"], "choose a configuration, such as adapter_learning=gpt3/squad"),
        ([LEARN, f"{A}=gpt3/sqad"], "did you mean gpt3/squad?"),
        ([LEARN, "adapter_lerning=gpt3/squad"], "did you mean adapter_learning?"),
        ([LEARN, "adapter_learning/gpt3=squad"], "did you mean adapter_learning=gpt3/squad?"),
        ([LEARN, "data_preparation=squad"], "it is called data_prep here"),
        ([LEARN, "evaluation.run.name=x"], "it is called eval here"),
        ([LEARN, "cluster_type=k8s"], "k8s is not there yet; use one of bcm, bcp, interactive"),
        ([LEARN, "cluster_type=bmc"], "must be one of bcm, bcp, interactive, not bmc; did you"),
        ([LEARN, "cluster=bcp"], "goes with cluster_type=bcp, not cluster_type=bcm"),
        ([LEARN, "cluster=bcmm"], "did you mean bcm?"),
        ([LEARN, "+cluster.gress=gpu:8"], "ours is cluster.sbatch_args"),
        ([LEARN, "clustr.partition=a"], "did you mean cluster.partition?"),
        ([LEARN, "base_result_dir=/x"], "did you mean base_results_dir?"),
        ([LEARN, f"{A}.trainer.device=4"], "did you mean adapter_learning.trainer.devices?"),
        ([LEARN, f"+{A}.trainer.device=4"], "did you mean adapter_learning.trainer.devices?"),
        ([LEARN, f"++{A}.trainer.device=4"], "did you mean adapter_learning.trainer.devices?"),
        ([LEARN, f"{A}.lr=1"], "did you mean adapter_learning.model.optim.lr?"),
        ([LEARN, "model.optim.lr=1"], "did you mean adapter_learning.model.optim.lr?"),
        ([LEARN, f"{A}.model.adapter_tuning.r=8"], "the width of an adapter is adapter_dim, in"),
        ([LEARN, f"{A}.model.lora_alpha=8"], "ours is model.peft.lora_tuning.alpha, of stage peft"),
        ([LEARN, f"{A}.model.target_modules=[q]"], "ours is model.peft.lora_tuning.target_modules"),
        ([LEARN, f"{A}.trainer.devices.x=1"], "adapter_learning.trainer.devices holds no keys"),
        (["stages=data_prep", "data_prep.rows.train=3"], "data_prep.rows: no such key"),
        ([LEARN, f"{A}.model.seed=1,2"], "write [1,2] for a list, or add --multirun"),
        ([LEARN, f"{A}.model.seed=range(3)"], "add --multirun"),
        ([LEARN, f"{A}.run.name=[a"], "cannot be read"),
        ([LEARN, "env_vars={a-b: x}"], "must be the name of an environment variable"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_right_one(command, words, said):
    refused(command(*words), said)


def test_all_mistakes_are_named_at_once(command):
    refused(
        command(
            "stages=[bogus,adapter_learning]",
            "clster.partition=a",
            f"{A}.trainer.device=1",
            f"{A}.trainer.devices=0",
            f"{A}.model.global_batch_size=-7",
            f"{A}.run.time_limit=banana",
            "eval=gpt3/sqad",
        ),
        "eval=gpt3/sqad: no such option",
        "stages=bogus: no such stage",
        "clster.partition: no such key",
        "adapter_learning.trainer.device: no such key",
        "adapter_learning.run.time_limit: must be a time limit",
        "adapter_learning.trainer.devices: must be a whole number of at least 1, not 0",
        "adapter_learning.model.global_batch_size: must be a whole number of at least 1, not -7",
    )


def test_mistakes_in_a_file_are_named_like_those_of_the_command_line(command, tmp_path):
    (tmp_path / "conf/data_prep").mkdir(parents=True)
    (tmp_path / "conf/data_prep/mine.yaml").write_text(
        "defaults: [squad@_here_]\nsede: 1\nseed: one\nrun: {time_limit: 12:00:00}\n"
    )
    refused(
        command("stages=data_prep", "data_prep=mine", "--config-dir", str(tmp_path / "conf")),
        "data_prep.run.time_limit: must be a time limit in quotes",
        "data_prep.seed: must be a whole number of at least 0, not one",
        "data_prep.sede: no such key; did you mean data_prep.seed?",
    )


# ---- values


WRONG = [
    ("trainer.devices=0", "a whole number of at least 1, not 0"),
    ("trainer.num_nodes=2.5", "a whole number of at least 1, not 2.5"),
    ("trainer.log_every_n_steps=True", "a whole number of at least 1, not true"),
    ("trainer.accumulate_grad_batches=null", "a whole number of at least 1, not null"),
    ("trainer.accelerator=gpus", "one of gpu, cpu, auto, not gpus; did you mean gpu?"),
    ("trainer.precision=bf61", "did you mean bf16?"),
    ("trainer.max_epochs=-2", "of at least -1"),
    ("trainer.val_check_interval=0", "above 0"),
    ("trainer.limit_val_batches=1.5", "of at most 1"),
    ("trainer.gradient_clip_val=-1", "of at least 0"),
    ("trainer.logger=True", "must be false"),
    ("trainer.max_time=tomorrow", "days:hours:minutes:seconds"),
    ("exp_manager.checkpoint_callback_params.save_top_k=-2", "of at least -1"),
    ("exp_manager.checkpoint_callback_params.mode=least", "one of min, max"),
    ("model.virtual_prompt_style=p-tuning", "must be no-prompts"),
    ("model.task_templates.0.total_virtual_tokens=-1", "of at least 0, not -1"),
    ("model.adapter_tuning.type=lora", "one of parallel_adapter, linear_adapter"),
    ("model.adapter_tuning.adapter_dropout=1.0", "below 1"),
    ("model.optim.lr=fast", "must be a number above 0, not fast"),
    ("model.optim.name=adamww", "did you mean adamw?"),
    ("model.data.train_ds=null", "must be a path or a list"),
    ("run.time_limit=banana", "must be a time limit"),
    ("run.dependency=sometime", "must be singleton or Slurm's"),
    ("run.name=a/b", "must be a name of letters, digits"),
    ("model.nemo_path=${nope.x}", "${nope.x} cannot be resolved: Interpolation key 'nope.x'"),
    ("model.language_model_path=???", "is missing; it must be a path or a name of the Hub"),
    ("model.optim.sched=null", "must be a mapping"),
]


def test_a_wrong_value_is_one_line_that_says_what_is_allowed(command):
    answer = command(LEARN, *(f"{A}.{word}" for word, _ in WRONG))
    lines = dict(line.split(": ", 1) for line in answer.lines)
    assert (answer.code, answer.written()) == (2, [])
    assert len(answer.lines) == len(WRONG)
    for word, said in WRONG:
        assert said in lines[f"{A}.{word.split('=')[0]}"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.optim.sched.name=Cosine", "did you mean CosineAnnealing?"),
        ("model.data=null", "must be a mapping"),
        ("trainer.precision=16", "must be one of bf16"),
    ],
)
def test_one_wrong_value_is_one_line(command, word, said):
    refused(command(LEARN, f"{A}.{word}"), said)


def holds(expected, value) -> bool:
    found: list[str] = []
    check(value, expected, "key", lambda key, what: found.append(what))
    return not found


@pytest.mark.parametrize(
    "value", ["30", "30:00", "4:30:00", "04:00:00", "2-0", "2-12:30", "2-12:30:15", "1000:00:00"]
)
def test_a_time_limit_has_slurms_forms(value):
    assert holds(TimeLimit, value)


@pytest.mark.parametrize(
    "value", ["", "banana", "1h", "4:00:00:00", "2-", "1:99", "-5", "2d", " 30", "30\n", 43200]
)
def test_what_slurm_would_not_read_is_no_time_limit(value):
    assert not holds(TimeLimit, value)


def test_dependencies_are_slurms():
    for value in ("singleton", "afterok:12", "afterok:12:13,singleton", "after:1+5"):
        assert holds(Dependency, value)
    for value in ("after", "afterok:", "afterok:x", "singleton;rm", "afterok:1 2"):
        assert not holds(Dependency, value)


def test_a_time_is_written_as_lightning_writes_it():
    assert holds(MaxTime, "00:03:45:00")
    assert not holds(MaxTime, "3h")


# ---- sizes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tensor_model_parallel_size=3"], "3 x pipeline_model_parallel_size 1 must divide the 8"),
        (
            ["tensor_model_parallel_size=4", "pipeline_model_parallel_size=4"],
            "4 x pipeline_model_parallel_size 4 must divide the 8 devices",
        ),
        (["global_batch_size=60"], "60 must be a multiple of micro_batch_size 8 x 8"),
        (["micro_batch_size=16"], "64 must be a multiple of micro_batch_size 16 x 8"),
    ],
)
def test_sizes_that_do_not_divide_are_named(command, words, said):
    refused(command(LEARN, *(f"{A}.model.{word}" for word in words)), said)


@pytest.mark.parametrize(("word", "code"), [("auto", 0), ("true", 0), ("sometimes", 2)])
def test_a_packed_step_may_have_any_number_of_rows(command, word, code):
    words = ["global_batch_size=60", "data.packed_sequence_size=512", f"data.share_prefixes={word}"]
    assert command(LEARN, *(f"{A}.model.{each}" for each in words)).code == code


def test_batches_count_the_copies_of_the_model(command):
    words = [f"{A}.model.tensor_model_parallel_size=2", f"{A}.model.micro_batch_size=16"]
    assert command(LEARN, *words).code == 0


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps({**sizes, "intermediate_size": 96}))
    return folder


def test_parallel_sizes_must_divide_the_checkpoints(command, checkpoint):
    refused(
        command(
            LEARN,
            f"{A}.model.language_model_path={checkpoint}",
            f"{A}.model.tensor_model_parallel_size=4",
            f"{A}.model.pipeline_model_parallel_size=4",
            f"{A}.trainer.devices=16",
        ),
        "4 must divide the model's num_query_groups 2",
    )


def test_the_shape_is_read_from_every_layout(tmp_path, checkpoint):
    assert read_shape(checkpoint) == Shape(6, 8, 2, 96)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hidden_size=100", "num_attention_heads=12"], "100 must be a multiple of num_attention"),
        (["num_query_groups=5"], "5 must divide num_attention_heads 12"),
        (["max_position_embeddings=1024"], "2048 must be at most max_position_embeddings 1024"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(command, words, said):
    refused(command("stages=training", *(f"training.model.{word}" for word in words)), said)


def test_an_answer_may_be_as_long_as_it_must_be(command):
    least = "eval.model.inference.min_tokens_to_generate"
    refused(
        command("stages=eval", f"{least}=33"), f"{least}: 33 must be at most tokens_to_generate 32"
    )
    assert command("stages=eval", f"{least}=32").code == 0


# ---- paths


def test_a_missing_path_is_a_mistake_where_the_job_runs_now(command):
    for kind in ("interactive", "bcp"):
        refused(
            command(LEARN, f"cluster_type={kind}", "dry_run=False"),
            f"{A}.model.language_model_path: ",
        )


def test_a_missing_path_is_a_warning_in_a_dry_run(command):
    answer = command(LEARN, "cluster_type=interactive")
    assert answer.code == 0
    assert any("warning: " in line and "language_model_path" in line for line in answer.lines)


def test_every_missing_path_is_named(command):
    refused(
        command(
            "stages=eval",
            "cluster_type=interactive",
            "dry_run=False",
            "eval.model.language_model_path=/nowhere/base",
            "eval.model.adapters=[{name: a, path: /nowhere/a.nemo}]",
            "eval.model.data.test_ds=[/nowhere/t.jsonl]",
            "eval.model.data.ground_truth_ds=[/nowhere/g.jsonl]",
            "wandb_api_key_file=/nowhere/key",
        ),
        "eval.model.language_model_path: /nowhere/base does not exist",
        "eval.model.data.test_ds: /nowhere/t.jsonl does not exist",
        "eval.model.data.ground_truth_ds: /nowhere/g.jsonl does not exist",
        "eval.model.adapters.path: /nowhere/a.nemo does not exist",
        "wandb_api_key_file: /nowhere/key does not exist",
    )


def test_what_an_earlier_stage_writes_need_not_exist(command):
    answer = command("experiment=quickstart")
    assert answer.code == 0
    assert not any("does not exist" in line for line in answer.lines)


def test_paths_inside_a_container_are_not_looked_for(command):
    answer = command(LEARN, "container=image")
    assert not any("does not exist" in line for line in answer.lines)


@pytest.mark.parametrize("place", ["results/megatron_gpt.nemo", "megatron_gpt.nemo"])
def test_the_checkpoint_is_taken_from_either_documented_place(command, tmp_path, place):
    folder = tmp_path / "o/results/gpt3_5b/convert_nemo"
    (folder / "results").mkdir(parents=True)
    (folder / place).write_bytes(b"")
    for given in ("results/megatron_gpt.nemo", "megatron_gpt.nemo"):
        answer = command(LEARN, f"{A}.model.language_model_path={folder / given}")
        model = answer.config(A)["model"]
        assert model["language_model_path"] == str(folder / place)
        told = [line for line in answer.lines if f"taking {folder / place}" in line]
        assert len(told) == (given != place)


def test_eval_says_what_no_learning_stage_tells_it(command):
    learners = ("training", "fine_tuning", "peft", "adapter_learning", "ia3_learning")
    answer = command("stages=eval", *(f"{name}=null" for name in learners))
    refused(
        answer,
        "eval.model.language_model_path: auto, but no learning stage",
        "eval.model.adapters: auto",
        "eval.model.models: auto",
        "eval.model.task_templates: auto",
    )
