"""`.nemo` files: laid out by hand from models of transformers, and written by us and read again."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from graftwerk.checkpoints import nemo
from graftwerk.checkpoints.base import load_base, open_checkpoint, save_base
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig, build_model
from graftwerk.models.config import RotaryScaling
from tests.graftwerk import nemo_files
from tests.graftwerk.tiny import shake, tiny_gpt, tokens

ROPE = {"max_position_embeddings": 64, "vocab_size": 60, "hidden_size": 32}


def make(config, kind=hf.AutoModelForCausalLM):
    torch.manual_seed(0)
    model = kind.from_config(config)
    shake(model)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2():
    return make(hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=64))


@pytest.fixture(scope="module")
def llama():
    return make(
        hf.LlamaConfig(
            **ROPE,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
        )
    )


@pytest.fixture(scope="module")
def t5():
    config = hf.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=4, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    return make(config, hf.AutoModelForSeq2SeqLM)


IDS = tokens(vocabulary=60)


def assert_same_logits(path: Path, theirs) -> None:
    ours = load_base(path)
    with torch.no_grad():
        if theirs.config.is_encoder_decoder:
            source = tokens(length=9, vocabulary=60, seed=1)
            expected = theirs(input_ids=source, decoder_input_ids=IDS).logits
            found = ours(IDS, source=source)
        else:
            expected, found = theirs(IDS).logits, ours(IDS)
    assert found.shape == expected.shape
    scale = max(1.0, expected.std().item())
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=1e-5)


SHARDS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("tp", "pp"), SHARDS)
@pytest.mark.parametrize("how", [{}, {"mcore": True}, {"legacy": True}], ids=str)
def test_gpt2_in_every_layout_gives_the_logits_of_transformers(gpt2, tmp_path, how, tp, pp):
    made = nemo_files.of_gpt2(gpt2, **how)
    assert_same_logits(nemo_files.lay_out(tmp_path / "m.nemo", *made, tp=tp, pp=pp), gpt2)


@pytest.mark.parametrize(("tp", "pp"), SHARDS)
@pytest.mark.parametrize(
    "how", [{}, {"split": True}, {"mcore": True}, {"mcore": True, "apart": True}], ids=str
)
def test_llama_in_every_layout_gives_the_logits_of_transformers(llama, tmp_path, how, tp, pp):
    made = nemo_files.of_llama(llama, **how)
    assert_same_logits(nemo_files.lay_out(tmp_path / "m.nemo", *made, tp=tp, pp=pp), llama)


@pytest.mark.parametrize(("tp", "pp"), SHARDS)
@pytest.mark.parametrize("native", [False, True])
def test_t5_in_every_layout_gives_the_logits_of_transformers(t5, tmp_path, native, tp, pp):
    made = nemo_files.of_t5(t5, native=native)
    assert_same_logits(nemo_files.lay_out(tmp_path / "m.nemo", *made, tp=tp, pp=pp), t5)


def test_keys_that_the_tensors_explain_may_be_left_out(t5, llama, tmp_path):
    config, tensors = nemo_files.of_t5(t5)
    for key in ("tokens_head_bias", "share_decoder_tokens_head_embeddings"):
        del config[key]
    config = {**config, **{side: dict(config[side]) for side in ("encoder", "decoder")}}
    for side in ("encoder", "decoder"):
        del config[side]["megatron_legacy"]
    assert_same_logits(nemo_files.lay_out(tmp_path / "t5.nemo", config, tensors), t5)
    config, tensors = nemo_files.of_llama(llama)
    del config["share_embeddings_and_output_weights"]
    assert_same_logits(nemo_files.lay_out(tmp_path / "llama.nemo", config, tensors), llama)


@pytest.mark.parametrize("kind", ["torch_dist", "zarr"])
@pytest.mark.parametrize(("tp", "pp"), SHARDS)
@pytest.mark.parametrize("form", ["tar", "folder"])
def test_stacked_layers_in_chunks_are_put_together(llama, tmp_path, kind, tp, pp, form):
    made = nemo_files.of_llama(llama, mcore=True)
    path = tmp_path / "m.nemo"
    nemo_files.lay_out(path, *made, tp=tp, pp=pp, distributed=kind, form=form)
    assert_same_logits(path, llama)


@pytest.mark.parametrize("form", ["gzip", "folder"])
def test_gzip_and_unpacked_folders_are_read(gpt2, tmp_path, form):
    made = nemo_files.of_gpt2(gpt2)
    path = nemo_files.lay_out(tmp_path / "m.nemo", *made, tp=2, pp=2, form=form)
    assert_same_logits(path, gpt2)


@pytest.mark.parametrize("mcore", [False, True])
def test_names_of_the_half_precision_wrapper_are_known(llama, tmp_path, mcore):
    made = nemo_files.of_llama(llama, mcore=mcore)
    assert_same_logits(nemo_files.lay_out(tmp_path / "m.nemo", *made, pp=2, o2=True), llama)


def test_bfloat16_zarr_is_what_megatron_writes(llama, tmp_path):
    config, tensors = nemo_files.of_llama(llama, mcore=True)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    nemo_files.lay_out(tmp_path / "m.nemo", config, half, distributed="zarr", pp=2)
    model = load_base(tmp_path / "m.nemo", dtype=torch.bfloat16)
    name = "model.decoder.layers.3.mlp.linear_fc2.weight"
    assert torch.equal(model.get_parameter("decoder.layers.3.mlp.linear_fc2.weight"), half[name])


# ---- native T5: learned positions, layer norms, biases; no model of transformers is like it


def reference_t5(config, tensors, source, target):
    """NeMo's forward pass in a few lines, on its own names."""
    half, heads = config["encoder"], config["encoder"]["num_attention_heads"]

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"],
                            half["layernorm_epsilon"])  # fmt: skip

    def attend(q, k, v, causal=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    def embed(ids):
        at = "enc_dec_model.encoder_embedding"
        places = tensors[f"{at}.position_embeddings.weight"][: ids.shape[1]]
        return tensors[f"{at}.word_embeddings.weight"][ids] + places

    def run(x, side, states=None):
        for i in range(config[side]["num_layers"]):
            at = f"enc_dec_model.enc_dec_model.{side}.model.layers.{i}"
            mixed = linear(norm(x, f"{at}.input_layernorm"), f"{at}.self_attention.query_key_value")
            q, k, v = mixed.unflatten(-1, (heads, -1)).chunk(3, -1)
            attended = attend(q, k, v, states is not None)
            x = x + linear(attended, f"{at}.self_attention.dense")
            normed = norm(x, f"{at}.post_attention_layernorm")
            if states is not None:
                q = linear(normed, f"{at}.inter_attention.query").unflatten(-1, (heads, -1))
                mixed = linear(states, f"{at}.inter_attention.key_value")
                k, v = mixed.unflatten(-1, (heads, -1)).chunk(2, -1)
                x = x + linear(attend(q, k, v), f"{at}.inter_attention.dense")
                normed = norm(x, f"{at}.post_inter_attention_layernorm")
            inner = F.gelu(linear(normed, f"{at}.mlp.dense_h_to_4h"), approximate="tanh")
            x = x + linear(inner, f"{at}.mlp.dense_4h_to_h")
        return norm(x, f"enc_dec_model.enc_dec_model.{side}.model.final_layernorm")

    hidden = run(embed(target), "decoder", run(embed(source), "encoder"))
    words = tensors["enc_dec_model.encoder_embedding.word_embeddings.weight"]
    return F.linear(hidden, words, tensors["enc_dec_model.tokens_head.bias"])


def native_t5(layers: int = 2) -> tuple:
    generator, size, inner, vocabulary = torch.Generator().manual_seed(0), 32, 48, 60
    half = {
        "num_layers": layers, "hidden_size": size, "ffn_hidden_size": "${multiply:3, 16}",
        "num_attention_heads": 4, "activation": "gelu", "bias_activation_fusion": True,
        "position_embedding_type": "learned_absolute", "layernorm_epsilon": 1e-5,
        "normalization": "layernorm", "arch": "transformer",
    }  # fmt: skip
    half["ffn_hidden_size"] = inner
    config = {"encoder": half, "decoder": half, "max_position_embeddings": 16}
    shapes = {}
    for side in ("encoder", "decoder"):
        at = f"enc_dec_model.enc_dec_model.{side}.model"
        shapes[f"{at}.final_layernorm"] = [size]
        for i in range(layers):
            shapes |= {
                f"{at}.layers.{i}.input_layernorm": [size],
                f"{at}.layers.{i}.self_attention.query_key_value": [3 * size, size],
                f"{at}.layers.{i}.self_attention.dense": [size, size],
                f"{at}.layers.{i}.post_attention_layernorm": [size],
                f"{at}.layers.{i}.mlp.dense_h_to_4h": [inner, size],
                f"{at}.layers.{i}.mlp.dense_4h_to_h": [size, inner],
            }
            if side == "decoder":
                shapes |= {
                    f"{at}.layers.{i}.inter_attention.query": [size, size],
                    f"{at}.layers.{i}.inter_attention.key_value": [2 * size, size],
                    f"{at}.layers.{i}.inter_attention.dense": [size, size],
                    f"{at}.layers.{i}.post_inter_attention_layernorm": [size],
                }
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        tensors[f"{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.2
    for side in ("encoder", "decoder"):
        at = f"enc_dec_model.{side}_embedding"
        generator.manual_seed(1)
        words = torch.randn(vocabulary, size, generator=generator)
        tensors[f"{at}.word_embeddings.weight"] = words
        places = torch.randn(16, size, generator=generator)
        tensors[f"{at}.position_embeddings.weight"] = places
    bias = torch.randn(vocabulary, generator=generator)
    tensors["enc_dec_model.tokens_head.bias"] = bias
    return config, tensors


@pytest.mark.parametrize(("tp", "pp"), SHARDS)
def test_a_t5_of_nemos_own_training_gives_the_logits_of_its_forward_pass(tmp_path, tp, pp):
    config, tensors = native_t5()
    nemo_files.lay_out(tmp_path / "m.nemo", config, tensors, tp=tp, pp=pp)
    source = tokens(length=9, vocabulary=60, seed=1)
    with torch.no_grad():
        found = load_base(tmp_path / "m.nemo")(IDS, source=source)
    expected = reference_t5(config, tensors, source, IDS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- vocabulary and tokenizer


def word_tokenizer(size: int) -> bytes:
    vocabulary = {f"w{n}": n for n in range(size)} | {"<unk>": size}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


def test_the_padded_vocabulary_is_cut_to_the_tokenizer_that_travels_along(gpt2, tmp_path):
    config, tensors = nemo_files.of_gpt2(gpt2, pad=68)
    config["tokenizer"] = {"library": "huggingface", "model": "nemo:abc_tokenizer.json"}
    artifacts = {"abc_tokenizer.json": word_tokenizer(59)}
    nemo_files.lay_out(tmp_path / "m.nemo", config, tensors, tp=2, artifacts=artifacts)
    assert_same_logits(tmp_path / "m.nemo", gpt2)
    assert nemo.load_tokenizer(tmp_path / "m.nemo")("w3 w5")["input_ids"] == [3, 5]


def test_the_padded_vocabulary_is_cut_to_override_vocab_size(gpt2, tmp_path):
    config, tensors = nemo_files.of_gpt2(gpt2, pad=4)
    config["override_vocab_size"] = 60
    assert_same_logits(nemo_files.lay_out(tmp_path / "m.nemo", config, tensors), gpt2)


def test_padding_that_nothing_explains_is_kept(gpt2, tmp_path):
    made = nemo_files.of_gpt2(gpt2, pad=68)
    with open_checkpoint(nemo_files.lay_out(tmp_path / "m.nemo", *made)) as checkpoint:
        assert checkpoint.config.vocab_size == 128


def test_gpt2_vocabulary_and_merges_under_any_name_are_the_tokenizer(gpt2, tmp_path, shared):
    theirs = shared / "data" / "models" / "gpt2_tokenizer"
    config, tensors = nemo_files.of_gpt2(gpt2)
    config["tokenizer"] = {
        "library": "megatron",
        "type": "GPT2BPETokenizer",
        "vocab_file": "nemo:0f_gpt2-vocab.json",
        "merge_file": "nemo:0f_gpt2-merges.txt",
    }
    artifacts = {
        "0f_gpt2-vocab.json": (theirs / "vocab.json").read_bytes(),
        "0f_gpt2-merges.txt": (theirs / "vocab.bpe").read_bytes(),
    }
    nemo_files.lay_out(tmp_path / "m.nemo", config, tensors, artifacts=artifacts)
    tokenizer = nemo.load_tokenizer(tmp_path / "m.nemo")
    text = "Grafts of adapters, 345 of them."
    assert tokenizer(text)["input_ids"] == hf.AutoTokenizer.from_pretrained(theirs)(text).input_ids


def test_word_pieces_of_a_native_t5_are_its_tokenizer(tmp_path):
    config, tensors = native_t5()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Graft", "graft", "##s"]
    words += [f"w{n}" for n in range(50)]  # 58, and two sentinels behind them: 60 rows
    config["tokenizer"] = {
        "library": "megatron",
        "type": "BertWordPieceCase",
        "vocab_file": "nemo:0f_vocab.txt",
        "num_sentinel_tokens": 2,
    }
    config["make_vocab_size_divisible_by"] = 4
    artifacts = {"0f_vocab.txt": "\n".join(words).encode()}
    path = nemo_files.lay_out(tmp_path / "m.nemo", config, tensors, artifacts=artifacts)
    tokenizer = nemo.load_tokenizer(path)
    assert tokenizer.encode("Grafts graft w7", add_special_tokens=False) == [5, 7, 6, 15]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, 0)
    assert tokenizer.encode("<extra_id_1>", add_special_tokens=False) == [59]
    assert len(tokenizer) == load_base(path).config.vocab_size == 60
    assert load_base(path).config.decoder_start_token_id == 2
    config["tokenizer"]["type"] = "BertWordPieceLowerCase"
    nemo_files.lay_out(path, config, tensors, artifacts=artifacts)
    lower = nemo.load_tokenizer(path)
    assert lower.encode("Grafts", add_special_tokens=False) == [6, 7]


def test_a_file_without_a_tokenizer_says_so(gpt2, tmp_path):
    config, tensors = nemo_files.of_gpt2(gpt2)
    config["tokenizer"] = {"library": "huggingface", "type": "gpt2"}
    path = nemo_files.lay_out(tmp_path / "m.nemo", config, tensors)
    with pytest.raises(UserError, match="names 'gpt2', which does not travel in it"):
        nemo.load_tokenizer(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer is None


# ---- what cannot be honoured, and what is missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headscale": True}, "headscale=True cannot be honoured"),
        ({"transformer_block_type": "normformer"}, "transformer_block_type='normformer'"),
        ({"num_moe_experts": 8}, "num_moe_experts=8"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
        ({"activation": "mish"}, "activation='mish'.*fast-swiglu"),
        ({"normalization": "batchnorm"}, "normalization='batchnorm'"),
        ({"hidden_size": None}, "hidden_size=None.*whole number"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"bias": "yes"}, "bias='yes'"),
        ({"num_layers": 40}, "num_layers=40 .* and 4 layers"),
        ({"num_layers": 10**12}, "num_layers=1000000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"name": "megatron_falcon_gpt"}, "name='megatron_falcon_gpt'"),
        ({"target": "nemo.x.MegatronBertModel"}, "only GPT and T5"),
        ({"window_size": [3, 3]}, "window_size="),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_key_that_cannot_be_honoured_is_refused_by_name(gpt2, tmp_path, change, message):
    config, tensors = nemo_files.of_gpt2(gpt2)
    path = nemo_files.lay_out(tmp_path / "m.nemo", config | change, tensors)
    with pytest.raises(UserError, match=message):
        load_base(path)


def test_a_half_that_differs_is_refused_by_its_key(t5, tmp_path):
    config, tensors = nemo_files.of_t5(t5)
    config["decoder"] = {**config["decoder"], "ffn_hidden_size": 50}
    path = nemo_files.lay_out(tmp_path / "m.nemo", config, tensors)
    with pytest.raises(UserError, match=r"decoder.ffn_hidden_size=50 .* the encoder has 48"):
        load_base(path)


def test_a_missing_shard_is_named(gpt2, tmp_path):
    made = nemo_files.of_gpt2(gpt2)
    path = nemo_files.lay_out(tmp_path / "m", *made, tp=2, pp=2, form="folder")
    os.unlink(path / "tp_rank_01_pp_rank_000" / "model_weights.ckpt")
    with pytest.raises(UserError, match="tensor rank 1 and pipeline rank 0 is missing"):
        load_base(path)


def test_missing_tensors_are_named_with_the_nearest(gpt2, tmp_path):
    config, tensors = nemo_files.of_gpt2(gpt2)
    name = "model.language_model.encoder.layers.2.mlp.dense_h_to_4h.bias"
    tensors[name.replace("dense", "dence")] = tensors.pop(name)
    path = nemo_files.lay_out(tmp_path / "m.nemo", config, tensors)
    with pytest.raises(UserError, match=rf"missing {name} \(there is .*dence_h_to_4h"):
        load_base(path)


def test_an_adapter_is_no_base(tmp_path):
    name = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"
    path = nemo_files.lay_out(tmp_path / "m.nemo", {"peft": {}}, {name: torch.ones(2, 2)})
    with pytest.raises(UserError, match="holds an adapter, not a base"):
        load_base(path)


# ---- writing


def rotary_scalings():
    linear = st.builds(RotaryScaling, kind=st.just("linear"), factor=st.floats(1, 8))
    return st.one_of(
        st.none(), linear, st.builds(RotaryScaling, kind=st.just("llama3"), factor=st.just(8.0))
    )


@st.composite
def gpts(draw) -> tuple[TransformerConfig, bool]:
    """Any GPT that NeMo can say, and whether under mcore names."""
    mcore, rope = draw(st.booleans()), draw(st.booleans())
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    normalization = draw(st.sampled_from(["layernorm", "layernorm1p", "rmsnorm"]))
    bias = draw(st.booleans())
    post = not mcore and draw(st.booleans())
    config = TransformerConfig(
        vocab_size=draw(st.integers(1, 40)),
        num_layers=draw(st.integers(1, 3)),
        hidden_size=8 * draw(st.integers(1, 3)),
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 4)),
        ffn_hidden_size=draw(st.integers(1, 20)),
        max_position_embeddings=draw(st.integers(1, 20)),
        transformer_block_type="post_ln" if post else "pre_ln",
        final_layernorm=not post,
        normalization=normalization,
        layernorm_epsilon=draw(st.sampled_from([1e-5, 1e-6, 0.01])),
        activation=draw(
            st.sampled_from(
                ["gelu", "gelu_tanh", "squared_relu", "relu", "swiglu", "geglu", "geglu_tanh"]
            )
        ),
        bias=bias,
        qkv_bias=bias or (mcore and draw(st.booleans())),
        qk_layernorm=mcore and normalization == "rmsnorm" and draw(st.booleans()),
        normalize_attention_scores=draw(st.booleans()),
        window_size=draw(st.integers(0, 9)),
        position_embedding_type="rope" if rope else "learned_absolute",
        rotary_base=draw(st.sampled_from([10000.0, 500000.0])) if rope else 10000.0,
        rotary_percentage=draw(st.sampled_from([1.0, 0.5])) if rope else 1.0,
        rotary_interleaved=rope and draw(st.booleans()),
        rotary_scaling=draw(rotary_scalings()) if rope else None,
        share_embeddings_and_output_weights=draw(st.booleans()),
    )
    return config, mcore


@st.composite
def t5s(draw) -> tuple[TransformerConfig, bool]:
    """Any T5 that NeMo can say."""
    relative, bias = draw(st.booleans()), draw(st.booleans())
    heads, tied = draw(st.integers(1, 3)), draw(st.booleans())
    config = TransformerConfig(
        architecture="t5",
        vocab_size=draw(st.integers(1, 40)),
        num_layers=draw(st.integers(1, 2)),
        decoder_num_layers=draw(st.integers(1, 2)),
        hidden_size=8 * draw(st.integers(1, 2)),
        num_attention_heads=heads,
        kv_channels=2 * draw(st.integers(1, 4)),
        ffn_hidden_size=draw(st.integers(1, 20)),
        max_position_embeddings=0 if relative else draw(st.integers(1, 20)),
        normalization=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(["geglu_tanh", "swiglu", "gelu", "relu", "reglu"])),
        bias=bias,
        qkv_bias=bias,
        normalize_attention_scores=draw(st.booleans()),
        position_embedding_type="relative" if relative else "learned_absolute",
        relative_attention_num_buckets=draw(st.integers(4, 8)) if relative else 32,
        relative_attention_max_distance=20 if relative else 128,
        share_embeddings_and_output_weights=tied,
        output_bias=draw(st.booleans()),
        output_scale=draw(st.sampled_from([1.0, 0.25])) if tied else 1.0,
        decoder_start_token_id=draw(st.integers(0, 3)),
    )
    return config, False


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    made=st.one_of(gpts(), t5s()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_is_written_is_read_bit_for_bit(made, dtype, tmp_path_factory):
    config, mcore = made
    path = tmp_path_factory.mktemp("nemo") / "m.nemo"
    model = build_model(config).to(dtype)
    shake(model)
    weights = dict(model.named_parameters())
    variant = nemo.write_nemo(config, lambda name: weights[name], path, None, mcore)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.variant == variant
        assert checkpoint.source.names >= {n for e in checkpoint.table.values() for n in e.names}
    again = load_base(path, dtype=dtype)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert os.listdir(path.parent) == ["m.nemo"]


def test_written_names_and_orders_are_those_of_the_table(llama, t5, tmp_path):
    for how, made, mcore in (
        ("classic", nemo_files.of_llama(llama), False),
        ("mcore", nemo_files.of_llama(llama, mcore=True), True),
        ("t5", nemo_files.of_t5(t5), False),
    ):
        by_hand = nemo_files.lay_out(tmp_path / f"{how}.nemo", *made)
        model = load_base(by_hand)
        weights = dict(model.named_parameters())
        written = tmp_path / f"{how}-written.nemo"
        nemo.write_nemo(model.config, lambda name, w=weights: w[name], written, None, mcore)
        theirs = torch.load(_member(written), weights_only=True)
        assert theirs.keys() == made[1].keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in made[1].items())


def _member(path: Path, name: str = "./model_weights.ckpt"):
    import tarfile

    return tarfile.open(path).extractfile(name)


def test_the_tokenizer_travels_along(gpt2, tmp_path):
    tokenizer = build_tokenizer("word", ["one two three four five"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = load_base(nemo_files.lay_out(tmp_path / "a.nemo", *nemo_files.of_gpt2(gpt2)))
    weights = dict(model.named_parameters())
    path = tmp_path / "b.nemo"
    nemo.write_nemo(model.config, weights.__getitem__, path, tmp_path / "tokenizer", False)
    again = nemo.load_tokenizer(path)
    assert again("two five six")["input_ids"] == tokenizer("two five six")["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id
    values = yaml.safe_load(_member(path, "./model_config.yaml").read())
    assert all(name.startswith("nemo:") for name in values["tokenizer"]["files"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_residual": True}, "no key for parallel_residual=True"),
        ({"position_offset": 2}, "no key for position_offset=2"),
        ({"qkv_bias": False}, "no key for qkv_bias=False"),
        ({"architecture": "bert"}, "BERT is not written as .nemo"),
    ],
)
def test_what_nemo_has_no_key_for_is_refused_and_nothing_is_written(tmp_path, change, message):
    config = TransformerConfig(
        vocab_size=9, num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    config = replace(config, **change)
    with pytest.raises(UserError, match=message):
        nemo.write_nemo(config, lambda name: torch.zeros(1), tmp_path / "m.nemo", None, False)
    assert not os.listdir(tmp_path)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    config = TransformerConfig(
        vocab_size=10**9, num_layers=1, hidden_size=8 * 4096, num_attention_heads=2,
        ffn_hidden_size=8, max_position_embeddings=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="GB are to be written"):
        nemo.write_nemo(config, lambda name: torch.zeros(1), tmp_path / "m.nemo", None, False)
    assert not os.listdir(tmp_path)


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    config = TransformerConfig(
        vocab_size=9, num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    weights = dict(build_model(config).named_parameters())
    (tmp_path / "m.nemo").write_text("before")

    def read(name: str) -> torch.Tensor:
        if "fc2" in name:
            raise OSError("no space left")
        return weights[name]

    with pytest.raises(OSError, match="no space"):
        nemo.write_nemo(config, read, tmp_path / "m.nemo", None, False)
    assert os.listdir(tmp_path) == ["m.nemo"]
    assert (tmp_path / "m.nemo").read_text() == "before"


def test_our_own_folder_is_not_taken_for_nemos(tmp_path):
    save_base(tiny_gpt(), None, tmp_path / "ours")
    with open_checkpoint(tmp_path / "ours") as checkpoint:
        assert checkpoint.format == "graftwerk"
