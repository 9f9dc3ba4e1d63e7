"""`.nemo` files laid out by hand, as NeMo's own scripts would, from models of transformers.

Independent of the package: names, orders and cuts are written down here a second time. `of_gpt2`,
`of_llama` and `of_t5` give a config and the whole tensors of a TP = PP = 1 checkpoint; `lay_out`
puts them into a file or folder in any of NeMo's forms.
"""

import io
import json
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

CLASSIC = "model.language_model"
Tensors = dict[str, Tensor]


def woven(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """For each group its query heads, its key, its value."""
    rows = []
    for group in range(groups):
        for part in (q, k, v):
            size = len(part) // groups
            rows.append(part[group * size : (group + 1) * size])
    return torch.cat(rows)


def of_gpt2(model: Any, mcore: bool = False, legacy: bool = False, pad: int = 0) -> tuple:
    """A GPT2LMHeadModel -> (config, tensors); `pad` rows are added to the vocabulary."""
    c, state = model.config, {k: v.detach() for k, v in model.state_dict().items()}
    config = {
        "mcore_gpt": mcore,
        "num_layers": c.n_layer,
        "hidden_size": c.n_embd,
        "ffn_hidden_size": c.n_inner or 4 * c.n_embd,
        "num_attention_heads": c.n_head,
        "encoder_seq_length": c.n_positions,
        "max_position_embeddings": c.n_positions,
        "layernorm_epsilon": c.layer_norm_epsilon,
        "activation": "gelu",
        "bias_activation_fusion": True,
        "normalization": "layernorm",
        "position_embedding_type": "learned_absolute",
        "share_embeddings_and_output_weights": True,
        "megatron_legacy": legacy,
        "make_vocab_size_divisible_by": 128,
    }
    names = {
        "wte": "embedding.word_embeddings",
        "wpe": "embedding.position_embeddings",
        "ln_f": "decoder.final_layernorm" if mcore else "encoder.final_layernorm",
    }
    start = "model" if mcore else CLASSIC
    tensors = {}
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            if f"transformer.{theirs}.{kind}" in state:
                tensors[f"{start}.{ours}.{kind}"] = state[f"transformer.{theirs}.{kind}"]
    word = f"{start}.embedding.word_embeddings.weight"
    tensors[word] = torch.cat([tensors[word], torch.full((pad, c.n_embd), 7.0)])
    layer_names = MCORE if mcore else OLD
    for i in range(c.n_layer):
        for theirs, ours in {
            "ln_1": "norm1", "attn.c_attn": "qkv", "attn.c_proj": "o",
            "ln_2": "norm2", "mlp.c_fc": "up", "mlp.c_proj": "down",
        }.items():  # fmt: skip
            for kind in ("weight", "bias"):
                tensor = state[f"transformer.h.{i}.{theirs}.{kind}"]
                tensor = tensor.t() if tensor.ndim > 1 else tensor
                if ours == "qkv" and not legacy:
                    tensor = woven(*tensor.chunk(3), groups=c.n_head)
                tensors[layer_names[ours].format(i=i, kind=kind)] = tensor.contiguous()
    return config, tensors


_OLD = CLASSIC + ".encoder.layers.{i}."
OLD = {
    "norm1": _OLD + "input_layernorm.{kind}",
    "qkv": _OLD + "self_attention.query_key_value.{kind}",
    "o": _OLD + "self_attention.dense.{kind}",
    "norm2": _OLD + "post_attention_layernorm.{kind}",
    "up": _OLD + "mlp.dense_h_to_4h.{kind}",
    "down": _OLD + "mlp.dense_4h_to_h.{kind}",
}
_NEW = "model.decoder.layers.{i}."
MCORE = {
    "norm1": _NEW + "self_attention.linear_qkv.layer_norm_{kind}",
    "qkv": _NEW + "self_attention.linear_qkv.{kind}",
    "o": _NEW + "self_attention.linear_proj.{kind}",
    "norm2": _NEW + "mlp.linear_fc1.layer_norm_{kind}",
    "up": _NEW + "mlp.linear_fc1.{kind}",
    "down": _NEW + "mlp.linear_fc2.{kind}",
}


def of_llama(model: Any, mcore: bool = False, split: bool = False, apart: bool = False) -> tuple:
    """A LlamaForCausalLM -> (config, tensors).

    `split`: gate and up are two tensors (classic names). `apart`: mcore's norms are modules of
    their own, as without Transformer Engine.
    """
    c, state = model.config, {k: v.detach() for k, v in model.state_dict().items()}
    config = {
        "mcore_gpt": mcore,
        "num_layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "ffn_hidden_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads,
        "num_query_groups": c.num_key_value_heads,
        "kv_channels": None,
        "encoder_seq_length": c.max_position_embeddings,
        "max_position_embeddings": "${.encoder_seq_length}",
        "layernorm_epsilon": c.rms_norm_eps,
        "activation": "swiglu" if split else "fast-swiglu",
        "bias": False,
        "bias_activation_fusion": False,
        "normalization": "rmsnorm",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": False,
        "override_vocab_size": c.vocab_size,
    }
    start = "model" if mcore else CLASSIC
    inside = "decoder" if mcore else "encoder"
    tensors = {
        f"{start}.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        f"{start}.{inside}.final_layernorm.weight": state["model.norm.weight"],
        f"{start}.output_layer.weight": state["lm_head.weight"],
    }
    names = MCORE if mcore else OLD
    if apart:
        norms = {
            "norm1": _NEW + "input_layernorm.{kind}",
            "norm2": _NEW + "pre_mlp_layernorm.{kind}",
        }
        names = {**MCORE, **norms}
    for i in range(c.num_hidden_layers):
        layer = {k.split(f"layers.{i}.")[1]: v for k, v in state.items() if f".layers.{i}." in k}
        q, k, v = (layer[f"self_attn.{n}_proj.weight"] for n in "qkv")
        gate, up = layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]
        made = {
            "norm1": layer["input_layernorm.weight"],
            "qkv": woven(q, k, v, c.num_key_value_heads),
            "o": layer["self_attn.o_proj.weight"],
            "norm2": layer["post_attention_layernorm.weight"],
            "up": gate if split else torch.cat([gate, up]),
            "down": layer["mlp.down_proj.weight"],
        }
        for name, tensor in made.items():
            tensors[names[name].format(i=i, kind="weight")] = tensor
        if split:
            tensors[f"{CLASSIC}.encoder.layers.{i}.mlp.dense_h_to_4h_2.weight"] = up
    return config, tensors


