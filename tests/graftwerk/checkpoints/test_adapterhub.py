"""Reading and writing AdapterHub's folders: names, settings, what is refused, and what is kept."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwerk.adapters.composition import Average, BatchSplit, Fuse, Parallel, Stack
from graftwerk.adapters.configs import (
    BnConfig,
    BottleneckConfig,
    HubLoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    UnionConfig,
)
from graftwerk.adapters.merge import merge
from graftwerk.checkpoints import load_adapter
from graftwerk.checkpoints.adapterhub import (
    About,
    load_adapterhub,
    load_adapterhub_setup,
    save_adapterhub,
    save_adapterhub_setup,
)
from graftwerk.checkpoints.adapterhub_config import hub_config, method_of
from graftwerk.checkpoints.adapterhub_files import read_adapterhub, setup_dict, setup_of
from graftwerk.checkpoints.adapterhub_heads import numbered
from graftwerk.checkpoints.peft import save_peft
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, TransformerConfig, build_model

SIZES = {
    "vocab_size": 40,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 24,
    "max_position_embeddings": 32,
}
LLAMA = {
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "qkv_bias": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
}
T5_SHAPE = {
    "architecture": "t5",
    "normalization": "rmsnorm",
    "activation": "relu",
    "bias": False,
    "qkv_bias": False,
    "position_embedding_type": "relative",
    "normalize_attention_scores": False,
    "max_position_embeddings": 0,
    "output_scale": 16**-0.5,
    "layernorm_epsilon": 1e-6,
}
SEQ_BN = BnConfig(reduction_factor=4, original_ln_before=True)


def tiny(**shape) -> GPT | T5 | BERT:
    torch.manual_seed(0)
    return build_model(TransformerConfig(**{**SIZES, **shape})).eval()


def saved(model, method, folder: Path, name="a", **about) -> dict[str, torch.Tensor]:
    """Adds an adapter with random weights, writes it, and returns the file's tensors."""
    model.add_adapter(name, method)
    for value in model.adapter_state(name).values():
        value.normal_(std=0.1)
    save_adapterhub(model, name, folder, About(**about), safetensors=True)
    return load_file(folder / "adapter.safetensors")


def edited(folder: Path, **changes) -> Path:
    """Changes the top keys of `adapter_config.json`; under `config` those of the configuration."""
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    config = changes.pop("config", {})
    values["config"] = {**values["config"], **config}
    path.write_text(json.dumps({**values, **changes}))
    return folder


# ---- names


def test_gpt2s_fused_projection_holds_the_parts_of_its_slots_in_blocks(tmp_path):
    model = tiny()
    file = saved(model, HubLoRAConfig(places=("query", "value"), r=3), tmp_path)
    parts = [model.adapter_state("a")[f"decoder.layers.0.self_attention.{n}.lora_A"]
             for n in ("query", "value")]  # fmt: skip
    fused = file["transformer.h.0.attn.c_attn.loras.a.lora_A"]
    assert torch.equal(fused, torch.cat(parts))
    assert fused.shape == (6, 16)
    assert file["transformer.h.1.attn.c_attn.loras.a.lora_B"].shape == (32, 3)


def test_an_ia3_with_an_alpha_scales_the_rest_of_gpt2s_projection_too(tmp_path):
    model = tiny()
    said = {"architecture": "lora", "composition_mode": "scale", "r": 1, "alpha": 2}
    said |= {"attn_matrices": ["k", "v"], "init_weights": "ia3"}
    method = method_of(said, model)
    assert isinstance(method, HubLoRAConfig)
    assert method.scaled_places == ("query",)
    tensors = saved(model, method, tmp_path)
    assert sum(t.numel() for t in tensors.values()) == len(tensors) * 2 * model.config.hidden_size
    load_adapterhub(model, tmp_path, "again")
    model.add_adapter("whole", replace(method, places=("query", "key", "value"), scaled_places=()))
    ones = {k: torch.ones_like(v) for k, v in model.adapter_state("whole").items()}
    model.load_adapter_state("whole", ones | model.adapter_state("a"))
    logits, ids = {}, torch.arange(10)[None]
    for name in ("a", "again", "whole"):
        model.set_active(name)
        logits[name] = model(ids)
    torch.testing.assert_close(logits["again"], logits["a"])
    torch.testing.assert_close(logits["whole"], logits["a"])
    merged = merge(model)
    torch.testing.assert_close(model(ids), logits["a"], atol=1e-4, rtol=1e-4)
    merged.undo()
    save_peft(model, "a", tmp_path / "peft")
    model.set_active(load_adapter(model, tmp_path / "peft", "of_peft"))
    torch.testing.assert_close(model(ids), logits["a"])
    assert method_of({**said, "alpha": 1}, model).scaled_places == ()
    assert method_of({**said, "attn_matrices": ["q", "k", "v"]}, model).scaled_places == ()
    assert method_of({**said, "use_gating": True}, model).scaled_places == ()
    assert method_of(said, tiny(**LLAMA)).scaled_places == ()
    with pytest.raises(UserError, match=r"scaled_places=\[\]: with alpha=2 it means \['query'\]"):
        hub_config(replace(method, scaled_places=()), model)


