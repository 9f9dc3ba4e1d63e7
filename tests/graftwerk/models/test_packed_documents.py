"""T5s and BERTs keep the documents of a packed row apart: they learn as from padded rows."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch

from graftwerk.adapters import (
    BnConfig,
    BottleneckConfig,
    HubLoRAConfig,
    IA3Config,
    LoRAConfig,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    Split,
    Stack,
)
from graftwerk.adapters.packing import bound_to_rows, bound_to_texts
from graftwerk.data.dataset import RowArrays
from graftwerk.data.encoding import Example, Label
from graftwerk.data.micro_batches import PackedBatches, PaddedBatches
from graftwerk.data.sampler import Step
from graftwerk.models import build_model
from graftwerk.models.flex import Blocks
from graftwerk.training.copies import for_copies
from graftwerk.training.loss import label_losses
from tests.graftwerk.data.rows import VOCABULARY, assert_same
from tests.graftwerk.models.flexible import gradients_on_a_cpu
from tests.graftwerk.models.test_encoders import BERT_SHAPE, CONFIGS
from tests.graftwerk.tiny import shake

SHAPES = {
    "t5": CONFIGS["t5"],
    "native_t5": CONFIGS["native_t5"],
    "bert": replace(BERT_SHAPE, head="question_answering"),
}
LORA = LoRAConfig(dim=3, target_modules=("all",))
PREFIX = PrefixTuningConfig(prefix_length=3, reparametrise=False)
PROMPT = PromptTuningConfig(virtual_tokens=2)
LORA_PLACES = ("query", "value", "cross_query", "cross_value", "fc2")
METHODS = {
    "lora": {"a": LORA},
    "many": {"a": BottleneckConfig(dim=4), "b": IA3Config(), "c": ReftConfig(prefix_positions=2)},
    "parallel": {"a": LORA, "b": BottleneckConfig(dim=4)},
    "late": {"a": ReftConfig(suffix_positions=2)},
    "prefix": {"a": PREFIX},
    "gates": {
        "a": BnConfig(mh_adapter=True, cross_adapter=True, reduction_factor=8, use_gating=True),
        "b": HubLoRAConfig(places=LORA_PLACES, r=2, init_weights="bert", use_gating=True),
    },
    "split": {"a": LORA, "b": BottleneckConfig(dim=4)},
    "prefix_keys": {"a": replace(PREFIX, relative_positions="keys")},
    "prefix_both": {"a": replace(PREFIX, relative_positions="both")},
    "prompts": {"a": PROMPT, "b": replace(PROMPT, virtual_tokens=1), "c": ReftConfig(r=2)},
    "all": {
        "a": PROMPT,
        "b": replace(PREFIX, use_gating=True, relative_positions="both"),
        "c": BnConfig(mh_adapter=True, cross_adapter=True, reduction_factor=8, use_gating=True),
    },
}
GATED = ("gates", "all")
BLOCKS = {"parallel": Parallel, "split": partial(Split, splits=[3, 1])}
# A T5's padded targets end with padding, which late positions then are of.
OTHERWISE = [("t5", "late"), ("native_t5", "late")]
LENGTHS = [(3, 9), (5, 4), (2, 12), (4, 7), (1, 3), (6, 8), (3, 5)]  # of targets and sources


class Rows:
    """Random pairs of a T5, or windows of a BERT with a span in each."""

    def __init__(self, family: str):
        random = np.random.default_rng(0)
        self.family, self.examples = family, []
        for target, source in LENGTHS:
            tokens = random.integers(1, VOCABULARY, target + 1).tolist()
            read = random.integers(1, VOCABULARY, source).tolist()
            if family == "t5":
                labels = [Label(n, tokens[n + 1]) for n in range(target)]
                self.examples.append(Example(tokens[:-1], labels, source=read))
            else:
                types = [int(n > source // 2) for n in range(source)]
                span = source // 3, source - 1
                self.examples.append(Example(read, [], token_types=types, span=span))
        self.filler = self.examples[0]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        return self.examples[number]

    def source_of(self, number: int) -> int:
        return 0

    def arrays(self, number: int) -> RowArrays:
        row = self.examples[number]
        labels = np.array([label[:2] for label in row.labels], np.int32).reshape(-1, 2)
        source, types, span = (
            None if value is None else np.array(value, np.int32)
            for value in (row.source, row.token_types, row.span)
        )
        return RowArrays(number, np.array(row.tokens, np.int32), labels, source, types, span)


def packed_rows(model):
    """Micro-batches of two packed rows, of all pairs or windows."""
    family = model.config.architecture
    rows, step = Rows(family), Step(list(range(len(LENGTHS))), 0)
    how = {"family": family, "prompt": model.virtual_tokens}
    room = (10, 20) if family == "t5" else (20,)
    return PackedBatches(rows, 0, 1, 2, room=room, **how)[step]


def learned(model, batches):
    """The summed loss, and the gradients of what is trained."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        spans = batch.label_positions is None
        copies = [for_copies(x, model.width, spans) for x in (batch.labels, batch.weights)]
        loss = label_losses(model(**batch.inputs()), *copies).sum()
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapted(shape: str, methods: str):
    torch.manual_seed(0)
    model = build_model(SHAPES[shape]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim < 2), 0.2)
    for seed, (name, method) in enumerate(METHODS[methods].items(), 1):
        model.add_adapter(name, method, head=False)
        for _, _, part in model.parts(name):
            shake(part.double(), seed)
    model.train_only(list(METHODS[methods]), [])
    model.set_active(BLOCKS.get(methods, Stack)(*METHODS[methods]))
    return model


@pytest.mark.parametrize(
    ("shape", "methods"),
    [(s, m) for s in SHAPES for m in METHODS if (s, m) not in OTHERWISE],
)
def test_packed_rows_learn_as_padded_ones(shape: str, methods: str):
    model = adapted(shape, methods)
    assert bound_to_rows(model) is None
    assert "both ways" in (bound_to_texts(model) or "")
    rows, step = Rows(model.config.architecture), Step(list(range(len(LENGTHS))), 0)
    packed = packed_rows(model)
    assert len(packed) < len(rows) // 2
    # A gate of padded rows is a mean over padding too.
    padded = PaddedBatches(rows, 0, 1, 1 if methods in GATED else 3)[step]
    assert_same(learned(model, packed), learned(model, padded))


@pytest.mark.parametrize("methods", ["lora", "many", "parallel", "gates", "split", "prompts"])
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_attention_learns_as_masks_do(shape: str, methods: str):
    model = adapted(shape, methods)
    packed = packed_rows(model)
    expected = learned(model, packed)
    model.attention = "flex"
    calls = patch.object(Blocks, "attend", autospec=True, side_effect=Blocks.attend)
    with calls as attend, gradients_on_a_cpu():
        assert_same(learned(model, packed), expected)
    attentions = model.config.num_layers + 2 * model.config.decoder_num_layers
    assert attend.call_count == len(packed) * attentions
