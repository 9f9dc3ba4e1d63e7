"""`python3 -m graftwerk generate`: one prompt, one answer."""

import argparse
import warnings
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The command; prints what the model adds to the prompt."""
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

    warnings.filterwarnings("ignore")
    from graftwerk.checkpoints import load_adapter, load_base, load_tokenizer
    from graftwerk.evaluation.predict import Answerer

    tokenizer = load_tokenizer(arguments.model)
    model = load_base(arguments.model)
    if arguments.adapter:
        model.set_active(load_adapter(model, arguments.adapter))
    answerer = Answerer(tokenizer, arguments.max_new_tokens, tuple(arguments.end_string))
    prompt = tokenizer.encode(arguments.prompt, add_special_tokens=False)
    print(answerer.answer(model, [prompt])[0])
    return 0
