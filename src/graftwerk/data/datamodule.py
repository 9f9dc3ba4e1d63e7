"""The files of a learning stage as the steps of its training and validation loops."""

from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from graftwerk.adapters.masks import chances
from graftwerk.data.dataset import AnswerDataset, Batch, collate
from graftwerk.data.encoding import Example, RowReport, padding_token
from graftwerk.data.sampler import MicroBatches, Mixture, StepSampler
from graftwerk.data.sources import Source, data_files, settings_of, sources_of
from graftwerk.data.tasks import encoders_from_config, longest_row
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AnswerDataModule", "data_files", "encoders_from_config", "longest_row"]


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
        virtual_tokens: that the run's adapters put before each row (`model.virtual_tokens`).

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
        virtual_tokens: int = 0,
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
        self._keys = {key: settings_of(model_cfg, key) for key in ("train_ds", "validation_ds")}

        def read(key: str, sources: list[Source], trainable: bool) -> AnswerDataset:
            encoders = encoders_from_config(
                model_cfg, tokenizer, shape, key=key, virtual_tokens=virtual_tokens
            )
            files = [source.files for source in sources]
            drops = self._keys[key].get("unlabelled") == "drop"
            rows = AnswerDataset(files, encoders, trainable, drops)
            if shape is not None:
                _check_lengths(rows, key, shape, virtual_tokens)
            return rows

        self.train_sources = sources_of(model_cfg, "train_ds")
        self.train_set = read("train_ds", self.train_sources, True)
        # `split: {val: 0}` leaves an empty validation file: nothing to validate on, no mistake.
        self.val_sources = [s for s in map(_with_rows, sources_of(model_cfg, "validation_ds")) if s]
        self.val_set = read("validation_ds", self.val_sources, False)
        self.sampler = self._sampler(
            self.train_set,
            shuffle=self._keys["train_ds"].get("shuffle", True),
            drop_last=self._keys["train_ds"].get("drop_last", False),
            weights=[source.weight for source in self.train_sources],
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
    def val_names(self) -> list[str]:
        """What the sources of the validation rows are called; a metric for each where several."""
        return [source.name for source in self.val_sources]

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
        return self._loader("train_ds", self.train_set, self.sampler)

    def val_dataloader(self) -> DataLoader | list:
        if not len(self.val_set):
            return []
        sampler = self._sampler(self.val_set, shuffle=False, drop_last=False, weights=[])
        return self._loader("validation_ds", self.val_set, sampler)

    def _sampler(
        self, rows: AnswerDataset, shuffle: bool, drop_last: bool, weights: list[float | None]
    ) -> StepSampler:
        given = [weight for weight in weights if weight is not None]
        for source, size in zip(self.train_sources, rows.sizes, strict=True) if given else ():
            if source.weight and not size:
                raise UserError(
                    f"model.data.train_ds: {source.name} has a weight of {source.weight:g} and no "
                    f"row to train on: set it to 0 or leave the file out"
                )
        return StepSampler(
            rows=len(rows),
            step_rows=self.step_rows,
            micro_batch_size=self.cfg.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=drop_last,
            mixture=Mixture(rows.sizes, given) if given else None,
        )

    def _loader(self, key: str, rows: AnswerDataset, sampler: StepSampler) -> DataLoader:
        workers = self._keys[key].get("num_workers", 0)
        named = key == "validation_ds" and len(self.val_sources) > 1
        seed = self.seed if key == "train_ds" else None
        return DataLoader(
            _Steps(rows, self.pad, self.pad_multiple, rows.filler, named, seed),
            # Not as `batch_sampler`: that one fetches each index apart. A step is one item.
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            pin_memory=self._keys[key].get("pin_memory", False) and torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )


class _Steps(torch.utils.data.Dataset[list[Batch]]):
    """The micro-batches of a step, by their row numbers.

    `named`: with the sources of labels; `seed`: with what dropout draws from.
    """

    def __init__(
        self,
        rows: AnswerDataset,
        pad: int,
        multiple: int,
        filler: Example,
        named: bool,
        seed: int | None,
    ) -> None:
        self.rows, self.pad, self.multiple, self.filler = rows, pad, multiple, filler
        self.named, self.seed = named, seed

    def __getitem__(self, step: MicroBatches) -> list[Batch]:
        batches, first = [self._batch(micro_batch) for micro_batch in step], step.first
        if self.seed is None:
            return batches
        for batch in batches:
            count = len(batch.tokens)
            batch.chance = chances(self.seed, range(first, first + count))
            first += count
        return batches

    def _batch(self, numbers: list[int]) -> Batch:
        examples = [self.rows[number] for number in numbers]
        origins = [self.rows.source_of(number) for number in numbers] if self.named else None
        return collate(examples, self.pad, self.multiple, self.filler, origins)


def _check_lengths(rows: AnswerDataset, key: str, shape: TransformerConfig, virtual: int) -> None:
    longest = rows.longest + virtual if len(rows) else 0
    if 0 < shape.max_position_embeddings < longest:
        raise UserError(
            f"model.data.{key}: the longest row needs {longest} positions, the model has "
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


def _with_rows(source: Source) -> Source | None:
    """A source without its empty files; None where nothing is left."""
    files = tuple(path for path in source.files if _has_rows(path))
    return Source(files, source.name, source.weight) if files else None


def _has_rows(path: str) -> bool:
    with open(path, "rb") as file:
        return any(not line.isspace() for line in file)