def of_t5(model: Any, native: bool = False) -> tuple:
    """A T5ForConditionalGeneration (v1.1, gated) -> (config, tensors).

    `native`: queries, keys and values woven head by head as NeMo's own training leaves them, not
    one after the other as its conversion from Hugging Face does.
    """
    c, state = model.config, {k: v.detach() for k, v in model.state_dict().items()}
    half = {
        "num_layers": c.num_layers,
        "hidden_size": c.d_model,
        "ffn_hidden_size": c.d_ff,
        "num_attention_heads": c.num_heads,
        "kv_channels": c.d_kv,
        "layernorm_epsilon": c.layer_norm_epsilon,
        "normalization": "rmsnorm",
        "bias": False,
        "bias_activation_fusion": False,
        "activation": "geglu",
        "openai_gelu": True,
        "arch": "transformer",
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": c.relative_attention_num_buckets,
        "relative_attention_max_distance": c.relative_attention_max_distance,
        "relative_position_bias_self_attention_only": True,
        "normalize_attention_scores": False,
        "megatron_legacy": not native,
        "headscale": False,
        "transformer_block_type": "pre_ln",
    }
    config = {
        "encoder": half,
        "decoder": {**half, "num_layers": c.num_decoder_layers},
        "seq_length": 64,
        "max_position_embeddings": 64,
        "share_token_embeddings": True,
        "share_decoder_tokens_head_embeddings": False,
        "tokens_head_bias": False,
        "make_vocab_size_divisible_by": 1,
    }
    tensors = {
        "enc_dec_model.encoder_embedding.word_embeddings.weight": state["shared.weight"],
        "enc_dec_model.decoder_embedding.word_embeddings.weight": state["shared.weight"],
        "enc_dec_model.tokens_head.weight": state["lm_head.weight"],
    }
    for side, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        start = f"enc_dec_model.enc_dec_model.{side}.model"
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        place = f"enc_dec_model.{side}_relative_position_embedding.relative_position_embedding"
        tensors[f"{place}.weight"] = state[relative]
        tensors[f"{start}.final_layernorm.weight"] = state[f"{side}.final_layer_norm.weight"]
        for i in range(layers):
            tensors |= _t5_layer(state, side, i, c.num_heads, native)
    return config, tensors