def test_llamas_intermediate_lora_lies_at_down_proj_and_output_lora_at_up_proj(tmp_path):
    model = tiny(**LLAMA)
    config = {"architecture": "lora", "selfattn_lora": False, "intermediate_lora": True}
    assert method_of(config, model).places == ("fc2",)
    method = method_of({**config, "intermediate_lora": False, "output_lora": True}, model)
    assert any(".mlp.up_proj.loras.a." in name for name in saved(model, method, tmp_path))


@pytest.mark.parametrize(("activation", "module"), [("relu", "wi"), ("geglu_tanh", "wi_1")])
def test_a_gated_t5s_intermediate_lora_lies_at_wi_1(tmp_path, activation, module):
    tied = activation == "relu"  # as T5's first version and its later ones are
    shape = {"activation": activation, "share_embeddings_and_output_weights": tied}
    model = tiny(**{**T5_SHAPE, **shape, "output_scale": 0.25 if tied else 1.0})
    method = method_of({"architecture": "lora", "intermediate_lora": True}, model)
    names = saved(model, method, tmp_path)
    assert f"encoder.block.0.layer.1.DenseReluDense.{module}.loras.a.lora_A" in names
    assert f"decoder.block.1.layer.2.DenseReluDense.{module}.loras.a.lora_B" in names
    assert "decoder.block.0.layer.1.EncDecAttention.q.loras.a.lora_A" in names


@pytest.mark.parametrize(
    ("model_class", "root"),
    [("T5AdapterModel", "transformer.encoder."), ("T5ForConditionalGeneration", "encoder.")],
)
def test_the_class_of_a_t5_decides_what_stands_before_names_and_both_are_read(
    tmp_path, model_class, root
):
    model = tiny(**T5_SHAPE)
    names = saved(model, SEQ_BN, tmp_path, model_class=model_class)
    assert any(name.startswith(root) for name in names)
    assert load_adapterhub(model, tmp_path, "again") == "again"


def test_the_prefix_of_all_layers_is_one_tensor_and_lies_under_every_attention_too(tmp_path):
    model = tiny(**T5_SHAPE)
    model.add_adapter(
        "a", PrefixTuningConfig(prefix_length=3, bottleneck_dim=5, relative_positions="keys")
    )
    save_adapterhub(model, "a", tmp_path)
    file = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    last = file["prefix_tuning.prefix_tunings.a.self_prefix.control_trans.2.weight"]
    own = [model.adapter_state("a")[f"decoder.layers.{n}.self_attention.prefix.linear_out.weight"]
           for n in (0, 1)]  # fmt: skip
    assert torch.equal(last, torch.cat(own))
    assert last.shape == (2 * 2 * 16, 5)
    pool = "decoder.block.1.layer.1.EncDecAttention.prefix_tuning.pool.prefix_tunings.a."
    assert torch.equal(file[f"{pool}self_prefix.control_trans.2.weight"], last)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 4 * sum(t.numel() for t in model.adapter_state("a").values()) + 65536


