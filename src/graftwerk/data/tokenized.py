"""Rows of a JSONL file to the arrays of their examples, by one process or by several.

What runs in the processes of their own is imported here: nothing of this module knows torch.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from graftwerk.data.columns import FIELDS
from graftwerk.data.encoding import (
    Encoded,
    Example,
    RowDropped,
    RowEncoder,
    RowReport,
    RowUnlabelled,
    task_of,
)
from graftwerk.data.jsonl import Part, Row, parts_of, read_rows
from graftwerk.data.templates import RowError
from graftwerk.errors import UserError

ROWS_AT_ONCE = 512  # enough for the tokenizer to use all cores, little enough to stay out of memory
NUMBERS_AT_ONCE = 2**20  # of all fields, that wait to be written
BYTES_TOLD = 2**20  # of a file, that a process reads before it says so
# Of a file, that make a process of its own worth its start: some seconds of encoding.
BYTES_OF_A_PROCESS = 32 * 2**20

Path_ = str | os.PathLike[str]
Advance = Callable[[int], object]  # is told how many bytes of the file are done
Block = dict[str, list[np.ndarray]]  # some examples by field


@dataclass(frozen=True)
class Encoding:
    """How the rows of files become examples.

    Args:
        encoders: by task name. Rows of other tasks are dropped and counted.
        drop_unlabelled: count rows in which nothing is to be learned; otherwise one is an error.
    """

    encoders: Mapping[str, RowEncoder]
    drop_unlabelled: bool = False

    @property
    def fields(self) -> list[str]:
        """Those of `FIELDS` that the examples have."""
        return [name for name, values in _arrays(self.filler).items() if values is not None]

    @property
    def filler(self) -> Example:
        """An example that weighs nothing."""
        return next(iter(self.encoders.values())).filler

    def blocks(
        self,
        path: Path_,
        report: RowReport,
        part: Part | None = None,
        advance: Advance = lambda size: None,
    ) -> Iterator[Block]:
        """The examples of a file or a part of it, in its order; `report` counts its rows.

        Raises:
            UserError: for a row that cannot be used; names file, line and reason.
        """
        block: Block = {name: [] for name in self.fields}
        held = 0
        for example in self._examples(path, report, part, advance):
            arrays = _arrays(example)
            for name, waiting in block.items():
                values = arrays[name]
                assert values is not None, f"an example without {name} among others"
                waiting.append(values)
                held += len(values)
            if held >= NUMBERS_AT_ONCE:
                yield block
                block, held = {name: [] for name in block}, 0
        if block["tokens"]:
            yield block

    def _examples(
        self, path: Path_, report: RowReport, part: Part | None, advance: Advance
    ) -> Iterator[Example]:
        rows = self._sound_rows(path, report, part, advance)
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            by_task: dict[str, list[int]] = {}
            for index, (_, task, _) in enumerate(chunk):
                by_task.setdefault(task, []).append(index)
            outcomes: dict[int, Encoded | RowDropped] = {}
            for task, members in by_task.items():
                encoded = self._encode(path, task, [chunk[index] for index in members])
                outcomes |= zip(members, encoded, strict=True)
            for index, (number, _, _) in enumerate(chunk):
                outcome = outcomes[index]
                if isinstance(outcome, RowDropped):
                    self._check_dropped(outcome, f"{path}, line {number}")
                    report.dropped[str(outcome)] += 1
                else:
                    report.add(outcome)
                    yield from outcome.examples

    def _encode(
        self, path: Path_, task: str, members: Sequence[tuple[int, str, Row]]
    ) -> list[Encoded | RowDropped]:
        encoder, rows = self.encoders[task], [row for _, _, row in members]
        try:
            return list(encoder.encode_all(rows))
        except RowError as error:
            for number, _, row in members:
                try:
                    list(encoder.encode_all([row]))
                except RowError as reason:
                    raise UserError(f"{path}, line {number}: {reason}") from None
            raise AssertionError("a row that is refused among others alone") from error

    def _check_dropped(self, dropped: RowDropped, where: str) -> None:
        if isinstance(dropped, RowUnlabelled) and not self.drop_unlabelled:
            raise UserError(
                f"{where}: {dropped}: nothing is to be learned from the row; mend or remove it, or "
                f"set model.data.unlabelled: drop"
            )

    def _sound_rows(
        self, path: Path_, report: RowReport, part: Part | None, advance: Advance
    ) -> Iterator[tuple[int, str, Row]]:
        """(line, task, row) of rows that have all they need; the first that does not ends it."""
        for number, row in read_rows(path, part, advance):
            report.rows += 1
            task = task_of(row, self.encoders)
            if task is None:
                raise UserError(
                    f"{path}, line {number}: no field 'taskname', and there are several tasks: "
                    f"{', '.join(self.encoders)}"
                )
            if task not in self.encoders:
                report.dropped[f"of task {task!r}, not in existing_tasks or new_tasks"] += 1
                continue
            try:
                self.encoders[task].check(row)
            except RowError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            yield number, task, row


def _arrays(example: Example) -> dict[str, np.ndarray | None]:
    """An example by field, each laid flat."""
    labels = [number for label in example.labels for number in label[:2]]
    values = example.tokens, labels, example.source, example.token_types, example.span
    return {
        name: None if numbers is None else np.array(numbers, kind)
        for (name, kind), numbers in zip(FIELDS.items(), values, strict=True)
    }


def check_not_empty(path: Path_, report: RowReport) -> None:
    """Raises a UserError for a file that has no row at all."""
    if not report.rows:
        raise UserError(f"{path}: the file is empty; it must hold one JSON object a line")


def write_encoded(
    encoding: Encoding, path: Path_, folder: Path, advance: Advance, processes: int | None = None
) -> tuple[list[Path], RowReport]:
    """Encodes a file into Arrow files, whose rows one behind the other are the file's examples.

    Args:
        processes: that share the file; None: as many as are worth it, one for each core at most.

    Raises:
        UserError: as `Encoding.blocks`, for the first row that cannot be used.
        OSError: where the files cannot be written.
    """
    parts = parts_of(path, processes or worthwhile_processes(path))
    names = [folder / f"{n:05d}-of-{len(parts):05d}.arrow" for n in range(len(parts))]
    jobs = list(zip(parts, names, strict=True))
    if len(jobs) > 1:
        reports = _in_processes(encoding, path, jobs, advance)
    else:
        reports = [_write_part(encoding, path, part, name, advance) for part, name in jobs]
    whole = RowReport()
    for report in reports:
        whole.join(report)
    check_not_empty(path, whole)
    return names, whole


def worthwhile_processes(path: Path_) -> int:
    """How many processes encode a file fastest, by its size and the cores of this one."""
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return max(min(os.path.getsize(path) // BYTES_OF_A_PROCESS, len(cores)), 1)


def _write_part(
    encoding: Encoding, path: Path_, part: Part, target: Path, advance: Advance
) -> RowReport:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    report = RowReport()
    kinds = {name: List(Value(FIELDS[name].name)) for name in encoding.fields}
    with ArrowWriter(path=str(target), features=Features(kinds)) as writer:
        for block in encoding.blocks(path, report, part, advance):
            # In one piece: a chunk of its own when it is mapped.
            writer.write_batch(block, writer_batch_size=len(block["tokens"]))
        writer.finalize()
    return report


def _in_processes(
    encoding: Encoding, path: Path_, jobs: Sequence[tuple[Part, Path]], advance: Advance
) -> list[RowReport]:
    """A process for each part. Of several parts with an error the first's counts."""
    # Not forked: this process may have threads, of the tokenizer and of the devices.
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    running: dict[Connection, int] = {}
    outcomes: dict[int, RowReport | Exception] = {}
    try:
        for number, (part, target) in enumerate(jobs):
            here, there = context.Pipe(duplex=False)
            given = (there, encoding, path, part, target)
            process = context.Process(target=_encode_apart, args=given, daemon=True)
            process.start()
            there.close()
            processes.append(process)
            running[here] = number
        while running:
            for end in wait(list(running)):
                assert isinstance(end, Connection)
                said = _heard(end)
                if isinstance(said, int):
                    advance(said)
                else:
                    outcomes[running.pop(end)] = said
    finally:
        for process in processes:
            process.terminate()
            process.join()
    reports = []
    for _, outcome in sorted(outcomes.items()):
        if isinstance(outcome, Exception):
            raise outcome
        reports.append(outcome)
    return reports


def _heard(end: Connection) -> int | RowReport | Exception:
    try:
        return end.recv()
    except EOFError:
        return OSError("a process that encoded rows was ended")


def _encode_apart(
    told: Connection, encoding: Encoding, path: Path_, part: Part, target: Path
) -> None:
    """Encodes a part, and tells how far it is, then the report or what went wrong."""
    # It ends with its parent, which looks after the signals that all processes of a job get.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process
    waiting = 0

    def advance(size: int) -> None:
        nonlocal waiting
        waiting += size
        if waiting >= BYTES_TOLD:
            told.send(waiting)
            waiting = 0

    outcome: RowReport | Exception
    try:
        outcome = _write_part(encoding, path, part, target, advance)
    except (UserError, OSError) as error:
        outcome = error
    except Exception:
        outcome = RuntimeError(traceback.format_exc())
    with suppress(BrokenPipeError):  # the parent is gone
        told.send(waiting)
        told.send(outcome)
