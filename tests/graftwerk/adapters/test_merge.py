"""Adapters merged into their base, taken out again, and written by the command `merge`."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from graftwerk.__main__ import guarded
from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    SelectiveConfig,
    Stack,
)
from graftwerk.adapters.merge import merge
from graftwerk.checkpoints import load_base, save_adapter, save_adapters, save_base
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_prompts import make, run

EVERYWHERE = {"dim": 3, "alpha": 6, "target_modules": ("all",)}
MERGEABLE = {
    "lora": LoRAConfig(**EVERYWHERE),
    "canonical": LoRAConfig(**EVERYWHERE, variant="canonical", rank_stabilised=True),
    "dora": LoRAConfig(**EVERYWHERE, dora=True),
    "canonical_dora": LoRAConfig(**EVERYWHERE, dora=True, variant="canonical"),
    "tied": LoRAConfig(**EVERYWHERE, weight_tying=True),
    "ia3": IA3Config(),
    "selective": SelectiveConfig(parameters=("*linear_fc2.*", "*linear_qkv.bias")),
}
ORDERS = [
    *[(name,) for name in MERGEABLE],
    ("ia3", "lora"),
    ("dora", "ia3", "canonical"),
    ("selective", "ia3", "canonical_dora", "lora"),
]


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference, as a share of the largest score."""
    kept = one.isfinite()
    assert torch.equal(kept, two.isfinite())
    return (one - two)[kept].abs().max().item() / one[kept].abs().max().item()


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5", "bert"])
@torch.no_grad()
def test_a_merged_model_answers_as_the_unmerged_and_unmerging_is_exact(shape, order):
    model = make(shape, **{name: MERGEABLE[name] for name in order}).double()
    base = run(model)
    weights = {name: p.clone() for name, p in model.base_parameters()}
    model.set_active(Stack(*order))
    expected = run(model)
    assert difference(expected, base) > 1e-3
    merged = merge(model)
    assert model.active is None
    assert difference(run(model), expected) < 1e-11  # in float32 rounding is the processor's
    merged.undo()
    assert model.active == Stack(*order)
    assert torch.equal(run(model), expected)
    model.set_active(None)
    assert torch.equal(run(model), base)
    assert all(torch.equal(p, weights[name]) for name, p in model.base_parameters())


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5", "bert"])
@torch.no_grad()
def test_in_float32_merging_rounds_no_worse_than_a_pass_does(shape, order):
    model = make(shape, **{name: MERGEABLE[name] for name in order})
    model.set_active(Stack(*order))
    exact = run(deepcopy(model).double())
    of_pass = difference(exact, run(model).double())
    merge(model)
    assert difference(exact, run(model).double()) < 4 * of_pass + 1e-6


@torch.no_grad()
def test_a_merged_base_takes_another_adapter_and_remembers_what_it_was():
    model = make("llama", a=MERGEABLE["lora"], b=MERGEABLE["ia3"]).double()
    model.set_active(Stack("a", "b"))
    expected = run(model)
    model.set_active("a")
    merged = merge(model)
    model.set_active("b")
    assert difference(run(model), expected) < 1e-11
    with pytest.raises(UserError, match="a is merged already"):
        merged.put()
    merged.undo()
    model.set_active(Stack("a", "b"))
    assert torch.equal(run(model), expected)


@torch.no_grad()
def test_a_base_in_bfloat16_is_rounded_once():
    model = make("llama", a=MERGEABLE["lora"]).bfloat16()
    for _, _, part in model.parts("a"):
        part.float()
    model.set_active("a")
    name = "decoder.layers.0.mlp.linear_fc2"
    weight = model.get_submodule(name).weight.clone()
    part = model.get_submodule("decoder.layers.0.mlp.fc2.adapter_layer.a")
    merge(model)
    expected = weight.float() + 2 * part.linear_out.weight @ part.linear_in.weight
    assert torch.equal(model.get_submodule(name).weight, expected.bfloat16())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (BottleneckConfig(dim=4), "Bottleneck"),
        (PromptTuningConfig(virtual_tokens=2), "PromptTuning"),
        (PrefixTuningConfig(prefix_length=2, bottleneck_dim=4), "PrefixTuning"),
        (LoRAConfig(dim=2, weight_tying=True, position_embedding_strategy="add"), "LoRA"),
    ],
)
def test_a_method_that_no_weight_can_hold_is_refused_by_name(config, name):
    model = make("llama", a=config, b=LoRAConfig(dim=2))
    model.set_active(Stack("b", "a"))
    with pytest.raises(UserError, match=rf"adapter 'a' \({name}\) cannot be merged"):
        merge(model)
    assert model.active == Stack("b", "a")


