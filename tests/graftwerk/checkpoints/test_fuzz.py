"""Thousands of damaged and hostile files: only the documented error, no harm, little memory.

The files are read in a process of its own, whose address space is limited, so that no file can
make it ask for much memory, and whose temporary folder is looked at afterwards.
"""

import copy
import gzip
import io
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load, save
from torch._utils import _rebuild_tensor_v2

from graftwerk.adapters import LoRAConfig, PrefixTuningConfig, PTuningConfig
from graftwerk.checkpoints import load_adapters, load_base, save_adapters, save_base
from graftwerk.checkpoints.base import load_tokenizer
from graftwerk.checkpoints.inspect import inspect
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig
from tests.graftwerk import nemo_files
from tests.graftwerk.tiny import tiny_gpt

ROOT = Path(__file__).resolve().parents[3]
RANDOM_DAMAGES = 58  # files of each sample
MEMORY = 1 << 30  # bytes that a damaged file may make the process ask for, above its start
RESIDENT = 200 << 20  # bytes of them that may be touched
SHAPE = TransformerConfig(
    vocab_size=20, num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8,
    max_position_embeddings=8,
)  # fmt: skip
Content = dict[str, bytes]  # file in the checkpoint -> bytes; "" is the checkpoint itself


@pytest.mark.timeout(600)
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.long)])
def test_damaged_and_hostile_files_are_refused_with_one_clear_error(every: int, tmp_path: Path):
    """Of the damages that are drawn at random one in `every` is tried."""
    temporary, place = tmp_path / "tmp", tmp_path / "place"
    for folder in (temporary, place):
        folder.mkdir()
    code = f"from tests.graftwerk.checkpoints.test_fuzz import main; main({every})"
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [os.path.abspath(sys.executable), "-c", code],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["files"] >= (2000 if every == 1 else 400)
    assert said["unexpected"] == []
    assert said["outside"] == []
    assert said["refused"] > said["files"] // 2, "most damages are noticed"
    assert said["resident"] < RESIDENT
    left = [name for name in os.listdir(temporary) if not name.startswith("torchinductor")]
    assert left == [], "what torch itself makes when it is imported aside"
    assert sorted(os.listdir(tmp_path)) == ["place", "tmp"]


# ---- in the process of its own


