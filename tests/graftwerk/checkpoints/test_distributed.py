"""Megatron's distributed checkpoints: chunks of any cut, in torch's form and in zarr's."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from graftwerk.checkpoints.archive import open_folder
from graftwerk.checkpoints.distributed import DistributedSource
from graftwerk.errors import UserError


def open_source(folder: Path) -> DistributedSource:
    return DistributedSource(open_folder(folder), "model_weights")


def test_what_torch_itself_saved_is_read_layer_by_layer(tmp_path):
    stack = torch.randn(3, 4, 5)
    state = {
        "model.decoder.layers.mlp.linear_fc1.weight": stack,
        "model.decoder.layers.0.norm.weight": torch.ones(2),  # numbered already
        "word": torch.arange(7, dtype=torch.bfloat16),
        "model.decoder.layers.mlp._extra_state": io.BytesIO(b"state"),
    }
    dcp.save(state, checkpoint_id=tmp_path / "model_weights", no_dist=True)
    with open_source(tmp_path) as source:
        layers = {f"model.decoder.layers.{i}.mlp.linear_fc1.weight": i for i in range(3)}
        assert source.names == {*layers, "model.decoder.layers.0.norm.weight", "word"}
        for name, i in layers.items():
            assert source.shape(name) == (4, 5)
            assert torch.equal(source.read(name), stack[i])
        assert source.dtype("word") == torch.bfloat16
        assert torch.equal(source.read("word"), state["word"])


def zarr(folder: Path, name: str, tensor: torch.Tensor, chunks: list[int], **how) -> Path:
    """A zarr array; chunks at the edge are filled up, as the format wants it."""
    place = folder / "model_weights" / name
    place.mkdir(parents=True)
    described = {
        "chunks": chunks, "compressor": None, "dtype": "<f4", "fill_value": None, "filters": None,
        "order": "C", "shape": list(tensor.shape), "zarr_format": 2, **how,
    }  # fmt: skip
    (place / ".zarray").write_text(json.dumps(described))
    grid = [range(-(-n // size)) for n, size in zip(tensor.shape, chunks, strict=True)]
    for index in torch.cartesian_prod(*(torch.tensor(list(r)) for r in grid)).reshape(
        -1, len(grid)
    ):
        full = torch.full(chunks, 99.0)
        piece = tensor
        for axis, (number, size) in enumerate(zip(index.tolist(), chunks, strict=True)):
            length = min(size, tensor.shape[axis] - number * size)
            piece = piece.narrow(axis, number * size, length)
        full[tuple(slice(n) for n in piece.shape)] = piece
        (place / ".".join(str(n) for n in index.tolist())).write_bytes(full.numpy().tobytes())
    return place


@pytest.mark.parametrize("chunks", [[1, 4, 5], [3, 4, 5], [2, 3, 2], [1, 1, 1]])
def test_zarr_chunks_of_any_size_are_put_together(tmp_path, chunks):
    stack = torch.randn(3, 4, 5)
    zarr(tmp_path, "model.decoder.layers.w", stack, chunks)
    with open_source(tmp_path) as source:
        for i in range(3):
            name = f"model.decoder.layers.{i}.w"
            assert torch.equal(source.read(name), stack[i])
            source.release(name)
            assert torch.equal(source.read(name), stack[i])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"compressor": {"id": "blosc"}}, "compressor="),
        ({"order": "F"}, "order='F'"),
        ({"filters": [{"id": "delta"}]}, "filters="),
        ({"dtype": ">f4"}, "dtype='>f4'"),
        ({"dtype": "<f8"}, "has 48 bytes, not 96"),
        ({"shape": [6, 4]}, r"the chunk .*/1\.0 is missing"),
        ({"shape": [10**9, 10**9]}, "chunks are missing"),
        ({"dimension_separator": "/"}, r"the chunk .*/0/0 is missing"),
        ({"zarr_format": 3}, "zarr_format=3"),
    ],
)
def test_zarr_that_is_not_read_is_refused_by_its_key(tmp_path, how, message):
    zarr(tmp_path, "w", torch.ones(3, 4), [3, 4], **how)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_a_metadata_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("owned",)

    (tmp_path / "model_weights").mkdir()
    (tmp_path / "model_weights" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"holds a builtins.print, which is no tensor"):
        open_source(tmp_path)


def change(folder: Path, how) -> None:
    path = folder / "model_weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    how(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_chunks_that_are_missing_or_out_of_place_are_refused(tmp_path):
    dcp.save({"w": torch.ones(4, 4)}, checkpoint_id=tmp_path / "model_weights", no_dist=True)
    good = (tmp_path / "model_weights" / ".metadata").read_bytes()

    def longer(metadata):
        (place,) = metadata.storage_data.values()
        place.length += 1 << 40

    def elsewhere(metadata):
        (place,) = metadata.storage_data.values()
        place.relative_path = "../../../etc/passwd"

    def larger(metadata):
        metadata.state_dict_metadata["w"].size = torch.Size([4, 400])

    def bytes_only(metadata):
        metadata.state_dict_metadata["w"] = BytesStorageMetadata()

    for how, message in (
        (longer, "shorter than its chunks"),
        (elsewhere, "passwd is missing"),
        (larger, "not the whole tensor"),
    ):
        (tmp_path / "model_weights" / ".metadata").write_bytes(good)
        change(tmp_path, how)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path)
    (tmp_path / "model_weights" / ".metadata").write_bytes(good)
    change(tmp_path, bytes_only)
    with open_source(tmp_path) as source:
        assert source.names == set()


def test_a_folder_with_neither_form_is_refused(tmp_path):
    (tmp_path / "model_weights").mkdir()
    (tmp_path / "model_weights" / "common.pt").touch()
    with pytest.raises(UserError, match=r"neither .metadata .* nor .zarray"):
        open_source(tmp_path)
