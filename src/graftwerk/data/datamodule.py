"""The files of a learning stage as the steps of its training and validation loops."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from graftwerk.data.dataset import AnswerDataset, Batch, collate
from graftwerk.data.encoding import Encoder, RowReport
from graftwerk.data.sampler import MicroBatches, StepSampler
from graftwerk.data.templates import TaskTemplate
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerDataModule(LightningDataModule):
    """Yields for each optimizer step this rank's list of micro-batches, `list[Batch]`.

    A training step thus sees its whole share of the global batch and can divide by the label count
    of all ranks. All ranks have the same number of micro-batches in a step; in an epoch's last one
    some may be fillers without labels, so that every rank joins every collective.

    Lightning's own sampler must stay off (`use_distributed_sampler: False`). Where
    `model.data.validation_ds` is empty or its files hold no rows, `val_dataloader()` is an empty
    list: there is no validation.

    Args:
        model_cfg: the stage's `model` section; reads `global_batch_size`, `micro_batch_size`,
            `encoder_seq_length`, `task_templates`, `existing_tasks`, `new_tasks` and `data`.
        tokenizer: the base model's.
        rank, world_size: of the data-parallel group.
        seed: of the order of rows.
        accumulate: global batches in one optimizer step (`trainer.accumulate_grad_batches`).
        pad_multiple: pad rows to a multiple of so many tokens.
    """

    def __init__(
        self,
        model_cfg: DictConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        accumulate: int = 1,
        pad_multiple: int = 1,
    ) -> None:
        super().__init__()
        self.cfg = model_cfg
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.step_rows = model_cfg.global_batch_size * accumulate
        self.pad_multiple = pad_multiple
        self.pad = padding_token(tokenizer)
        check_batch_sizes(model_cfg.global_batch_size, model_cfg.micro_batch_size, world_size)
        encoders = encoders_from_config(model_cfg, tokenizer)
        self.train_set = AnswerDataset(data_files(model_cfg, "train_ds"), encoders)
        # `split: {val: 0}` leaves an empty validation file: nothing to validate on, no mistake.
        validation = [path for path in data_files(model_cfg, "validation_ds") if _has_rows(path)]
        self.val_set = AnswerDataset(validation, encoders, trainable=False)
        self.sampler = self._sampler(
            self.train_set,
            shuffle=self._data("shuffle", True),
            drop_last=self._data("drop_last", False),
        )
        if not len(self.sampler):
            raise UserError(
                f"model.data.drop_last is True and {len(self.train_set)} rows are fewer than one "
                f"step of {self.step_rows}: nothing to train on; lower model.global_batch_size"
            )

    @property
    def report(self) -> dict[str, RowReport]:
        """What became of the rows of the `train` and `validation` files."""
        return {"train": self.train_set.report, "validation": self.val_set.report}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return len(self.sampler)

    def set_consumed(self, samples: int) -> None:
        """Go on after `samples` rows of training, counted over all epochs and ranks.

        An epoch's last step may have fewer rows than the others: `samples_after` counts them.
        """
        self.sampler.set_consumed(samples)

    def samples_after(self, steps: int) -> int:
        """Rows of training that `steps` optimizer steps from the very start use, over all ranks."""
        return self.sampler.samples_after(steps)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, self.sampler)

    def val_dataloader(self) -> DataLoader | list:
        if not len(self.val_set):
            return []
        return self._loader(self.val_set, self._sampler(self.val_set, False, False))

    def _data(self, key: str, default: Any) -> Any:
        value = OmegaConf.select(self.cfg, f"data.{key}")
        return default if value is None else value

    def _sampler(self, rows: AnswerDataset, shuffle: bool, drop_last: bool) -> StepSampler:
        return StepSampler(
            rows=len(rows),
            step_rows=self.step_rows,
            micro_batch_size=self.cfg.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=drop_last,
        )

    def _loader(self, rows: AnswerDataset, sampler: StepSampler) -> DataLoader:
        workers = self._data("num_workers", 0)
        return DataLoader(
            _Steps(rows, self.pad, self.pad_multiple),
            # Not as `batch_sampler`: that one fetches each index apart. A step is one item.
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            pin_memory=self._data("pin_memory", False) and torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )


class _Steps(torch.utils.data.Dataset[list[Batch]]):
    """The micro-batches of a step, by their row numbers."""

    def __init__(self, rows: AnswerDataset, pad: int, multiple: int) -> None:
        self.rows, self.pad, self.multiple = rows, pad, multiple

    def __getitem__(self, step: MicroBatches) -> list[Batch]:
        return [
            collate([self.rows[index] for index in micro_batch], self.pad, self.multiple)
            for micro_batch in step
        ]


def encoders_from_config(
    model_cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Encoder]:
    """An encoder for each task of `existing_tasks` and `new_tasks`, or of all templates where both
    are empty. Evaluation uses it too, so that prompts are those of training."""
    entries: Sequence[Mapping[str, Any]] = OmegaConf.select(model_cfg, "task_templates") or []
    templates = [TaskTemplate.from_config(entry) for entry in entries]
    by_name = {template.taskname: template for template in templates}
    if not by_name:
        raise UserError("model.task_templates is empty; it must hold a template for each task")
    if len(by_name) < len(templates):
        raise UserError("model.task_templates has two entries of one taskname; keep one")
    tasks = [
        task
        for key in ("existing_tasks", "new_tasks")
        for task in OmegaConf.select(model_cfg, key) or []
    ] or list(by_name)
    for task in tasks:
        if task not in by_name:
            raise UserError(
                f"model.new_tasks or model.existing_tasks names {task!r}, which has no entry in "
                f"model.task_templates; these have one: {', '.join(by_name)}"
            )
    limit = OmegaConf.select(model_cfg, "encoder_seq_length")
    if not isinstance(limit, int) or limit < 2:
        raise UserError(f"model.encoder_seq_length must be a whole number above 1, not {limit!r}")
    add_bos = bool(OmegaConf.select(model_cfg, "data.add_bos"))
    add_eos = OmegaConf.select(model_cfg, "data.add_eos") is not False
    return {task: Encoder(by_name[task], tokenizer, limit, add_bos, add_eos) for task in tasks}


def padding_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token to fill rows with: nothing attends to it and no label is it, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Refuse a global batch that the ranks' micro-batches do not divide."""
    if global_batch_size < 1 or micro_batch_size < 1:
        raise UserError("model.global_batch_size and model.micro_batch_size must be at least 1")
    if global_batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"model.global_batch_size {global_batch_size} must be a multiple of micro_batch_size "
            f"{micro_batch_size} x {world_size} data-parallel ranks"
        )


def data_files(model_cfg: DictConfig, key: str) -> list[str]:
    """The paths of `model.data.<key>`: a list, or one path."""
    value = OmegaConf.select(model_cfg, f"data.{key}")
    if value is None:
        return []
    files = [value] if isinstance(value, str) else list(value)
    for path in files:
        if not isinstance(path, str):
            raise UserError(f"model.data.{key}: {path!r} is no path")
        if not os.path.isfile(path):
            raise UserError(
                f"model.data.{key}: {path} does not exist; the data_prep stage writes such files"
            )
    return files


def _has_rows(path: str) -> bool:
    with open(path, "rb") as file:
        return any(not line.isspace() for line in file)
