"""Torch's own files: mapped tensors, what their pickles may hold, and what we write."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from graftwerk.checkpoints import load_base
from graftwerk.checkpoints.torch_files import TorchFiles, unpickle
from graftwerk.checkpoints.torch_writer import TorchWriter
from graftwerk.errors import UserError
from tests.graftwerk.tiny import tokens

KINDS = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"t{i}": (torch.randn(5, 3) * 9).to(kind) for i, kind in enumerate(KINDS)}
    base = torch.randn(6, 4)
    views = {"whole": base, "rows": base[2:4], "turned": base.t(), "column": base[:, 1]}
    return {**made, **views, "number": torch.tensor(2.5), "none": torch.empty(0, 3)}


@pytest.mark.parametrize("new", [True, False])
def test_tensors_of_every_type_and_view_are_those_that_torch_saved(tmp_path, new):
    path = tmp_path / "a.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=new)
    with TorchFiles([path]) as source:
        assert source.names == set(tensors())
        for name, expected in tensors().items():
            found = source.read(name)
            assert (source.shape(name), source.dtype(name)) == (expected.shape, expected.dtype)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), name


def test_reading_maps_the_file_and_copies_nothing(tmp_path):
    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "a.bin")
    with TorchFiles([tmp_path / "a.bin"]) as source:
        view = source.read("x")
        maps = Path("/proc/self/maps").read_text().splitlines()
        inside = [line for line in maps if line.endswith("a.bin")]
        first, last = (int(place, 16) for place in inside[0].split()[0].split("-"))
        assert first <= view.data_ptr() < last


def test_parameters_a_state_dict_inside_and_things_that_are_none(tmp_path):
    held = {"w": torch.nn.Parameter(torch.ones(2)), "n": 3, "a_extra_state": io.BytesIO(b"x")}
    torch.save({"state_dict": held, "epoch": 4}, tmp_path / "a.bin")
    with TorchFiles([tmp_path / "a.bin"]) as source:
        assert source.names == {"w"}
        assert source.others == {"n", "a_extra_state"}


def test_shards_are_one_source_and_a_name_in_two_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "1.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "2.bin")
    paths = [tmp_path / "1.bin", tmp_path / "2.bin"]
    with TorchFiles(paths) as source:
        assert source.names == {"a", "b"}
    torch.save({"a": torch.ones(2)}, paths[1])
    with pytest.raises(UserError, match="tensor a is in two files"):
        TorchFiles(paths)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_would_run_something_is_refused(tmp_path, new):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"x": Evil()}, tmp_path / "a.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"a.bin cannot be read"):
        TorchFiles([tmp_path / "a.bin"])
    assert not (tmp_path / "owned").exists()


def test_names_outside_the_list_are_refused_whatever_they_are():
    for text in (b"cbuiltins\neval\n.", b"ctorch.nn\nLinear\n.", b"cos.path\njoin\n."):
        with pytest.raises(pickle.UnpicklingError, match="which is no tensor"):
            unpickle(text, {})
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        unpickle(b"\x80\x02}r\xff\xff\xff\x7f.", {})


def test_records_that_lie_about_their_size_are_refused(tmp_path):
    torch.save({"x": torch.ones(4)}, tmp_path / "a.bin")
    with (
        zipfile.ZipFile(tmp_path / "a.bin") as old,
        zipfile.ZipFile(tmp_path / "b.bin", "w") as new,
    ):
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, content[:8] if "data/" in info.filename else content)
    with pytest.raises(UserError, match="storage 0 has 8 bytes, not 16"):
        TorchFiles([tmp_path / "b.bin"])


def test_compressed_records_are_refused(tmp_path):
    torch.save({"x": torch.ones(4)}, tmp_path / "a.bin")
    with (
        zipfile.ZipFile(tmp_path / "a.bin") as old,
        zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(UserError, match="compressed"):
        TorchFiles([tmp_path / "b.bin"])


@pytest.mark.parametrize("shards", [1, 2])
def test_a_hugging_face_folder_of_bin_files_is_read(tmp_path, shards):
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    config.save_pretrained(tmp_path)
    state = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(state), tmp_path / "pytorch_model.bin")
    else:
        index = {}
        for number in range(shards):
            name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            torch.save(dict(state[number::shards]), tmp_path / name)
            index |= {key: name for key, _ in state[number::shards]}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    with torch.no_grad():
        expected = model(tokens()).logits
        torch.testing.assert_close(load_base(tmp_path)(tokens()), expected, atol=1e-5, rtol=1e-5)


def test_what_we_write_tensor_by_tensor_is_what_torch_would_load(tmp_path):
    with open(tmp_path / "a.ckpt", "wb") as file:
        file.write(bytes(512))  # it may begin anywhere in a file
        writer = TorchWriter(file)
        for name, tensor in tensors().items():
            writer.add(name, tensor)
        writer.alias("tied", "t0")
        writer.close()
    content = (tmp_path / "a.ckpt").read_bytes()[512:]
    found = torch.load(io.BytesIO(content), weights_only=True)
    expected = {**tensors(), "tied": tensors()["t0"]}
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["tied"].data_ptr() == found["t0"].data_ptr()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert not any(info.extra for info in archive.infolist()), "padding once, not in the index"
    (tmp_path / "a.ckpt").write_bytes(content)
    mapped = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=True)
    assert all(t.data_ptr() % 64 == 0 for name, t in mapped.items() if t.numel()), "aligned"


def test_many_small_tensors_are_views_of_one_storage_for_each_type(tmp_path):
    small = {f"layers.{n}.gate.weight": torch.randn(1, 3 + n % 2) for n in range(200)}
    given = {**tensors(), **small}
    with open(tmp_path / "a.ckpt", "wb") as file:
        writer = TorchWriter(file)
        writer.add_all(given)
        writer.alias("tied", "t0")
        writer.close()
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert found["tied"].data_ptr() == found["t0"].data_ptr()
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename]
    assert len(records) == len({tensor.dtype for tensor in given.values()})
    names = sum(len(name) for name in small)
    numbers = sum(tensor.nbytes for tensor in given.values())
    assert (tmp_path / "a.ckpt").stat().st_size < numbers + names + 60 * len(given) + 4096
    with TorchFiles([tmp_path / "a.ckpt"]) as source:
        assert source.names == {*given, "tied"}
        assert all(torch.equal(source.read(name), tensor) for name, tensor in given.items())
