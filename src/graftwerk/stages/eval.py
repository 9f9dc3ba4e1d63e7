"""The `eval` stage: base, adapters and tuned models answer the same questions, side by side.

Writes `<name>/predictions.jsonl` for each and `metrics.json` to `exp_manager.explicit_log_dir`.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf, open_dict
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from graftwerk.adapters import Composition, Stack
from graftwerk.adapters.composition import branches, columns, fusions, last, names, parse
from graftwerk.checkpoints.adapter import load_adapters, read_adapters
from graftwerk.checkpoints.adapter_form import AdapterFile, method_of
from graftwerk.checkpoints.base_path import base_of
from graftwerk.checkpoints.leftovers import remove_leftovers
from graftwerk.data.datamodule import data_files, encoders_from_config
from graftwerk.data.jsonl import read_rows, replacing, write_json
from graftwerk.errors import Exit, UserError
from graftwerk.evaluation.metrics import squad_scores
from graftwerk.evaluation.predict import Answer, Answerer, Questions
from graftwerk.evaluation.spans import SpanAnswerer
from graftwerk.generation import Sampling
from graftwerk.generation.sharing import Compiler
from graftwerk.models import BERT, GPT, T5
from graftwerk.models.compiling import allow_graphs, why_not_compiled
from graftwerk.parallel.mesh import Axis
from graftwerk.parallel.placement import Placement
from graftwerk.training.base import Base, revision_of
from graftwerk.training.frozen import add_frozen, check_fusions, columns_of, read_frozen
from graftwerk.training.goal import check_blocks, check_layers
from graftwerk.training.peers import Peers
from graftwerk.training.stopping import Interrupted
from graftwerk.training.trainer import device_of, precision_of
from graftwerk.training.world import World

BASE = "base"
SPLITS = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
# What a learning stage told of an adapter in its `summary.json`, to stand beside the scores.
LEARNED = ("trainable_parameters", "total_parameters", "steps", "seconds", "file_bytes")


def run(cfg: DictConfig) -> int:
    """Runs the stage on a resolved config (`trainer`, `exp_manager`, `model`).

    Returns the exit code: 0 done, 75 stopped by a signal, of any of its processes, and to be run
    again. Answers are written when a model has given all of its own, so none are half-written.

    Raises:
        UserError: for input that a person can mend, before anything is written.
    """
    world = World.from_environment()
    try:
        with Peers(world):
            return _run(cfg, world)
    except Interrupted as reason:
        world.say(f"stopped by {reason}: start again to repeat it")
        return Exit.REQUEUE


def _run(cfg: DictConfig, world: World) -> int:
    check(cfg)
    world.check(cfg.trainer.get("devices") or 1, cfg.trainer.get("num_nodes") or 1)
    model_cfg, folder = cfg.model, Path(cfg.exp_manager.explicit_log_dir)
    sampling = Sampling.from_keys(model_cfg.inference, model_cfg.seed)
    truth = read_truth(
        data_files(model_cfg, "ground_truth_ds"), model_cfg.data.get("label_key") or "answer"
    )
    paths = {str(adapter.name): str(adapter.path) for adapter in model_cfg.adapters}
    compositions = compositions_of(model_cfg)
    files = read_files(paths, compositions)
    head = head_of(model_cfg, files)
    base = Base.open(base_of(model_cfg), revision_of(model_cfg), head)
    skipped = tuple(model_cfg.get("skip_layers") or ())
    check_layers(base.config, skipped, "model.skip_layers")
    tuned = {model.name: open_tuned(model.path, base) for model in model_cfg.get("models") or []}
    tokenizer = base.tokenizer()
    device = device_of(cfg.trainer, world)
    compiler = compiler_of(model_cfg, base, device)
    answerer = answerer_of(base, tokenizer, sampling, model_cfg.data.batch_size, compiler)
    questions = read_questions(model_cfg, base, tokenizer, virtual_tokens(files, compositions))
    unknown = [str(row["id"]) for row in questions.rows if str(row["id"]) not in truth]
    if unknown:
        raise UserError(
            f"model.data.ground_truth_ds has no answer for {len(unknown)} questions of "
            f"model.data.test_ds, such as id {unknown[0]!r}"
        )
    dtype = precision_of(cfg.trainer, device)
    mesh = world.mesh(model_cfg, device)
    first = world.rank == 0
    model = base.load(dtype, device, model_cfg.seed, mesh=mesh)
    scored = put_on(model, paths, files, compositions)
    Placement(model, mesh)
    if base.fresh_head and model_cfg.evaluate_base:
        world.say(
            f"{BASE}: {base.path} has no head {base.config.head}: it answers with a random one"
        )
    if sampling.idle:
        world.say(f"model.inference.greedy=True: {', '.join(sampling.idle)} has no effect")

    def result(name: str, path: str | None, model: GPT | T5 | BERT) -> dict[str, Any]:
        file = None if path is None else Path(path)
        answers, seconds = ask(name, model, answerer, questions, mesh.data, first)
        if not first:
            return {}
        place = folder / place_of(name)
        remove_leftovers(place)
        return evaluate(name, file, answers, seconds, answerer, questions, truth, place)

    results = [result(BASE, None, model)] if model_cfg.evaluate_base else []
    for name, (path, composition) in scored.items():
        model.set_active(composition, skipped)
        results.append(result(name, path, model))
    for name, other in tuned.items():
        model = other.load(dtype, device, mesh=mesh)  # in the place of the one before
        Placement(model, mesh)
        results.append(result(name, other.path, model))
    if not first:
        return Exit.DONE
    metrics = {
        "base_model": base.path,
        "questions": len(truth),
        "dropped": dict(questions.dropped),
        "results": results,
    }
    remove_leftovers(folder)
    write_json(folder / "metrics.json", metrics)
    show(results, len(truth), questions)
    return Exit.DONE


def check(cfg: DictConfig) -> None:
    """Raises a UserError for what the configuration alone shows to be wrong."""
    model = cfg.model
    for key in (
        "language_model_path",
        "adapters",
        "models",
        "task_templates",
        "encoder_seq_length",
    ):
        if model.get(key) == "auto":
            raise UserError(f"model.{key}=auto: no learning stage says what it is; give a value")
    for key in ("test_ds", "ground_truth_ds"):
        if not data_files(model, key):
            raise UserError(f"model.data.{key} is empty: name at least one JSONL file")
    given = [each.name for each in (*model.adapters, *(model.get("models") or []))]
    if len(set(given)) < len(given) or BASE in given:
        raise UserError(
            f"model.adapters and model.models: the names must differ, and none is {BASE!r}: {given}"
        )
    if not given and not model.evaluate_base:
        raise UserError(
            "nothing to evaluate: model.adapters and model.models are empty and evaluate_base is "
            "False"
        )


def read_truth(files: list[str], label: str = "answer") -> dict[str, list[str]]:
    """Gold answers by question id: `answer`, `label`, or the last turn of a conversation."""
    truth: dict[str, list[str]] = {}
    for path in files:
        for number, row in read_rows(path):
            answer = row.get("answer", row.get(label))
            if answer is None and isinstance(row.get("messages"), list):
                answer = _last_words(row["messages"])
            answers = [answer] if isinstance(answer, str) else answer
            if "id" not in row or not answers:
                raise UserError(f"{path}, line {number}: needs an 'id' and an 'answer'")
            truth[str(row["id"])] = answers
    return truth


def _last_words(messages: list[Any]) -> Any:
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    return last.get("content") if last.get("role") == "assistant" else None


def head_of(model_cfg: DictConfig, files: Mapping[str, AdapterFile]) -> str | None:
    """`model.head`; where it is not given, the head that an adapter's file holds."""
    if model_cfg.get("head") not in (None, "auto"):
        return str(model_cfg.head)
    heads = (adapter.config.get("head") for file in files.values() for adapter in file.adapters)
    return next((str(head) for head in heads if head is not None), None)


