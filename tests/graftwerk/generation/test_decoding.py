"""Greedy decoding against `transformers`, and batches against single rows."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from graftwerk.adapters import BottleneckConfig
from graftwerk.checkpoints import load_base
from graftwerk.errors import UserError
from graftwerk.generation import generate
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt

SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
THEIRS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES),
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **SIZES,
    ),
}  # fmt: skip


def prompts(count: int = 7, vocabulary: int = 61) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def greedy_of_transformers(model, prompt: list[int], tokens: int) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=2
    )[0, len(prompt) :].tolist()
    return ids[: ids.index(2)] if 2 in ids else ids


@pytest.mark.parametrize("family", THEIRS)
def test_ids_equal_those_of_transformers(family: str, tmp_path: Path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(THEIRS[family]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "model")
    ours = generate(load_base(tmp_path / "model"), prompts(), 12, eos_ids=[2], batch_size=3)
    assert ours == [greedy_of_transformers(theirs, prompt, 12) for prompt in prompts()]


def test_a_real_model_continues_as_under_transformers(shared: Path):
    path = shared / "data" / "models" / "stories260k"
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    batch = prompts(5, vocabulary=512)
    ours = generate(load_base(path), batch, 20, eos_ids=[2], batch_size=4)
    assert ours == [greedy_of_transformers(theirs, prompt, 20) for prompt in batch]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_finish_leave_and_the_others_go_on_as_alone(shape: str):
    model = tiny_gpt(SHAPES[shape])
    model.add_adapter("a", BottleneckConfig(dim=4))
    for _, _, part in model.parts("a"):
        shake(part)
    model.set_active("a")
    batch = prompts(9)
    alone = [generate(model, [prompt], 10, eos_ids=range(20))[0] for prompt in batch]
    assert len({len(row) for row in alone}) > 1, "no row finished early: the case tests nothing"
    assert generate(model, batch, 10, eos_ids=range(20), batch_size=9) == alone


def test_stop_ends_a_row_with_the_token_that_completed_it():
    model, batch = tiny_gpt(), prompts(3)
    free = generate(model, batch, 8)
    stopped = generate(model, batch, 8, stop=lambda added: len(added) >= 3)
    assert stopped == [row[:3] for row in free]


def test_rows_end_where_the_positions_do():
    model = tiny_gpt(SHAPES["gpt2"])
    (added,) = generate(model, [[5] * 60], 20)
    assert len(added) == 64 - 60 + 1  # the last token needs no position of its own


def test_progress_counts_every_row():
    finished: list[int] = []
    generate(tiny_gpt(), prompts(7), 2, batch_size=3, progress=finished.append)
    assert finished == [3, 3, 1]


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "prompt 0 is empty"), ([1] * 64, "64 tokens")]
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompt: list[int], message: str):
    with pytest.raises(UserError, match=message):
        generate(tiny_gpt(), [prompt], 4)