@pytest.mark.parametrize(
    ("active", "message"),
    [(None, "no adapter is active"), (Parallel("a", "b"), "side by side cannot be merged")],
)
def test_what_is_no_stack_is_not_merged(active, message):
    model = make("llama", a=LoRAConfig(dim=2), b=LoRAConfig(dim=2))
    model.set_active(active)
    with pytest.raises(UserError, match=message):
        merge(model)


def command(*arguments: object) -> int:
    return guarded(["merge", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["huggingface", "nemo", "graftwerk"])
@torch.no_grad()
def test_the_command_writes_a_model_that_answers_as_base_and_adapters(kind, tmp_path, capsys):
    adapters = {"a": MERGEABLE["dora"], "i": MERGEABLE["ia3"], "c": MERGEABLE["canonical"]}
    model = make("llama", **adapters)
    save_base(make("llama"), None, tmp_path / "base")
    save_adapters(model, ["a", "i"], tmp_path / "two")
    save_adapter(model, "c", tmp_path / "one.nemo")
    model.set_active(Stack("a", "i", "c"))
    output = tmp_path / "merged"
    files = ("--adapter", tmp_path / "two", "--adapter", tmp_path / "one.nemo")
    how = ("--model", tmp_path / "base", *files, "--output", output, "--format", kind)
    assert command(*how) == 0
    assert "merged" in capsys.readouterr().out
    assert difference(run(load_base(output)), run(model)) < 1e-5
    if kind == "huggingface":
        theirs = AutoModelForCausalLM.from_pretrained(output)
        source = torch.arange(9)[None]
        assert difference(theirs(source).logits, model(source)) < 1e-5
    assert command(*how) == 2
    assert f"--output {output} exists already" in capsys.readouterr().err


@torch.no_grad()
def test_the_command_keeps_the_head_of_an_adapter_and_the_order_of_twins(tmp_path):
    model = make("bert", a=MERGEABLE["lora"])
    save_base(make("bert"), None, tmp_path / "base")
    save_adapter(model, "a", tmp_path / "a")
    model.add_adapter("b", MERGEABLE["lora"])
    model.load_adapter_state("b", {k: v * 1.5 for k, v in model.adapter_state("a").items()})
    save_adapter(model, "b", tmp_path / "b")
    twin = tmp_path / "b" / "adapter_config.yaml"
    twin.write_text(twin.read_text().replace("name: b", "name: a"))
    model.set_active(Stack("a", "b"))
    files = ("--adapter", tmp_path / "a", "--adapter", tmp_path / "b")
    place = ("--output", tmp_path / "out", "--format", "huggingface")
    assert command("--model", tmp_path / "base", *files, *place) == 0
    assert difference(run(load_base(tmp_path / "out")), run(model)) < 1e-5


def test_the_command_writes_nothing_where_a_method_cannot_be_merged(tmp_path, capsys):
    model = make("gpt2", a=BottleneckConfig(dim=4))
    save_base(make("gpt2"), None, tmp_path / "base")
    save_adapter(model, "a", tmp_path / "a")
    place = ("--output", tmp_path / "out", "--format", "graftwerk")
    assert command("--model", tmp_path / "base", "--adapter", tmp_path / "a", *place) == 2
    assert "adapter 'a' (Bottleneck) cannot be merged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


@torch.no_grad()
def test_the_command_casts_after_it_has_merged(tmp_path):
    model = make("gpt2", a=MERGEABLE["lora"])
    save_base(make("gpt2"), None, tmp_path / "base")
    save_adapter(model, "a", tmp_path / "a")
    place = ("--output", tmp_path / "out", "--format", "graftwerk", "--dtype", "bf16")
    assert command("--model", tmp_path / "base", "--adapter", tmp_path / "a", *place) == 0
    model.set_active("a")
    merge(model)
    got = load_base(tmp_path / "out", torch.bfloat16)
    base = dict(model.base_parameters())
    for name, parameter in got.named_parameters():
        assert torch.equal(parameter, base[name].bfloat16()), name