def compositions_of(model_cfg: DictConfig) -> list[Composition | str]:
    """What `model.composition` says is scored; none: each file alone.

    A `Parallel` is its children, one after the other: they answer the same questions apart.

    Raises:
        UserError: for a text that is no composition, and names that `model.adapters` does not have.
    """
    given = model_cfg.get("composition")
    texts = [given] if isinstance(given, str) else list(given or [])
    known = [str(adapter.name) for adapter in model_cfg.adapters]
    found: list[Composition | str] = []
    for text in texts:
        whole = parse(str(text))
        check_blocks(whole, "model.composition")
        if unknown := [name for name in names(whole) if name not in known]:
            raise UserError(
                f"model.composition={whole}: model.adapters has no {unknown[0]!r}: it has "
                f"{', '.join(known) or 'none'}"
            )
        found += [branch for branch in branches(whole) if branch is not None]
    return list(dict.fromkeys(found))


def read_files(
    paths: Mapping[str, str], compositions: list[Composition | str]
) -> dict[str, AdapterFile]:
    """The files of `model.adapters` by their names.

    Raises:
        UserError: where one cannot be read, or nothing says how its fusion is used.
    """
    if compositions:
        return read_frozen(paths)
    files = {name: read_adapters(path) for name, path in paths.items()}
    for name, file in files.items():
        if file.fusions:
            raise UserError(
                f"model.composition is missing: {paths[name]} holds a fusion of "
                f"{file.fusions[0].name}, which acts in a Fuse of these: give "
                f'"Fuse({file.fusions[0].name})", and their files in model.adapters'
            )
    return files


