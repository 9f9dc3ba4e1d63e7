"""Small models and adapters in the Hub's cache, under the names of the real ones."""

import hashlib
import os
import shutil
from pathlib import Path

import torch

from graftwerk.adapterhub import AutoAdapterModel
from graftwerk.checkpoints.huggingface import write_folder
from graftwerk.models import TransformerConfig, build_model
from tests.graftwerk.tiny import shake
from tests.graftwerk.tiny_families import bert_shape, bert_tokenizer

COMMIT = "c" * 40
WORDS = ["a", "fine", "dull", "film", "acting", "what", "day", "how"]
ADAPTERS = {"sst-2": "sentiment", "qqp": "sts", "qnli": "nli"}


def lay_out(cache: Path, repository: str, folder: Path) -> None:
    """Moves a folder's files into the cache as the Hub's library keeps them."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    (home / "blobs").mkdir()
    for file in folder.iterdir():
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    shutil.rmtree(folder)


def fill(cache: Path) -> None:
    """Puts `bert-base-uncased`, three adapters for it, and `gpt2` into a cache."""
    tokenizer = bert_tokenizer(WORDS)
    made = cache.parent / "made"
    write_base(bert_shape(len(tokenizer), "masked_lm"), made, tokenizer)
    model = AutoAdapterModel.from_pretrained(made)
    for dataset, task in ADAPTERS.items():
        model.add_adapter(dataset, config="pfeiffer[reduction_factor=4]")
        model.add_classification_head(dataset, id2label={0: "no", 1: "yes"})
        shake(model.base, seed=len(dataset))
        folder = cache.parent / dataset
        model.save_adapter(folder, dataset)
        lay_out(cache, f"AdapterHub/bert-base-uncased_{task}_{dataset}_pfeiffer", folder)
    lay_out(cache, "bert-base-uncased", made)
    gpt2 = TransformerConfig(
        vocab_size=61,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=48,
        max_position_embeddings=32,
    )
    write_base(gpt2, made, None)
    lay_out(cache, "gpt2", made)


def write_base(shape: TransformerConfig, path: Path, tokenizer) -> None:
    torch.manual_seed(0)
    model = build_model(shape)
    shake(model)
    parameters = dict(model.named_parameters())
    write_folder(shape, lambda name: parameters[name].detach(), path, tokenizer)
