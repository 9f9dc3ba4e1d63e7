"""The stage `conversion`: between all formats, bit for bit, and nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from graftwerk.checkpoints import shards
from graftwerk.checkpoints.base import load_base, load_tokenizer, open_checkpoint
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from graftwerk.stages import conversion
from tests.graftwerk import families

TEXT = "red is one and blue is two"
TOKENS = torch.arange(4, 16)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Hugging Face folders of random models, each with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("gpt2", "llama", "llama_bias_tied", "t5", "t5_v1.1"):
        families.write(name, folder / name)
        build_tokenizer("word", [TEXT]).save_pretrained(str(folder / name))
    return folder


def config(source: Path | str, target: Path, form: str, **more: Any) -> DictConfig:
    model = {
        "model_type": None,
        "checkpoint_folder": str(source),
        "revision": None,
        "tokenizer": None,
        "output_path": str(target),
        "overwrite": False,
        "target": form,
        "dtype": "keep",
        "mcore_gpt": True,
        "architecture": "auto",
    }
    return OmegaConf.create({"run": {"name": "c"}, "model": {**model, **more}})


def convert(source: Path | str, target: Path, form: str, **more: Any) -> Path:
    assert conversion.run(config(source, target, form, **more)) == 0
    return target


def refused(tmp_path: Path, source: Any, target: Path, form: str, **more: Any) -> str:
    """The message of a conversion that writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        conversion.run(config(source, target, form, **more))
    assert sorted(tmp_path.rglob("*")) == before
    return str(error.value)


def same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("name", "mcore"),
    [
        ("gpt2", True),
        ("gpt2", False),
        ("llama", True),
        ("llama", False),
        ("llama_bias_tied", True),
        ("t5", False),
        ("t5_v1.1", False),
    ],
)
def test_to_nemo_and_back_gives_the_same_bits(bases, tmp_path, name, mcore):
    nemo = convert(bases / name, tmp_path / "a.nemo", "nemo", mcore_gpt=mcore)
    back = convert(nemo, tmp_path / "back", "huggingface")
    same_weights(bases / name, back)
    with open_checkpoint(nemo) as opened:
        assert opened.variant == ("t5" if "t5" in name else "mcore" if mcore else "classic")


@pytest.mark.parametrize("name", ["llama", "t5_v1.1"])
def test_through_our_own_layout_and_back_gives_the_same_bits(bases, tmp_path, name):
    ours = convert(bases / name, tmp_path / "ours", "graftwerk")
    same_weights(bases / name, convert(ours, tmp_path / "back", "huggingface"))
    nemo = convert(ours, tmp_path / "a.nemo", "nemo")
    same_weights(bases / name, convert(nemo, tmp_path / "again", "huggingface"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", AutoModelForCausalLM),
        ("llama", AutoModelForCausalLM),
        ("t5", AutoModelForSeq2SeqLM),
    ],
)
def test_what_is_written_as_hugging_face_gives_its_logits_in_transformers(
    bases, tmp_path, name, kind
):
    nemo = convert(bases / name, tmp_path / "a.nemo", "nemo")
    back = convert(nemo, tmp_path / "back", "huggingface")
    more = {"decoder_input_ids": TOKENS} if "t5" in name else {}
    with torch.no_grad():
        logits = [kind.from_pretrained(f)(TOKENS, **more).logits for f in (bases / name, back)]
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(back).encode(
        "red is two"
    ) == AutoTokenizer.from_pretrained(bases / name).encode("red is two")


@pytest.mark.parametrize("form", ["nemo", "huggingface", "graftwerk"])
@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_written_in_the_asked_type(bases, tmp_path, form, dtype, expected):
    path = convert(bases / "llama", tmp_path / "a.nemo", form, dtype=dtype)
    with open_checkpoint(path) as opened:
        assert {opened.source.dtype(name) for name in opened.source.names} == {expected}
    before, after = load_base(bases / "llama", expected), load_base(path, expected)
    assert torch.equal(before(TOKENS), after(TOKENS))


@pytest.mark.parametrize("form", ["nemo", "huggingface", "graftwerk"])
def test_the_tokenizer_goes_along(bases, tmp_path, form):
    path = convert(bases / "llama", tmp_path / "a.nemo", form)
    ids = load_tokenizer(bases / "llama").encode("red is two")
    assert load_tokenizer(path).encode("red is two") == ids


def test_another_tokenizer_can_go_along(bases, tmp_path):
    build_tokenizer("word", [TEXT + " more words"]).save_pretrained(str(tmp_path / "other"))
    more = {"tokenizer": str(tmp_path / "other")}
    path = convert(bases / "llama", tmp_path / "a", "graftwerk", **more)
    assert len(load_tokenizer(path)) == len(load_tokenizer(bases / "llama")) + 2


