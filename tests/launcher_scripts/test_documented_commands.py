"""The documented commands of Base Command Platform, from files where they are expected to scores.

A stand-in for bcprun starts the processes. Base models are tiny and random, `.nemo` files as NeMo
lays them out; besides the documented words only those are given that fit a machine without GPUs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel

from graftwerk.data.tokenizers import build_tokenizer
from tests.graftwerk import nemo_files
from tests.graftwerk.tiny_families import bert_tokenizer
from tests.launcher_scripts import chain

ROOT = Path(__file__).resolve().parents[2]
MAIN = ROOT / "launcher_scripts/main.py"
STAGES = ("adapter_learning", "ia3_learning")
BASES = {
    "gpt3": "gpt3_5b/convert_nemo/results/megatron_gpt.nemo",
    "t5": "t5_220m/convert_nemo/results/megatron_t5.nemo",
}
COLOURS = ["red", "blue", "green", "grey"]
FAMILIES = ["gpt3", pytest.param("t5", marks=pytest.mark.long)]
MARK = "0123456789abcdef0123456789abcdef"  # the name that NeMo gives artifacts


def small(stage: str, devices: int = 1) -> list[str]:
    """For a machine without GPUs."""
    words = [f"trainer.devices={devices}", "trainer.accelerator=cpu", "trainer.precision=32"]
    if stage != "eval":
        words += ["trainer.max_steps=2", "model.data.num_workers=0"]
    else:
        words.append("model.inference.tokens_to_generate=3")
    return [f"{stage}.{word}" for word in words]


def rows(count: int) -> list[dict]:
    return [
        {
            "taskname": "squad",
            "id": str(n),
            "context": f"the ball is {COLOURS[n % 4]}",
            "question": "which colour ?",
            "answer": COLOURS[n % 4],
        }
        for n in range(count)
    ]


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def mount(tmp_path_factory) -> Path:
    """`data` with SQuAD's files, and `results` with a converted GPT and T5."""
    folder = tmp_path_factory.mktemp("mount")
    data = folder / "data/prompt_data/v1.1"
    data.mkdir(parents=True)
    for split, count in (("train", 24), ("val", 4)):
        write(data / f"squad_{split}.jsonl", rows(count))
    asked = [{k: v for k, v in row.items() if k != "answer"} for row in rows(6)]
    write(data / "squad_test.jsonl", asked)
    truth = [{"id": row["id"], "answer": [row["answer"]]} for row in rows(6)]
    write(data / "squad_test_ground_truth.jsonl", truth)
    torch.manual_seed(0)
    for family, place in BASES.items():
        (folder / "results" / place).parent.mkdir(parents=True)
        {"gpt3": gpt, "t5": t5}[family](folder / "results" / place)
    return folder


def gpt(path: Path) -> None:
    """A GPT with a byte-level vocabulary, padded, cut over two ranks."""
    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 2048}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(pieces), **shape, **ends))
    config, tensors = nemo_files.of_gpt2(model, pad=-len(pieces) % 256)
    config["tensor_model_parallel_size"] = 2
    files = {"vocab.json": json.dumps({p: n for n, p in enumerate(pieces)}), "merges.txt": ""}
    config["tokenizer"] = {
        "library": "megatron",
        "type": "GPT2BPETokenizer",
        "model": None,
        "vocab_file": f"nemo:{MARK}_vocab.json",
        "merge_file": f"nemo:{MARK}_merges.txt",
    }
    artifacts = {f"{MARK}_{name}": text.encode() for name, text in files.items()}
    nemo_files.lay_out(path, config, tensors, tp=2, artifacts=artifacts)


def t5(path: Path) -> None:
    """A T5 with a vocabulary of words."""
    words = ["context: question: answer:", *(" ".join(map(str, row.values())) for row in rows(8))]
    tokenizer = build_tokenizer("word", words)
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )
    config, tensors = nemo_files.of_t5(model)
    tokenizer.save_pretrained(str(path.parent))
    names = ("tokenizer.json", "tokenizer_config.json")
    artifacts = {f"{MARK}_{name}": (path.parent / name).read_bytes() for name in names}
    config["tokenizer"] = {
        "library": "huggingface",
        "files": [f"nemo:{name}" for name in artifacts],
    }
    nemo_files.lay_out(path, config, tensors, artifacts=artifacts)


