"""Layouts that cannot be are refused before anything is queued, with the numbers that could."""

import json

import pytest

A, P, T5 = "adapter_learning", "peft", "adapter_learning=t5/squad"


@pytest.fixture
def gpt(tmp_path):
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 4}
    return base(tmp_path, {**sizes, "intermediate_size": 96})


@pytest.fixture
def t5(tmp_path):
    sizes = {"num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    return base(tmp_path, {**sizes, "d_kv": 8, "d_ff": 64})


def base(folder, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return f"language_model_path={folder}"


def lines(command, stage: str, *words: str, before: tuple[str, ...] = ()) -> list[str]:
    """What a stage with these settings of `model` (or `trainer.`) is refused with."""
    own = [w if w.startswith("trainer.") else f"model.{w}" for w in words]
    answer = command(f"stages={stage}", *before, *(f"{stage}.{word}" for word in own))
    assert answer.code in (0, 2)
    assert answer.code == 0 or answer.written() == []
    return answer.lines if answer.code else []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["tensor_model_parallel_size=8"],
            "tensor_model_parallel_size: 8 must divide the model's num_attention_heads 12, "
            "num_query_groups 4: use 1, 2 or 4",
        ),
        (
            ["tensor_model_parallel_size=8", "pipeline_model_parallel_size=2"],
            "tensor_model_parallel_size: 8 x pipeline_model_parallel_size 2 must divide the 8 "
            "devices (trainer.devices 8 x num_nodes 1): use 1, 2 or 4",
        ),
        (
            ["pipeline_model_parallel_size=3"],
            "tensor_model_parallel_size: 1 x pipeline_model_parallel_size 3 must divide the 8 "
            "devices (trainer.devices 8 x num_nodes 1): their product is one of 1, 2, 4 or 8",
        ),
        (
            ["pipeline_model_parallel_size=8"],
            "pipeline_model_parallel_size: 8 stages are more than the model's num_layers 6: use at "
            "most 6",
        ),
        (
            ["tensor_model_parallel_size=2", "global_batch_size=70"],
            "global_batch_size: 70 must be a multiple of micro_batch_size 8 x 4 data-parallel "
            "copies of the model (devices by tensor and pipeline size), that is of 32: use 64 or "
            "96",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_those_that_would(command, gpt, words, said):
    found = lines(command, A, gpt, *words)
    assert any(line.endswith(f"{A}.model.{said}") for line in found), found


@pytest.mark.parametrize(
    "words",
    [
        [
            "tensor_model_parallel_size=4",
            "pipeline_model_parallel_size=2",
            "sequence_parallel=True",
        ],
        ["pipeline_model_parallel_size=4"],  # layers need not divide
        ["tensor_model_parallel_size=2", "use_fsdp=True"],
        ["activations_checkpoint_granularity=selective"],
    ],
)
def test_what_fits_is_launched(command, gpt, words):
    assert lines(command, A, gpt, *words) == []


@pytest.mark.parametrize(
    ("size", "split", "said"),
    [
        (2, "null", ""),
        (4, "null", ""),
        (4, "1", ""),
        (4, "3", "3 leaves 3 stages to the encoder's 2 layers and 1 to the decoder's 3, one of"),
        (4, "4", "4 is not 1 to 3, the stages on which a T5's decoder may begin"),
        (8, "null", "8 stages are more than the model's num_layers 2 + decoder_num_layers 3: use"),
    ],
)
def test_a_t5_is_cut_where_both_halves_have_a_layer_for_each_stage(command, t5, size, split, said):
    words = [f"pipeline_model_parallel_size={size}", "global_batch_size=64"]
    words.append(f"pipeline_model_parallel_split_rank={split}")
    found = lines(command, A, t5, *words, before=(T5,))
    assert len(found) == bool(said), found
    assert all(said in line for line in found), found


def test_a_split_of_what_has_no_decoder_is_said_to_have_no_effect(command, gpt):
    words = ["pipeline_model_parallel_size=2", "pipeline_model_parallel_split_rank=1", gpt]
    answer = command(f"stages={A}", *(f"{A}.model.{word}" for word in words))
    assert answer.code == 0
    assert any("pipeline_model_parallel_split_rank has no effect" in x for x in answer.lines)


def test_rows_are_split_over_tensor_parallel_devices_only(command, gpt):
    (line,) = lines(command, A, gpt, "sequence_parallel=True")
    assert f"{A}.model.sequence_parallel: True splits rows over tensor-parallel devices" in line
    assert "set tensor_model_parallel_size to 2 or 4, or set it to False" in line


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        (A, ["pipeline_model_parallel_size=2"], "pipeline_model_parallel_size 1, not 2; set one"),
        (A, ["tensor_model_parallel_size=4", "trainer.devices=4"], "use 8 devices or more"),
        (P, ["peft.peft_scheme=none"], "the whole model is trained here"),
        (P, ["peft.peft_scheme=qlora"], "peft_scheme qlora, whose base is held in 4 bits"),
    ],
)
def test_a_base_is_sharded_where_it_is_frozen_and_has_copies(command, gpt, stage, words, said):
    (line,) = lines(command, stage, gpt, "use_fsdp=True", "global_batch_size=64", *words)
    assert f"{stage}.model.use_fsdp: True" in line
    assert said in line


def test_eval_is_laid_out_like_learning(command, gpt):
    given = ["eval.model.adapters=[]", f"eval.model.{gpt}", "eval.trainer.devices=8"]
    given += ["eval.model.task_templates=[]", "eval.model.encoder_seq_length=null"]
    given += ["eval.model.models=[]", "eval.model.head=null", "eval.model.composition=null"]
    given += ["eval.model.revision=null", "eval.model.tensor_model_parallel_size=8"]
    answer = command("stages=eval", *given)
    assert answer.code == 2
    (line,) = answer.lines
    assert "eval.model.tensor_model_parallel_size: 8 must divide the model's" in line
    assert line.endswith("use 1, 2 or 4")


def test_names_of_other_tools_lead_to_ours(command):
    (line,) = lines(command, A, "activations_checkpoint_method=uniform")
    assert "model.activations_checkpoint_granularity alone" in line
