"""Answers of a model to the rows of a file."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwerk.data.encoding import RowDropped, RowEncoder, task_of
from graftwerk.data.jsonl import Row, read_rows
from graftwerk.data.templates import RowError
from graftwerk.errors import UserError
from graftwerk.generation import Continuation, Ending, Sampling, complete
from graftwerk.generation.sharing import Compiler
from graftwerk.models import BERT, GPT, T5

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Questions:
    """Rows with an id, what answers are made from, and why others have none.

    `prompts` are what the encoder makes of a row without its answer: tokens, or a BERT's windows.
    `metadata` is what a row holds besides.
    """

    rows: list[Row] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        files: Sequence[str],
        encoders: Mapping[str, RowEncoder],
        room: int,
        identified: bool = True,
    ) -> "Questions":
        """All rows of some JSONL files whose prompts leave room for an answer.

        A prompt is cut, where its template allows it, to leave `room` tokens; one that may not be
        cut stays whole as long as one token fits behind it. Where rows are `identified`, each needs
        an `id`.

        Raises:
            UserError: for a row without an id, a task or a field of its template.
        """
        questions = cls()
        for path in files:
            for number, row in read_rows(path):
                where = f"{path}, line {number}"
                if identified and "id" not in row:
                    raise UserError(f"{where}: no field 'id', which joins answers to questions")
                encoder = _encoder_of(row, encoders, where)
                try:
                    prompt = _prompt(encoder, row, room)
                except RowError as error:
                    raise UserError(f"{where}: {error}") from None
                except RowDropped as error:
                    questions.dropped[str(error)] += 1
                    continue
                questions.rows.append(row)
                questions.prompts.append(prompt)
                questions.metadata.append(encoder.metadata(row))
        return questions


def _encoder_of(row: Row, encoders: Mapping[str, RowEncoder], where: str) -> RowEncoder:
    name = task_of(row, encoders)
    if not isinstance(name, str) or name not in encoders:
        raise UserError(
            f"{where}: taskname {name!r} has no entry in model.task_templates; "
            f"these have one: {', '.join(encoders)}"
        )
    return encoders[name]


def _prompt(encoder: RowEncoder, row: Row, room: int) -> Any:
    try:
        return encoder.encode_prompt(row, room)
    except RowDropped:
        return encoder.encode_prompt(row, 1)


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt: `text` without what ended it and without space around it.

    `tokens` and `logprobs` are those of all that it produced, an end string's included and the
    end of text left out; empty unless they are asked for.
    """

    text: str
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answerer:
    """How answers are decoded: by `sampling`, up to the end of text or one of its end strings.

    `compiler`: as in `complete`.
    """

    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling
    batch_size: int = 8
    compiler: Compiler | None = None

    def answer(
        self,
        model: GPT | T5 | BERT,
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], object] = lambda finished: None,
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """What the model says to each prompt.

        A prompt's number says what chance makes of it; None: its place.
        """
        ending = Ending(self.tokenizer, self.sampling)
        rows = complete(
            model,
            prompts,
            self.sampling,
            eos_ids=ending.ids,
            batch_size=self.batch_size,
            stop=ending if ending.strings else None,
            progress=progress,
            numbers=numbers,
            compiler=self.compiler,
        )
        return [self._answer(row, ending.text(row.tokens).strip()) for row in rows]

    def _answer(self, row: Continuation, text: str) -> Answer:
        if not self.sampling.compute_logprob:
            return Answer(text)
        tokens: Any = self.tokenizer.convert_ids_to_tokens(row.tokens)
        return Answer(text, tokens, row.logprobs)
