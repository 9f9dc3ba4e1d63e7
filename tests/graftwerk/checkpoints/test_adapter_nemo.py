"""Adapters with NeMo's names: files laid by hand from the table of its names, and what we write."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    Stack,
)
from graftwerk.checkpoints import load_adapter, load_adapters, save_adapter, save_adapters
from graftwerk.checkpoints.inspect import inspect
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig, build_model
from tests.graftwerk import nemo_files
from tests.graftwerk.tiny import LLAMA, shake, tiny_gpt, tokens

H, HEADS, GROUPS, D, FFN, LAYERS = 32, 4, 2, 8, 48, 3  # of tests.graftwerk.tiny.LLAMA
QKV = (HEADS + 2 * GROUPS) * D
T5 = TransformerConfig(
    architecture="t5", vocab_size=61, num_layers=2, decoder_num_layers=2, hidden_size=32,
    num_attention_heads=4, ffn_hidden_size=48, normalization="rmsnorm", bias=False,
    qkv_bias=False, position_embedding_type="relative", activation="geglu_tanh",
    max_position_embeddings=0, share_embeddings_and_output_weights=False,
    normalize_attention_scores=False,
)  # fmt: skip
HALF = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
    "kv_channels": 8, "normalization": "rmsnorm", "bias": False, "activation": "geglu",
    "openai_gelu": True, "position_embedding_type": "relative", "megatron_legacy": True,
    "normalize_attention_scores": False,
}  # fmt: skip
GPT_KEYS = {
    "num_layers": LAYERS, "hidden_size": H, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
    "num_query_groups": GROUPS, "kv_channels": D, "normalization": "rmsnorm", "bias": False,
    "activation": "fast-swiglu", "position_embedding_type": "rope",
    "max_position_embeddings": 64, "share_embeddings_and_output_weights": False,
}  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {
    "mcore": {**GPT_KEYS, "mcore_gpt": True},
    "classic": {**GPT_KEYS, "mcore_gpt": False},
    "t5": {"encoder": HALF, "decoder": HALF, "share_decoder_tokens_head_embeddings": False},
}
LAYER = {
    "mcore": {"decoder": "model.decoder.layers.{}"},
    "classic": {"decoder": "model.language_model.encoder.layers.{}"},
    "t5": {
        "encoder": "enc_dec_model.enc_dec_model.encoder.model.layers.{}",
        "decoder": "enc_dec_model.enc_dec_model.decoder.model.layers.{}",
    },
}
PROMPT = {
    "mcore": "model.embedding.adapter_layer.ptuning_adapter",
    "classic": "model.language_model.adapter_layer.ptuning_adapter",
    "t5": "enc_dec_model.adapter_layer.ptuning_adapter",
}
LORA = {  # our slot: NeMo's module, features in, out
    "self_attention.qkv": ("self_attention.adapter_layer.lora_kqv_adapter", H, QKV),
    "self_attention.output": ("self_attention.adapter_layer.lora_dense_attention_adapter", H, H),
    "mlp.fc1": ("mlp.adapter_layer.lora_hto4h_adapter", H, 2 * FFN),
    "mlp.fc2": ("mlp.adapter_layer.lora_4htoh_adapter", FFN, H),
}
Tensors = dict[str, Tensor]


def model_of(variant: str):
    if variant != "t5":
        return tiny_gpt(LLAMA)
    torch.manual_seed(0)
    model = build_model(T5)
    shake(model)
    return model.eval()


def logits(model) -> Tensor:
    if model.config.architecture == "t5":
        return model(tokens(seed=1), source=tokens(seed=2))
    return model(tokens())


def lay(path: Path, config: dict[str, Any], shards: dict[str, Tensors]) -> Path:
    """A `.nemo` of NeMo's form, made of nothing of ours."""
    with tarfile.open(path, "w") as tar:
        contents = {"./model_config.yaml": yaml.safe_dump(config).encode()}
        for name, tensors in shards.items():
            weights = io.BytesIO()
            torch.save(tensors, weights)
            contents[f"./{name}"] = weights.getvalue()
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def whole(path: Path, variant: str, peft: dict[str, Any], tensors: Tensors) -> Path:
    config = {**KEYS[variant], "peft": peft, "restore_from_path": "/base.nemo"}
    return lay(path, config, {"model_weights.ckpt": tensors})


