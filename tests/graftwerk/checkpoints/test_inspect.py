"""`inspect`: what a checkpoint is, from its headers."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from graftwerk.__main__ import guarded
from graftwerk.adapters import BottleneckConfig, FusionConfig
from graftwerk.checkpoints import save_adapter, save_adapters, save_base
from graftwerk.checkpoints.inspect import inspect
from graftwerk.checkpoints.tensors import SafeTensors
from graftwerk.checkpoints.torch_files import TorchSource
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from tests.graftwerk import families, nemo_files
from tests.graftwerk.tiny import tiny_gpt


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """No tensor may be read."""

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafeTensors, "read", read)
    monkeypatch.setattr(TorchSource, "read", read)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert_question_answering"])
def test_a_hugging_face_folder(tmp_path, name):
    model = families.write(name, tmp_path / "a")
    report = inspect(tmp_path / "a")
    kind, architecture = model.config.model_type, {"t5": "t5", "bert_question_answering": "bert"}
    assert (report.kind, report.format) == ("base", f"huggingface ({kind})")
    assert report.architecture == architecture.get(name, "gpt")
    assert report.parameters == count(model)
    assert list(report.dtypes) == ["float32"]
    assert report.tokenizer is None
    assert report.faults == []
    assert report.shards == 1
    assert report.sizes["hidden_size"] == 32
    size = (tmp_path / "a/model.safetensors").stat().st_size
    assert report.file_bytes == size


def test_shards_types_and_tokenizer_are_counted(tmp_path):
    model = families.make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    build_tokenizer("word", ["some words"]).save_pretrained(str(tmp_path))
    report = inspect(tmp_path)
    assert report.shards == len(list(tmp_path.glob("*.safetensors"))) > 2
    assert report.dtypes == {"bfloat16": count(model)}
    assert report.tokenizer is not None
    assert report.tokenizer.endswith(" tokens")


@pytest.mark.parametrize("form", ["tar", "folder", "gzip"])
def test_a_nemo_file_or_folder(tmp_path, form):
    model = families.make("llama")
    path = nemo_files.lay_out(tmp_path / "a.nemo", *nemo_files.of_llama(model), tp=2, form=form)
    report = inspect(path)
    assert report.format == "nemo (classic)"
    assert report.parameters == count(model)
    assert report.faults == []
    assert report.sizes["num_query_groups"] == 2


def test_our_own_folder(tmp_path):
    model = tiny_gpt()
    save_base(model, None, tmp_path / "a")
    report = inspect(tmp_path / "a")
    assert report.format == "graftwerk (gpt)"
    assert report.parameters == count(model)


# ---- adapters


@pytest.mark.parametrize("name", ["a.nemo", "folder"])
def test_an_adapter_of_ours(tmp_path, name):
    model = tiny_gpt()
    model.add_adapter("mine", BottleneckConfig(dim=4, dropout=0.25))
    save_adapter(model, "mine", tmp_path / name, {"base": "/the/base"})
    report = inspect(tmp_path / name)
    assert (report.kind, report.method) == ("adapter", "BottleneckConfig")
    assert report.settings["dim"] == 4
    assert report.settings["dropout"] == 0.25
    assert report.base == "/the/base"
    assert report.parameters == sum(t.numel() for t in model.adapter_state("mine").values())
    assert report.dtypes == {"float32": report.parameters}


def test_a_fusion_is_named_beside_adapters(tmp_path):
    model = tiny_gpt()
    for name in "ab":
        model.add_adapter(name, BottleneckConfig(dim=4))
    model.add_fusion("a,b", FusionConfig(temperature=True))
    save_adapters(model, ["a"], tmp_path / "both", fusions=["a,b"])
    report = inspect(tmp_path / "both")
    assert report.method == "BottleneckConfig, FusionConfig"
    assert report.settings["a"]["dim"] == 4
    assert report.settings["a,b"]["temperature"] is True


def test_an_adapter_of_nemo(tmp_path):
    name = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_{}.weight"
    tensors = {name.format("in"): torch.ones(2, 8), name.format("out"): torch.ones(24, 2)}
    config = {"peft": {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": 2}}, "num_layers": 1}
    torch.save(tensors, tmp_path / "model_weights.ckpt")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config))
    with tarfile.open(tmp_path / "a.nemo", "w") as tar:
        for member in ("model_config.yaml", "model_weights.ckpt"):
            tar.add(tmp_path / member, f"./{member}")
    report = inspect(tmp_path / "a.nemo")
    assert (report.kind, report.method, report.format) == ("adapter", "lora", "nemo (.nemo)")
    assert report.parameters == 64
    assert report.settings == {"lora_tuning": {"adapter_dim": 2}}


# ---- what is not whole


def test_missing_unknown_and_misshapen_tensors_are_named_and_the_code_is_2(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    families.write("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.extra"] = tensors.pop("transformer.ln_f.bias")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:9].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert guarded(["inspect", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "(3 faults)" in out
    for fault in ("missing transformer.ln_f.bias", "unknown transformer.extra", "(9, 32), not"):
        assert fault in out


def test_missing_shards_are_named(tmp_path):
    families.write("llama", tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        inspect(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", bytes(2000)])
def test_what_is_no_checkpoint_is_one_line_and_code_2(tmp_path, capsys, content):
    (tmp_path / "a.nemo").write_bytes(content)
    for path in (tmp_path / "a.nemo", tmp_path, tmp_path / "nowhere"):
        assert guarded(["inspect", str(path)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert str(path) in said.err


# ---- what it prints


def test_json_holds_the_whole_report(tmp_path, capsys):
    families.write("llama", tmp_path)
    assert guarded(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(tmp_path)
    assert report["sizes"]["num_layers"] == 2
    assert report["faults"] == []


def test_the_table_has_a_line_for_each_fact(tmp_path, capsys):
    model = families.write("mistral", tmp_path)
    assert guarded(["inspect", str(tmp_path)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["base"] == str(tmp_path)
    assert lines["format"] == "huggingface (mistral)"
    assert lines["parameters"] == f"{count(model):,}"
    assert lines["dtype"] == "float32"
    assert lines["tokenizer"] == "none"
    assert lines["window_size"] == "5"


def test_real_weights(shared: Path):
    report = inspect(shared / "data/models/stories260k")
    assert report.parameters == 260_032
    assert report.tokenizer == "512 tokens"
