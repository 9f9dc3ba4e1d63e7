"""`python3 -m graftwerk merge`: adapters in the weights of their base, as a checkpoint."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from graftwerk.adapters import Stack
from graftwerk.adapters.merge import Merge
from graftwerk.checkpoints.adapter import load_adapters, read_adapters
from graftwerk.checkpoints.base import load_base, load_tokenizer, open_checkpoint
from graftwerk.checkpoints.shards import check_space
from graftwerk.checkpoints.write import DTYPES, FORMATS, write_checkpoint
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5


def main(argv: Sequence[str]) -> int:
    """The command: reads base and adapters, merges in the order given, writes.

    Raises:
        UserError: for files that are missing or do not fit, methods that cannot be merged, and an
            output that exists; before anything is written.
    """
    arguments = _parser().parse_args(list(argv))
    output, dtype = Path(arguments.output), DTYPES[arguments.dtype]
    if os.path.lexists(output):
        raise UserError(f"--output {output} exists already: choose another path, or remove it")
    model, place = load_merging(arguments.model, arguments.adapter, dtype, arguments.revision)
    merge = Merge(model)
    shapes = [parameter for _, parameter in model.base_parameters()]
    check_space(output, sum(p.numel() * (dtype or p.dtype).itemsize for p in shapes))
    tokenizer = None if place is None else load_tokenizer(place)
    if tokenizer is None:
        print(f"warning: {arguments.model} has no tokenizer, so what is written has none")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(model.config, merge.read, output, arguments.format, tokenizer, dtype)
    print(f"merged {', '.join(model.adapters)} into {arguments.model}: {output}")
    return 0


def load_merging(
    path: str, adapters: Sequence[str], dtype: torch.dtype | None, revision: str | None = None
) -> tuple[GPT | T5 | BERT, Path | None]:
    """A base with the adapters of the files active in their order, and where its tokenizer lies.

    The base is held in the type of its files, or in `dtype` if that is wider.

    Raises:
        UserError: where files are missing or do not fit.
    """
    files = {file: read_adapters(file).adapters for file in adapters}
    heads = {str(one.config["head"]) for s in files.values() for one in s if one.config.get("head")}
    if len(heads) > 1:
        raise UserError(f"adapters with different heads cannot be merged: {sorted(heads)}")
    wide, place = held_type(path, revision, dtype)
    model = load_base(path, wide, head=heads.pop() if heads else None, revision=revision)
    for file in adapters:
        taken = {one.name for one in files[file]} & set(model.adapters)
        load_adapters(model, file, {name: f"{name}_{len(model.adapters)}" for name in taken})
    model.set_active(Stack(*model.adapters))
    return model, place


def held_type(
    path: str, revision: str | None, dtype: torch.dtype | None
) -> tuple[torch.dtype, Path | None]:
    """The type of a base's files, or `dtype` if that is wider; and where its tokenizer lies."""
    with open_checkpoint(path, revision) as checkpoint:
        names = (entry.names[0] for entry in checkpoint.table.values())
        held = {checkpoint.source.dtype(name) for name in names}
        place = checkpoint.tokenizer
    wide = dtype or min(held, key=str)
    for each in held:
        wide = torch.promote_types(wide, each)
    return wide, place


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all of the project does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells all options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python3 -m graftwerk merge",
        description="Write a model whose weights hold what adapters add to them: LoRA, DoRA, IA3 "
        "and selective tuning. It answers as the base with the adapters does, at the base's cost.",
        epilog="example: python3 -m graftwerk merge --model gpt2-folder --adapter results/lora "
        "--output merged --format huggingface",
    )
    add = parser.add_argument
    add("--model", required=True, help="the base: a folder, a .nemo file or a name of the Hub")
    add("--revision", help="branch, tag or commit of a name of the Hub")
    add(
        "--adapter",
        required=True,
        action="append",
        metavar="FILE",
        help="an adapter's file or folder; given several times, each acts on what the one before "
        "left",
    )
    add("--output", required=True, metavar="PATH", help="where the checkpoint goes")
    add("--format", required=True, choices=FORMATS, help="what it is written as")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="keep",
        help="the type of the written weights (default: keep, the base's)",
    )
    return parser
