"""What a learning stage leaves at `model.nemo_path`: adapters, or a whole model."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.checkpoints import nemo_tokenizer, save_adapters, save_base
from graftwerk.checkpoints.nemo import write_nemo
from graftwerk.checkpoints.nemo_config import from_config
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig
from graftwerk.training.learner import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_nemo(path: Path) -> bool:
    """Whether a result is written in NeMo's form; else it is a folder of ours."""
    return path.suffix == ".nemo"


def check_whole(
    config: TransformerConfig, tokenizer: "PreTrainedTokenizerBase", path: Path
) -> None:
    """Raises a UserError where a whole model cannot be written at the path as its name wants it."""
    if not is_nemo(path):
        return
    advice = "leave out `.nemo` to write a folder in our own layout"
    if config.architecture == "bert":
        raise UserError(f"model.nemo_path={path}: a BERT has no .nemo form: {advice}")
    try:
        from_config(config, mcore=config.architecture == "gpt")
        with _folder_of(tokenizer) as folder:
            nemo_tokenizer.section_for(folder, "")
    except UserError as error:
        raise UserError(f"model.nemo_path={path}: {error}; {advice}") from None


def write_result(learner: Learner, path: Path, extra: dict[str, Any]) -> int:
    """Writes what was trained, adapters and fusions or the whole model; returns the bytes on disk.

    `extra` are plain values to keep in an adapter's file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not learner.whole:
        return save_adapters(learner.model, learner.adapters, path, extra, learner.fusions)
    if not is_nemo(path):
        save_base(learner.model, learner.tokenizer, path)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    parameters = {name: p.detach().cpu() for name, p in learner.model.named_parameters()}
    config = learner.model.config
    with _folder_of(learner.tokenizer) as folder:
        write_nemo(config, parameters.__getitem__, path, folder, config.architecture == "gpt")
    return path.stat().st_size


@contextmanager
def _folder_of(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Path]:
    """The tokenizer's files."""
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as folder:
        tokenizer.save_pretrained(folder)
        yield Path(folder)