def main(every: int) -> None:
    """Reads the damaged files and prints what became of them as one line of JSON."""
    work = Path.cwd()
    samples = make_samples(work / "samples")
    target = work / "target"
    for read, content in samples.values():  # whole files are read, and warm the process up
        read(put(target, content))
    start = _status("VmRSS")
    limit = _status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts = {"files": 0, "refused": 0}
    unexpected: list[str] = []
    outside: list[str] = []
    peak = start
    for name, read, content in damaged(samples, every):
        path = put(target, content)
        counts["files"] += 1
        try:
            read(path)
        except UserError as error:
            counts["refused"] += 1
            if "\n" in str(error):
                unexpected.append(f"{name}: more than one line: {error}")
        except BaseException:
            unexpected.append(f"{name}: {traceback.format_exc()[-900:]}")
            if len(unexpected) > 5:
                break
        outside += [f"{name}: {other}" for other in set(os.listdir(work)) - {"samples", "target"}]
        peak = max(peak, _status("VmRSS"))
    shutil.rmtree(work / "samples")
    shutil.rmtree(target)
    said = {**counts, "unexpected": unexpected, "outside": outside, "resident": peak - start}
    print(json.dumps(said))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def put(target: Path, content: Content) -> Path:
    """Lays a checkpoint's files down, in place of the one before."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for name, data in content.items():
        path = target / "x.nemo" if not name else target / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return target / ("x.nemo" if "" in content else "x")


def read_base(path: Path) -> None:
    load_base(path)


def read_all_of_base(path: Path) -> None:
    """As the command `inspect` does, then the tokenizer, then the weights."""
    inspect(path)
    load_tokenizer(path)
    load_base(path)


def read_adapter(path: Path) -> None:
    try:
        load_adapters(BASE, path)
    finally:
        for name in list(BASE.adapters):
            BASE.delete_adapter(name)


def inspect_adapter(path: Path) -> None:
    """As the command `inspect` does, then the weights."""
    inspect(path)
    read_adapter(path)


BASE = tiny_gpt(SHAPE)
Sample = tuple[Callable[[Path], None], Content]


def _content(path: Path) -> Content:
    if path.is_file():
        return {"": path.read_bytes()}
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def make_samples(folder: Path) -> dict[str, Sample]:
    """A small whole checkpoint of each kind."""
    from graftwerk.data.tokenizers import build_tokenizer

    folder.mkdir()
    torch.manual_seed(0)
    rope: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    llama: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**rope))
    t5: Any = hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=20,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    samples: dict[str, Sample] = {}
    llama.save_pretrained(folder / "hf")
    samples["safetensors"] = read_base, _content(folder / "hf")
    config = samples["safetensors"][1]["config.json"]
    tensors = load(samples["safetensors"][1]["model.safetensors"])
    for name, new in (("bin", True), ("old_bin", False)):
        content = io.BytesIO()
        torch.save(tensors, content, _use_new_zipfile_serialization=new)
        files = {"config.json": config, "pytorch_model.bin": content.getvalue()}
        samples[name] = read_base, files
    save_base(BASE, build_tokenizer("word", ["one two three"]), folder / "ours")
    samples["ours"] = read_all_of_base, _content(folder / "ours")
    for name, made, how in (
        ("classic", nemo_files.of_llama(llama), {}),
        ("split", nemo_files.of_llama(llama, split=True), {"form": "gzip"}),
        ("ranks", nemo_files.of_llama(llama), {"tp": 2, "pp": 2}),
        ("t5", nemo_files.of_t5(t5), {}),
        ("mcore", nemo_files.of_llama(llama, mcore=True), {"form": "folder"}),
        ("torch_dist", nemo_files.of_llama(llama, mcore=True), {"distributed": "torch_dist"}),
        ("zarr", nemo_files.of_llama(llama, mcore=True), {"distributed": "zarr", "pp": 2}),
    ):
        path = nemo_files.lay_out(folder / name, *made, **how)
        samples[name] = read_base, _content(path)
    config, weights = nemo_files.of_llama(llama)
    config["tokenizer"] = {"model": "nemo:a_tokenizer.json"}
    artifacts = {"a_tokenizer.json": (folder / "ours" / "tokenizer.json").read_bytes()}
    path = nemo_files.lay_out(folder / "whole", config, weights, artifacts=artifacts)
    samples["whole"] = read_all_of_base, _content(path)
    return samples | adapter_samples(folder)


def adapter_samples(folder: Path) -> dict[str, Sample]:
    """Adapters in our folder and in NeMo's container, with its names and with ours."""
    BASE.add_adapter("a", LoRAConfig(dim=2))
    BASE.add_adapter("b", PTuningConfig(virtual_tokens=2, embedding_dim=2, bottleneck_dim=2))
    BASE.add_adapter("c", PrefixTuningConfig(prefix_length=2, bottleneck_dim=2))
    samples: dict[str, Sample] = {}
    for name, held in (
        ("adapter.nemo", "ab"),
        ("own.nemo", "c"),
        ("adapter", "a"),
        ("adapters", "bc"),
    ):
        save_adapters(BASE, list(held), folder / name)
        samples[name] = read_adapter, _content(folder / name)
    for name in list(BASE.adapters):
        BASE.delete_adapter(name)
    unpacked = folder / "unpacked"  # as NeMo itself leaves it: without our section
    with tarfile.open(folder / "adapter.nemo") as tar:
        tar.extractall(unpacked, filter="data")
    config = yaml.safe_load((unpacked / "model_config.yaml").read_text())
    del config["graftwerk"]
    (unpacked / "model_config.yaml").write_text(yaml.safe_dump(config))
    samples["unpacked"] = inspect_adapter, _content(unpacked)
    return samples


Damaged = Iterator[tuple[str, Callable[[Path], None], Content]]


def damaged(samples: dict[str, Sample], every: int) -> Damaged:
    """(what was done, reader, files) of damaged checkpoints: all hostile ones, others by chance."""
    chance = random.Random(0)
    drawn = itertools.chain(
        _bytes(chance, samples), _tensors(chance, samples), _settings(chance, samples)
    )
    yield from itertools.islice(drawn, 0, None, every)
    for name in ("classic", "adapter.nemo"):
        read, content = samples[name]
        for what, data in hostile_tars(content[""]):
            yield f"{name} {what}", read, {"": data}
    for what, data in hostile_pickles():
        for name in ("bin", "mcore", "unpacked"):
            read, content = samples[name]
            file = "pytorch_model.bin" if name == "bin" else "model_weights.ckpt"
            yield f"{name} {what}", read, {**content, file: data}


# ---- damages of bytes


def _bytes(chance: random.Random, samples: dict[str, Sample]) -> Damaged:
    for name, (read, content) in samples.items():
        for number in range(RANDOM_DAMAGES):
            how = chance.choice(DAMAGES)
            file = chance.choice(list(content))
            hurt = how(chance, content[file])
            yield f"{name} {number} {how.__name__} {file}", read, {**content, file: hurt}
        for file in content:
            if file:
                rest = {other: data for other, data in content.items() if other != file}
                yield f"{name} without {file}", read, rest