def test_what_the_library_shares_is_in_the_file_once(tmp_path):
    compacter = BnConfig(phm_layer=True, reduction_factor=4)
    names = saved(tiny(**LLAMA), compacter, tmp_path / "phm")
    assert [name for name in names if "phm_rule" in name] == ["model.shared_parameters.a.phm_rule"]
    vera = HubLoRAConfig(r=2, init_weights="vera", vera_d=0.1, vera_b=0.0)
    names = saved(tiny(**LLAMA), vera, tmp_path / "vera")
    assert names["model.shared_parameters.a.lora_A"].shape == (2, 16)
    for folder in ("phm", "vera"):
        assert load_adapterhub(tiny(**LLAMA), tmp_path / folder) == "a"


def test_a_rotation_without_a_base_is_written_with_one_and_turns_alike(tmp_path):
    model, method = tiny(), ReftConfig(r=2, suffix_positions=1)
    names = saved(model, method, tmp_path)
    assert names["transformer.h.0.reft_layer.refts.a.units.1.projection.parametrizations.weight.0"
                 ".base"].shape == (16, 16)  # fmt: skip
    load_adapterhub(model, tmp_path, "again")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        model.set_active("a")
        ours = model(tokens)
        model.set_active("again")
        torch.testing.assert_close(model(tokens), ours)


def test_a_norm_before_a_bottleneck_has_both_of_its_names_in_a_torch_file(tmp_path):
    model = tiny()
    model.add_adapter("a", BnConfig(ln_before=True, reduction_factor=4))
    save_adapterhub(model, "a", tmp_path)
    file = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    start = "transformer.h.0.output_adapters.adapters.a."
    assert torch.equal(
        file[f"{start}adapter_norm_before.weight"], file[f"{start}adapter_down.0.weight"]
    )
    assert file[f"{start}adapter_down.1.weight"].shape == (4, 16)


# ---- settings


METHODS = [
    SEQ_BN,
    BnConfig(mh_adapter=True, reduction_factor={"0": 2, "default": 8}, scaling="learned"),
    BnConfig(is_parallel=True, residual_before_ln="post_add", leave_out=(1,), use_gating=True),
    HubLoRAConfig(places=("value", "query", "fc1"), r=2, alpha=3, dropout=0.1, use_gating=True),
    HubLoRAConfig(places=("key",), r=1, alpha=1, composition_mode="scale", init_weights="ia3"),
    PrefixTuningConfig(reparametrise=False, prefix_length=2, relative_positions="keys"),
    PromptTuningConfig(virtual_tokens=2, shifts_positions=False, prompt_init="random_uniform"),
    ReftConfig(layer_selection=(2,), orthogonality=False, subtract_projection=False),
    UnionConfig(configs=(SEQ_BN, HubLoRAConfig(places=("query",), r=2))),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_method_goes_into_a_dictionary_and_back(method):
    model = tiny()
    written = json.loads(json.dumps(hub_config(method, model)))
    assert hub_config(method_of(written, model), model) == written
    kinds = {"BnConfig": None, "UnionConfig": "union"}
    name = type(method).__name__
    assert name not in kinds or written.get("architecture") == kinds[name]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (BottleneckConfig(dim=4), "no words for BottleneckConfig"),
        (BnConfig(weight_tying=True), "weight_tying=True"),
        (BnConfig(layer_selection=(1,)), "layer_selection=(1,)"),
        (HubLoRAConfig(places=("query", "output")), "cannot be at output"),
        (PrefixTuningConfig(shifts_positions=True), "shifts_positions=True"),
        (PromptTuningConfig(place="word_embedding", shifts_positions=False), "word_embedding"),
    ],
)
def test_what_the_files_cannot_say_is_refused_by_name_before_anything_is_written(
    tmp_path, method, said
):
    model = tiny()
    model.add_adapter("a", method)
    with pytest.raises(UserError) as error:
        save_adapterhub(model, "a", tmp_path / "a")
    assert said in str(error.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "spectral"}, "architecture 'spectral' is not known"),
        ({"architecture": ["lora"]}, "is not known"),
        ({"reduction": 2}, "the key 'reduction' is not known"),
        ({"reduction_factor": "16"}, "must be a number or a map"),
        ({"reduction_factor": {"default": None}}, "must be"),
        ({"mh_adapter": 1}, "true or false"),
        ({"dropout": float("nan")}, "dropout=nan must be a number"),
        ({"weight_tying": True}, "the key 'weight_tying' is not known"),
        ({"architecture": "lora", "attn_matrices": ["o"]}, "a list of q, k, v"),
        ({"architecture": "lora", "r": 2.5}, "a whole number"),
        ({"architecture": "prefix_tuning", "flat": "no"}, "true or false"),
        ({"architecture": "reft", "layers": ["0"]}, "a list of layers from 0"),
        ({"architecture": "union", "configs": "lora"}, "a list of configurations"),
        ({"architecture": "union", "configs": [{"architecture": "union", "configs": []}]}, "union"),
        ({"leave_out": 3}, "a list"),
    ],
)
def test_values_of_strangers_are_checked_by_kind_and_named(config, said):
    with pytest.raises(UserError) as error:
        method_of(config, tiny(), "here")
    assert said in str(error.value)
    assert str(error.value).startswith("here: ")


