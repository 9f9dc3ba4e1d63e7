"""Base models: our layout there and back, damaged and foreign folders."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from graftwerk.checkpoints import load_base, load_tokenizer, save_base
from graftwerk.errors import UserError
from tests.graftwerk.tiny import SHAPES, tiny_gpt, tokens


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("shape", SHAPES)
def test_our_layout_there_and_back_is_exact(shape: str, tmp_path: Path):
    model = tiny_gpt(SHAPES[shape])
    save_base(model, None, tmp_path / "model")
    again = load_base(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(tokens()), model(tokens()))
    save_base(again, None, tmp_path / "model")  # over what is there
    assert os.listdir(tmp_path) == ["model"]


def test_sharded_weights_are_read(llama: Path):
    expected = load_base(llama)(tokens())
    weights = load_file(llama / "model.safetensors")
    shards = {"a.safetensors": dict(list(weights.items())[::2]),
              "b.safetensors": dict(list(weights.items())[1::2])}  # fmt: skip
    index = {name: shard for shard, part in shards.items() for name in part}
    for shard, part in shards.items():
        save_file(part, llama / shard)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (llama / "model.safetensors").unlink()
    assert torch.equal(load_base(llama)(tokens()), expected)


def test_the_chosen_type_is_what_every_weight_has(llama: Path):
    model = load_base(llama, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_checkpoint_is_found_with_and_without_results(llama: Path):
    folder = llama.parent
    (folder / "results").mkdir()
    llama.rename(folder / "results" / "megatron_gpt.nemo")
    load_base(folder / "megatron_gpt.nemo")
    load_base(folder / "results" / "megatron_gpt.nemo")
    with pytest.raises(UserError, match=r"no checkpoint there, nor at .*results/other.nemo"):
        load_base(folder / "other.nemo")


def test_every_missing_unknown_and_misshapen_tensor_is_named(llama: Path):
    weights = load_file(llama / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = torch.zeros(2)
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(UserError, match=r"missing model.norm.weight .*unknown model.extra"):
        load_base(llama)
    del weights["model.extra.weight"]
    weights["model.norm.weight"] = torch.zeros(17)
    weights["lm_head.weight"] = torch.zeros(3, 16)
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight gives \[17\].*lm_head.weight gives"):
        load_base(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not known; those that are: bert, gpt2, .* t5"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not known"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported"),
    ],
)
def test_a_config_that_we_cannot_build_is_refused_by_its_key(llama: Path, change, message):
    raw = json.loads((llama / "config.json").read_text()) | change
    raw = {key: value for key, value in raw.items() if value is not None}
    (llama / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        load_base(llama)


def test_damaged_files_are_refused(llama: Path):
    size = (llama / "model.safetensors").stat().st_size
    os.truncate(llama / "model.safetensors", size - 10)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load_base(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'model.safetensors' or .* is missing"):
        load_base(llama)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(llama)
    (llama / "config.json").unlink()
    with pytest.raises(UserError, match="is no checkpoint that can be read"):
        load_base(llama)


def test_an_index_cannot_lead_out_of_the_folder(llama: Path):
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.ones(16)}, llama.parent / "elsewhere.safetensors")
    with pytest.raises(UserError, match="elsewhere"):
        load_base(llama)


def test_missing_tensors_of_many_layers_are_named_in_ranges_with_the_nearest(llama: Path):
    weights = load_file(llama / "model.safetensors")
    renamed = {name.replace("mlp.down_proj", "mlp.downproj"): w for name, w in weights.items()}
    save_file(renamed, llama / "model.safetensors")
    line = r"missing model.layers.\[0-1\].mlp.down_proj.weight \(there is .*\[0-1\].mlp.downproj"
    with pytest.raises(UserError, match=line):
        load_base(llama)
