"""The base model that a stage's `model` section names: opened, checked, then read."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from graftwerk.checkpoints import load_base, load_tokenizer
from graftwerk.checkpoints.base import open_checkpoint
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, TransformerConfig
from graftwerk.parallel.mesh import Mesh
from graftwerk.parallel.pipeline import Cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK_HEADS = ("question_answering",)  # heads that stages can train and evaluate


@dataclass(frozen=True)
class Base:
    """A base model of which nothing is read yet but its configuration.

    `config` is that of the model as the stage wants it, with the head. `fresh_head`: the files have
    no such head, and `load` makes a random one.
    """

    path: str
    revision: str | None
    config: TransformerConfig
    fresh_head: bool

    @classmethod
    def open(cls, path: str, revision: str | None = None, head: str | None = None) -> "Base":
        """Opens a checkpoint and checks that stages can use it with this head.

        Raises:
            UserError: for what is no checkpoint, a head on a model that has none, a BERT without
                one, and heads without a task.
        """
        with open_checkpoint(path, revision) as checkpoint:
            config = checkpoint.config
        allowed = f"set model.head to {', '.join(TASK_HEADS)}"
        if config.architecture != "bert":
            if head is not None:
                raise UserError(
                    f"model.head={head}: {path} is a {config.architecture} model, and heads are "
                    f"for BERT and RoBERTa: set it to null"
                )
            return cls(path, revision, config, fresh_head=False)
        wanted = head or config.head
        if wanted is None:
            raise UserError(f"{path} is a BERT without a head for a task: {allowed}")
        if wanted not in TASK_HEADS:
            said = f"model.head={head}" if head else f"{path} is a BERT with the head {wanted}"
            raise UserError(f"{said}: no stage trains or evaluates such a head yet: {allowed}")
        return cls(path, revision, replace(config, head=wanted), fresh_head=config.head != wanted)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base's own tokenizer."""
        return load_tokenizer(self.path, self.revision)

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        quantize: str | None = None,
        mesh: Mesh | None = None,
    ) -> GPT | T5 | BERT:
        """Reads the weights, of them those that this process has on a mesh.

        `seed` is of a fresh head, `quantize` as in `load_base`.
        """
        more: dict[str, Any] = {"revision": self.revision, "seed": seed, "quantize": quantize}
        if mesh is not None and mesh.pipeline.size > 1:
            cut = Cut.of(self.config, mesh.pipeline.size, mesh.split)
            more["wanted"] = lambda name: mesh.pipeline.rank in cut.stages_of(name)
        if mesh is not None:
            more["mesh"], more["sequence"] = mesh.tensor_devices, mesh.sequence
        return load_base(self.path, dtype, device, self.config.head, **more)


def revision_of(model: DictConfig) -> str | None:
    """`model.revision`, of a base from the Hub; `auto` that nothing has filled is none."""
    revision = model.get("revision")
    return None if revision in (None, "auto") else str(revision)
