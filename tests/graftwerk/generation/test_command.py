"""`python3 -m graftwerk generate` as it is typed."""

from pathlib import Path

import pytest
import torch

from graftwerk.adapters import IA3Config
from graftwerk.checkpoints import load_base, load_tokenizer, save_adapter, save_base
from graftwerk.errors import Exit, UserError
from graftwerk.generation import Sampling, complete, generate
from graftwerk.generation.command import FLAGS, main
from graftwerk.models import T5, TransformerConfig
from tests.graftwerk.learning_stage import WORDS, base  # noqa: F401
from tests.graftwerk.ranks import Rank
from tests.graftwerk.tiny import shake

PROMPT = " ".join(WORDS[:3])


def command(folder: Path, *arguments: str | Path) -> Rank:
    """The command in a process of its own, to its end, with what it said in a folder."""
    folder.mkdir(exist_ok=True)
    process = Rank(0, folder, {}, None, ["generate", *map(str, arguments)])
    process.wait()
    return process


@pytest.fixture(scope="module")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with a base whose answers are no echo of the prompt, an adapter on it, and a T5."""
    folder = tmp_path_factory.mktemp("models")
    gpt, tokenizer = load_base(base), load_tokenizer(base)
    for seed in range(30):
        shake(gpt.decoder, seed)  # pyright: ignore
    save_base(gpt, tokenizer, folder / "base")
    gpt.add_adapter("ia3", IA3Config())
    for seed in range(5):
        for _, _, part in gpt.parts("ia3"):
            shake(part, seed)
    save_adapter(gpt, "ia3", folder / "ia3.nemo")
    torch.manual_seed(0)
    t5 = T5(
        TransformerConfig(
            architecture="t5", vocab_size=len(tokenizer), num_layers=1, hidden_size=16,
            num_attention_heads=2, ffn_hidden_size=32, max_position_embeddings=0,
            normalization="rmsnorm", position_embedding_type="relative", bias=False, qkv_bias=False,
        )
    )  # fmt: skip
    for seed in range(10):
        shake(t5, seed)
    save_base(t5, tokenizer, folder / "t5")
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([*map(str, arguments), "--prompt", PROMPT]) == 0
    return capsys.readouterr().out


def text_of(path: Path, sampling: Sampling, end: bool = False) -> str:
    """What the prompt is continued by, made without the command; `end` closes the prompt."""
    model, tokenizer = load_base(path), load_tokenizer(path)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    prompt += [tokenizer.eos_token_id] if end else []
    (row,) = complete(model, [prompt], sampling, eos_ids=[tokenizer.eos_token_id])
    return str(tokenizer.decode(row.tokens, skip_special_tokens=True)).strip()


def test_it_prints_what_the_model_adds_with_and_without_an_adapter(models: Path, tmp_path: Path):
    gpt, tokenizer = load_base(models / "base"), load_tokenizer(models / "base")
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    (added,) = generate(gpt, [prompt], 4, eos_ids=[tokenizer.eos_token_id])
    given = ("--model", models / "base", "--prompt", PROMPT, "--max-new-tokens", "4")
    plain = command(tmp_path / "plain", *given)
    assert plain.wait() == 0, plain.complained
    assert plain.said.strip() == str(tokenizer.decode(added, skip_special_tokens=True)).strip()
    adapted = command(tmp_path / "adapted", *given, "--adapter", models / "ia3.nemo")
    assert adapted.wait() == 0, adapted.complained
    assert adapted.said != plain.said


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ((), Sampling(tokens_to_generate=64)),
        (("--repetition-penalty", "9"), Sampling(tokens_to_generate=64, repetition_penalty=9)),
        (
            ("--temperature", "2", "--top-k", "9", "--top-p", "0.9", "--max-new-tokens", "7"),
            Sampling(greedy=False, temperature=2, top_k=9, top_p=0.9, tokens_to_generate=7),
        ),
        (
            ("--top-k", "0", "--seed", "7", "--min-new-tokens", "60"),
            Sampling(greedy=False, seed=7, tokens_to_generate=64, min_tokens_to_generate=60),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["base", "t5"])
def test_options_say_how_a_gpt_and_a_t5_continue(models, capsys, kind, options, sampling):
    expected = text_of(models / kind, sampling, end=kind == "t5")
    assert expected
    assert printed(capsys, "--model", models / kind, *options).strip() == expected


def test_the_seed_is_of_the_draw(models: Path, capsys):
    def drawn(*options: str) -> str:
        return printed(capsys, "--model", models / "base", *options)

    hot = ("--temperature", "3", "--seed")
    assert drawn(*hot, "1") == drawn(*hot, "1") != drawn(*hot, "2")
    assert drawn("--temperature", "3") == drawn(*hot, "1234")
    main(["--model", str(models / "base"), "--prompt", PROMPT, "--seed", "1"])
    assert "--seed has no effect" in capsys.readouterr().err


def test_each_of_several_end_strings_ends_the_text(models: Path, capsys):
    given = ("--model", models / "base", "--temperature", "3", "--max-new-tokens", "12")
    words = printed(capsys, *given).split()
    first = next(n for n, word in enumerate(words) if n and word not in words[:n])
    ends = ("--end-string", "no such", "--end-string", words[first])
    assert printed(capsys, *given, *ends).split() == words[:first]


def test_logprobs_are_printed_below_the_text(models: Path, capsys):
    given = ("--model", models / "base", "--max-new-tokens", "3")
    text = printed(capsys, *given).strip()
    first, *rows = printed(capsys, *given, "--logprobs").splitlines()
    assert first == text
    assert [row.split()[1] for row in rows] == text.split()
    assert all(float(row.split()[0]) < 0 for row in rows)


def test_the_help_names_every_option(tmp_path: Path):
    run = command(tmp_path, "--help")
    assert run.wait() == 0
    for flag in (*FLAGS.values(), "--model", "--revision", "--adapter", "--prompt"):
        assert f"\n  {flag}" in run.said, flag


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/missing"}, "--model /missing: no such file"),
        ({"--adapter": "/missing.nemo"}, "--adapter /missing.nemo: no such file"),
        ({"--prompt": ""}, "--prompt holds no token"),
        ({"--max-new-tokens": "-3"}, "--max-new-tokens -3: give at least 1"),
        ({"--max-new-tokens": "many"}, "argument --max-new-tokens: invalid int value: 'many'"),
        ({"--min-new-tokens": "65"}, "--min-new-tokens 65: give at most 64"),
        ({"--temperature": "0"}, "--temperature 0.0: give 0.001 to 1000"),
        ({"--top-k": "-1"}, "--top-k -1: give at least 1, or 0 for all"),
        ({"--top-p": "1.2"}, "--top-p 1.2: give more than 0 and at most 1"),
        ({"--repetition-penalty": "0"}, "--repetition-penalty 0.0: give 0.001 to 1000"),
        ({"--seed": "-1", "--top-k": "2"}, "--seed -1: give 0 to"),
        ({"--end-string": ""}, "--end-string: an empty text"),
        ({"--beams": "3"}, "unrecognized arguments: --beams=3"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_option(change, message, base):  # noqa: F811
    options = {"--model": str(base), "--prompt": PROMPT} | change
    with pytest.raises(UserError) as raised:
        main([f"{key}={value}" for key, value in options.items()])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_wrong_input_exits_with_2_and_prints_nothing_else(base: Path, tmp_path: Path):  # noqa: F811
    run = command(tmp_path, "--model", base, "--prompt", PROMPT, "--top-p", "x")
    assert run.wait() == Exit.WRONG_INPUT
    assert "argument --top-p: invalid float value: 'x'" in run.complained
    assert run.complained.count("\n") == 1
    assert not run.said
