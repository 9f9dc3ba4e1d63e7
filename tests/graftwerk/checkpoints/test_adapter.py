"""Adapter files: both forms, there and back, and what does not fit."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from graftwerk.adapters import BottleneckConfig, IA3Config, LoRAConfig, PTuningConfig, Stack
from graftwerk.checkpoints import (
    load_adapter,
    load_adapters,
    read_adapters,
    save_adapter,
    save_adapters,
)
from graftwerk.errors import UserError
from tests.graftwerk.tiny import GPT2, LLAMA, shake, tiny_gpt, tokens

METHODS = {
    "bottleneck": BottleneckConfig(dim=4, norm_position="post"),
    "ia3": IA3Config(),
    "lora": LoRAConfig(dim=4, alpha=8, target_modules=("attention_dense", "mlp_fc2")),
}


@pytest.mark.parametrize("file", ["adapter.nemo", "adapter"])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_there_and_back_on_a_fresh_base_is_exact(method, file, tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("a", METHODS[method])
    for _, _, part in model.parts("a"):
        shake(part)
    model.set_active("a")
    written = save_adapter(model, "a", tmp_path / file)
    fresh = tiny_gpt()
    name = load_adapter(fresh, tmp_path / file)
    fresh.set_active(name)
    assert name == "a"
    assert fresh.adapters["a"] == METHODS[method]
    assert torch.equal(fresh(tokens()), model(tokens()))
    assert os.listdir(tmp_path) == [file]
    parameters = sum(value.numel() for value in model.adapter_state("a").values())
    assert 4 * parameters <= written <= 4 * parameters + 65536


def test_an_adapter_for_another_model_is_refused_and_leaves_the_model_as_it_was(tmp_path: Path):
    model = tiny_gpt(LLAMA)
    model.add_adapter("a", IA3Config())
    save_adapter(model, "a", tmp_path / "a.nemo")
    other = tiny_gpt(GPT2)
    with pytest.raises(UserError, match=r"a.nemo: the weights do not fit .* is \[16\], not \[32\]"):
        load_adapter(other, tmp_path / "a.nemo")
    assert not other.adapters
    assert not any("adapter_layer" in name for name, _ in other.named_parameters())


def test_a_pickle_that_is_no_tensors_is_never_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    with tarfile.open(tmp_path / "evil.nemo", "w") as tar:
        for member, content in (
            ("./model_config.yaml", b"name: a\nmethod: IA3Config\n"),
            ("./model_weights.ckpt", pickle.dumps({"x": Evil()})),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(tiny_gpt(), tmp_path / "evil.nemo")
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_adapters_are_refused(tmp_path: Path):
    (tmp_path / "noise.nemo").write_bytes(os.urandom(1000))
    (tmp_path / "folder").mkdir()
    for name in ("noise.nemo", "folder", "nothing"):
        with pytest.raises(UserError, match=name):
            load_adapter(tiny_gpt(), tmp_path / name)


# ---- several in one file


def two_adapters():
    model = tiny_gpt()
    for name, method in (("first", METHODS["lora"]), ("second", METHODS["ia3"])):
        model.add_adapter(name, method)
        for _, _, part in model.parts(name):
            shake(part)
    return model


@pytest.mark.parametrize("file", ["adapters.nemo", "adapters"])
def test_several_adapters_come_back_in_order_and_under_new_names(file, tmp_path: Path):
    model = two_adapters()
    save_adapters(model, ["second", "first"], tmp_path / file, {"steps": 7})
    fresh = tiny_gpt()
    assert load_adapters(fresh, tmp_path / file, {"first": "other"}) == ["second", "other"]
    fresh.set_active(Stack("other", "second"))
    model.set_active(Stack("first", "second"))
    assert torch.equal(fresh(tokens()), model(tokens()))
    assert read_adapters(tmp_path / file).extra["steps"] == 7


@pytest.mark.parametrize("file", ["adapters.nemo", "adapters"])
def test_nothing_of_the_model_changes_where_one_of_several_does_not_fit(file, tmp_path: Path):
    model = two_adapters()
    save_adapters(model, ["first", "second"], tmp_path / file)
    other = tiny_gpt(GPT2)
    before = set(dict(other.named_parameters()))
    with pytest.raises(UserError, match="the weights do not fit"):
        load_adapters(other, tmp_path / file)
    assert not other.adapters
    assert set(dict(other.named_parameters())) == before
    taken = tiny_gpt()
    taken.add_adapter("second", METHODS["ia3"])
    with pytest.raises(UserError, match="has an adapter 'second' already"):
        load_adapters(taken, tmp_path / file)
    assert list(taken.adapters) == ["second"]


def test_names_that_a_file_does_not_have_are_refused(tmp_path: Path):
    save_adapters(two_adapters(), ["first", "second"], tmp_path / "two")
    for rename, said in (
        ({"third": "x"}, "holds no adapter 'third'"),
        ({"first": "second"}, "would have one name"),
        ("one", "holds 2 adapters"),
    ):
        with pytest.raises(UserError, match=said):
            load_adapters(tiny_gpt(), tmp_path / "two", rename)
    with pytest.raises(UserError, match="several adapters"):
        load_adapter(tiny_gpt(), tmp_path / "two")


def test_sizes_in_settings_that_the_weights_do_not_have_cost_no_memory(tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("a", PTuningConfig(virtual_tokens=2, embedding_dim=4, bottleneck_dim=4))
    save_adapter(model, "a", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.yaml"
    settings = yaml.safe_load(file.read_text())
    for key in ("virtual_tokens", "embedding_dim", "bottleneck_dim"):
        for size in (1 << 36, 10**40):
            file.write_text(yaml.safe_dump({**settings, key: size}))
            with pytest.raises(UserError, match=r"the weights do not fit|cannot be made"):
                load_adapter(model, tmp_path / "a", "b")
    assert list(model.adapters) == ["a"]


def test_a_folder_of_the_form_before_this_one_still_loads(tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("a", METHODS["lora"])
    state = {key: torch.randn_like(value) for key, value in model.adapter_state("a").items()}
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / "adapter.safetensors")
    (tmp_path / "old" / "adapter_config.yaml").write_text(
        "name: a\nmethod: LoRAConfig\ndim: 4\nalpha: 8\ndropout: 0.0\nbase: /some/base\n"
        "target_modules: [attention_dense, mlp_fc2]\ncolumn_init_method: xavier\n"
        "row_init_method: zero\nstage: peft\nsteps: 3\n"
    )
    fresh = tiny_gpt()
    assert load_adapter(fresh, tmp_path / "old") == "a"
    assert fresh.adapters["a"] == METHODS["lora"]
    assert all(torch.equal(fresh.adapter_state("a")[key], state[key]) for key in state)
