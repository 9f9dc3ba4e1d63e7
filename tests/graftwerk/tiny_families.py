"""Tiny T5 and BERT bases on disk, and tasks that an adapter on them learns in a second."""

import json
import random
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from graftwerk.checkpoints import save_base
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.models import TransformerConfig, build_model

FILLERS = [f"w{n}" for n in range(8)]
MARKS = [f"x{n}" for n in range(4)]
TEMPLATE = "context: {context} question: {question} answer: {answer}"
WORDS = ["context", "question", "answer", ":", "which", "?", *FILLERS, *MARKS]
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48}


def bert_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """WordPiece over whole words and letters, in BERT's form: `[CLS] a [SEP] b [SEP]`."""
    letters = sorted({letter for word in words for letter in word})
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces = [*special, *dict.fromkeys([*words, *letters, *(f"##{x}" for x in letters)])]
    core = Tokenizer(models.WordPiece({p: n for n, p in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def t5_shape(vocab_size: int) -> TransformerConfig:
    return TransformerConfig(
        architecture="t5",
        vocab_size=vocab_size,
        max_position_embeddings=0,
        normalization="rmsnorm",
        activation="relu",
        bias=False,
        qkv_bias=False,
        normalize_attention_scores=False,
        position_embedding_type="relative",
        **SHAPE,
    )


def bert_shape(vocab_size: int, head: str | None = None) -> TransformerConfig:
    return TransformerConfig(
        architecture="bert",
        vocab_size=vocab_size,
        max_position_embeddings=64,
        transformer_block_type="post_ln",
        final_layernorm=False,
        embedding_layernorm=True,
        activation="gelu",
        num_token_types=2,
        head=head,
        **SHAPE,
    )


def save_tiny(family: str, path: Path) -> Path:
    """A random `t5` or headless `bert` in our own layout, with its tokenizer."""
    if family == "t5":
        tokenizer = build_tokenizer("word", [" ".join(WORDS)])
        shape = t5_shape(len(tokenizer))
    else:
        tokenizer = bert_tokenizer()
        shape = bert_shape(len(tokenizer))
    model = build_model(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    save_base(model, tokenizer, path)
    return path


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_rows(count: int, seed: int, marks: list[str] = MARKS) -> list[dict]:
    """Rows that ask which mark stands among a context's fillers."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.sample(FILLERS, rng.randint(2, 5))
        answer = rng.choice(marks)
        words.insert(rng.randrange(len(words) + 1), answer)
        row = {"taskname": "mark", "id": f"q{number}", "context": " ".join(words)}
        rows.append({**row, "question": "which ?", "answer": answer})
    return rows


def as_family(cfg: DictConfig, base: Path, folder: Path, steps: int = 60) -> DictConfig:
    """The stage of `learning_stage.cfg` on another base and its task."""
    changed = {
        "trainer": {"max_epochs": -1, "max_steps": steps, "val_check_interval": 1.0},
        "model": {
            "language_model_path": str(base),
            "new_tasks": ["mark"],
            "task_templates": [{"taskname": "mark", "prompt_template": TEMPLATE}],
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "data": {
                "train_ds": [write_lines(folder / "mark_train.jsonl", task_rows(200, 1))],
                "validation_ds": [write_lines(folder / "mark_val.jsonl", task_rows(24, 2))],
            },
            "adapter_tuning": {"adapter_dim": 16, "adapter_dropout": 0.0},
        },
    }
    made = OmegaConf.merge(cfg, changed)
    assert isinstance(made, DictConfig)
    if "bert" in str(base.name):
        made.model.head = "question_answering"
    return made


def eval_cfg(learned: DictConfig, folder: Path) -> DictConfig:
    """An eval stage of the base and the adapter that a learning stage has left."""
    rows = task_rows(24, 3)
    asked = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
    truth = [{"id": row["id"], "answer": [row["answer"]]} for row in rows]
    return OmegaConf.create(
        {
            "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "precision": 32},
            "exp_manager": {"explicit_log_dir": str(folder / "eval")},
            "model": {
                "seed": 1,
                "language_model_path": learned.model.language_model_path,
                "head": learned.model.get("head"),
                "adapters": [{"name": "mine", "path": learned.model.nemo_path}],
                "evaluate_base": True,
                "task_templates": learned.model.task_templates,
                "encoder_seq_length": 64,
                "tensor_model_parallel_size": 1,
                "pipeline_model_parallel_size": 1,
                "data": {
                    "test_ds": [write_lines(folder / "mark_test.jsonl", asked)],
                    "ground_truth_ds": [write_lines(folder / "mark_truth.jsonl", truth)],
                    "batch_size": 8,
                    "add_bos": False,
                },
                "inference": {"greedy": True, "tokens_to_generate": 4, "end_strings": []},
            },
        }
    )
