"""Adapter files: both forms, there and back, and what does not fit."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from graftwerk.adapters import BottleneckConfig, IA3Config, LoRAConfig
from graftwerk.checkpoints import load_adapter, save_adapter
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