def flip_bits(chance: random.Random, data: bytes) -> bytes:
    """Some bits, more often where a file's own description lies."""
    hurt = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 50))):
        if hurt:
            place = chance.randrange(len(hurt))
            if chance.random() < 0.6:
                place = chance.choice((1, -1)) * chance.randrange(min(len(hurt), 1500))
            hurt[place] ^= 1 << chance.randrange(8)
    return bytes(hurt)


def cut_short(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def overwrite(chance: random.Random, data: bytes) -> bytes:
    """A run of zeros, ones or noise."""
    size = chance.choice((1, 4, 8, 64, 512, 4096))
    place = chance.randrange(max(1, len(data)))
    run = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
    return data[:place] + run + data[place + size :]


def take_out(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(max(1, len(data)))
    return data[:place] + data[place + chance.choice((1, 8, 512)) :]


def put_in(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.randbytes(chance.choice((1, 8, 512))) + data[place:]


def copy_over(chance: random.Random, data: bytes) -> bytes:
    """A piece of the file over another: headers where data is, and the other way round."""
    size, ends = chance.choice((8, 512, 1024)), max(1, len(data))
    source, place = chance.randrange(ends), chance.randrange(ends)
    return data[:place] + data[source : source + size] + data[place + size :]


DAMAGES = (flip_bits, flip_bits, flip_bits, cut_short, overwrite, take_out, put_in, copy_over)


# ---- damages of tensors and settings


def _changed(chance: random.Random, tensors: dict) -> dict:
    changed = dict(tensors)
    name = chance.choice(list(changed))
    tensor = changed.pop(name)
    what = chance.randrange(7)
    if what == 0:
        changed[f"{name}x"] = tensor
    elif what == 1:
        changed[name] = torch.zeros(*tensor.shape, 1)
    elif what == 2:
        changed[name] = tensor[:-1].clone()
    elif what == 3:
        changed[name] = torch.tensor(1.0)
    elif what == 4:
        changed[name] = torch.zeros(0, *tensor.shape[1:])
    elif what == 5:
        other = chance.choice(list(changed))
        changed[name], changed[other] = changed[other].clone(), tensor
    return changed


def _tensors(chance: random.Random, samples: dict[str, Sample]) -> Damaged:
    for name, file in (
        ("safetensors", "model.safetensors"),
        ("ours", "model.safetensors"),
        ("adapter", "adapter.safetensors"),
        ("adapters", "adapter.safetensors"),
        ("unpacked", "model_weights.ckpt"),
        ("bin", "pytorch_model.bin"),
        ("mcore", "model_weights.ckpt"),
    ):
        read, content = samples[name]
        safe = file.endswith("safetensors")
        tensors = load(content[file]) if safe else torch.load(io.BytesIO(content[file]))
        for number in range(40):
            changed = _changed(chance, tensors)
            if safe:
                data = save(changed)
            else:
                buffer = io.BytesIO()
                torch.save(changed, buffer)
                data = buffer.getvalue()
            yield f"{name} tensors {number}", read, {**content, file: data}


VALUES = (
    None, True, -1, 0, 1, 3, 7, 10**6, 10**12, 2**63, 2**70, -0.5, 1e308, float("nan"), "", "x",
    "../../etc", [], [1], {}, {"a": 1}, "${a}", "${.a}", "${multiply:4, ${.a}}", "nemo:../../x",
)  # fmt: skip


def _settings(chance: random.Random, samples: dict[str, Sample]) -> Damaged:
    for name, file in (
        ("safetensors", "config.json"),
        ("ours", "model_config.yaml"),
        ("mcore", "model_config.yaml"),
        ("adapter", "adapter_config.yaml"),
        ("adapters", "adapter_config.yaml"),
        ("unpacked", "model_config.yaml"),
    ):
        read, content = samples[name]
        values = yaml.safe_load(content[file])
        kind = json.dumps if file.endswith("json") else yaml.safe_dump
        for place in _places(values):
            for value in chance.sample(VALUES, 2 if name in ("adapters", "unpacked") else 4):
                changed = copy.deepcopy(values)
                _set(changed, place, value)
                data = kind(changed).encode()
                yield f"{name} {place}={value!r}", read, {**content, file: data}
        for data in (b"", b"[]", b"1", b"{", b"a: [", b"\xff\xfe", b"[" * 10**4, b"{" * 10**4):
            yield f"{name} settings {data[:5]!r}", read, {**content, file: data}
        bomb = b"a: &a [x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(97, 105)
        )
        yield f"{name} settings that grow", read, {**content, file: bomb}


def _places(values: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every key, and to those inside of methods' settings."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        yield (key,)
        inside = isinstance(key, int) or key in ("peft", "adapters", "lora_tuning", "p_tuning")
        if inside and isinstance(value, dict | list):
            yield from ((key, *rest) for rest in _places(value))


def _set(values: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        values = values[key]
    values[place[-1]] = value


# ---- hostile files


def hostile_tars(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Tars that would do harm if they were unpacked, or would not fit."""

    def tar(change: Callable[[tarfile.TarFile], None], first: bool = False) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as made:
            if first:
                change(made)
            with tarfile.open(fileobj=io.BytesIO(good)) as old:
                for info in old:
                    made.addfile(info, old.extractfile(info) if info.isfile() else None)
            if not first:
                change(made)
        return buffer.getvalue()

    def member(name: str, type: bytes = tarfile.REGTYPE, link: str = "") -> Callable:
        def change(made: tarfile.TarFile) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = type, link, 5 if type == tarfile.REGTYPE else 0
            made.addfile(info, io.BytesIO(b"12345"))

        return change

    work = os.getcwd()
    for first in (False, True):
        for what, change in {
            "up": member("../../outside"),
            "up inside": member("./a/../../../outside"),
            "absolute": member(f"{work}/outside"),
            "symlink": member("link", tarfile.SYMTYPE, work),
            "symlink up": member("model_weights", tarfile.SYMTYPE, "../.."),
            "hard link": member("link", tarfile.LNKTYPE, "/etc/passwd"),
            "fifo": member("pipe", tarfile.FIFOTYPE),
            "device": member("sda", tarfile.BLKTYPE),
            "terminal": member("tty", tarfile.CHRTYPE),
            "sparse": member("holes", tarfile.GNUTYPE_SPARSE),
            "twice": member("./model_config.yaml"),
            "unknown": member("what", b"Z"),
            "long": member("a/" * 20000 + "b"),
        }.items():
            yield f"{what} {first}", tar(change, first)
    info = tarfile.TarInfo("./model_config.yaml")
    for size in (1 << 33, 1 << 62, 10**6):
        info.size = size
        yield f"claims {size}", info.tobuf(tarfile.GNU_FORMAT) + good
        pax = tarfile.TarInfo("pax")
        pax.type, pax.size = tarfile.XHDTYPE, size
        yield f"claims a header of {size}", pax.tobuf(tarfile.GNU_FORMAT) + good
    yield "many members", b"".join(tarfile.TarInfo(str(n)).tobuf() for n in range(50_000)) + good
    yield "zeros packed small", gzip.compress(bytes(1 << 29), 1)
    yield "half a gzip", gzip.compress(good)[:-20]


def hostile_pickles() -> Iterator[tuple[str, bytes]]:
    """Torch files whose pickle would run something, or grow."""
    import pickle
    import zipfile

    def packed(description: bytes, records: dict[str, bytes] | None = None) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as made:
            made.writestr("x/data.pkl", description)
            made.writestr("x/version", "3\n")
            for name, data in (records or {}).items():
                made.writestr(f"x/{name}", data)
        return buffer.getvalue()

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("outside",)

    evil = pickle.dumps({"x": Evil()}, 2)
    yield "runs", packed(evil)
    yield "runs, alone", evil
    yield "deep", packed(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield "large memo", packed(b"\x80\x02}r\xff\xff\xff\x7f.")
    yield "large text", packed(b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b".")
    yield "large bytes", packed(b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".")
    yield "large number", packed(b"\x80\x02\x8b\xff\xff\xff\x7f.")

    def tensor(size: tuple, stride: tuple, count: int = 4, offset: int = 0) -> bytes:
        class Stored:
            def __reduce__(self):
                return _rebuild_tensor_v2, (Store(), offset, size, stride, False, {})

        class Store:
            pass

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj):
                is_store = isinstance(obj, Store)
                return ("storage", torch.FloatStorage, "0", "cpu", count) if is_store else None

        buffer = io.BytesIO()
        Pickler(buffer, 2).dump({"model.norm.weight": Stored()})
        return packed(buffer.getvalue(), {"data/0": bytes(16)})

    yield "of nothing", tensor((10**6, 10**6), (0, 0))
    yield "past the end", tensor((4,), (1,), offset=1)
    yield "before the start", tensor((4,), (-1,), offset=3)
    yield "more than stored", tensor((8,), (1,), count=8)
    yield "endless", tensor((2**62,), (1,), count=2**62)
    yield "less than none", tensor((-1,), (1,), count=-1)
    packed_small = io.BytesIO()
    with zipfile.ZipFile(packed_small, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data.pkl", bytes(1 << 28))
    yield "zeros packed small", packed_small.getvalue()
