"""`python3 -m graftwerk generate`: one prompt, one answer."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from graftwerk.errors import UserError


def main(argv: Sequence[str]) -> int:
    """The command; prints what the model adds to the prompt.

    Raises:
        UserError: for files that are not there or do not fit, and for an empty prompt.
    """
    parser = argparse.ArgumentParser(
        prog="python3 -m graftwerk generate",
        description="Continue one prompt, greedily, with a base model and an adapter on it.",
    )
    parser.add_argument("--model", required=True, help="the base model's folder")
    parser.add_argument("--adapter", help="an adapter's file; without it the base answers")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--end-string", action="append", default=[], help="text that ends it")
    arguments = parser.parse_args(list(argv))

    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: give at least 1")
    for option, path in (("--model", arguments.model), ("--adapter", arguments.adapter)):
        if path is not None and not Path(path).exists():
            raise UserError(f"{option} {path}: no such file or folder")

    import torch

    from graftwerk.checkpoints import load_adapter, load_base, load_tokenizer
    from graftwerk.evaluation.predict import Answerer

    tokenizer = load_tokenizer(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(arguments.model, device=device)
    if arguments.adapter:
        model.set_active(load_adapter(model, arguments.adapter))
    answerer = Answerer(tokenizer, arguments.max_new_tokens, tuple(arguments.end_string))
    prompt = tokenizer.encode(arguments.prompt, add_special_tokens=False)
    if not prompt:
        raise UserError("--prompt holds no token: give some text")
    print(answerer.answer(model, [prompt])[0])
    return 0
