"""`python3 -m graftwerk generate` as it is typed."""

import subprocess
import sys
from pathlib import Path

import pytest

from graftwerk.adapters import IA3Config
from graftwerk.checkpoints import load_base, load_tokenizer, save_adapter, save_base
from graftwerk.generation import generate
from tests.conftest import ROOT
from tests.graftwerk.learning_stage import WORDS, base  # noqa: F401
from tests.graftwerk.tiny import shake

PROMPT = " ".join(WORDS[:3])


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graftwerk", "generate", *map(str, arguments)],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A base whose answers are no echo of the prompt, and an adapter that changes them."""
    gpt, tokenizer = load_base(base), load_tokenizer(base)
    for seed in range(30):
        shake(gpt.decoder, seed)
    save_base(gpt, tokenizer, tmp_path / "base")
    gpt.add_adapter("ia3", IA3Config())
    for seed in range(5):
        for _, _, part in gpt.parts("ia3"):
            shake(part, seed)
    save_adapter(gpt, "ia3", tmp_path / "ia3.nemo")
    return tmp_path / "base"


def test_it_prints_what_the_model_adds_with_and_without_an_adapter(model: Path, tmp_path: Path):
    gpt, tokenizer = load_base(model), load_tokenizer(model)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    (added,) = generate(gpt, [prompt], 4, eos_ids=[tokenizer.eos_token_id])
    plain = command("--model", model, "--prompt", PROMPT, "--max-new-tokens", "4")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() == str(tokenizer.decode(added, skip_special_tokens=True)).strip()
    adapted = command(
        *("--model", model, "--adapter", tmp_path / "ia3.nemo", "--prompt", PROMPT),
        *("--max-new-tokens", "4"),
    )
    assert adapted.returncode == 0, adapted.stderr
    assert adapted.stdout != plain.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/missing"}, "--model /missing: no such file"),
        ({"--adapter": "/missing.nemo"}, "--adapter /missing.nemo: no such file"),
        ({"--prompt": ""}, "--prompt holds no token"),
        ({"--max-new-tokens": "-3"}, "--max-new-tokens -3: give at least 1"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_option(
    change: dict[str, str],
    message: str,
    base: Path,  # noqa: F811
):
    options = {"--model": str(base), "--prompt": PROMPT} | change
    run = command(*(f"{key}={value}" for key, value in options.items()))
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert not run.stdout
