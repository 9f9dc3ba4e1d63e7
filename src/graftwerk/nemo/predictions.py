"""What `trainer.predict` makes of `model.data.test_ds`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from graftwerk.data.datamodule import data_files, encoders_from_config
from graftwerk.errors import UserError
from graftwerk.evaluation.predict import Questions
from graftwerk.generation import Ending, Sampling, complete
from graftwerk.models import GPT, T5, TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "test_ds"


@dataclass(frozen=True)
class Question:
    """A row's place in the files, its prompt as tokens, and the row."""

    number: int
    prompt: list[int]
    row: dict[str, Any]


def sampling_of(model_cfg: DictConfig) -> Sampling:
    """How answers are decoded: `inference`, with `tokens_to_generate` of the test files."""
    inference: Any = OmegaConf.to_container(model_cfg.get("inference") or OmegaConf.create({}))
    length = OmegaConf.select(model_cfg, f"data.{KEY}.tokens_to_generate")
    if length is not None:
        inference.setdefault("tokens_to_generate", length)
    return Sampling.from_keys(inference, model_cfg.seed)


def questions_of(
    model_cfg: DictConfig,
    tokenizer: "PreTrainedTokenizerBase",
    shape: TransformerConfig,
    virtual_tokens: int,
) -> list[Question]:
    """The rows of `data.test_ds` and their prompts, which need no answers.

    Raises:
        UserError: where there are no files, or no row of them can be asked.
    """
    files = data_files(model_cfg, KEY)
    if not files:
        raise UserError(f"model.data.{KEY}.file_names is empty: name the files to predict")
    encoders = encoders_from_config(
        model_cfg, tokenizer, shape, key=KEY, virtual_tokens=virtual_tokens
    )
    room = sampling_of(model_cfg).tokens_to_generate
    found = Questions.read(files, encoders, room, identified=False)
    for reason, count in found.dropped.items():
        print(f"{count} rows of model.data.{KEY} have no prediction: {reason}", flush=True)
    if not found.rows:
        raise UserError(f"model.data.{KEY}: no row to predict: {dict(found.dropped)}")
    pairs = zip(found.prompts, found.rows, strict=True)
    return [Question(number, prompt, row) for number, (prompt, row) in enumerate(pairs)]


def predict(
    model: GPT | T5,
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    sampling: Sampling,
) -> dict[str, list[Any]]:
    """The answers to a batch of questions.

    Returns:
        Lists with an entry a row: `inputs` (the prompt's text), `answers` (without what ended
        them), `sentences` (both, as the model has written them), `rows` (as they are in the file);
        with `compute_logprob` also `tokens` and `logprob`, of the answers.
    """
    ending = Ending(tokenizer, sampling)
    continued = complete(
        model,
        [question.prompt for question in questions],
        sampling,
        eos_ids=ending.ids,
        batch_size=len(questions),
        stop=ending if ending.strings else None,
        numbers=[question.number for question in questions],
    )

    def texts(rows: Iterable[list[int]]) -> list[Any]:
        return tokenizer.batch_decode(list(rows), skip_special_tokens=True)

    made = {
        "sentences": texts(
            q.prompt + row.tokens for q, row in zip(questions, continued, strict=True)
        ),
        "inputs": texts(question.prompt for question in questions),
        "answers": [ending.text(row.tokens).strip() for row in continued],
        "rows": [question.row for question in questions],
    }
    if sampling.compute_logprob:
        made["tokens"] = [tokenizer.convert_ids_to_tokens(row.tokens) for row in continued]
        made["logprob"] = [row.logprobs for row in continued]
    return made
