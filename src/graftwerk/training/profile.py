"""Where the time of a training step goes: a clock over its phases, a trace, and rates.

Of a run's steps some are timed, without torch's profiler, which would slow them down; those behind
them are traced. What processes exchange within the phases, as tensor-parallel ones do, is read off
the trace and taken out of the phase.
"""

import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import Profiler
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from graftwerk.checkpoints.leftovers import remove_leftovers
from graftwerk.data.dataset import Batch
from graftwerk.data.jsonl import replacing
from graftwerk.models.flops import Flops, Training, Work
from graftwerk.training.module import LearningModule
from graftwerk.training.profile_table import PHASES, Rank, Table

LOADING = "train_dataloader_next"  # what Lightning calls waiting for a batch


@dataclass(frozen=True)
class Window:
    """Which of the steps of this process's run, counted from 0, are timed and which are traced.

    The first two, in which memory is allocated and kernels are made, are neither.
    """

    timed: range
    traced: range

    @classmethod
    def of(cls, left: int | None) -> "Window":
        """Of a run with so many steps left; None: without end. Of one step, both are that step."""
        left = 9 if left is None else min(left, 9)
        warm = min(2, (left - 1) // 2)
        traced = min(2, (left - warm) // 2)
        timed = range(warm, left - traced)
        return cls(timed, range(left - traced, left) if traced else timed)


@dataclass
class Clock:
    """Adds up the seconds of phases; each lasts until the next is marked. Waits for the device."""

    device: torch.device
    running: bool = False
    tracing: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    phase: str | None = None
    since: float = 0.0
    named: Any = None  # the phase in the trace

    def mark(self, phase: str | None) -> None:
        """From here on it is this phase; None: not part of a step."""
        if not self.running and not self.tracing and self.phase is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.phase is not None and self.running:
            self.seconds[self.phase] += now - self.since
        if self.named is not None:
            self.named.__exit__(None, None, None)
            self.named = None
        self.phase, self.since = phase, now
        if phase is not None and self.tracing:
            self.named = record_function(phase)
            self.named.__enter__()


class Loading(Profiler):
    """Lightning's hook of that name, for the one thing that only it can tell: waiting for data."""

    def __init__(self, begin: Callable[[], None]) -> None:
        super().__init__()
        self.begin = begin

    def start(self, action_name: str) -> None:
        if action_name.endswith(LOADING):
            self.begin()

    def stop(self, action_name: str) -> None:
        """The phase lasts until the step begins: a batch has to get to the device, too."""


class Profile(Callback):
    """Profiles a few steps of a run and writes, in `folder`, each process's trace
    (`trace_rank<N>.json.gz`, for Perfetto or chrome://tracing), and for all of them `table.json`
    and `table.txt`, which rank zero prints.

    All processes profile the same steps. Nothing that is trained changes: no random number is drawn
    and nothing is added to a sum.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trace: torch.profiler.profile | None = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes of itself to standard error

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LearningModule)
        self.clock = Clock(pl_module.placement.model.device)
        self.window, self.done = Window(range(0), range(0)), 0
        self.work: Work | None = None  # of timed steps: all columns
        self.useful: Work | None = None  # without padding
        self.rows = self.columns = self.row_tokens = 0
        pl_module.mark = self.clock.mark
        trainer.profiler = Loading(lambda: self.clock.mark("data"))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.max_steps if (trainer.max_steps or 0) > 0 else None
        self.window = Window.of(None if total is None else total - trainer.global_step)
        self.first = trainer.global_step + 1
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
        self._prepare()

    def _prepare(self) -> None:
        """For the next step, which begins with its batch."""
        self.clock.running = self.done in self.window.timed
        if self.trace is None and self.done in self.window.traced:
            activities = [ProfilerActivity.CPU]
            if self.clock.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.start()
            self.clock.tracing = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.clock.running:
            assert isinstance(pl_module, LearningModule)
            self.clock.mark(None)
            for micro in batch:
                self._count(pl_module, micro)
        self.clock.mark("rest")

    def _count(self, module: LearningModule, micro: Batch) -> None:
        model: Any = module.model
        inputs, kind = micro.inputs(), model.config.architecture
        work = Work.of(inputs, model.columns_ahead(model.is_packed(inputs)))
        useful = Work.useful(inputs, micro.num_tokens, kind)
        self.work = work if self.work is None else self.work + work
        self.useful = useful if self.useful is None else self.useful + useful
        self.columns += micro.tokens.numel() + (0 if micro.source is None else micro.source.numel())
        self.row_tokens += micro.row_tokens
        self.rows += micro.num_rows

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        self.clock.mark(None)
        self.done += 1
        if self.done < self.window.traced.stop:
            self._prepare()
        elif self.done == self.window.traced.stop:
            assert isinstance(pl_module, LearningModule)
            began = time.monotonic()
            self._finish(pl_module)
            pl_module.paused += time.monotonic() - began

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that `max_time` ends may end before the steps are through."""
        assert isinstance(pl_module, LearningModule)
        if 0 < self.done < self.window.traced.stop and self.work is not None:
            self._finish(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.clock.running, self.clock.tracing = False, False
        if self.trace is not None:
            self.trace.stop()
            self.trace = None

    # ---- what comes of it

    def _finish(self, module: LearningModule) -> None:
        trace, clock = self.trace, self.clock
        clock.running, clock.tracing, self.trace = False, False, None
        exchanged: dict[str, float] = {}
        rank = dist.get_rank() if dist.is_initialized() else 0
        if trace is not None:
            trace.stop()
            write_trace(trace, self.folder / f"trace_rank{rank}.json.gz")
            if dist.is_initialized():
                exchanged = exchange_shares(trace.events() or ())
        own = self._rank(module, exchanged)
        ranks: list[Any] = [own]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        if rank == 0:
            timed = range(self.first + self.window.timed.start, self.first + self.window.timed.stop)
            table = Table(ranks, timed, str(clock.device.type), dtype_of(module))
            table.write(self.folder)
            table.show()

    def _rank(self, module: LearningModule, exchanged: dict[str, float]) -> Rank:
        """This process's share: processes that share a model share its tokens and operations."""
        mesh = module.mesh
        sharers = mesh.tensor.size * mesh.pipeline.size
        training = Training.of(module.model, module.placement.numel)
        needed, useful = (
            Flops() if work is None else training.flops(work) / sharers
            for work in (self.work, self.useful)
        )
        seconds = dict(self.clock.seconds)
        for phase, share in exchanged.items():
            moved = seconds[phase] * share
            seconds[phase] -= moved
            seconds["communication"] += moved
        if dist.is_initialized():
            dist.barrier()  # processes on one machine share its cores: all measure at once
        return Rank(
            seconds=seconds,
            rows=self.rows / sharers,
            columns=self.columns / sharers,
            row_tokens=self.row_tokens / sharers,
            forward=needed.forward,
            backward=needed.backward,
            useful=useful.total,
            peak=measured_peak(self.clock.device, dtype_of(module)),
        )


def dtype_of(module: LearningModule) -> torch.dtype:
    """The type in which the model multiplies."""
    model: Any = module.model
    return torch.bfloat16 if module.settings.autocast else model.dtype


def write_trace(trace: torch.profiler.profile, path: Path) -> None:
    """Writes a Chrome trace, compressed; whole or not at all."""
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as folder, replacing(path) as file:
        plain = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(plain))
        with open(plain, "rb") as written, gzip.open(file, "wb") as packed:
            shutil.copyfileobj(written, packed)


def exchange_shares(events: Iterable[Any]) -> dict[str, float]:
    """For each phase the share of its time in which this process exchanges something; the events
    are those of torch's profiler.

    On a GPU that is where the kernels of NCCL run, also beside others; on a CPU until gloo is done.
    """
    spans: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
    sent: list[tuple[float, float]] = []
    for event in events:
        span = event.time_range.start, event.time_range.end
        on_device = event.device_type.name != "CPU"
        if event.name.startswith("gloo:") or (on_device and event.name.startswith("nccl")):
            sent.append(span)
        elif event.name in spans and not on_device:
            spans[event.name].append(span)
    shares = {}
    for phase, own in spans.items():
        whole = sum(stop - start for start, stop in own)
        if whole and phase != "communication":
            shares[phase] = overlap(own, sent) / whole
    return shares


def overlap(spans: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """How long some of `others` run within `spans`, which do not overlap each other."""
    total = 0.0
    for start, stop in spans:
        reached = start
        for begin, end in sorted(others):
            begin, end = max(begin, reached), min(end, stop)
            if end > begin:
                total += end - begin
                reached = end
    return total


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of large square matrix products, the best of some: what this device
    really reaches, here and now, in this type.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # not torch's own: training draws from that
    made = torch.randn(2, size, size, generator=generator, device=device).to(dtype)
    best, began = float("inf"), time.perf_counter()
    with torch.no_grad():
        torch.mm(made[0], made[1])
        while time.perf_counter() - began < seconds or best == float("inf"):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            torch.mm(made[0], made[1])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
