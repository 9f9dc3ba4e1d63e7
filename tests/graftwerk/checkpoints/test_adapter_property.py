"""Any set of methods on any tiny model comes back from both forms of file as it was."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    Stack,
)
from graftwerk.checkpoints import load_adapters, save_adapters
from graftwerk.models import build_model
from tests.graftwerk.tiny import GPT2, LLAMA, shake, tokens
from tests.graftwerk.tiny_families import bert_shape, t5_shape

SHAPES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "t5": t5_shape(61),
    "bert": bert_shape(61),
    "labels": bert_shape(61, "question_answering"),
}
COMMON = {
    "layer_selection": st.sampled_from([None, (1,), (2,), (1, 2)]),
    "weight_tying": st.booleans(),
}
TARGETS = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")
METHODS = st.one_of(
    st.builds(
        BottleneckConfig,
        dim=st.integers(1, 5),
        type=st.sampled_from(["parallel_adapter", "linear_adapter"]),
        norm_position=st.sampled_from(["pre", "post"]),
        **COMMON,
    ),
    st.builds(IA3Config, **COMMON),
    st.builds(
        LoRAConfig,
        dim=st.integers(1, 5),
        alpha=st.sampled_from([0, 3, 16]),
        target_modules=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple),
        variant=st.sampled_from(["nemo", "canonical"]),
        rank_stabilised=st.booleans(),
        **COMMON,
    ),
    st.builds(LoRAConfig, dim=st.integers(1, 5), dora=st.just(True)),
    st.builds(
        PTuningConfig,
        virtual_tokens=st.integers(1, 3),
        embedding_dim=st.sampled_from([2, 4]),
        bottleneck_dim=st.integers(1, 5),
        encoder=st.sampled_from(["mlp", "lstm"]),
    ),
    st.builds(PromptTuningConfig, virtual_tokens=st.integers(1, 3)),
    st.builds(
        PrefixTuningConfig,
        prefix_length=st.integers(1, 3),
        bottleneck_dim=st.integers(1, 4),
        reparametrise=st.booleans(),
    ),
    st.builds(
        SelectiveConfig,
        parameters=st.sampled_from([("*.mlp.linear_fc2.*",), ("*layernorm*",), ("*.weight",)]),
    ),
)


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("family", SHAPES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(methods=st.lists(METHODS, min_size=1, max_size=3))
def test_methods_there_and_back_in_both_forms(family: str, methods: list[Any]):
    torch.manual_seed(0)
    model = build_model(SHAPES[family]).eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = [m for n, m in enumerate(methods) if n == 0 or not isinstance(m, SelectiveConfig)]
    names = [f"a{number}" for number in range(len(chosen))]
    for name, method in zip(names, chosen, strict=True):
        model.add_adapter(name, method)
        for _, _, part in model.parts(name):
            shake(part)
        for copy in model.replacements.of(name).values():
            copy.data += 0.01
        if (head := model.head_of(name)) is not None:
            shake(head)
    inputs = {"tokens": tokens(length=6)}
    if family == "t5":
        inputs["source"] = tokens(length=7, seed=1)
    model.set_active(Stack(*names))
    with tempfile.TemporaryDirectory() as folder:
        for file in ("adapters", "adapters.nemo"):
            path = Path(folder, file)
            save_adapters(model, names, path)
            fresh = build_model(SHAPES[family]).eval()
            fresh.load_state_dict(base)
            assert load_adapters(fresh, path) == names
            assert fresh.adapters == model.adapters
            fresh.set_active(Stack(*names))
            difference = (logits(fresh, inputs) - logits(model, inputs)).abs().max()
            assert difference < 1e-6, (file, difference)
