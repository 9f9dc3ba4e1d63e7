"""Decoding against `transformers`, and batches against single rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
)

from graftwerk.adapters import BottleneckConfig
from graftwerk.checkpoints import load_base
from graftwerk.errors import UserError
from graftwerk.generation import Sampling, complete, generate
from graftwerk.models import BERT, GPT, T5, TransformerConfig, build_model
from tests.graftwerk.tiny import SHAPES as GPT_SHAPES
from tests.graftwerk.tiny import shake, tiny_gpt

EOS = 2
SIZES: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": EOS}
T5_SIZES: dict[str, Any] = SIZES | {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
THEIRS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, **SIZES),
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, **SIZES,
    ),
    "t5": T5Config(feed_forward_proj="relu", **T5_SIZES),
    "flan": T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5_SIZES),
}  # fmt: skip
SHAPES = GPT_SHAPES | {
    "t5": TransformerConfig(
        architecture="t5", vocab_size=61, num_layers=2, decoder_num_layers=3, hidden_size=32,
        num_attention_heads=4, ffn_hidden_size=48, max_position_embeddings=0, activation="relu",
        normalization="rmsnorm", position_embedding_type="relative", bias=False, qkv_bias=False,
        decoder_start_token_id=0,
    ),
}  # fmt: skip


def tiny(shape: str) -> GPT | T5:
    torch.manual_seed(0)
    model = build_model(SHAPES[shape])
    assert not isinstance(model, BERT)
    for seed in range(3):
        shake(model, seed)
    return model.eval()


def prompts(count: int = 7, vocabulary: int = 61) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=THEIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A random model of `transformers`, ours of the same weights, and a token that ends rows."""
    config = THEIRS[request.param]
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    theirs = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    free, _ = of_transformers(theirs, prompts(4)[0], 4, EOS)
    return theirs, load_base(path), free[3]


