"""The files of a learning stage as the steps of its training and validation loops."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from graftwerk.data.dataset import AnswerDataset, Batch, collate
from graftwerk.data.encoding import Encoder, Example, RowEncoder, RowReport, padding_token
from graftwerk.data.question_answering import SpanEncoder
from graftwerk.data.sampler import MicroBatches, StepSampler
from graftwerk.data.seq2seq import Seq2SeqEncoder
from graftwerk.data.templates import TaskTemplate
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LENGTH = (
    512  # tokens of a row where neither the configuration nor the model bounds it; T5's
)


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
        shape: of the model that reads the rows: its family decides what becomes of them. None: a
            GPT of unknown size, as for a model that is made after its data.

    Raises:
        UserError: for data, tokenizer and lengths that do not fit each other or the model.
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
        shape: TransformerConfig | None = None,
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
        encoders = encoders_from_config(model_cfg, tokenizer, shape)
        self.train_set = AnswerDataset(data_files(model_cfg, "train_ds"), encoders)
        # `split: {val: 0}` leaves an empty validation file: nothing to validate on, no mistake.
        validation = [path for path in data_files(model_cfg, "validation_ds") if _has_rows(path)]
        self.val_set = AnswerDataset(validation, encoders, trainable=False)
        if shape is not None:
            _check_lengths(self.train_set, "train_ds", shape)
            _check_lengths(self.val_set, "validation_ds", shape)
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
            _Steps(rows, self.pad, self.pad_multiple, rows.filler),
            # Not as `batch_sampler`: that one fetches each index apart. A step is one item.
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            pin_memory=self._data("pin_memory", False) and torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )


class _Steps(torch.utils.data.Dataset[list[Batch]]):
    """The micro-batches of a step, by their row numbers."""

    def __init__(self, rows: AnswerDataset, pad: int, multiple: int, filler: Example) -> None:
        self.rows, self.pad, self.multiple, self.filler = rows, pad, multiple, filler

    def __getitem__(self, step: MicroBatches) -> list[Batch]:
        return [
            collate([self.rows[n] for n in micro_batch], self.pad, self.multiple, self.filler)
            for micro_batch in step
        ]


def encoders_from_config(
    model_cfg: DictConfig,
    tokenizer: "PreTrainedTokenizerBase",
    shape: TransformerConfig | None = None,
) -> Mapping[str, RowEncoder]:
    """An encoder for each task of `existing_tasks` and `new_tasks`, or of all templates where both
    are empty. Evaluation uses it too, so that prompts are those of training.

    `shape` is the model's: its architecture says how rows are encoded (None: as for a GPT).

    Raises:
        UserError: for templates that do not fit, a length that the model has no positions for, a
            tokenizer that does not fit the model's vocabulary.
    """
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
    if shape is not None:
        check_tokenizer(tokenizer, shape.vocab_size)
    limit = longest_row(model_cfg, shape)
    add_bos = bool(OmegaConf.select(model_cfg, "data.add_bos"))
    add_eos = OmegaConf.select(model_cfg, "data.add_eos") is not False

    def encoder(template: TaskTemplate) -> RowEncoder:
        if shape is None or shape.architecture == "gpt":
            return Encoder(template, tokenizer, limit, add_bos, add_eos)
        if shape.architecture == "t5":
            start = shape.decoder_start_token_id
            return Seq2SeqEncoder(template, tokenizer, limit, start, add_bos, add_eos)
        if add_bos or not add_eos:
            raise UserError(
                "data.add_bos and data.add_eos have no meaning for head question_answering, whose "
                "rows have the tokenizer's own special tokens: leave them at False and True"
            )
        return SpanEncoder(template, tokenizer, limit, shape.num_token_types)

    return {task: encoder(by_name[task]) for task in tasks}


def longest_row(model_cfg: DictConfig, shape: TransformerConfig | None) -> int:
    """`model.encoder_seq_length`; where it is absent, the model's positions, or 512 without a
    limit.

    Raises:
        UserError: for what is no length, and for one beyond the table of a model's positions.
    """
    limit = OmegaConf.select(model_cfg, "encoder_seq_length")
    if limit is None and shape is not None:
        return shape.max_position_embeddings or DEFAULT_LENGTH
    if not isinstance(limit, int) or limit < 2:
        raise UserError(f"model.encoder_seq_length must be a whole number above 1, not {limit!r}")
    if shape is None or shape.position_embedding_type != "learned_absolute":
        return limit
    if 0 < shape.max_position_embeddings < limit:
        raise UserError(
            f"model.encoder_seq_length={limit} is longer than the "
            f"{shape.max_position_embeddings} positions that the model has: lower it"
        )
    return limit


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Raises a UserError where a token of the tokenizer is beyond the model's vocabulary."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if size > vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: it has tokens up to number {size - 1}, the "
            f"model's vocabulary ends at {vocab_size - 1}: put the model's own tokenizer beside it"
        )


def _check_lengths(rows: AnswerDataset, key: str, shape: TransformerConfig) -> None:
    if 0 < shape.max_position_embeddings < rows.longest:
        raise UserError(
            f"model.data.{key}: the longest row needs {rows.longest} positions, the model has "
            f"{shape.max_position_embeddings}: set model.encoder_seq_length to that or lower"
        )


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