def test_keys_of_the_oldest_files_are_known():
    old = {"MH_Adapter": True, "Output_Adapter": True, "LN_before": True, "attention_type": "x"}
    old |= {"invertible_adapter": {"block_type": "nice", "reduction_factor": 4}}
    method = method_of({**old, "non_linearity": "swish", "reduction_factor": 16}, tiny())
    assert method == BnConfig(
        mh_adapter=True,
        ln_before=True,
        non_linearity="swish",
        inv_adapter="nice",
        inv_adapter_reduction_factor=4,
    )


def test_modules_of_the_oldest_files_are_known(tmp_path):
    model = tiny(architecture="bert", transformer_block_type="post_ln", activation="gelu",
                 embedding_layernorm=True, num_token_types=2, final_layernorm=False)  # fmt: skip
    file = saved(model, SEQ_BN, tmp_path)
    old = {name.replace(".output.adapters.", ".output.layer_text_task_adapters."): t
           for name, t in file.items()}  # fmt: skip
    assert old.keys() != file.keys()
    save_file(old, tmp_path / "adapter.safetensors")
    edited(tmp_path, type="text_task", config={"inv_adapter": "nice"})
    assert load_adapterhub(model, tmp_path, "old") == "old"
    assert model.adapters["old"].inv_adapter is None


def test_lora_of_versions_that_forgot_its_scale_has_none(tmp_path):
    model = tiny()
    saved(model, HubLoRAConfig(r=4, alpha=8), tmp_path)
    for version, alpha in (("adapters.1.0.1", 4), ("adapters.1.1.0", 8), ("adapters.1.10.2", 8)):
        edited(tmp_path, version=version)
        name = f"v{alpha}_{version[-3]}"
        load_adapterhub(model, tmp_path, name)
        assert model.adapters[name].alpha == alpha, version


# ---- loading


def test_a_folder_is_recognised_among_other_forms_and_keeps_its_numbers(tmp_path):
    model = tiny()
    saved(model, SEQ_BN, tmp_path, model_name="gpt2")
    assert load_adapter(model, tmp_path, "again") == "again"
    ours, read = model.adapter_state("a"), model.adapter_state("again")
    assert all(torch.equal(ours[key], read[key]) for key in ours)


def test_leave_out_and_changed_keys_when_loading(tmp_path):
    model = tiny()
    saved(model, SEQ_BN, tmp_path)
    load_adapterhub(model, tmp_path, "b", config={"non_linearity": "gelu"}, leave_out=[0])
    assert [slot.site.layer for _, slot, _ in model.parts("b")] == [1]
    assert model.adapters["b"].non_linearity == "gelu"


def test_a_half_precision_file_is_read_into_float32(tmp_path):
    model = tiny()
    file = saved(model, SEQ_BN, tmp_path)
    save_file({k: v.half() for k, v in file.items()}, tmp_path / "adapter.safetensors")
    load_adapterhub(model, tmp_path, "narrow")
    state = model.adapter_state("narrow")
    assert all(value.dtype == torch.float32 for value in state.values())


