"""`python3 -m graftwerk generate`: one prompt, one answer."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from graftwerk.errors import UserError
from graftwerk.generation.sampling import OptionError, Sampling

# The options by their names in `Sampling`.
FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "repetition_penalty": "--repetition-penalty",
    "min_tokens_to_generate": "--min-new-tokens",
    "tokens_to_generate": "--max-new-tokens",
    "end_strings": "--end-string",
    "compute_logprob": "--logprobs",
    "seed": "--seed",
}
DRAWING = ("temperature", "top_k", "top_p")


def main(argv: Sequence[str]) -> int:
    """The command; prints what the model adds to the prompt.

    Raises:
        UserError: for files that are not there or do not fit, for options out of range, and for an
            empty prompt.
    """
    arguments = _parser().parse_args(list(argv))
    sampling = _sampling(arguments)
    _check_paths(arguments)

    import torch

    from graftwerk.checkpoints import load_adapter, load_base, load_tokenizer
    from graftwerk.evaluation.predict import Answerer
    from graftwerk.models import T5

    tokenizer = load_tokenizer(arguments.model, arguments.revision)
    prompt = tokenizer.encode(arguments.prompt, add_special_tokens=False)
    if not prompt:
        raise UserError("--prompt holds no token: give some text")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(arguments.model, device=device, revision=arguments.revision)
    if arguments.adapter:
        model.set_active(load_adapter(model, arguments.adapter))
    if isinstance(model, T5) and isinstance(tokenizer.eos_token_id, int):
        prompt.append(tokenizer.eos_token_id)  # as its encoder has always seen texts end
    (answer,) = Answerer(tokenizer, sampling).answer(model, [prompt])
    print(answer.text)
    for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
        print(f"{logprob:9.4f}  {token}")
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all of the project does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells all options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python3 -m graftwerk generate",
        description="Continue one prompt with a GPT or a T5, and an adapter on it. The likeliest "
        "token is taken each time, unless --temperature, --top-k or --top-p is given: then tokens "
        "are drawn, the same ones for the same seed.",
        epilog="example: python3 -m graftwerk generate --model openai-community/gpt2 --prompt 'Two "
        "and two are' --temperature 0.7 --top-p 0.9 --end-string $'\\n'",
    )
    add = parser.add_argument
    add("--model", required=True, help="the base: a folder, a .nemo file or a name of the Hub")
    add("--revision", help="branch, tag or commit of a name of the Hub")
    add("--adapter", help="an adapter's file or folder; without it the base answers")
    add("--prompt", required=True, metavar="TEXT", help="the text to continue; a T5's input")

    add = parser.add_argument_group("how tokens are chosen").add_argument
    add("--temperature", type=float, help="draw; below 1 likely tokens more, above 1 less often")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0: from all")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest that hold this share")
    add("--seed", type=int, help="of the draw (default: 1234)")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that were there, prompt included, become less likely (default: 1)",
    )

    add = parser.add_argument_group("where the text ends").add_argument
    add("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default: 64)")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="at least (default: 0)")
    add(
        "--end-string",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends it and is left out, or a special token; may be given several times",
    )

    add = parser.add_argument_group("what is printed").add_argument
    add("--logprobs", action="store_true", help="each token and its log-probability below the text")
    return parser


def _sampling(arguments: argparse.Namespace) -> Sampling:
    given = {name: getattr(arguments, name) for name in (*DRAWING, "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    greedy = not given.keys() & {*DRAWING}
    if greedy and "seed" in given:
        drawing = ", ".join(FLAGS[name] for name in DRAWING)
        print(f"--seed has no effect: nothing is drawn without one of {drawing}", file=sys.stderr)
    try:
        return Sampling(
            greedy=greedy,
            repetition_penalty=arguments.repetition_penalty,
            min_tokens_to_generate=arguments.min_new_tokens,
            tokens_to_generate=arguments.max_new_tokens,
            end_strings=tuple(arguments.end_string),
            compute_logprob=arguments.logprobs,
            **given,
        )
    except OptionError as error:
        shown = "" if error.key == "end_strings" else f" {error.value}"
        raise UserError(f"{FLAGS[error.key]}{shown}: {error.advice}") from None


def _check_paths(arguments: argparse.Namespace) -> None:
    from graftwerk.checkpoints.hub import is_hub_name

    if not Path(arguments.model).exists() and not is_hub_name(arguments.model):
        raise UserError(f"--model {arguments.model}: no such file or folder")
    if arguments.adapter is not None and not Path(arguments.adapter).exists():
        raise UserError(f"--adapter {arguments.adapter}: no such file or folder")