def random(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape)


def expected(variant: str, method, ours: Tensors) -> Tensor:
    """Logits of a model into which our names were copied without a file."""
    model = model_of(variant)
    model.add_adapter("x", method)
    model.load_adapter_state("x", ours)
    model.set_active("x")
    return logits(model)


def check(path: Path, variant: str, name: str, method, ours: Tensors) -> None:
    model = model_of(variant)
    assert load_adapters(model, path) == [name]
    assert model.adapters[name] == method
    model.set_active(name)
    found = logits(model)
    assert torch.equal(found, expected(variant, method, ours))
    model.set_active(None)
    assert (found - logits(model)).abs().max() > 1e-3


# ---- reading: one rank


@pytest.mark.parametrize("variant", ["mcore", "classic"])
def test_lora_of_a_gpt_at_every_target(variant, tmp_path: Path):
    theirs, ours = {}, {}
    for layer in range(LAYERS):
        for slot, (module, inputs, outputs) in LORA.items():
            a, b = random(4, inputs), random(outputs, 4)
            start = f"{LAYER[variant]['decoder'].format(layer)}.{module}"
            theirs |= {f"{start}.linear_in.weight": a, f"{start}.linear_out.weight": b}
            start = f"decoder.layers.{layer}.{slot}"
            ours |= {f"{start}.linear_in.weight": a, f"{start}.linear_out.weight": b}
    peft = {
        "peft_scheme": "lora",
        "lora_tuning": {
            "adapter_dim": 4, "alpha": 8, "adapter_dropout": 0.1, "target_modules": ["all"],
            "column_init_method": "normal", "row_init_method": "zero", "weight_tying": False,
            "layer_selection": None, "position_embedding_strategy": None,
            "a2a_experimental": False,
        },
    }  # fmt: skip
    path = whole(tmp_path / "a.nemo", variant, peft, theirs)
    method = LoRAConfig(
        dim=4, alpha=8, dropout=0.1, dropout_position="post", target_modules=("all",),
        column_init_method="normal",
    )  # fmt: skip
    check(path, variant, "lora", method, ours)
    report = inspect(path)
    assert (report.format, report.method, report.base) == ("nemo (.nemo)", "lora", "/base.nemo")


def test_lora_with_a_part_for_each_projection(tmp_path: Path):
    theirs, ours = {}, {}
    parts = {
        "self_attention.query": ("self_attention", "lora_unfused_kqv_adapter.q_adapter", H),
        "self_attention.key": ("self_attention", "lora_unfused_kqv_adapter.k_adapter", GROUPS * D),
        "self_attention.value": (
            "self_attention", "lora_unfused_kqv_adapter.v_adapter", GROUPS * D,
        ),
        "mlp.gate": ("mlp", "lora_unfused_hto4h_adapter.gate_adapter", FFN),
        "mlp.up": ("mlp", "lora_unfused_hto4h_adapter.up_adapter", FFN),
    }  # fmt: skip
    for layer in range(LAYERS):
        for slot, (owner, adapter, outputs) in parts.items():
            a, b = random(4, H), random(outputs, 4)
            start = f"model.decoder.layers.{layer}.{owner}.adapter_layer.{adapter}"
            theirs |= {f"{start}.linear_in.weight": a, f"{start}.linear_out.weight": b}
            start = f"decoder.layers.{layer}.{slot}"
            ours |= {f"{start}.linear_in.weight": a, f"{start}.linear_out.weight": b}
    tuning = {
        "adapter_dim": 4, "variant": "canonical", "target_modules": ["attention_qkv", "mlp_fc1"],
    }  # fmt: skip
    peft = {"peft_scheme": "lora", "lora_tuning": tuning}
    path = whole(tmp_path / "a.nemo", "mcore", peft, theirs)
    method = LoRAConfig(
        dim=4, variant="canonical", target_modules=("attention_qkv", "mlp_fc1"),
        dropout_position="post",
    )  # fmt: skip
    check(path, "mcore", "lora", method, ours)