def test_a_checkpoint_without_a_tokenizer_is_converted_and_the_lack_is_said(tmp_path, capsys):
    families.write("llama", tmp_path / "bare")
    path = convert(tmp_path / "bare", tmp_path / "a.nemo", "nemo")
    assert "has no tokenizer" in capsys.readouterr().out
    with open_checkpoint(path) as opened:
        assert opened.tokenizer is None


def test_the_architecture_can_be_named(bases, tmp_path):
    path = convert(bases / "llama", tmp_path / "a", "huggingface", architecture="mistral")
    assert json.loads((path / "config.json").read_text())["model_type"] == "mistral"
    same_weights(bases / "llama", path)


def test_what_was_written_is_told(bases, tmp_path, capsys):
    path = convert(bases / "gpt2", tmp_path / "a.nemo", "nemo")
    out = capsys.readouterr().out
    assert f"converted {bases / 'gpt2'} (huggingface, gpt2) to\nbase" in out
    assert str(path) in out
    count = sum(p.numel() for p in load_base(path).parameters())
    assert f"{count:,}" in out
    assert "nemo (mcore)" in out


# ---- what is refused


def test_a_place_that_is_taken_is_left_alone_unless_asked(bases, tmp_path):
    target = tmp_path / "a.nemo"
    target.write_text("mine")
    said = refused(tmp_path, bases / "llama", target, "nemo")
    assert said.startswith(f"model.output_path={target} exists already: set model.overwrite=True")
    assert target.read_text() == "mine"
    convert(bases / "llama", target, "nemo", overwrite=True)
    with open_checkpoint(target) as opened:
        assert opened.variant == "mcore"


def test_a_folder_is_replaced_only_where_it_holds_a_checkpoint(bases, tmp_path):
    target = convert(bases / "llama", tmp_path / "a", "huggingface")
    convert(bases / "gpt2", target, "huggingface", overwrite=True)
    assert json.loads((target / "config.json").read_text())["model_type"] == "gpt2"
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("mine")
    said = refused(tmp_path, bases / "gpt2", home, "huggingface", overwrite=True)
    assert "is a folder that holds no checkpoint" in said


@pytest.mark.parametrize("place", ["", "inside"])
def test_a_checkpoint_is_not_converted_into_itself(tmp_path, place):
    base = tmp_path / "base"
    families.write("llama", base)
    said = refused(tmp_path, base, base / place, "nemo", overwrite=True)
    assert f"lies in model.checkpoint_folder={base}" in said


def test_a_missing_checkpoint_is_named(tmp_path):
    said = refused(tmp_path, tmp_path / "nowhere", tmp_path / "a", "nemo")
    assert said.startswith(f"model.checkpoint_folder={tmp_path / 'nowhere'} does not exist")


def test_the_other_family_is_refused_with_the_right_group(bases, tmp_path):
    said = refused(tmp_path, bases / "t5", tmp_path / "a", "nemo", model_type="gpt")
    assert said.endswith("is a t5 model, not gpt: use conversion=t5/...")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(bases, tmp_path):
    words = " ".join(f"w{n}" for n in range(100))
    build_tokenizer("word", [words]).save_pretrained(str(tmp_path / "other"))
    said = refused(
        tmp_path, bases / "llama", tmp_path / "a", "nemo", tokenizer=str(tmp_path / "other")
    )
    assert "more than the model.checkpoint_folder=" in said
    assert "vocabulary of 61" in said


def test_too_small_a_disk_is_refused(bases, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage)
    assert "GB free" in refused(tmp_path, bases / "llama", tmp_path / "a", "graftwerk")


def test_missing_and_misshapen_tensors_are_named_before_anything_is_written(bases, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(bases / "llama", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weigth"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, broken / "model.safetensors")
    said = refused(tmp_path, broken, tmp_path / "a", "nemo")
    for part in ("missing model.norm.weight", "unknown model.norm.weigth", "lm_head.weight gives"):
        assert part in said


def test_a_conversion_that_breaks_off_leaves_nothing(bases, tmp_path, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(conversion, "verified", broken)
    target = tmp_path / "a.nemo"
    target.write_text("old")
    for form in ("nemo", "huggingface", "graftwerk"):
        with pytest.raises(RuntimeError, match="out of luck"):
            conversion.run(config(bases / "llama", target, form, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.nemo"]
    assert target.read_text() == "old"


@pytest.mark.parametrize(("key", "value"), [("target", "onnx"), ("dtype", "fp8")])
def test_unknown_values_are_refused_with_those_that_are_known(bases, tmp_path, key, value):
    cfg = config(bases / "llama", tmp_path / "a", "nemo")
    cfg.model[key] = value
    with pytest.raises(UserError, match=f"model.{key}='{value}': use one of "):
        conversion.run(cfg)
