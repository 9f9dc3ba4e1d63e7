"""A base model written in any of the formats, from a function that gives its parameters."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftwerk.checkpoints.base import write_own
from graftwerk.models import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("nemo", "huggingface", "graftwerk")
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_checkpoint(
    config: TransformerConfig,
    read: Callable[[str], Tensor],
    path: Path,
    format: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
    mcore: bool = True,
) -> None:
    """Writes a checkpoint at `path`; one parameter is in memory at a time.

    Args:
        read: one whole parameter of ours by name.
        format: one of `FORMATS`.
        dtype: of the written weights; None: as read.
        architecture: of `huggingface`: the family; None: the first that can say all of the config.
        mcore: of `nemo`: a GPT's names are those of Megatron core.

    Raises:
        UserError: where the format cannot hold the model.
    """
    if format == "graftwerk":
        write_own(config, read, path, tokenizer, dtype)
    elif format == "huggingface":
        from graftwerk.checkpoints import huggingface

        huggingface.write_folder(config, read, path, tokenizer, architecture, dtype)
    else:
        from graftwerk.checkpoints import nemo

        with tempfile.TemporaryDirectory(prefix="graftwerk-") as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            place = Path(folder) if tokenizer is not None else None
            nemo.write_nemo(
                config, read, path, place, mcore and config.architecture == "gpt", dtype
            )
