"""NeMo's names of our parameters, and how tensor parallelism cut the tensors of these names."""

from dataclasses import dataclass

from graftwerk.checkpoints.layout import AS_IS, Entry, Heads, Reshape, Rows, Stacked, Table
from graftwerk.checkpoints.nemo_config import Layout
from graftwerk.models.config import TransformerConfig

CLASSIC = "model.language_model"
T5 = "enc_dec_model"


def nemo_table(config: TransformerConfig, layout: Layout) -> Table:
    """Where each parameter lies in a file of this layout."""
    if layout.variant == "t5":
        return _t5(config, layout)
    return _mcore(config, layout) if layout.variant == "mcore" else _classic(config, layout)


def is_no_weight(config: TransformerConfig):
    """Tells names of files that are no weights: buffers, states, copies of tied tensors."""
    tied = config.share_embeddings_and_output_weights
    copies = {f"{prefix}.word_embeddings.weight" for prefix in ("model", CLASSIC, T5)}
    if tied:
        copies |= {"model.output_layer.weight", f"{CLASSIC}.output_layer.weight"}

    def ignored(name: str) -> bool:
        return (
            name in copies
            or name.endswith(("rotary_pos_emb.inv_freq", "_extra_state"))
            or name.startswith((f"{T5}.decoder_embedding.", "optimizer."))
            or "._extra_state" in name
        )

    return ignored


def _entries(
    ours: str, *theirs: str, bias: bool = True, reshape: Reshape = AS_IS, join: str = "."
) -> Table:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {
        f"{ours}.{kind}": Entry(tuple(f"{name}{join}{kind}" for name in theirs), reshape)
        for kind in kinds
    }


def _vocabulary(config: TransformerConfig, layout: Layout) -> Reshape:
    return AS_IS if layout.rows == config.vocab_size else Rows(config.vocab_size, layout.rows)


def _learned(config: TransformerConfig) -> bool:
    return config.position_embedding_type == "learned_absolute"


def _classic(config: TransformerConfig, layout: Layout) -> Table:
    padded, embedding = _vocabulary(config, layout), f"{CLASSIC}.embedding"
    table = _entries(
        "embedding.word_embeddings",
        f"{embedding}.word_embeddings",
        bias=False,
        reshape=padded,
    )
    if _learned(config):
        theirs = f"{embedding}.position_embeddings"
        table |= _entries("embedding.position_embeddings", theirs, bias=False)
    encoder = f"{CLASSIC}.encoder"
    table |= _stack(config, layout, "decoder", encoder, config.num_layers)
    if not config.share_embeddings_and_output_weights:
        table |= _entries("output_layer", f"{CLASSIC}.output_layer", bias=False, reshape=padded)
    return table


def _t5(config: TransformerConfig, layout: Layout) -> Table:
    padded, embedding = _vocabulary(config, layout), f"{T5}.encoder_embedding"
    table = _entries(
        "embedding.word_embeddings", f"{embedding}.word_embeddings", bias=False, reshape=padded
    )
    if _learned(config):
        theirs = f"{embedding}.position_embeddings"
        table |= _entries("embedding.position_embeddings", theirs, bias=False)
    for side, count in (("encoder", config.num_layers), ("decoder", config.decoder_num_layers)):
        table |= _stack(config, layout, side, f"{T5}.{T5}.{side}.model", count)
        if config.position_embedding_type == "relative":
            theirs = f"{T5}.{side}_relative_position_embedding.relative_position_embedding"
            table |= _entries(f"{side}.relative_position", theirs, bias=False)
    if not config.share_embeddings_and_output_weights:
        table["output_layer.weight"] = Entry((f"{T5}.tokens_head.weight",), padded)
    if config.output_bias:
        table["output_layer.bias"] = Entry((f"{T5}.tokens_head.bias",), padded)
    return table


def _stack(config: TransformerConfig, layout: Layout, side: str, theirs: str, count: int) -> Table:
    """The layers of a GPT or of one half of a T5, under classic names."""
    norm_bias = config.normalization != "rmsnorm"
    table: Table = {}
    if config.final_layernorm:
        table = _entries(f"{side}.final_layernorm", f"{theirs}.final_layernorm", bias=norm_bias)
    for i in range(count):
        cross = config.architecture == "t5" and side == "decoder"
        table |= _layer(config, layout, f"{side}.layers.{i}", f"{theirs}.layers.{i}", cross)
    return table


