"""AdapterHub's LoRA on whole models: merged, saved, shared by tasks."""

from dataclasses import replace

import pytest
import torch

from graftwerk.adapters import IA3Config, MultiTask, Stack, UnionConfig
from graftwerk.adapters.merge import merge
from graftwerk.adapters.methods.hub_lora import HubLoRAConfig, HubMTLLoRAConfig
from graftwerk.adapters.sharing import share_matrices
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_merge import difference
from tests.graftwerk.adapters.test_prompts import SHAPES, SOURCE, make, run
from tests.graftwerk.tiny import shake

CROSS = ("cross_query", "cross_key", "cross_value")
PLACES = ("query", "key", "value", *CROSS, "fc1", "fc2")
LORA = HubLoRAConfig(places=PLACES, r=3, alpha=6)
MTL = HubMTLLoRAConfig(places=("query", "value"), r=2, alpha=4, n_up_projection=2)
METHODS = {
    "lora": LORA,
    "dora": replace(LORA, use_dora=True),
    "vera": replace(LORA, init_weights="vera", vera_d=0.1, vera_b=0.0),
    "ia3": replace(LORA, r=1, alpha=1, composition_mode="scale", init_weights="ia3"),
    "mtl": HubMTLLoRAConfig(places=PLACES, r=3, alpha=6, n_up_projection=2),
}


def sizes(shape: str) -> list[tuple[int, int]]:
    """(inputs, outputs) of every projection that the places name, over all layers."""
    config = SHAPES[shape]
    h, q, kv, f = config.hidden_size, config.query_size, config.key_size, config.ffn_hidden_size
    inner = 2 * f if config.gated else f
    attention = [(h, q), (h, kv), (h, kv)]
    mlp = [(h, inner), (f, h)]
    layers = (attention + mlp) * config.num_layers
    if config.architecture == "t5":
        layers += (2 * attention + mlp) * config.decoder_num_layers
    return layers