def spoil_pickle(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": print}))


def spoil_weights(change):
    def spoil(folder: Path) -> None:
        file = load_file(folder / "adapter.safetensors")
        save_file(change(file), folder / "adapter.safetensors")

    return spoil


FIRST = "transformer.h.0.output_adapters.adapters.a.adapter_up.bias"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_pickle, "cannot be read"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "its weights are missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "keys and values"),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 10**5), "cannot be read"),
        (lambda folder: edited(folder, name=None), "name=None"),
        (
            lambda folder: edited(folder, model_type="bert"),
            "made for a bert, and this model is a gpt2",
        ),
        (lambda folder: edited(folder, hidden_size=32), "hidden_size 32"),
        (lambda folder: edited(folder, config={"reduction_factor": 2}), "is [4"),
        (lambda folder: edited(folder, config={"reduction_factor": 1e-9}), "do not fit"),
        (lambda folder: edited(folder, config={"use_gating": True}), "missing h.0"),
        (spoil_weights(lambda f: {k: v for k, v in f.items() if k != FIRST}), "missing h.0"),
        (spoil_weights(lambda f: {**f, "transformer.h.7.x": f[FIRST].clone()}), "unknown h.7.x"),
        (spoil_weights(lambda f: {**f, FIRST: torch.zeros(3)}), "is [3], not [16]"),
        (spoil_weights(lambda f: {**f, FIRST: torch.zeros(16).long()}), "weights are needed"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, spoil, said):
    model = tiny()
    saved(model, SEQ_BN, tmp_path)
    model.delete_adapter("a")
    before = set(model.state_dict())
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_adapterhub(model, tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not model.adapters
    assert set(model.state_dict()) == before


def test_writing_the_other_form_leaves_no_weights_of_an_earlier_adapter(tmp_path):
    model = tiny()
    saved(model, SEQ_BN, tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    save_adapterhub(model, "a", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "pytorch_adapter.bin", "notes.txt"}


# ---- setups


@pytest.mark.parametrize(
    "setup",
    [
        Stack("a", Parallel("b", "c")),
        BatchSplit("a", Stack("b", "c"), batch_sizes=[2, 1]),
        Average("a", "b", weights=[0.25, 0.75]),
    ],
    ids=str,
)
def test_a_composition_survives_the_librarys_tree(setup):
    tree = json.loads(json.dumps(setup_dict(setup)))
    assert setup_dict(setup_of(tree, "")) == tree
    assert type(setup_of(tree, "")) is type(setup)


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "Exec", "children": []},
        {"type": "Composition", "children": [{"type": "single", "children": ["a"]}]},
        {"type": "parse", "children": []},
        {"type": "single", "children": [3]},
        {"type": "Split", "children": [{"type": "single", "children": ["a"]}]},
        {"type": "Stack", "children": "a", "kwargs": {"splits": [1]}},
        [],
        "Stack",
    ],
)
def test_a_tree_that_is_no_composition_is_refused(tree):
    with pytest.raises(UserError, match=r"^here: "):
        setup_of(tree, "here")


def test_a_setup_comes_back_with_its_fusion_or_not_at_all(tmp_path):
    model = tiny()
    for name in "abc":
        model.add_adapter(name, SEQ_BN)
    model.add_fusion("b,c")
    setup = Stack("a", Fuse("b", "c"))
    save_adapterhub_setup(model, setup, tmp_path, safetensors=True)
    other = tiny()
    folder, found = load_adapterhub_setup(other, tmp_path)
    assert found == setup == other.active
    assert len(folder.adapters) == 3
    assert all(
        torch.equal(value, other.fusion_state("b,c")[key])
        for key, value in model.fusion_state("b,c").items()
    )
    edited(tmp_path / "c", hidden_size=8)
    third = tiny()
    with pytest.raises(UserError, match="hidden_size 8"):
        load_adapterhub_setup(third, tmp_path)
    assert not third.adapters
    assert not third.fusions
    assert third.active is None


# ---- heads


def test_a_head_of_transformers_own_class_gets_the_numbers_of_its_layers():
    tensors = {
        "classifier.dense.weight": torch.ones(2, 2),
        "classifier.out_proj.bias": torch.ones(3),
    }
    about = {"model_class": "RobertaForSequenceClassification", "num_labels": 3}
    config, named = numbered({**about, "label2id": {"x": 0, "y": 1, "z": 2}}, tensors, "here")
    assert config["head_type"] == "classification"
    assert config["num_labels"] == 3
    assert named.keys() == {"1.weight", "4.bias"}
    with pytest.raises(UserError, match="here: the head of a DebertaForX"):
        numbered({"model_class": "DebertaForX"}, tensors, "here")


def test_a_folder_of_peft_is_none(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match="peft's"):
        read_adapterhub(tmp_path)
