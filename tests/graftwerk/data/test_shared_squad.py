"""Real questions on real paragraphs: padded, packed and shared learn the same."""

import numpy as np
import pytest

from graftwerk.adapters import BottleneckConfig, IA3Config, LoRAConfig, PTuningConfig
from graftwerk.data.sampler import Step
from graftwerk.models import TransformerConfig
from tests.graftwerk.data.rows import adapted, assert_same, learned, packed, padded

SIZES = {"vocab_size": 50257, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
GPT2 = TransformerConfig(**SIZES, ffn_hidden_size=32, max_position_embeddings=1024)
METHODS = {
    "lora": LoRAConfig(dim=4),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(dim=4),
    "ptuning": PTuningConfig(virtual_tokens=4, embedding_dim=8, bottleneck_dim=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_squads_questions_learn_the_same(questions, method):
    model = adapted(GPT2, a=METHODS[method])
    model.set_active("a")
    paragraphs = np.random.default_rng(0).permutation(240)[:3]
    step = Step([int(5 * p + n) for p in paragraphs for n in range(5)], 0)
    expected = learned(model, padded(questions)[step])
    tokens = []
    for share in (False, True):
        batches = packed(questions, 1024, share)[step]
        tokens.append(sum(batch.num_tokens for batch in batches))
        assert_same(learned(model, batches), expected)
    assert tokens[1] < 0.6 * tokens[0]