COUNTS = {
    "lora": lambda i, o: 3 * (i + o),
    "dora": lambda i, o: 3 * (i + o) + o,
    "vera": lambda i, o: 9 + o * o,
    "ia3": lambda i, o: o,
    "mtl": lambda i, o: 3 * (i + 2 * o) + 2 + 3,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5", "bert"])
def test_as_many_weights_are_trained_as_the_formula_says(shape, method):
    model = make(shape, a=METHODS[method])
    model.freeze_base()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = (
        0 if model.head_of("a") is None else sum(p.numel() for p in model.head_of("a").parameters())
    )
    assert trained - head == sum(COUNTS[method](i, o) for i, o in sizes(shape))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5", "bert"])
@torch.no_grad()
def test_a_merged_model_answers_as_the_unmerged(shape, method):
    model = make(shape, a=METHODS[method]).double()
    if model.head_of("a") is not None:
        model.head = model.head.own  # adapters' own heads compute in float32
    model.set_active("a")
    expected = run(model)
    merged = merge(model)
    assert difference(run(model), expected) < 1e-10
    merged.undo()
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_weights_saved_and_loaded_give_the_same_answer(method):
    model = make("llama", a=METHODS[method])
    model.set_active("a")
    fresh = make("llama")
    fresh.add_adapter("b", METHODS[method])
    fresh.load_adapter_state("b", model.adapter_state("a"))
    fresh.set_active("b")
    assert torch.equal(run(fresh), run(model))


@torch.no_grad()
def test_updates_of_a_stack_add_on_fused_projections():
    model = make("gpt2", a=LORA, b=replace(LORA, r=2, alpha=1), ia3=IA3Config())
    base, layer = run(model), model.decoder.layers[0]
    joined = make("gpt2", c=replace(LORA, r=5, alpha=5))
    state = {}
    one, two = model.adapter_state("a"), model.adapter_state("b")
    for key in one:  # s B A of both is that of matrices side by side
        if key.endswith("lora_A"):
            state[key] = torch.cat([2 * one[key], 0.5 * two[key]])
        else:
            state[key] = torch.cat([one[key], two[key]], 1)
    joined.load_adapter_state("c", state)
    joined.set_active("c")
    model.set_active(Stack("a", "b"))
    torch.testing.assert_close(run(model), run(joined), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(model), base, atol=1e-3)
    assert layer.self_attention.query.adapter_layer.keys() == {"a", "b"}


def test_a_union_of_two_loras_has_each_in_its_own_places():
    union = UnionConfig(
        configs=(replace(LORA, places=("query",)), replace(LORA, places=("value",), r=1))
    )
    model = make("gpt2", a=union)
    ranks = {slot.site.name: part.lora_A.shape[0] for _, slot, part in model.parts("a")}
    assert ranks == {"query": 3, "value": 1}


# ---- tasks


def tasks(shape: str = "llama"):
    model = make(shape, a=MTL, b=MTL, c=MTL)
    share_matrices(model, ["a", "b", "c"], reference="b")
    return model


@torch.no_grad()
def test_each_row_of_a_multitask_block_is_answered_by_its_tasks_adapter():
    model = tasks()
    batch = torch.cat([SOURCE, SOURCE.flip(0)])
    alone = {}
    for name in "abc":
        model.set_active(name)
        alone[name] = model(batch)
    model.set_active(MultiTask("a", "b", "c"))
    got = model(batch, task_ids=torch.tensor([2, 0, 1, 0]))
    for row, name in enumerate("caba"):
        torch.testing.assert_close(got[row], alone[name][row], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-4)


def test_sharing_takes_the_references_matrices_and_trains_them_once():
    model = make("llama", a=MTL, b=MTL)
    before = {key: value.clone() for key, value in model.adapter_state("b").items()}
    own = {key: value.clone() for key, value in model.adapter_state("a").items()}
    share_matrices(model, ["a", "b"], reference="b")
    state = model.adapter_state("a")
    for key, value in state.items():
        shared = key.endswith(("lora_A", "lora_B"))
        assert torch.equal(value, before[key] if shared else own[key]), key
    model.freeze_base()
    apart, slots = sum(v.numel() for v in own.values()), 3 * 2
    matrices = sum(v.numel() for k, v in own.items() if k.endswith(("lora_A", "lora_B")))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * apart - matrices
    assert len(trained) == slots * (2 + 2 * 2)
    model.set_active(MultiTask("a", "b"))
    model(SOURCE, task_ids=torch.tensor([0, 1])).square().mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    moved = model.adapter_state("a"), model.adapter_state("b")
    for key, value in moved[0].items():
        shared = key.endswith(("lora_A", "lora_B"))
        assert torch.equal(value, moved[1][key]) == shared, key
        assert not torch.equal(value, before[key]), key


def test_what_has_no_matrices_in_common_cannot_share():
    model = make("llama", a=MTL, b=replace(MTL, r=3), c=METHODS["vera"], d=LORA)
    with pytest.raises(UserError, match="needs two adapters at least, not a"):
        share_matrices(model, ["a"])
    with pytest.raises(UserError, match="'a' and 'b' lie in different slots, or their matrices"):
        share_matrices(model, ["a", "b"])
    with pytest.raises(UserError, match="'a' and 'd' lie in different slots"):
        share_matrices(model, ["a", "d"])
    with pytest.raises(UserError, match="'c' has parts other than AdapterHub's LoRA"):
        share_matrices(model, ["c", "a"])
    with pytest.raises(UserError, match="no adapter is called 'e'"):
        share_matrices(model, ["a", "e"])


def test_veras_shared_matrices_stay_frozen_and_are_saved_once():
    model = make("gpt2", a=METHODS["vera"])
    state = model.adapter_state("a")
    shared = [key for key in state if ".shared." in key]
    shapes = {(i, o) for i, o in sizes("gpt2")}
    assert len(shared) == 2 * len(shapes)
    model.freeze_base()
    for _, _, part in model.parts("a"):
        assert not part.shared["lora_A"].requires_grad
        assert part.vera_B.requires_grad
    shake(model, 3)
    model.set_active("a")
    model(SOURCE).sum().backward()
    assert all(part.shared["lora_A"].grad is None for _, _, part in model.parts("a"))