@pytest.mark.parametrize("variant", ["mcore", "classic", "t5"])
def test_canonical_adapters(variant, tmp_path: Path):
    theirs, ours = {}, {}
    for side, layer in sides(variant):
        for slot, name in (("attention_output", "adapter_1"), ("mlp_output", "adapter_2")):
            for leaf, shape in (
                ("linear_in.weight", (4, H)),
                ("linear_out.weight", (H, 4)),
                ("layer_norm.weight", (H,)),
                ("layer_norm.bias", (H,)),
            ):
                value = random(*shape)
                start = LAYER[variant][side].format(layer)
                theirs[f"{start}.adapter_layer.{name}.{leaf}"] = value
                ours[f"{side}.layers.{layer}.{slot}.{leaf}"] = value
    tuning = {"adapter_dim": 4, "adapter_dropout": 0.0, "norm_position": "post"}
    peft = {"peft_scheme": "adapter", "adapter_tuning": tuning}
    path = whole(tmp_path / "a.nemo", variant, peft, theirs)
    check(path, variant, "adapter", BottleneckConfig(dim=4, norm_position="post"), ours)


def sides(variant: str) -> list[tuple[str, int]]:
    if variant == "t5":
        return [(side, layer) for side in ("encoder", "decoder") for layer in range(2)]
    return [("decoder", layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("variant", ["mcore", "classic", "t5"])
def test_ia3(variant, tmp_path: Path):
    theirs, ours = {}, {}
    key = GROUPS * D if variant != "t5" else H
    for side, layer in sides(variant):
        places = {
            "self_attention.keys": ("self_attention", "key_infused_adapter", key),
            "self_attention.values": ("self_attention", "value_infused_adapter", key),
            "mlp.inner": ("mlp", "mlp_infused_adapter", FFN),
        }
        if variant == "t5" and side == "decoder":
            places["cross_attention.keys"] = ("inter_attention", "key_infused_adapter", H)
            places["cross_attention.values"] = ("inter_attention", "value_infused_adapter", H)
        for slot, (owner, name, size) in places.items():
            value = 1 + random(size)
            start = LAYER[variant][side].format(layer)
            theirs[f"{start}.{owner}.adapter_layer.{name}.scalers"] = value
            ours[f"{side}.layers.{layer}.{slot}.scalers"] = value
    peft = {"peft_scheme": "ia3", "ia3_tuning": {"layer_selection": None}}
    check(whole(tmp_path / "a.nemo", variant, peft, theirs), variant, "ia3", IA3Config(), ours)


@pytest.mark.parametrize("variant", ["mcore", "classic", "t5"])
def test_p_tuning(variant, tmp_path: Path):
    ours = {
        "embedding.output.embedding": random(5, 6),
        "embedding.output.first.weight": random(7, 6),
        "embedding.output.first.bias": random(7),
        "embedding.output.second.weight": random(H, 7),
        "embedding.output.second.bias": random(H),
    }
    start = PROMPT[variant]
    theirs = {
        f"{start}.embedding.weight": ours["embedding.output.embedding"],
        **{
            f"{start}.{leaf}": ours[f"embedding.output.{leaf}"]
            for leaf in ("first.weight", "first.bias", "second.weight", "second.bias")
        },
        f"{start}.inference_table": random(5, H),
    }
    tuning = {"virtual_tokens": 5, "embedding_dim": 6, "bottleneck_dim": 7, "init_std": 0.023}
    peft = {"peft_scheme": "ptuning", "p_tuning": tuning}
    path = whole(tmp_path / "a.nemo", variant, peft, theirs)
    method = PTuningConfig(virtual_tokens=5, embedding_dim=6, bottleneck_dim=7)
    check(path, variant, "ptuning", method, ours)


def test_lora_of_a_t5_has_queries_then_keys_then_values_and_nothing_across(tmp_path: Path):
    theirs, ours = {}, {}
    for side, layer in sides("t5"):
        a = random(4, H)
        q, k, v = random(HEADS, D, 4), random(HEADS, D, 4), random(HEADS, D, 4)
        start = f"{LAYER['t5'][side].format(layer)}.self_attention.adapter_layer.lora_kqv_adapter"
        theirs[f"{start}.linear_in.weight"] = a
        theirs[f"{start}.linear_out.weight"] = torch.cat([x.reshape(H, 4) for x in (q, k, v)])
        start = f"{side}.layers.{layer}"
        ours[f"{start}.self_attention.qkv.linear_in.weight"] = a
        rows = [x[head] for head in range(HEADS) for x in (q, k, v)]
        ours[f"{start}.self_attention.qkv.linear_out.weight"] = torch.cat(rows)
        if side == "decoder":
            dead = LAYER["t5"][side].format(layer) + ".inter_attention.adapter_layer"
            theirs[f"{dead}.lora_kqv_adapter.linear_in.weight"] = random(4, H)
            theirs[f"{dead}.lora_kqv_adapter.linear_out.weight"] = random(3 * H, 4)
            for slot in ("query", "key", "value"):
                across = f"{start}.cross_attention.{slot}"
                ours[f"{across}.linear_in.weight"] = torch.ones(4, H)
                ours[f"{across}.linear_out.weight"] = torch.zeros(H, 4)
    peft = {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": 4}}
    path = whole(tmp_path / "a.nemo", "t5", peft, theirs)
    check(path, "t5", "lora", LoRAConfig(dim=4, dropout_position="post"), ours)


def test_several_methods_in_one_file_are_adapters_by_their_schemes(tmp_path: Path):
    lora, ia3 = {}, {}
    for layer in range(LAYERS):
        start = f"model.decoder.layers.{layer}"
        module = f"{start}.self_attention.adapter_layer.lora_kqv_adapter"
        lora |= {f"{module}.linear_in.weight": random(4, H)}
        lora |= {f"{module}.linear_out.weight": random(QKV, 4)}
        for owner, name, size in (
            ("self_attention", "key_infused_adapter", GROUPS * D),
            ("self_attention", "value_infused_adapter", GROUPS * D),
            ("mlp", "mlp_infused_adapter", FFN),
        ):
            ia3[f"{start}.{owner}.adapter_layer.{name}.scalers"] = 1 + random(size)
    peft = {"peft_scheme": "lora,ia3", "lora_tuning": {"adapter_dim": 4}, "ia3_tuning": {}}
    path = whole(tmp_path / "a.nemo", "mcore", peft, {**lora, **ia3})
    model = model_of("mcore")
    assert load_adapters(model, path) == ["lora", "ia3"]
    name = "decoder.layers.1.mlp.inner.scalers"
    theirs = "model.decoder.layers.1.mlp.adapter_layer.mlp_infused_adapter.scalers"
    assert torch.equal(model.adapter_state("ia3")[name], ia3[theirs])


def test_layers_that_share_weights_and_those_that_were_selected(tmp_path: Path):
    a, b = random(4, H), random(QKV, 4)
    theirs = {}
    for layer in (1, 2):
        start = f"model.decoder.layers.{layer}.self_attention.adapter_layer.lora_kqv_adapter"
        theirs |= {f"{start}.linear_in.weight": a, f"{start}.linear_out.weight": b}
    tuning = {"adapter_dim": 4, "weight_tying": True, "layer_selection": [2, 3]}
    peft = {"peft_scheme": "lora", "lora_tuning": tuning}
    path = whole(tmp_path / "a.nemo", "mcore", peft, theirs)
    method = LoRAConfig(dim=4, weight_tying=True, layer_selection=(2, 3), dropout_position="post")
    start = "decoder.layers.1.self_attention.qkv"
    ours = {f"{start}.linear_in.weight": a, f"{start}.linear_out.weight": b}
    check(path, "mcore", "lora", method, ours)
    theirs = {name: value.clone() for name, value in theirs.items()}
    theirs[max(theirs)] += 1
    with pytest.raises(UserError, match=r"weight_tying=True, and .*layers.2.* differs"):
        load_adapter(model_of("mcore"), whole(tmp_path / "b.nemo", "mcore", peft, theirs))


def test_parameters_of_the_base_itself(tmp_path: Path):
    gate_up, norm = random(2 * FFN, H), 1 + random(H)
    theirs = {
        "model.decoder.layers.1.mlp.linear_fc1.weight": gate_up,
        "model.decoder.layers.1.mlp.linear_fc1.layer_norm_weight": norm,
    }
    tuning = {"tunable_base_param_names": ["layers.1.mlp.linear_fc1"]}
    peft = {"peft_scheme": "selective", "selective_tuning": tuning}
    ours = {
        "decoder.layers.1.pre_mlp_layernorm.weight": norm,
        "decoder.layers.1.mlp.linear_fc1.weight": gate_up,
    }
    path = whole(tmp_path / "a.nemo", "mcore", peft, theirs)
    check(path, "mcore", "selective", SelectiveConfig(parameters=tuple(ours)), ours)


# ---- reading: shards


def rows(tensor: Tensor, rank: int, runs: int = 1) -> Tensor:
    """A rank's share of the rows, of each run of them."""
    return torch.cat([run.chunk(2)[rank] for run in tensor.chunk(runs)])


@pytest.mark.parametrize("stages", [1, 2])
def test_shards_of_two_ranks_and_local_layers_are_joined(stages, tmp_path: Path):
    shape = TransformerConfig(**{**LLAMA.to_dict(), "num_layers": 4})
    shards: dict[str, Tensors] = {}
    ours: Tensors = {}
    for layer in (0, 2, 3):  # not every layer of the first stage
        stage, local = divmod(layer, 4 // stages)
        for slot, (module, inputs, outputs) in LORA.items():
            a, b = random(4, inputs), random(outputs, 4)
            start = f"decoder.layers.{layer}.{slot}"
            ours |= {f"{start}.linear_in.weight": a, f"{start}.linear_out.weight": b}
            for rank in (0, 1):
                folder = f"mp_rank_{rank:02d}"
                if stages > 1:
                    folder = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
                held = shards.setdefault(f"{folder}/model_weights.ckpt", {})
                row = slot in ("self_attention.output", "mlp.fc2")  # split over their inputs
                name = f"model.decoder.layers.{local}.{module}"
                held[f"{name}.linear_in.weight"] = a.chunk(2, 1)[rank] if row else rows(a, rank)
                runs = 2 if slot == "mlp.fc1" else 1  # gate, then up
                held[f"{name}.linear_out.weight"] = rows(b, rank, runs)
    tuning = {"adapter_dim": 4, "target_modules": ["all"], "layer_selection": [1, 3, 4]}
    config = {
        **KEYS["mcore"], "num_layers": 4, "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": stages,
        "peft": {"peft_scheme": "lora", "lora_tuning": tuning},
    }  # fmt: skip
    path = lay(tmp_path / "a.nemo", config, shards)
    model = tiny_gpt(shape)
    load_adapter(model, path)
    state = model.adapter_state("lora")
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[key], ours[key]) for key in ours)
    (tmp_path / "folder").mkdir()
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    assert load_adapter(tiny_gpt(shape), tmp_path / "folder") == "lora"
    assert inspect(tmp_path / "folder").method == "lora"


@pytest.mark.parametrize("how", [{"form": "gzip", "o2": True}, {"distributed": "torch_dist"}])
def test_packed_half_precision_and_distributed_files(how, tmp_path: Path):
    theirs, ours = {}, {}
    for layer in range(LAYERS):
        for name, slot in (("adapter_1", "attention_output"), ("adapter_2", "mlp_output")):
            for leaf, shape in (
                ("linear_in.weight", (4, H)),
                ("linear_out.weight", (H, 4)),
                ("layer_norm.weight", (H,)),
                ("layer_norm.bias", (H,)),
            ):
                value = random(*shape)
                theirs[f"model.decoder.layers.{layer}.adapter_layer.{name}.{leaf}"] = value
                ours[f"decoder.layers.{layer}.{slot}.{leaf}"] = value
    peft = {"peft_scheme": "adapter", "adapter_tuning": {"adapter_dim": 4}}
    config = {**KEYS["mcore"], "peft": peft}
    path = nemo_files.lay_out(tmp_path / "a.nemo", config, theirs, **how)
    check(path, "mcore", "adapter", BottleneckConfig(dim=4), ours)


# ---- writing


def keys_of(path: Path) -> tuple[dict[str, Any], Tensors]:
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    tensors = torch.load(io.BytesIO(members["./model_weights.ckpt"]), weights_only=True)
    return yaml.safe_load(members["./model_config.yaml"]), tensors


def test_what_is_written_for_a_gpt_has_nemos_names_and_keys(tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("mine", LoRAConfig(dim=4, alpha=2, rank_stabilised=True))
    model.add_adapter("prompt", PTuningConfig(virtual_tokens=5, embedding_dim=6, bottleneck_dim=7))
    save_adapters(model, ["mine", "prompt"], tmp_path / "a.nemo", {"base": "/b", "steps": 3})
    config, tensors = keys_of(tmp_path / "a.nemo")
    kqv = "model.decoder.layers.{}.self_attention.adapter_layer.lora_kqv_adapter.linear_{}.weight"
    names = {kqv.format(layer, way) for layer in range(LAYERS) for way in ("in", "out")}
    leaves = (
        "embedding.weight", "first.weight", "first.bias", "second.weight", "second.bias",
        "inference_table",
    )  # fmt: skip
    assert tensors.keys() == names | {f"{PROMPT['mcore']}.{leaf}" for leaf in leaves}
    part = next(part for _, _, part in model.parts("prompt"))
    assert torch.equal(tensors[f"{PROMPT['mcore']}.inference_table"], part.vectors())  # type: ignore
    assert {key: config[key] for key in KEYS["mcore"]} == KEYS["mcore"]
    assert config["restore_from_path"] == "/b"
    peft = config["peft"]
    assert peft["peft_scheme"] == "lora,ptuning"
    assert peft["lora_tuning"]["adapter_dim"] == 4
    assert peft["lora_tuning"]["alpha"] == 2 * 4**0.5  # over 4: what the update is scaled with
    assert peft["p_tuning"] == {
        "virtual_tokens": 5, "embedding_dim": 6, "bottleneck_dim": 7, "init_std": 0.023,
    }  # fmt: skip
    fresh = tiny_gpt()
    assert load_adapters(fresh, tmp_path / "a.nemo") == ["mine", "prompt"]
    assert fresh.adapters == model.adapters
    report = inspect(tmp_path / "a.nemo")
    assert report.method == "LoRAConfig, PTuningConfig"
    assert report.settings["steps"] == 3


def test_what_is_written_reads_the_same_without_our_section(tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("mine", LoRAConfig(dim=4, alpha=2, rank_stabilised=True))
    shake(model)
    save_adapter(model, "mine", tmp_path / "a.nemo")
    config, tensors = keys_of(tmp_path / "a.nemo")
    del config["graftwerk"]
    model.set_active("mine")
    other = tiny_gpt()
    shake(other)
    other.load_state_dict(model.state_dict(), strict=False)
    other.set_active(
        load_adapter(other, lay(tmp_path / "b.nemo", config, {"model_weights.ckpt": tensors}))
    )
    assert (logits(other) - logits(model)).abs().max() < 1e-6


def test_what_is_written_for_a_t5_has_nemos_names(tmp_path: Path):
    model = model_of("t5")
    model.add_adapter("a", IA3Config())
    save_adapter(model, "a", tmp_path / "a.nemo")
    _, tensors = keys_of(tmp_path / "a.nemo")
    names = set()
    for side, layer in sides("t5"):
        start = LAYER["t5"][side].format(layer)
        owners = ["self_attention"] + ["inter_attention"] * (side == "decoder")
        names |= {
            f"{start}.{owner}.adapter_layer.{kind}_infused_adapter.scalers"
            for owner in owners
            for kind in ("key", "value")
        }
        names.add(f"{start}.mlp.adapter_layer.mlp_infused_adapter.scalers")
    assert tensors.keys() == names


def test_layers_that_share_weights_are_written_for_each_and_once_on_disk(tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("a", BottleneckConfig(dim=4, weight_tying=True))
    written = save_adapter(model, "a", tmp_path / "a.nemo")
    _, tensors = keys_of(tmp_path / "a.nemo")
    for layer in range(LAYERS):
        name = f"model.decoder.layers.{layer}.adapter_layer.adapter_1.linear_in.weight"
        own = model.adapter_state("a")["decoder.layers.0.attention_output.linear_in.weight"]
        assert torch.equal(tensors[name], own)
    assert written < 4 * sum(t.numel() for t in model.adapter_state("a").values()) + 20_000


def test_whole_modules_of_the_base_are_written_under_nemos_names(tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("a", SelectiveConfig(parameters=("*.1.mlp.linear_fc2.*",)))
    save_adapter(model, "a", tmp_path / "a.nemo")
    config, tensors = keys_of(tmp_path / "a.nemo")
    assert list(tensors) == ["model.decoder.layers.1.mlp.linear_fc2.weight"]
    chosen = config["peft"]["selective_tuning"]["tunable_base_param_names"]
    assert chosen == ["decoder.layers.1.mlp.linear_fc2"]
    assert inspect(tmp_path / "a.nemo").kind == "adapter"
    fresh = tiny_gpt()
    load_adapter(fresh, tmp_path / "a.nemo")
    assert fresh.adapters == model.adapters


@pytest.mark.parametrize(
    "method",
    [
        PrefixTuningConfig(prefix_length=2, bottleneck_dim=4),
        LoRAConfig(dim=2, dora=True),
        PTuningConfig(virtual_tokens=2, embedding_dim=4, encoder="lstm"),
        BottleneckConfig(dim=2, weight_tying=True, position_embedding_strategy="add"),
        SelectiveConfig(parameters=("*.linear_fc1.weight",)),  # its norm is not among them
    ],
)
def test_what_nemo_has_no_words_for_keeps_our_names_in_its_container(method, tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("a", method)
    save_adapter(model, "a", tmp_path / "a.nemo")
    config, tensors = keys_of(tmp_path / "a.nemo")
    assert config["format"] == "graftwerk"
    assert tensors.keys() == model.adapter_state("a").keys()
    fresh = tiny_gpt()
    load_adapter(fresh, tmp_path / "a.nemo")
    assert fresh.adapters == model.adapters
    model.set_active("a")
    fresh.set_active("a")
    assert torch.equal(fresh(tokens()), model(tokens()))


def test_two_adapters_of_one_method_keep_our_names(tmp_path: Path):
    model = tiny_gpt()
    model.add_adapter("a", IA3Config())
    model.add_adapter("b", IA3Config())
    save_adapters(model, ["a", "b"], tmp_path / "a.nemo")
    assert keys_of(tmp_path / "a.nemo")[0]["format"] == "graftwerk"
    fresh = tiny_gpt()
    fresh.set_active(Stack(*load_adapters(fresh, tmp_path / "a.nemo")))
    assert list(fresh.adapters) == ["a", "b"]


# ---- what is refused


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path):
    start = "model.decoder.layers.0.self_attention.adapter_layer"
    good = {
        f"{start}.lora_kqv_adapter.linear_in.weight": random(4, H),
        f"{start}.lora_kqv_adapter.linear_out.weight": random(QKV, 4),
    }
    tuning = {"adapter_dim": 4, "layer_selection": [1]}
    peft = {"peft_scheme": "lora", "lora_tuning": tuning}
    big = random(1 << 20)
    for tensors, section, said in (
        ({f"{start}.vera_kqv_adapter.x": random(4)}, peft, "vera_kqv_adapter.x is of an adapter"),
        ({**good, f"{start}.lora_q_adapter.x": random(4)}, peft, "lora_q_adapter.x is at a place"),
        (good, {"peft_scheme": "ia3"}, "its settings are of ia3, and its weights of lora"),
        (good, {"peft_scheme": "vera"}, "peft_scheme='vera' is not known"),
        (good, {**peft, "lora_tuning": {**tuning, "adapter_dim": 8}}, "is [4, 32], not [8, 32]"),
        (good, {**peft, "lora_tuning": {**tuning, "adapter_dim": "x"}}, "must be a whole number"),
        (good, {**peft, "lora_tuning": {**tuning, "other": 1}}, "lora_tuning.other is not known"),
        ({"weight": random(4)}, peft, "no names of adapters"),
        (
            {f"model.decoder.layers.{n}.adapter_layer.adapter_1.x": big for n in range(40)},
            {"peft_scheme": "adapter", "adapter_tuning": {}},
            "its tensors overlap",
        ),
    ):
        path = whole(tmp_path / "a.nemo", "mcore", section, tensors)
        model = tiny_gpt()
        with pytest.raises(UserError) as error:
            load_adapter(model, path)
        assert said in str(error.value)
        assert str(path) in str(error.value)
        assert not model.adapters