def _t5_layer(state: Tensors, side: str, i: int, heads: int, native: bool) -> Tensors:
    at, ours = f"{side}.block.{i}.layer", f"enc_dec_model.enc_dec_model.{side}.model.layers.{i}"
    q, k, v = (state[f"{at}.0.SelfAttention.{n}.weight"] for n in "qkv")
    made = {
        "input_layernorm": state[f"{at}.0.layer_norm.weight"],
        "self_attention.query_key_value": woven(q, k, v, heads if native else 1),
        "self_attention.dense": state[f"{at}.0.SelfAttention.o.weight"],
        "post_attention_layernorm": state[f"{at}.1.layer_norm.weight"],
    }
    mlp = f"{at}.1"
    if side == "decoder":
        mlp, cross = f"{at}.2", f"{at}.1.EncDecAttention"
        k, v = state[f"{cross}.k.weight"], state[f"{cross}.v.weight"]
        made |= {
            "inter_attention.query": state[f"{cross}.q.weight"],
            "inter_attention.key_value": woven(k, v, v[:0], heads if native else 1),
            "inter_attention.dense": state[f"{cross}.o.weight"],
            "post_inter_attention_layernorm": state[f"{mlp}.layer_norm.weight"],
        }
    dense = f"{mlp}.DenseReluDense"
    made |= {
        "mlp.dense_h_to_4h": state[f"{dense}.wi_0.weight"],
        "mlp.dense_h_to_4h_2": state[f"{dense}.wi_1.weight"],
        "mlp.dense_4h_to_h": state[f"{dense}.wo.weight"],
    }
    return {f"{ours}.{name}.weight": tensor for name, tensor in made.items()}


# ---- forms


def lay_out(
    path: Path,
    config: dict,
    tensors: Tensors,
    tp: int = 1,
    pp: int = 1,
    form: str = "tar",
    distributed: str | None = None,
    artifacts: dict[str, bytes] | None = None,
    o2: bool = False,
) -> Path:
    """Writes a checkpoint and returns its path.

    Args:
        tp, pp: tensor- and pipeline-parallel ranks.
        form: `tar`, `gzip`, or `folder` (unpacked).
        distributed: `torch_dist` or `zarr`: the stacked form, its chunks cut as `tp` and `pp` say.
        artifacts: further members, such as a tokenizer's files.
        o2: names get the `module.` of NeMo's half-precision wrapper.
    """
    if o2:
        tensors = {name.replace(".", ".module.", 1): value for name, value in tensors.items()}
    members = {"model_config.yaml": yaml.safe_dump(config).encode(), **(artifacts or {})}
    if distributed == "torch_dist":
        members |= _torch_dist(_stacked(tensors), config, tp, pp)
    elif distributed == "zarr":
        members |= _zarr(_stacked(tensors), config, tp, pp)
    else:
        for stage in range(pp):
            for rank in range(tp):
                place = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/" if pp > 1 else ""
                place = f"mp_rank_{rank:02d}/" if pp == 1 and tp > 1 else place
                own = _stage(tensors, stage, pp)
                own = {n: _cut(n, t, config, tp)[rank].clone() for n, t in own.items()}
                content = io.BytesIO()
                torch.save(own, content)
                members[f"{place}model_weights.ckpt"] = content.getvalue()
    if form == "folder":
        for name, content in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path
    with tarfile.open(path, "w:gz" if form == "gzip" else "w") as tar:
        top = tarfile.TarInfo("./")
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _stage(tensors: Tensors, stage: int, stages: int) -> Tensors:
    """A stage's tensors: its layers, counted from 0, and what its end of the model holds.

    A T5's encoder lies on the first half of the stages, its decoder on the second.
    """
    own = {}
    for name, tensor in tensors.items():
        first, last, side = 0, stages, re.search(r"\b(encoder|decoder)\.model\.", name)
        t5 = name.startswith("enc_dec_model")
        if t5 and stages > 1:
            second = ".decoder.model." in name or "decoder_" in name or "tokens_head" in name
            first, last = (stages // 2, stages) if second else (0, stages // 2)
        layer = re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name)
        if layer:
            count = 1 + max(int(m[2]) for m in _layers(tensors, layer[1]))
            assert count % (last - first) == 0
            each = count // (last - first)
            if first + int(layer[2]) // each == stage:
                own[f"{layer[1]}{int(layer[2]) % each}{layer[3]}"] = tensor
        elif "final_layernorm" in name or "output_layer" in name or "tokens_head" in name:
            if stage == last - 1:
                own[name] = tensor
        elif "relative_position" in name or (t5 and side is None and "embedding" in name):
            if first <= stage < last:  # other stages than the first hold zeros
                own[name] = tensor if stage == first else torch.zeros_like(tensor)
        elif stage == first:
            own[name] = tensor
    if stage == stages - 1 and stages > 1 and f"{CLASSIC}.output_layer.weight" not in tensors:
        word = f"{CLASSIC}.embedding.word_embeddings.weight"
        if word in tensors:  # the tied output's own copy
            own["model.word_embeddings.weight"] = tensors[word]
    return own


def _layers(tensors: Tensors, start: str) -> list:
    pattern = re.compile(rf"({re.escape(start)})(\d+)\..*")
    return [match for name in tensors if (match := pattern.fullmatch(name))]


