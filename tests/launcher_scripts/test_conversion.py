"""Stage `conversion` from the command line, and the names by which stages take checkpoints."""

import json
import tarfile

import pytest

from tests.launcher_scripts.test_schema import refused

C, A = "conversion", "adapter_learning"
SIZES = {
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
HERE = ("cluster_type=interactive", "dry_run=False")


@pytest.fixture
def checkpoint(tmp_path):
    """A folder in Hugging Face's layout, without weights."""
    folder = tmp_path / "org/model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES))
    return folder


@pytest.mark.parametrize("family", ["gpt3", "t5"])
def test_conversion_writes_what_learning_reads_without_further_keys(command, checkpoint, family):
    answer = command(
        f"stages=[{A},{C}]",
        f"{C}={family}/hf_to_nemo",
        f"{A}={family}/squad",
        f"{C}.model.checkpoint_folder={checkpoint}",
    )
    assert answer.code == 0, answer.lines
    assert answer.stages()[-2:] == [C, A]
    written = answer.config(C)["model"]["output_path"]
    name = {
        "gpt3": "gpt3_5b/convert_nemo/results/megatron_gpt",
        "t5": "t5_220m/convert_nemo/results/megatron_t5",
    }
    assert written.endswith(f"/results/{name[family]}.nemo")
    assert answer.config(A)["model"]["language_model_path"] == written
    assert not [line for line in answer.lines if "does not exist" in line]


def test_the_result_of_training_can_be_converted_in_one_chain(command):
    answer = command(
        f"stages=[training,{C}]",
        f"{C}=gpt3/nemo_to_hf",
        f"{C}.model.checkpoint_folder=${{training.model.nemo_path}}",
    )
    assert answer.code == 0, answer.lines
    made = answer.config("training")["model"]["nemo_path"]
    assert answer.config(C)["model"]["checkpoint_folder"] == made


@pytest.mark.parametrize(
    ("option", "target", "place"),
    [
        ("hf_to_nemo", "nemo", "convert_nemo/results/megatron_gpt.nemo"),
        ("nemo_to_hf", "huggingface", "convert_hf/results/model"),
        ("to_graftwerk", "graftwerk", "convert_graftwerk/results/model"),
    ],
)
def test_each_direction_has_a_place_of_its_own(command, checkpoint, option, target, place):
    answer = command(
        f"stages={C}", f"{C}=gpt3/{option}", f"{C}.model.checkpoint_folder={checkpoint}"
    )
    model = answer.config(C)["model"]
    assert model["target"] == target
    assert model["output_path"].endswith(f"/gpt3_5b/{place}")


def test_names_of_the_run_make_the_place(command, checkpoint):
    words = [f"{C}.model.checkpoint_folder={checkpoint}", f"{C}.run.model_train_name=mine"]
    answer = command(f"stages={C}", *words, f"{C}.run.nemo_file_name=a.nemo")
    assert answer.config(C)["model"]["output_path"].endswith("/mine/convert_nemo/results/a.nemo")
    answer = command(f"stages={C}", *words, f"{C}.run.train_dir=/there", "--cfg", "job")
    assert "/there" in answer.out


def test_a_conversion_is_one_process_without_gpus(command, checkpoint):
    script = command(f"stages={C}", f"{C}.model.checkpoint_folder={checkpoint}").script(C)
    assert "#SBATCH --ntasks-per-node=1\n" in script
    assert "gpus-per-node" not in script


def test_values_reach_the_job(command, checkpoint):
    words = {"dtype": "bf16", "mcore_gpt": False, "architecture": "mistral", "overwrite": True}
    words |= {"model_type": None, "tokenizer": "/tokenizer", "checkpoint_folder": "org/name"}
    given = [f"{C}.model.{k}={'null' if v is None else v}" for k, v in words.items()]
    model = command(f"stages={C}", *given, f"{C}.model.revision=v1").config(C)["model"]
    assert {key: model[key] for key in words} == words
    assert model["revision"] == "v1"


def test_what_is_wrong_is_said_before_anything_is_written(command, tmp_path):
    refused(
        command(f"stages={C}", *HERE, f"{C}.model.dtype=fp8", f"{C}.model.target=onnx"),
        "conversion.model.checkpoint_folder: is ???: it must be given",
        "conversion.model.target: must be one of nemo, huggingface, graftwerk, not onnx",
        "conversion.model.dtype: must be one of keep, fp32, bf16, fp16, not fp8",
    )
    refused(
        command(f"stages={C}", *HERE, f"{C}.model.checkpoint_folder=/nowhere/model"),
        "conversion.model.checkpoint_folder: /nowhere/model does not exist",
    )


def test_a_place_that_is_taken_is_refused_unless_it_may_be_replaced(command, checkpoint, tmp_path):
    words = [f"stages={C}", f"{C}.model.checkpoint_folder={checkpoint}"]
    words += [f"{C}.model.output_path={tmp_path}/a.nemo"]
    (tmp_path / "a.nemo").touch()
    refused(command(*words, *HERE), f"conversion.model.output_path: {tmp_path}/a.nemo exists")
    dry = command(*words, "cluster_type=interactive")
    assert dry.code == 0
    assert any("warning: conversion.model.output_path: " in line for line in dry.lines)
    assert command(*words, "cluster_type=interactive", f"{C}.model.overwrite=True").code == 0


def test_sizes_of_what_is_converted_count_for_the_stage_after_it(command, checkpoint):
    answer = command(
        f"stages=[{C},{A}]",
        f"{C}.model.checkpoint_folder={checkpoint}",
        f"{A}.model.tensor_model_parallel_size=4",
        f"{A}.model.pipeline_model_parallel_size=2",
    )
    refused(answer, f"{A}.model.tensor_model_parallel_size: 4 must divide the model's num_query")


def test_sizes_of_a_compressed_nemo_file_are_checked(command, tmp_path):
    (tmp_path / "model_config.yaml").write_text("num_layers: 4\nnum_attention_heads: 6\n")
    with tarfile.open(tmp_path / "a.nemo", "w:gz") as tar:
        tar.add(tmp_path / "model_config.yaml", "./model_config.yaml")
    words = [f"{A}.model.language_model_path={tmp_path}/a.nemo"]
    answer = command(f"stages={A}", *words, f"{A}.model.tensor_model_parallel_size=4")
    refused(answer, "4 must divide the model's num_attention_heads 6, num_query_groups 6")


# ---- names of the Hub


def test_a_name_of_the_hub_is_no_missing_path(command):
    words = [f"{A}.model.language_model_path=org/name", f"{A}.model.revision=v1"]
    answer = command(f"stages=[{A},eval]", *words, "cluster_type=interactive")
    assert answer.code == 0, answer.lines
    for stage in (A, "eval"):
        model = answer.config(stage)["model"]
        assert (model["language_model_path"], model["revision"]) == ("org/name", "v1")
    (line,) = [line for line in answer.lines if "Hugging Face Hub" in line and A in line]
    assert "env_vars.TRANSFORMERS_OFFLINE forbids to download it" in line
    answer = command(f"stages={A}", *words, "env_vars.TRANSFORMERS_OFFLINE=0")
    assert not any("forbids" in line for line in answer.lines)


def test_a_folder_of_that_name_is_a_path(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = command(f"stages={A}", f"{A}.model.language_model_path=org/model")
    assert answer.config(A)["model"]["language_model_path"] == str(checkpoint)


@pytest.mark.parametrize("path", ["./org/name", "org/name/more", "org/a.nemo", "/org/name"])
def test_what_can_only_be_a_path_must_exist(command, path):
    words = (f"stages={A}", *HERE, f"{A}.model.language_model_path={path}")
    said = command(*words, "data_prep.source=null").lines
    assert any(f"{A}.model.language_model_path: /" in line for line in said), said


def test_a_revision_goes_with_a_name_of_the_hub(command, checkpoint):
    said = "revision: v1 goes with a name of the Hub, not with the path /"
    for stage, key in ((A, "language_model_path"), (C, "checkpoint_folder")):
        words = [f"{stage}.model.{key}={checkpoint}", f"{stage}.model.revision=v1"]
        refused(command(f"stages={stage}", *words), f"{stage}.model.{said}")


# ---- the keys of a base


@pytest.mark.parametrize("stage", [A, "ia3_learning"])
def test_restore_from_path_is_another_name_of_the_base(command, checkpoint, stage):
    words = [f"{stage}.model.restore_from_path={checkpoint}"]
    answer = command(f"stages=[{stage},eval]", *words)
    assert answer.code == 0, answer.lines
    model = answer.config(stage)["model"]
    assert model["restore_from_path"] == str(checkpoint)
    assert model["language_model_path"] is None
    assert answer.config("eval")["model"]["language_model_path"] == str(checkpoint)


def test_sizes_are_those_of_the_base_by_any_name(command, checkpoint):
    words = [f"{A}.model.restore_from_path={checkpoint}"]
    words.append(f"{A}.model.tensor_model_parallel_size=8")
    refused(command(f"stages={A}", *words), "8 must divide the model's num_query_groups 2")


def test_restore_from_path_names_the_base_of_eval(command, checkpoint):
    answer = command("stages=eval", f"eval.model.restore_from_path={checkpoint}")
    assert answer.code == 0, answer.lines
    model = answer.config("eval")["model"]
    assert (model["language_model_path"], model["restore_from_path"]) == (None, str(checkpoint))


def test_two_different_bases_are_refused(command, checkpoint):
    words = [f"{A}.model.restore_from_path={checkpoint}", f"{A}.model.language_model_path=/other"]
    refused(command(f"stages={A}", *words), f"{A}.model.restore_from_path: {checkpoint} is not")


def test_restore_path_is_the_base_where_no_other_key_names_one(command, checkpoint):
    words = [f"{A}.model.language_model_path=null", f"{A}.model.restore_path={checkpoint}"]
    answer = command(f"stages=[{A},eval]", *words)
    assert answer.code == 0, answer.lines
    assert answer.config("eval")["model"]["language_model_path"] == str(checkpoint)


def test_no_base_at_all_is_refused(command):
    words = [f"{A}.model.language_model_path=null"]
    refused(command(f"stages={A}", *words), f"{A}.model.language_model_path: is missing")


def test_eval_takes_the_head_and_the_length_of_learning(command, checkpoint):
    words = [f"{A}=bert/squad", f"{A}.model.language_model_path={checkpoint}"]
    answer = command(f"stages=[{A},eval]", *words)
    model = answer.config("eval")["model"]
    assert (model["head"], model["encoder_seq_length"]) == ("question_answering", 384)


def test_a_length_that_is_not_given_stays_the_models(command):
    answer = command(f"stages=[{A},eval]", f"{A}=t5/squad")
    assert answer.config(A)["model"]["encoder_seq_length"] is None
    assert answer.config("eval")["model"]["encoder_seq_length"] is None