def virtual_tokens(
    files: Mapping[str, AdapterFile], compositions: list[Composition | str] | None = None
) -> int:
    """The most that anything scored puts before a row: all answer questions of one length."""
    if compositions:
        lengths = {**dict.fromkeys(files, 0), **columns_of(files)}
        return max(columns(composition, lengths) for composition in compositions)
    counts = [
        sum(getattr(method_of(a.config, name), "virtual_tokens", 0) for a in file.adapters)
        for name, file in files.items()
    ]
    return max(counts, default=0)


def put_on(
    model: GPT | T5 | BERT,
    paths: Mapping[str, str],
    files: Mapping[str, AdapterFile],
    compositions: list[Composition | str],
) -> dict[str, tuple[str, Composition | str]]:
    """Adds all files to a model; returns what is scored: name -> (file of it, composition)."""
    if not compositions:
        return {n: (paths[n], add_adapters(model, n, file, paths[n])) for n, file in files.items()}
    add_frozen(model, paths, files, compositions)
    advice = "name a file that holds it in model.adapters"
    check_fusions(model, compositions, "model.composition", advice)
    scored = {}
    for composition in compositions:
        fused = {fuse.name for fuse in fusions(composition)}
        holds = [n for n, f in files.items() if any(own.name in fused for own in f.fusions)]
        scored[str(composition)] = (paths[(holds or [last(composition)])[0]], composition)
    return scored


def add_adapters(
    model: GPT | T5 | BERT, name: str, file: AdapterFile, path: str
) -> Composition | str:
    """Adds what a file holds, and returns how it was trained: one behind the other."""
    own = [adapter.name for adapter in file.adapters]
    if len(own) == 1:
        return load_adapters(model, path, name)[0]
    return Stack(*load_adapters(model, path, {each: f"{name}-{each}" for each in own}))


def place_of(name: str) -> str:
    """The folder of what is called `name`: a composition's without brackets, commas and spaces."""
    return re.sub(r"[(), \[\]]+", "-", name).strip("-")


def open_tuned(path: str, base: Base) -> Base:
    """A whole model to evaluate beside the base, whose questions it is asked.

    Raises:
        UserError: where it does not read the base's tokens.
    """
    model = Base.open(path, head=base.config.head)
    same = ("architecture", "vocab_size")
    if any(getattr(model.config, key) != getattr(base.config, key) for key in same):
        raise UserError(
            f"model.models: {path} is a {model.config.architecture} model of "
            f"{model.config.vocab_size} tokens, the base {base.path} a {base.config.architecture} "
            f"model of {base.config.vocab_size}: evaluate it as the base of a stage of its own"
        )
    return model


def answerer_of(
    base: Base, tokenizer: Any, sampling: Sampling, batch_size: int, compiler: Compiler | None
) -> Answerer | SpanAnswerer:
    """What makes a model's answers: a BERT marks them, the others write them."""
    if base.config.architecture == "bert":
        return SpanAnswerer(sampling, batch_size)
    return Answerer(tokenizer, sampling, batch_size, compiler)


def compiler_of(model_cfg: DictConfig, base: Base, device: torch.device) -> Compiler | None:
    """What compiles the passes of decoding, where `model.compile` asks for it.

    Raises:
        UserError: where they cannot be compiled.
    """
    if not model_cfg.get("compile"):
        return None
    split = [key for key in SPLITS if (model_cfg.get(key) or 1) > 1]
    if base.config.architecture != "gpt":
        reason = f"it is for the passes of a GPT, and {base.path} is a {base.config.architecture}"
    elif split:
        reason = f"it is for a model on one device, and {split[0]} is {model_cfg[split[0]]}"
    else:
        reason = why_not_compiled(device.type)
    if reason is not None:
        raise UserError(f"model.compile=True: {reason}: set it to False")
    allow_graphs()
    return torch.compile


def read_questions(
    model_cfg: DictConfig, base: Base, tokenizer: Any, virtual: int = 0
) -> Questions:
    """The questions of `test_ds`, under the templates of training, within the model's positions.

    `virtual` of these are taken by virtual tokens.
    """
    positions, length = base.config.max_position_embeddings, model_cfg.encoder_seq_length
    bounded = OmegaConf.merge(model_cfg)
    if positions and length:
        with open_dict(bounded):
            bounded.encoder_seq_length = min(length, positions)
    assert isinstance(bounded, DictConfig)
    questions = Questions.read(
        data_files(model_cfg, "test_ds"),
        encoders_from_config(
            bounded, tokenizer, base.config, key="test_ds", virtual_tokens=virtual or None
        ),
        model_cfg.inference.tokens_to_generate,
    )
    if not questions.rows:
        raise UserError(f"model.data.test_ds: no question to answer: {dict(questions.dropped)}")
    return questions