def of_transformers(model, prompt: list[int], tokens: int, eos: int, **options):
    """Their tokens without the end of text, and the log-probabilities of their raw logits."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
        max_new_tokens=tokens, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True, use_cache=False, **options,
    )  # fmt: skip
    ids = out.sequences[0, -len(out.logits) :].tolist()
    scores = [
        logits[0].log_softmax(-1)[i].item() for i, logits in zip(ids, out.logits, strict=True)
    ]
    count = ids.index(eos) if eos in ids else len(ids)
    return ids[:count], scores[:count]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 9},
        {"repetition_penalty": 0.7, "min_new_tokens": 5},
    ],
)
def test_greedy_ids_and_their_logprobs_equal_those_of_transformers(pair, options):
    theirs, ours, eos = pair
    sampling = Sampling(
        tokens_to_generate=12,
        repetition_penalty=options.get("repetition_penalty", 1.0),
        min_tokens_to_generate=options.get("min_new_tokens", 0),
        compute_logprob=True,
    )
    rows = complete(ours, prompts(4), sampling, eos_ids=[eos], batch_size=3)
    assert options or len(rows[0].tokens) <= 3, "no row ended early"
    for row, prompt in zip(rows, prompts(4), strict=True):
        tokens, scores = of_transformers(theirs, prompt, 12, eos, **options)
        assert row.tokens == tokens
        assert row.logprobs == pytest.approx(scores, abs=1e-4)


def test_a_real_model_continues_as_under_transformers(shared: Path):
    path = shared / "data" / "models" / "stories260k"
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    batch = prompts(5, vocabulary=512)
    ours = generate(load_base(path), batch, 20, eos_ids=[EOS], batch_size=4)
    assert ours == [of_transformers(theirs, prompt, 20, EOS)[0] for prompt in batch]


DRAWN = Sampling(
    greedy=False,
    temperature=1.5,
    top_k=40,
    top_p=0.95,
    repetition_penalty=1.2,
    min_tokens_to_generate=2,
    tokens_to_generate=10,
    compute_logprob=True,
)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(shape: str, greedy: bool):
    model, batch = tiny(shape), prompts(9)
    model.add_adapter("a", BottleneckConfig(dim=4))
    for _, _, part in model.parts("a"):
        shake(part)
    model.set_active("a")
    sampling = Sampling(**{**vars(DRAWN), "greedy": greedy})

    free = complete(model, batch, sampling)
    eos = {row.tokens[place] for place, row in enumerate(free)}

    def run(numbers: list[int], batch_size: int):
        rows = [batch[number] for number in numbers]
        done = complete(model, rows, sampling, eos, batch_size, numbers=numbers)
        return dict(zip(numbers, done, strict=True))

    alone = {number: run([number], 1)[number] for number in range(9)}
    assert len({len(row.tokens) for row in alone.values()}) > 1, "no row finished early"
    for numbers, size in (([*range(9)], 9), ([8, 2, 5, 0, 7], 3), ([*range(8, -1, -1)], 4)):
        for number, row in run(numbers, size).items():
            assert row.tokens == alone[number].tokens
            assert row.logprobs == pytest.approx(alone[number].logprobs, abs=1e-4)


def test_the_seed_and_the_number_change_what_is_drawn():
    model, prompt = tiny("llama"), prompts(1)[0]

    def drawn(seed: int, numbers: list[int]) -> list[list[int]]:
        sampling = Sampling(greedy=False, tokens_to_generate=8, seed=seed)
        rows = complete(model, [prompt] * len(numbers), sampling, numbers=numbers)
        return [row.tokens for row in rows]

    one, two = drawn(1, [0, 1])
    assert one != two
    assert drawn(1, [0]) == [one]
    assert drawn(2, [0]) != [one]
    sampling = Sampling(greedy=False, tokens_to_generate=8, seed=1)
    assert [row.tokens for row in complete(model, [prompt] * 2, sampling)] == [one, two]


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.001}])
def test_the_narrowest_draw_is_greedy(option: dict[str, Any]):
    model, batch = tiny("gpt2"), prompts()
    sampling = Sampling(greedy=False, tokens_to_generate=8, **option)
    assert [row.tokens for row in complete(model, batch, sampling)] == generate(model, batch, 8)


def test_greedy_does_not_look_at_what_draws():
    model, batch = tiny("gpt2"), prompts()
    sampling = Sampling(temperature=3.0, top_k=7, top_p=0.3, tokens_to_generate=8)
    assert [row.tokens for row in complete(model, batch, sampling)] == generate(model, batch, 8)


def test_draws_follow_the_probabilities_of_the_model():
    model, prompt = tiny("llama"), [5, 6, 7]
    with torch.no_grad():
        chances = (model(torch.tensor([prompt]))[0, -1].double() / 2).softmax(-1)
    rows, sampling = 3000, Sampling(greedy=False, temperature=2.0, tokens_to_generate=1)
    drawn = complete(model, [prompt] * rows, sampling, batch_size=rows)
    counts = torch.bincount(torch.tensor([row.tokens[0] for row in drawn]), minlength=61)
    deviation = (rows * chances * (1 - chances)).sqrt()
    assert ((counts - rows * chances).abs() <= 5 * deviation + 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_gives_what_whole_passes_give(shape: str):
    model = tiny(shape)
    for prompt in prompts(3):
        tokens: list[int] = []
        for _ in range(6):
            with torch.no_grad():
                if isinstance(model, T5):
                    logits = model(torch.tensor([[0, *tokens]]), source=torch.tensor([prompt]))
                else:
                    logits = model(torch.tensor([[*prompt, *tokens]]))
            tokens.append(int(logits[0, -1].argmax()))
        assert generate(model, [prompt], 6) == [tokens]


def test_nothing_ends_a_row_before_the_minimum():
    model, batch = tiny("gpt2"), prompts()
    free = generate(model, batch, 8)
    eos = {row[1] for row in free}
    assert any(len(row) < 4 for row in generate(model, batch, 8, eos_ids=eos))
    sampling = Sampling(tokens_to_generate=8, min_tokens_to_generate=4)
    rows = complete(model, batch, sampling, eos_ids=eos)
    assert min(len(row.tokens) for row in rows) >= 4
    assert not any(eos & {*row.tokens[:4]} for row in rows)


def test_log_probabilities_are_the_models_own_and_made_when_asked_for():
    model, prompt = tiny("gpt2"), prompts(1)[0]
    (plain,) = complete(model, [prompt], Sampling(tokens_to_generate=5))
    assert plain.logprobs == []
    options = {**vars(DRAWN), "tokens_to_generate": 5, "repetition_penalty": 3.0}
    (row,) = complete(model, [prompt], Sampling(**options))
    with torch.no_grad():
        own = model(torch.tensor([prompt + row.tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = own.gather(-1, torch.tensor(row.tokens)[:, None])[:, 0].tolist()
    assert row.logprobs == pytest.approx(expected, abs=1e-4)


def test_stop_ends_a_row_with_the_token_that_completed_it():
    model, batch = tiny_gpt(), prompts(3)
    free = generate(model, batch, 8)
    stopped = generate(model, batch, 8, stop=lambda added: len(added) >= 3)
    assert stopped == [row[:3] for row in free]


def test_rows_end_where_the_positions_do():
    model = tiny_gpt(SHAPES["gpt2"])
    short, long = generate(model, [[5] * 50, [5] * 60], 20)
    assert len(long) == 64 - 60 + 1  # the last token needs no position of its own
    assert len(short) == 64 - 50 + 1


def test_a_t5_has_no_positions_that_end():
    (added,) = generate(tiny("t5"), [[5] * 200], 150)
    assert len(added) == 150


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


def test_a_bert_continues_nothing():
    shape = TransformerConfig(
        architecture="bert", vocab_size=61, num_layers=1, hidden_size=16, num_attention_heads=2,
        ffn_hidden_size=32, max_position_embeddings=64, transformer_block_type="post_ln",
    )  # fmt: skip
    with pytest.raises(UserError, match="a BERT does not continue text"):
        generate(build_model(shape), [[1, 2]], 4)