def _layer(config: TransformerConfig, layout: Layout, ours: str, theirs: str, cross: bool) -> Table:
    qkv, key_value = heads_of(config, layout)
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    if config.transformer_block_type == "post_ln":
        norms = {
            "post_attention_layernorm": "input_layernorm",
            "post_mlp_layernorm": "post_attention_layernorm",
        }
    if cross:
        norms["pre_cross_attention_layernorm"] = "post_attention_layernorm"
        norms["pre_mlp_layernorm"] = "post_inter_attention_layernorm"
    table: Table = {}
    for our_norm, their_norm in norms.items():
        bias = config.normalization != "rmsnorm"
        table |= _entries(f"{ours}.{our_norm}", f"{theirs}.{their_norm}", bias=bias)
    own, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"
    inner = [f"{mlp}.dense_h_to_4h"] + [f"{mlp}.dense_h_to_4h_2"] * layout.split_glu
    modules: list[tuple[str, list[str], bool, Reshape]] = [
        ("self_attention.linear_qkv", [f"{own}.query_key_value"], config.qkv_bias, qkv),
        ("self_attention.linear_proj", [f"{own}.dense"], config.bias, AS_IS),
        ("mlp.linear_fc1", inner, bool(config.mlp_bias), Stacked(2) if inner[1:] else AS_IS),
        ("mlp.linear_fc2", [f"{mlp}.dense_4h_to_h"], bool(config.mlp_bias), AS_IS),
    ]
    if cross:
        across = f"{theirs}.inter_attention"
        modules += [
            ("cross_attention.linear_q", [f"{across}.query"], config.qkv_bias, AS_IS),
            ("cross_attention.linear_kv", [f"{across}.key_value"], config.qkv_bias, key_value),
            ("cross_attention.linear_proj", [f"{across}.dense"], config.bias, AS_IS),
        ]
    for name, files, bias, reshape in modules:
        table |= _entries(f"{ours}.{name}", *files, bias=bias, reshape=reshape)
    return table


def heads_of(config: TransformerConfig, layout: Layout) -> tuple[Reshape, Reshape]:
    """Reshapes of queries, keys and values, and of keys and values alone."""
    if not layout.legacy_qkv:
        return AS_IS, AS_IS
    groups, size = config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // groups
    return (
        Heads((per_group, 1, 1), groups, size, concatenated=True),
        Heads((1, 1), groups, size, concatenated=True),
    )


def _mcore(config: TransformerConfig, layout: Layout) -> Table:
    padded, norm_bias = _vocabulary(config, layout), config.normalization != "rmsnorm"
    table = _entries(
        "embedding.word_embeddings", "model.embedding.word_embeddings", bias=False, reshape=padded
    )
    if _learned(config):
        theirs = "model.embedding.position_embeddings"
        table |= _entries("embedding.position_embeddings", theirs, bias=False)
    table |= _entries("decoder.final_layernorm", "model.decoder.final_layernorm", bias=norm_bias)
    for i in range(config.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.decoder.layers.{i}"
        own, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"
        norms = ((f"{own}.linear_qkv.layer_norm", "_"), (f"{mlp}.linear_fc1.layer_norm", "_"))
        if layout.norms_apart:
            norms = ((f"{theirs}.input_layernorm", "."), (f"{theirs}.pre_mlp_layernorm", "."))
        for name, (norm, join) in zip(("input_layernorm", "pre_mlp_layernorm"), norms, strict=True):
            table |= _entries(f"{ours}.{name}", norm, bias=norm_bias, join=join)
        for name, bias in (
            ("self_attention.linear_qkv", config.qkv_bias),
            ("self_attention.linear_proj", config.bias),
            ("mlp.linear_fc1", config.bias),
            ("mlp.linear_fc2", config.bias),
        ):
            table |= _entries(f"{ours}.{name}", f"{theirs}.{name}", bias=bias)
        if config.qk_layernorm:
            for name in ("query", "key"):
                theirs_norm = f"{own}.{name[0]}_layernorm"
                ours_norm = f"{ours}.self_attention.{name}_layernorm"
                table |= _entries(ours_norm, theirs_norm, bias=False)
    if not config.share_embeddings_and_output_weights:
        table |= _entries("output_layer", "model.output_layer", bias=False, reshape=padded)
    return table


@dataclass(frozen=True)
class Split:
    """How tensor parallelism cut a tensor: along `dimension`, each run of it over all ranks.

    `runs` are the relative sizes of parts that each rank holds one after the other: gate and up.
    """

    dimension: int
    runs: tuple[int, ...] = (1,)


COLUMNS = (
    "word_embeddings",
    "output_layer",
    "tokens_head",
    "query_key_value",
    "key_value",
    "query",
    "linear_qkv",
    "dense_h_to_4h",
    "dense_h_to_4h_2",
    "linear_fc1",
)
ROWS = ("dense", "dense_4h_to_h", "linear_proj", "linear_fc2")


def split_of(name: str, config: TransformerConfig, layout: Layout) -> Split | None:
    """How a tensor of NeMo's is cut over tensor-parallel ranks; None: each rank has all of it."""
    module, _, kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    if kind == "weight" and module in ROWS:
        return Split(1)
    if module not in COLUMNS or kind not in ("weight", "bias"):
        return None
    if layout.legacy_qkv and module == "query_key_value":
        return Split(0, (config.num_attention_heads, *[config.num_query_groups] * 2))
    if layout.legacy_qkv and module == "key_value":
        return Split(0, (1, 1))
    if config.gated and not layout.split_glu and module in ("dense_h_to_4h", "linear_fc1"):
        return Split(0, (1, 1))
    return Split(0)