def _cut(name: str, tensor: Tensor, config: dict, tp: int) -> list[Tensor]:
    """The shares of tensor-parallel ranks."""
    section = config.get("encoder", config)
    module, kind = name.split(".")[-2:]
    if module in ("dense", "dense_4h_to_h", "linear_proj", "linear_fc2"):
        return list(tensor.chunk(tp, 1)) if kind == "weight" else [tensor] * tp
    if kind.startswith("layer_norm"):
        return [tensor] * tp
    runs = [tensor]
    if module in ("query_key_value", "key_value") and section.get("megatron_legacy"):
        runs = list(tensor.chunk(3 if module == "query_key_value" else 2))
    elif module in ("dense_h_to_4h", "linear_fc1") and section["activation"].startswith("fast"):
        runs = list(tensor.chunk(2))
    elif module not in (
        "query_key_value",
        "key_value",
        "query",
        "linear_qkv",
        "dense_h_to_4h",
        "dense_h_to_4h_2",
        "linear_fc1",
        "word_embeddings",
        "output_layer",
        "tokens_head",
    ):
        return [tensor] * tp
    return [torch.cat([run.chunk(tp)[rank] for run in runs]) for rank in range(tp)]


def _stacked(tensors: Tensors) -> Tensors:
    """Layers of one name stacked, as mcore's distributed checkpoints hold them."""
    stacks: dict[str, dict[int, Tensor]] = {}
    result = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"(.*\.layers\.)(\d+)\.(.*)", name)
        if layer:
            stacks.setdefault(layer[1] + layer[3], {})[int(layer[2])] = tensor
        else:
            result[name] = tensor
    for name, layers in stacks.items():
        result[name] = torch.stack([layers[i] for i in range(len(layers))])
    return result


def _pieces(name: str, tensor: Tensor, config: dict, tp: int, pp: int) -> list:
    """(offsets, piece) of the chunks that tp x pp ranks write."""
    stacked = ".layers." in name
    layers = tensor.chunk(pp) if stacked else [tensor]
    row = name.split(".")[-2] in ("linear_proj", "linear_fc2") and name.endswith("weight")
    axis = (1 if row else 0) + (1 if stacked else 0)
    split = _cut(name, tensor[0] if stacked else tensor, config, tp)[0].shape != (
        tensor.shape[1:] if stacked else tensor.shape
    )
    pieces, first = [], 0
    for part in layers:
        offset = 0
        for piece in part.chunk(tp, axis) if split else [part]:
            offsets = [0] * tensor.ndim
            offsets[0] += first if stacked else 0
            offsets[axis if split else 0] += offset
            pieces.append((tuple(offsets), piece))
            offset += piece.shape[axis] if split else 0
        first += len(part)
    return pieces


def _torch_dist(tensors: Tensors, config: dict, tp: int, pp: int) -> dict[str, bytes]:
    """Torch's distributed checkpoint: `.metadata`, and files of saved chunks end to end."""
    files = [io.BytesIO(), io.BytesIO()]
    described, places = {}, {}
    for name, tensor in tensors.items():
        chunks = []
        for number, (offsets, piece) in enumerate(_pieces(name, tensor, config, tp, pp)):
            file = number % 2
            start = files[file].tell()
            torch.save(piece.clone(), files[file])
            length = files[file].tell() - start
            index = MetadataIndex(name, torch.Size(offsets), number)
            places[index] = _StorageInfo(f"__{file}_0.distcp", start, length)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        properties = TensorProperties(dtype=tensor.dtype)
        described[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    metadata = Metadata(state_dict_metadata=described, planner_data=None, storage_data=places)
    members = {f"model_weights/__{n}_0.distcp": file.getvalue() for n, file in enumerate(files)}
    marker = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()
    return {
        **members,
        "model_weights/.metadata": pickle.dumps(metadata),
        "model_weights/metadata.json": marker,
    }


def _zarr(tensors: Tensors, config: dict, tp: int, pp: int) -> dict[str, bytes]:
    """A zarr array for each tensor; Megatron's chunks are what one rank holds."""
    kinds = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "bfloat16"}
    members = {"model_weights/metadata.json": b'{"sharded_backend": "zarr"}'}
    for name, tensor in tensors.items():
        pieces = _pieces(name, tensor, config, tp, pp)
        size = list(pieces[0][1].shape)
        described = {
            "chunks": size, "compressor": None, "dtype": kinds[tensor.dtype], "fill_value": None,
            "filters": None, "order": "C", "shape": list(tensor.shape), "zarr_format": 2,
        }  # fmt: skip
        members[f"model_weights/{name}/.zarray"] = json.dumps(described).encode()
        for offsets, piece in pieces:
            place = ".".join(str(o // n) for o, n in zip(offsets, size, strict=True))
            content = piece.contiguous().view(torch.uint8).numpy().tobytes()
            members[f"model_weights/{name}/{place}"] = content
    return members
