"""Rows to the examples of a T5: the prompt is what its encoder reads, the answer its target."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwerk.data.encoding import Encoder, Example, Label, RowDropped, RowUnlabelled
from graftwerk.data.prompts import plain_tokens
from graftwerk.data.templates import TaskTemplate
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Seq2SeqEncoder(Encoder):
    """Rows to source and target.

    The source is the prompt and the tokenizer's end token, as T5 was trained on it and as NeMo's
    T5 prompt learning data ends it (without the sentinel that NeMo can put before it). The target
    is the answer, tokenised as a text of its own; the decoder reads it behind `start`.

    Args:
        encoder_seq_length: the most tokens of the source, virtual ones included, and of the target.
        start: what the decoder reads first, the model's `decoder_start_token_id`.
        add_bos: open the source with the tokenizer's start token.
        add_eos: close the target with its end token. The source has it in any case.
        more: as of `Encoder`.
    """

    def __init__(
        self,
        template: TaskTemplate,
        tokenizer: "PreTrainedTokenizerBase",
        encoder_seq_length: int,
        start: int,
        add_bos: bool = False,
        add_eos: bool = True,
        **more: Any,
    ) -> None:
        super().__init__(template, tokenizer, encoder_seq_length, add_bos, add_eos, **more)
        if template.answer_field is None or not template.answer_only_loss:
            raise UserError(
                f"{template.key('answer_only_loss')}: a T5 learns the answer alone, its encoder "
                f"reads the prompt: set it to True and name the answer_field"
            )
        if self.sep or self.room:
            name = "add_sep" if self.sep else "tokens_to_generate"
            raise UserError(
                f"model.data.{name} has no meaning for a T5, which reads prompt and answer apart: "
                f"leave it out"
            )
        end = tokenizer.eos_token_id
        self.source_end = [end] if isinstance(end, int) else []
        self.start = start
        self.target_limit = encoder_seq_length
        self.filler = Example([start], source=self.source_end or [start])

    def encode_prompt(self, row: Mapping[str, Any], room: int = 0) -> list[int]:
        """The row's source; the answer is no part of it and needs no `room` in it."""
        return super().encode_prompt(row)

    def _framed(self, prompt: list[int]) -> list[int]:
        return self.bos + prompt + self.source_end

    def _answers(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        # The template's space before the answer separates it from a prompt that is not there.
        return plain_tokens(self.tokenizer, [answer.strip() for _, answer in texts])

    def _example(
        self, row: Mapping[str, Any], prompt: list[int], answer: list[int]
    ) -> tuple[Example, bool]:
        if not answer:
            raise RowUnlabelled("empty answer")
        target = answer + self.eos
        if len(target) > self.target_limit:
            raise RowDropped(f"answer longer than encoder_seq_length {self.target_limit}")
        source = self._framed(prompt)
        cut = len(source) > self.limit
        if cut:
            source = self._fit(row, self.limit)
        labels = [Label(index, token) for index, token in enumerate(target)]
        return Example([self.start, *target[:-1]], labels, source=source), cut
