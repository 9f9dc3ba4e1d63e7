"""Conversations to examples: the tokenizer's own chat template, loss on the assistant's turns.

A template turns a whole conversation into one text and does not say where the turns are. They are
found by rendering: the text up to a turn with the generation prompt is where the assistant begins,
the text with the turn is where it ends. Templates that mark the assistant's words
(`{% generation %}`) are asked instead.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwerk.data.encoding import (
    Encoded,
    Example,
    Label,
    RowDropped,
    RowUnlabelled,
    length_words,
    padding_token,
)
from graftwerk.data.prompts import Continuation, plain_tokens
from graftwerk.data.templates import RowError
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Segment = tuple[str, bool]  # text, and whether the assistant says it
Tokenised = tuple[list[int], list[bool]]  # tokens, and which of them the assistant says

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stands for an assistant's words: a character that no text has, so that both texts part there.
STAND_IN = "\ue0f3stand-in\ue0f3"
FIELDS = ("messages", "tools", "documents")  # of a row, for the template


class ChatEncoder:
    """Rows of `messages` to the examples of a GPT.

    A row is `{"messages": [{"role": ..., "content": ...}, ...]}`, and may have `tools` and
    `documents`; its messages go to the template as they are. Where the template shows earlier turns
    otherwise than it shows them when they are the last (it leaves out their reasoning, say), each
    of the assistant's turns becomes an example of its own, as the model will meet it.

    Args:
        tokenizer: one with a chat template, which says all special tokens.
        encoder_seq_length: the most tokens of a conversation, virtual ones included.
        answer_only_loss: False: all tokens are learned.
        tokens_to_generate: prompts leave room for so many tokens of answer at least.
        virtual_tokens: that the model puts before each row.
        over_long: `cut`: a conversation that is too long loses what `truncation_method` says;
            otherwise it is dropped.
        truncation_method: `right`: the end is cut off. `left`: the oldest turns, but not the
            system's. Prompts always lose the oldest turns.

    Raises:
        UserError: for a tokenizer without a chat template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        encoder_seq_length: int,
        *,
        answer_only_loss: bool = True,
        tokens_to_generate: int = 0,
        virtual_tokens: int = 0,
        over_long: str | None = None,
        truncation_method: str = "right",
    ) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                "model.data.chat=True, but the base's tokenizer has no chat template: use a base "
                "that was trained on conversations, or model.data.prompt_template"
            )
        self.tokenizer = tokenizer
        self.limit = encoder_seq_length - virtual_tokens
        self.length = length_words(encoder_seq_length, virtual_tokens)
        self.answer_only_loss = answer_only_loss
        self.room = tokens_to_generate
        self.cuts = over_long == "cut"
        self.left = truncation_method == "left"
        self.filler = Example([padding_token(tokenizer)])
        marks = isinstance(template, str) and MARKED.search(template) is not None
        self.marked = marks and tokenizer.is_fast  # only fast ones know where tokens come from

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises a `RowError` for a row without messages that can be rendered."""
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RowError(
                "no field 'messages' with a conversation: a list of {role: ..., content: ...}"
            )
        for number, message in enumerate(messages):
            said = isinstance(message, Mapping) and isinstance(message.get("role"), str)
            if not said or not ("content" in message or "tool_calls" in message):
                raise RowError(f"messages[{number}] must be {{role: ..., content: ...}}")
            content = message.get("content")
            if not isinstance(content, str | None) or (
                content is None and not message.get("tool_calls")
            ):
                raise RowError(
                    f"messages[{number}].content must be a text, not {type(content).__name__}"
                )

    def metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row holds besides its conversation."""
        return {key: value for key, value in row.items() if key not in FIELDS}

    def encode_all(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Encoded | RowDropped]:
        """The examples of each row, all texts tokenised at once."""
        conversations = [self._conversations(row, row["messages"]) for row in rows]
        flat = self._tokenise([text for texts in conversations for text in texts])
        for row, texts in zip(rows, conversations, strict=True):
            try:
                yield self._encoded(row, [next(flat) for _ in texts])
            except RowDropped as dropped:
                yield dropped

    def encode_prompt(self, row: Mapping[str, Any], room: int = 0) -> list[int]:
        """The conversation up to where the assistant is to answer, with the generation prompt.

        An assistant's turn at the end is what is asked for, and left out. `RowDropped` where the
        prompt leaves no `room` and may not be cut.
        """
        self.check(row)
        messages = list(row["messages"])
        if messages[-1]["role"] == "assistant":
            messages.pop()
        room = self.limit - max(room, self.room)
        while True:
            tokens = self._prompt(row, messages)
            if len(tokens) <= room:
                return tokens
            shorter = without_oldest_turn(messages) if self.cuts else None
            if shorter is None:
                raise RowDropped(f"longer than {self.length}")
            messages = shorter

    # ---- texts

    def render(
        self, row: Mapping[str, Any], messages: Sequence[Message], prompt: bool = False
    ) -> str:
        """Messages as the template writes them; `prompt`: open the assistant's turn behind them.

        Raises a `RowError` with the template's words where it refuses them.
        """
        from jinja2 import TemplateError

        try:
            text = self._apply(row, messages, add_generation_prompt=prompt, tokenize=False)
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            raise RowError(f"the chat template refuses the messages: {error}") from None
        assert isinstance(text, str)
        return text

    def _apply(self, row: Mapping[str, Any], messages: Sequence[Message], **how: Any) -> Any:
        said: Any = list(messages)
        given = {"tools": row.get("tools"), "documents": row.get("documents")}
        return self.tokenizer.apply_chat_template(said, **given, **how)

    def _conversations(
        self, row: Mapping[str, Any], messages: Sequence[Message]
    ) -> list[list[Segment] | Tokenised]:
        """What becomes of a conversation: one text in segments, or one for each turn."""
        if self.marked:
            return [self._by_marks(row, messages)]
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        texts = [self.render(row, messages[: n + 1]) for n in turns]
        starts = [self._start(row, messages, n, text) for n, text in zip(turns, texts, strict=True)]
        whole = self.render(row, messages)
        if not all(whole.startswith(text) for text in texts):
            pairs = zip(texts, starts, strict=True)
            return [[(text[:start], False), (text[start:], True)] for text, start in pairs]
        segments, done = [], 0
        for start, text in zip(starts, texts, strict=True):
            segments += [(whole[done:start], False), (whole[start : len(text)], True)]
            done = len(text)
        return [[*segments, (whole[done:], False)]]

    def _start(
        self, row: Mapping[str, Any], messages: Sequence[Message], turn: int, text: str
    ) -> int:
        """Where the assistant begins to speak in `text`, which ends with its turn."""
        try:
            prompt = self.render(row, messages[:turn], prompt=True)
        except RowError:  # some refuse a conversation that the assistant opens, or an empty one
            prompt = None
        if prompt and text.startswith(prompt):
            return len(prompt)
        # The prompt says what the turn does not (the start of its reasoning): the words alone then.
        other = {**messages[turn], "content": STAND_IN}
        stand_in = self.render(row, [*messages[:turn], other])
        if STAND_IN not in stand_in:
            raise RowError(f"the chat template does not show the words of messages[{turn}]")
        pairs = enumerate(zip(text, stand_in, strict=False))
        return next((n for n, (one, other) in pairs if one != other), len(text))

    # ---- tokens

    def _prompt(self, row: Mapping[str, Any], messages: Sequence[Message]) -> list[int]:
        """The tokens of a prompt, cut into segments as in training."""
        text = self.render(row, messages, prompt=True)
        segments: list[Segment] = [(text, False)]
        if not self.marked and any(message["role"] == "assistant" for message in messages):
            (before, *more) = self._conversations(row, messages)
            assert isinstance(before, list)
            done = "".join(words for words, _ in before[:-1])
            # As in training, where earlier turns have segments of their own.
            if not more and not before[-1][1] and text.startswith(done):
                segments = [*before[:-1], (text[len(done) :], False)]
        ((tokens, _),) = self._tokenise([segments])
        return tokens

    def _by_marks(self, row: Mapping[str, Any], messages: Sequence[Message]) -> Tokenised:
        self.render(row, messages)  # raises where the template refuses them
        made = self._apply(row, messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(made["input_ids"]), [bool(mask) for mask in made["assistant_masks"]]

    def _tokenise(self, texts: Sequence[list[Segment] | Tokenised]) -> Iterator[Tokenised]:
        """Segments tokenised apart, each as it goes on behind the one before."""
        jobs: dict[str, dict[str, list[int]]] = {}  # anchor -> text -> tokens
        planned: list[Tokenised | list[tuple[str, str, bool]]] = []
        for text in texts:
            if isinstance(text, tuple):
                planned.append(text)
                continue
            parts, anchor = [], ""
            for words, spoken in text:
                if words:
                    jobs.setdefault(anchor, {})[words] = []
                    parts.append((anchor, words, spoken))
                    anchor = words.rstrip(" ")[-1:] or anchor
            planned.append(parts)
        for anchor, wanted in jobs.items():
            tokens = self._continued(anchor, list(wanted))
            wanted.update(zip(list(wanted), tokens, strict=True))
        for plan in planned:
            if isinstance(plan, tuple):
                yield plan
                continue
            tokens, spoken = [], []
            for anchor, words, says in plan:
                tokens += jobs[anchor][words]
                spoken += [says] * len(jobs[anchor][words])
            yield tokens, spoken

    def _continued(self, anchor: str, texts: list[str]) -> list[list[int]]:
        if not anchor:
            return plain_tokens(self.tokenizer, texts)
        return Continuation(self.tokenizer, anchor).tokens(texts)

    # ---- examples

    def _encoded(self, row: Mapping[str, Any], texts: Sequence[Tokenised]) -> Encoded:
        if not texts or (self.answer_only_loss and not any(any(said) for _, said in texts)):
            raise RowUnlabelled("no turn of the assistant")
        fits = all(len(tokens) <= self.limit for tokens, _ in texts)
        if not fits and not self.cuts:
            raise RowDropped(f"longer than {self.length}")
        if not fits and self.left:
            texts = self._shortened(row)
        examples = [self._example(tokens[: self.limit], said) for tokens, said in texts]
        kept = [example for example in examples if example.labels]
        if not kept:
            raise RowDropped(f"longer than {self.length} before the assistant speaks")
        return Encoded(kept, cut=not fits)

    def _shortened(self, row: Mapping[str, Any]) -> list[Tokenised]:
        """The row without its oldest turns, as few as need be."""
        messages: Sequence[Message] | None = row["messages"]
        while messages := without_oldest_turn(messages or ()):
            texts = list(self._tokenise(self._conversations(row, messages)))
            if all(len(tokens) <= self.limit for tokens, _ in texts):
                return texts
        raise RowDropped(f"longer than {self.length} in its last turns alone")

    def _example(self, tokens: list[int], said: list[bool]) -> Example:
        labels = [
            Label(n - 1, tokens[n])
            for n in range(1, len(tokens))
            if said[n] or not self.answer_only_loss
        ]
        return Example(tokens[:-1], labels)


def without_oldest_turn(messages: Sequence[Message]) -> list[Message] | None:
    """A conversation without its first question and what answers it; the system's words stay.

    None where nothing but the last question is left.
    """
    start = next((n for n, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)
    asked = [n for n in range(start + 1, len(messages)) if messages[n]["role"] == "user"]
    return [*messages[:start], *messages[asked[0] :]] if asked else None