def run(mount: Path, *words: str) -> str:
    """A command of the documentation, as a person types it; returns what it printed."""
    chain.program(mount / "bin", "bcprun", chain.BCPRUN)
    outside = ("SLURM_", "NGC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if not key.startswith(outside)}
    env |= {"PATH": f"{mount / 'bin'}:{env['PATH']}", "FAKE_BCP": str(mount / "calls")}
    places = [
        "cluster_type=bcp",
        f"launcher_scripts_path={ROOT / 'launcher_scripts'}",
        f"data_dir={mount / 'data'}",
        f"base_results_dir={mount / 'results'}",
    ]
    command = [sys.executable, str(MAIN), *words, *places, "++env_vars.OMP_NUM_THREADS=1"]
    done = subprocess.run(command, env=env, cwd=mount, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def learn(mount) -> Callable[[str, str], Path]:
    """`learn(family, stage)` runs a documented command, once; returns where its results are."""

    @cache
    def once(family: str, stage: str) -> Path:
        model = BASES[family].partition("/")[0]
        run(
            mount,
            f"{stage}={family}/squad",
            f"stages=[{stage}]",
            f"{stage}.run.model_train_name={model}",
            f"{stage}.model.language_model_path={mount / 'results' / BASES[family]}",
            *small(stage, devices=2 if (family, stage) == ("gpt3", STAGES[0]) else 1),
        )
        return mount / "results" / model / f"{stage}_squad/results"

    return once


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_each_documented_command_leaves_its_adapter_at_the_documented_place(
    mount, learn, family, stage
):
    folder = learn(family, stage)
    kind = {"gpt3": "gpt", "t5": "t5"}[family]
    name = f"megatron_{kind}_{stage.partition('_')[0]}.nemo"
    assert (folder / name).is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["base"] == str(mount / "results" / BASES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_scores_the_base_and_the_adapters_that_the_commands_left(mount, learn, family):
    for stage in STAGES:
        learn(family, stage)
    model = BASES[family].partition("/")[0]
    chosen = [f"{group}={family}/squad" for group in (*STAGES, "eval")]
    named = [f"{group}.run.model_train_name={model}" for group in (*STAGES, "eval")]
    run(mount, "stages=[eval]", *chosen, *named, *small("eval"))
    folder = mount / "results" / model / "eval_squad/results"
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert [result["name"] for result in results] == ["base", *STAGES]
    assert all(0 <= result["f1"] <= 100 for result in results)


@pytest.mark.long
def test_data_prep_learning_and_eval_of_a_bert_that_marks_answers(mount):
    words = ["ball", "colour", "is", "the", "which", "?", *COLOURS]
    tokenizer = bert_tokenizer(words)
    base = mount / "bert"
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.BertConfig(vocab_size=len(tokenizer), intermediate_size=24, **shape)
    hf.BertModel(config).save_pretrained(base)
    tokenizer.save_pretrained(str(base))
    for name, first in (("train-v1.1.json", 0), ("dev-v1.1.json", 24)):
        paragraphs = [paragraph(n) for n in range(first, first + 24)]
        squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (mount / name).write_text(json.dumps(squad))
    run(
        mount,
        "stages=[data_prep,adapter_learning,eval]",
        "adapter_learning=bert/squad",
        "eval=bert/squad",
        f"data_prep.source={mount}",
        f"data_prep.output_dir={mount / 'prepared'}",
        *(
            f"adapter_learning.model.data.{key}=[{mount}/prepared/squad_{split}.jsonl]"
            for key, split in (("train_ds", "train"), ("validation_ds", "val"))
        ),
        f"eval.model.data.test_ds=[{mount}/prepared/squad_test.jsonl]",
        f"eval.model.data.ground_truth_ds=[{mount}/prepared/squad_test_ground_truth.jsonl]",
        f"adapter_learning.model.language_model_path={base}",
        *small("adapter_learning"),
        *small("eval"),
    )
    folder = mount / "results/bert_110m/eval_squad/results"
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert [result["name"] for result in results] == ["base", "adapter_learning"]
    answers = (folder / "adapter_learning/predictions.jsonl").read_text().splitlines()
    contexts = {f"q{n}": paragraph(n)["context"] for n in range(24, 48)}
    assert answers
    assert all(line["pred"] in contexts[line["id"]] for line in map(json.loads, answers))


def paragraph(number: int) -> dict:
    one, two, three = (COLOURS[number // step % 4] for step in (1, 4, 16))
    context = f"the {one} ball is {two} which is {three}"
    answer = {"text": two, "answer_start": context.index(f"is {two}") + 3}
    question = {"id": f"q{number}", "question": "which colour ?", "answers": [answer]}
    return {"context": context, "qas": [question]}
