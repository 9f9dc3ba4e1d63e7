"""The files of a learning stage as the steps of its training and validation loops."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.packing import bound_to_rows, bound_to_texts
from graftwerk.data.dataset import AnswerDataset
from graftwerk.data.encoding import RowReport, padding_token
from graftwerk.data.micro_batches import MicroBatches, PackedBatches, PaddedBatches
from graftwerk.data.packed_sizes import SHARE, SIZE, Packing
from graftwerk.data.packing_report import PackingReport
from graftwerk.data.sampler import Mixture, StepSampler
from graftwerk.data.sources import Source, data_files, settings_of, sources_of
from graftwerk.data.tasks import encoders_from_config, longest_row
from graftwerk.data.token_cache import token_cache
from graftwerk.data.trees import Groups, SortedRows
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GPU_WORKERS = 2  # processes that make batches for a GPU; each is two steps ahead

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
        device: that computes. On a GPU rows are read ahead and page-locked by default, and packed
            micro-batches have one shape, as compiled kernels like it.
        leads: whether this is the first process of its host, which encodes for all of them.
        say: takes a line for the log.

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
        device: torch.device | str = "cpu",
        leads: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = model_cfg
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.step_rows = model_cfg.global_batch_size * accumulate
        self.pad_multiple = pad_multiple
        self.pad = padding_token(tokenizer)
        self.device = torch.device(device)
        self.family = "gpt" if shape is None else shape.architecture
        self.packing = Packing.of(model_cfg.data)
        self.shares = False  # rows that begin alike are computed once, where `arrange` allows it
        self.packing_report: PackingReport | None = None
        self._batch_sizes = model_cfg.global_batch_size, model_cfg.micro_batch_size, world_size
        check_batch_sizes(*self._batch_sizes, packed=self.packing is not None)
        self._keys = {key: settings_of(model_cfg, key) for key in ("train_ds", "validation_ds")}

        cache = token_cache(model_cfg.data.get("cache_dir"), leads, say)

        def read(key: str, sources: list[Source], trainable: bool) -> AnswerDataset:
            encoders = encoders_from_config(
                model_cfg, tokenizer, shape, key=key, virtual_tokens=virtual_tokens
            )
            files = [source.files for source in sources]
            drops = self._keys[key].get("unlabelled") == "drop"
            rows = AnswerDataset(files, encoders, trainable, drops, cache)
            if shape is not None:
                _check_lengths(rows, key, shape, virtual_tokens)
            return rows

        self.train_sources = sources_of(model_cfg, "train_ds")
        self.train_set = read("train_ds", self.train_sources, True)
        # `split: {val: 0}` leaves an empty validation file: nothing to validate on, no mistake.
        self.val_sources = [s for s in map(_with_rows, sources_of(model_cfg, "validation_ds")) if s]
        self.val_set = read("validation_ds", self.val_sources, False)
        self._own_prompt = 0  # virtual tokens of each text in a packed row; `arrange` knows
        self._measure_room()
        self.sampler = self._train_sampler()
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

    @property
    def groups(self) -> int:
        """What shuffling moves: so many groups of rows; 0: rows one by one."""
        return self.sampler.group_count

    def set_consumed(self, samples: int) -> None:
        """Go on after `samples` rows of training, counted over all epochs and ranks.

        An epoch's last step may have fewer rows than the others: `samples_after` counts them.
        """
        self.sampler.set_consumed(samples)

    def samples_after(self, steps: int) -> int:
        """Rows of training that `steps` optimizer steps from the very start use, over all ranks."""
        return self.sampler.samples_after(steps)

    def arrange(self, model: AdapterModel) -> list[str]:
        """Settles, before training, what packing has to know of the model; lines for the log.

        Rows are padded where packed ones would change what its adapters do, and are no trees where
        shared tokens would.

        Raises:
            UserError: where `share_prefixes` insists on trees, and where padded rows do not come to
                whole micro-batches.
        """
        if self.packing is None:
            return []
        lines, reason, padded = [], bound_to_texts(model), bound_to_rows(model)
        if reason and self.packing.share is True:
            raise UserError(f"{SHARE}=True: {reason}: set it to auto or false")
        if padded:
            return [self._pad_instead(padded)]
        if model.plan.own_prompts:
            self._own_prompt = model.virtual_tokens
            self._measure_room()
        if reason and self.packing.share == "auto":
            lines = [f"packing: rows that begin alike are computed apart: {reason}"]
        self.shares = bool(self.packing.share) and not reason
        groups = self._groups() if self.shares else []
        self.sampler = self._train_sampler(groups)
        self.packing_report = self._packing_report(groups)
        return [*lines, *self.packing_report.lines(self.packing.size)]

    def _measure_room(self) -> None:
        """Sets what packed rows have room for."""
        if self.packing is not None:
            sets = {"train_ds": self.train_set, "validation_ds": self.val_set}
            room, prompt = self.packing.room, self._own_prompt
            self._room = {key: room(rows, key, prompt) for key, rows in sets.items()}

    def _pad_instead(self, reason: str) -> str:
        """Takes rows out of packed rows again, before the first is made; a line for the log."""
        assert self.packing is not None
        said = f"rows are padded in spite of {SIZE}={self.packing.size}: {reason}"
        self.packing = None
        try:
            check_batch_sizes(*self._batch_sizes)
        except UserError as error:
            raise UserError(f"{said}; {error}") from None
        return f"packing: {said}"

    def _packing_report(self, groups: list[Groups]) -> PackingReport:
        batches = self._micro_batches("train_ds", self.train_set)
        assert isinstance(batches, PackedBatches)
        found, counted = [], 0
        for part in groups:
            found.append(part.of_rows + counted)
            counted += len(part)
        trees = np.concatenate(found) if groups else np.arange(len(self.train_set))
        return PackingReport.of(batches, self.sampler, trees)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train_ds", self.train_set, self.sampler)

    def val_dataloader(self) -> DataLoader | list:
        if not len(self.val_set):
            return []
        sampler = StepSampler(len(self.val_set), self.step_rows, shuffle=False)
        return self._loader("validation_ds", self.val_set, sampler)

    def _train_sampler(self, groups: Sequence[Groups] = ()) -> StepSampler:
        """`groups`: what shuffling keeps together, of each source where they are mixed."""
        rows, keys = self.train_set, self._keys["train_ds"]
        given = self._weights
        for source, size in zip(self.train_sources, rows.sizes, strict=True) if given else ():
            if source.weight and not size:
                raise UserError(
                    f"model.data.train_ds: {source.name} has a weight of {source.weight:g} and no "
                    f"row to train on: set it to 0 or leave the file out"
                )
        return StepSampler(
            rows=len(rows),
            step_rows=self.step_rows,
            seed=self.seed,
            shuffle=keys.get("shuffle", True),
            drop_last=keys.get("drop_last", False),
            mixture=Mixture(rows.sizes, given, groups or None) if given else None,
            groups=groups[0] if groups and not given else None,
        )

    @property
    def _weights(self) -> list[float]:
        """The shares of the sources; none where each row comes once."""
        return [source.weight for source in self.train_sources if source.weight is not None]

    def _groups(self) -> list[Groups]:
        """Training rows that begin alike: of each source, or of all where they are not mixed."""
        rows, size = self.train_set, self._room["train_ds"][0]
        sizes = rows.sizes if self._weights else [len(rows)]
        runs = pairwise(accumulate(sizes, initial=0))
        return [Groups.of(SortedRows.of(rows.tokens(*run)), size) for run in runs]

    def _micro_batches(self, key: str, rows: AnswerDataset) -> MicroBatches:
        trains = key == "train_ds"
        common: dict[str, Any] = {
            "rows": rows,
            "pad": self.pad,
            "multiple": self.pad_multiple,
            "micro_batch_size": self.cfg.micro_batch_size,
            "rank": self.rank,
            "world_size": self.world_size,
            "seed": self.seed if trains else None,
            "named": not trains and len(self.val_sources) > 1,
        }
        if self.packing is None:
            return PaddedBatches(**common)
        static = self.device.type == "cuda"
        how = {"share": self.shares, "static": static, "family": self.family}
        return PackedBatches(**common, room=self._room[key], prompt=self._own_prompt, **how)

    def _loader(self, key: str, rows: AnswerDataset, sampler: StepSampler) -> DataLoader:
        settings, gpu = self._keys[key], self.device.type == "cuda"
        workers = settings.get("num_workers", GPU_WORKERS if gpu else 0)
        return DataLoader(
            self._micro_batches(key, rows),
            # Not as `batch_sampler`: that one fetches each index apart. A step is one item.
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            pin_memory=settings.get("pin_memory", gpu) and torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )


def _check_lengths(rows: AnswerDataset, key: str, shape: TransformerConfig, virtual: int) -> None:
    longest = rows.longest + virtual if len(rows) else 0
    if 0 < shape.max_position_embeddings < longest:
        raise UserError(
            f"model.data.{key}: the longest row needs {longest} positions, the model has "
            f"{shape.max_position_embeddings}: set model.encoder_seq_length to that or lower"
        )


def check_batch_sizes(
    global_batch_size: int, micro_batch_size: int, world_size: int, packed: bool = False
) -> None:
    """Refuse a global batch that the ranks' micro-batches do not divide.

    `packed`: how many micro-batches its rows come to is not known from their number.
    """
    if global_batch_size < 1 or micro_batch_size < 1:
        raise UserError("model.global_batch_size and model.micro_batch_size must be at least 1")
    if not packed and global_batch_size % (micro_batch_size * world_size):
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