def ask(
    name: str,
    model: GPT | T5 | BERT,
    answerer: Answerer | SpanAnswerer,
    questions: Questions,
    data: Axis,
    shown: bool,
) -> tuple[list[Answer], float]:
    """A model's answers, and the seconds they took; each replica of the model answers its share.

    A share is questions on end: those of one paragraph are read together. `shown`: a progress bar
    is.
    """
    start, total = time.monotonic(), len(questions.prompts)
    numbers = data.share(total)
    own = [questions.prompts[number] for number in numbers]
    with progress_bar(name, len(own), shown) as advance:
        answers = answerer.answer(model, own, advance, numbers)
    if data.group is not None:
        found: list[list[Answer]] = [[] for _ in range(data.size)]
        dist.all_gather_object(found, answers, data.group)
        answers = [answer for share in found for answer in share]
    return answers, time.monotonic() - start


def evaluate(
    name: str,
    path: Path | None,
    answers: list[Answer],
    seconds: float,
    answerer: Answerer | SpanAnswerer,
    questions: Questions,
    truth: dict[str, list[str]],
    folder: Path,
) -> dict[str, Any]:
    """Writes a model's answers to `folder`, scores them."""
    with replacing(folder / "predictions.jsonl") as file:
        for row, more, answer in zip(questions.rows, questions.metadata, answers, strict=True):
            kept = {key: row[key] for key in ("id", "taskname", "question") if key in row}
            line = {**kept, **more, "pred": answer.text, "answer": truth[str(row["id"])]}
            if answerer.sampling.compute_logprob:
                line |= {"tokens": answer.tokens, "logprobs": answer.logprobs}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    ids = (str(row["id"]) for row in questions.rows)
    texts = (answer.text for answer in answers)
    scores = squad_scores(dict(zip(ids, texts, strict=True)), truth)
    return {
        "name": name,
        "adapter": None if path is None else str(path),
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "answer_seconds": seconds,
        **learned(path),
    }


def learned(path: Path | None) -> dict[str, Any]:
    """What the learning stage said of an adapter, where its summary lies beside the file."""
    if path is None:
        return {}
    summary = path.parent / "summary.json"
    try:
        values = json.loads(summary.read_text())
    except (OSError, ValueError):
        return {}
    return {key: values[key] for key in LEARNED if key in values} | _of_point(values, path)


def _of_point(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a summary says of the one point of a sweep that lies at a path; the time is of all."""
    for point in summary.get("sweep") or ():
        files = [point["adapter"], *([summary["adapter"]] if point["best"] else [])]
        if path.name in (Path(file).name for file in files):
            own = {key: point[key] for key in ("trainable_parameters", "file_bytes")}
            others = summary["trainable_parameters"] - own["trainable_parameters"]
            return {**own, "total_parameters": summary["total_parameters"] - others}
    return {}


@contextmanager
def progress_bar(name: str, total: int, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, a line at the end elsewhere; yields what to call with finished rows."""
    console = Console(quiet=not shown)
    if not sys.stdout.isatty():
        yield lambda finished: None
        console.print(f"{name}: {total} questions answered")
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total)
        yield lambda finished: bar.advance(task, finished)


def show(results: list[dict[str, Any]], total: int, questions: Questions) -> None:
    """One row for the base and each adapter."""
    table = Table(title=f"{total} questions", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.collapse_padding = True  # eight columns in the 80 characters of a log
    table.add_column("", overflow="fold", max_width=22)  # compositions are long
    for column in ("exact\nmatch", "F1", "trained", "share", "training", "file", "answers"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        trainable, size = result.get("trainable_parameters"), result.get("file_bytes")
        share = trainable / result["total_parameters"] if trainable else None
        table.add_row(
            result["name"],
            f"{result['exact_match']:.2f}",
            f"{result['f1']:.2f}",
            "-" if trainable is None else f"{trainable:,}",
            "-" if share is None else f"{share:.2%}",
            _duration(result.get("seconds")),
            "-" if size is None else f"{size / 1024:,.0f} kB",
            _duration(result["answer_seconds"]),
        )
    console = Console()
    console.print(table)
    for reason, count in questions.dropped.items():
        console.print(f"{count} questions were not asked and count 0: {reason}")
    if torch.cuda.is_available():
        console.print(f"device: {torch.cuda.get_device_name()}")


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.1f} s"
