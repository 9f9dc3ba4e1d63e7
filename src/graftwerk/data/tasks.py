"""The configuration of a stage as encoders: which rows it reads, and what becomes of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from graftwerk.data.chat import ChatEncoder
from graftwerk.data.encoding import ANY_TASK, Encoder, RowEncoder
from graftwerk.data.question_answering import SpanEncoder
from graftwerk.data.seq2seq import Seq2SeqEncoder
from graftwerk.data.sources import settings_of
from graftwerk.data.templates import SFTTemplate, TaskTemplate
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a row where neither the configuration nor the model bounds it; T5's.
DEFAULT_LENGTH = 512
OVER_LONG = (None, "cut", "drop")
UNLABELLED = ("error", "drop")
METHODS = ("left", "right")


def encoders_from_config(
    model_cfg: DictConfig,
    tokenizer: "PreTrainedTokenizerBase",
    shape: TransformerConfig | None = None,
    *,
    key: str = "train_ds",
    virtual_tokens: int | None = None,
) -> Mapping[str, RowEncoder]:
    """An encoder for each task. Evaluation uses it too, so that prompts are those of training.

    Tasks are those of `existing_tasks` and `new_tasks`, or all templates where both are empty. With
    `data.prompt_template` (SFT rows) or `data.chat` (conversations) one encoder, `ANY_TASK`, is
    for all rows.

    Args:
        shape: the model's: its architecture says how rows are encoded (None: as for a GPT).
        key: which of the files of `model.data` are read, with the settings of their own.
        virtual_tokens: that the active adapters put before each row. None: as the templates say.
            In learning both must agree; of what is evaluated, the most count.

    Raises:
        UserError: for templates that do not fit, a length that the model has no positions for, a
            tokenizer that does not fit the model's vocabulary.
    """
    settings = settings_of(model_cfg, key)
    _check_settings(settings, OmegaConf.select(model_cfg, "task_templates"))
    if shape is not None:
        check_tokenizer(tokenizer, shape.vocab_size)
    make = _Factory(model_cfg, tokenizer, shape, settings, virtual_tokens, key != "test_ds")
    if settings.get("chat"):
        return {ANY_TASK: make.chat()}
    if settings.get("prompt_template") is not None:
        return {ANY_TASK: make.encoder(sft_template(settings))}
    return {template.taskname: make.encoder(template) for template in task_templates(model_cfg)}


def template_words(model_cfg: DictConfig) -> list[str]:
    """What templates say beside the fields of the rows: text that a tokenizer has to know."""
    settings = settings_of(model_cfg, "train_ds")
    if settings.get("chat"):
        return []
    if settings.get("prompt_template") is not None:
        templates: Sequence[TaskTemplate] = [sft_template(settings)]
    else:
        templates = task_templates(model_cfg)
    return [literal for template in templates for literal, _ in template.pieces]


def task_templates(model_cfg: DictConfig) -> list[TaskTemplate]:
    """The templates of the tasks that are read."""
    entries: Sequence[Mapping[str, Any]] = OmegaConf.select(model_cfg, "task_templates") or []
    templates = [TaskTemplate.from_config(entry) for entry in entries]
    by_name = {template.taskname: template for template in templates}
    if not by_name:
        raise UserError(
            "model.task_templates is empty; it must hold a template for each task; rows without "
            "tasks are read by model.data.prompt_template, conversations by model.data.chat: True"
        )
    if len(by_name) < len(templates):
        raise UserError("model.task_templates has two entries of one taskname; keep one")
    tasks = [
        task
        for key in ("existing_tasks", "new_tasks")
        for task in OmegaConf.select(model_cfg, key) or []
    ] or list(by_name)
    for task in tasks:
        if task not in by_name:
            raise UserError(
                f"model.new_tasks or model.existing_tasks names {task!r}, which has no entry in "
                f"model.task_templates; these have one: {', '.join(by_name)}"
            )
    return [by_name[task] for task in dict.fromkeys(tasks)]


def sft_template(settings: Mapping[str, Any]) -> SFTTemplate:
    """The template of `model.data.prompt_template` and the keys beside it."""
    fields = settings.get("truncation_field") or []
    fields = fields.split(",") if isinstance(fields, str) else fields
    return SFTTemplate(
        prompt_template=settings["prompt_template"],
        answer_field=settings.get("label_key", "output"),
        truncation_fields=tuple(dict.fromkeys(str(name).strip() for name in fields)),
        truncation_method=settings.get("truncation_method", "right"),
        answer_only_loss=settings.get("answer_only_loss", True),
    )


class _Factory:
    """Encoders of one family under one set of settings."""

    def __init__(
        self,
        model_cfg: DictConfig,
        tokenizer: "PreTrainedTokenizerBase",
        shape: TransformerConfig | None,
        settings: Mapping[str, Any],
        virtual_tokens: int | None,
        learns: bool,
    ) -> None:
        self.tokenizer, self.shape, self.settings = tokenizer, shape, settings
        self.virtual_tokens, self.learns = virtual_tokens, learns
        self.limit = longest_row(model_cfg, shape, settings.get("max_seq_length"))
        self.add_bos = bool(settings.get("add_bos"))
        self.add_eos = settings.get("add_eos") is not False

    def encoder(self, template: TaskTemplate) -> RowEncoder:
        virtual = self._virtual(template)
        tokenizer, bos, eos = self.tokenizer, self.add_bos, self.add_eos
        more = {
            "add_sep": bool(self.settings.get("add_sep")),
            "tokens_to_generate": self.settings.get("tokens_to_generate") or 0,
            "over_long": self.settings.get("over_long"),
            "virtual_tokens": virtual,
        }
        if self._family == "gpt":
            return Encoder(template, tokenizer, self.limit, bos, eos, **more)
        assert self.shape is not None
        if self._family == "t5":
            start = self.shape.decoder_start_token_id
            return Seq2SeqEncoder(template, tokenizer, self.limit, start, bos, eos, **more)
        self._refuse_for_spans(template)
        types = self.shape.num_token_types
        return SpanEncoder(template, tokenizer, self.limit, types, virtual)

    def chat(self) -> ChatEncoder:
        if self._family != "gpt":
            raise UserError(
                f"model.data.chat=True: a {self._family} model reads no conversations: use a GPT, "
                f"or rows with model.task_templates or model.data.prompt_template"
            )
        if self.add_bos or not self.add_eos or self.settings.get("add_sep"):
            raise UserError(
                "model.data.add_bos, add_eos and add_sep have no meaning with model.data.chat=True:"
                " the chat template says all special tokens; leave them at False, True and False"
            )
        names = ("tokens_to_generate", "over_long", "truncation_method", "answer_only_loss")
        more: dict[str, Any] = {k: self.settings[k] for k in names if k in self.settings}
        virtual = self._room(self.virtual_tokens or 0)
        return ChatEncoder(self.tokenizer, self.limit, virtual_tokens=virtual, **more)

    @property
    def _family(self) -> str:
        return "gpt" if self.shape is None else self.shape.architecture

    def _virtual(self, template: TaskTemplate) -> int:
        """The virtual tokens before a row: the adapters', which the template's must equal."""
        said = template.total_virtual_tokens
        given = said if self.virtual_tokens is None else self.virtual_tokens
        if not self.learns:
            given = max(said, given)
        elif said and said != given:
            raise UserError(
                f"{template.key('total_virtual_tokens')}={said}, but the run's adapters put "
                f"{given} virtual tokens before each row: give both the same number, or set it to "
                f"0 and leave placeholders and virtual_token_splits out"
            )
        return self._room(given)

    def _room(self, virtual: int) -> int:
        if virtual >= self.limit - 1:
            raise UserError(
                f"model.encoder_seq_length={self.limit} has no room for a row behind {virtual} "
                f"virtual tokens: raise it, or use fewer"
            )
        return virtual

    def _refuse_for_spans(self, template: TaskTemplate) -> None:
        if isinstance(template, SFTTemplate):
            raise UserError(
                "model.data.prompt_template has no meaning for head question_answering, which marks"
                " an answer in its context: describe the rows by model.task_templates"
            )
        if self.add_bos or not self.add_eos:
            raise UserError(
                "data.add_bos and data.add_eos have no meaning for head question_answering, whose "
                "rows have the tokenizer's own special tokens: leave them at False and True"
            )
        for key in ("add_sep", "tokens_to_generate", "over_long"):
            if self.settings.get(key):
                raise UserError(
                    f"model.data.{key} has no meaning for head question_answering, which reads "
                    f"long contexts in windows: leave it out"
                )


def longest_row(
    model_cfg: DictConfig, shape: TransformerConfig | None, own: int | None = None
) -> int:
    """`model.encoder_seq_length`, or the data's own `max_seq_length`.

    Where both are absent: the model's positions, or 512 without a limit.

    Raises:
        UserError: for what is no length, and for one beyond the table of a model's positions.
    """
    key = "encoder_seq_length" if own is None else "data: max_seq_length"
    limit = OmegaConf.select(model_cfg, "encoder_seq_length") if own is None else own
    if limit is None and shape is not None:
        return shape.max_position_embeddings or DEFAULT_LENGTH
    if not isinstance(limit, int) or limit < 2:
        raise UserError(f"model.{key} must be a whole number above 1, not {limit!r}")
    if shape is None or shape.position_embedding_type != "learned_absolute":
        return limit
    if 0 < shape.max_position_embeddings < limit:
        raise UserError(
            f"model.{key}={limit} is longer than the "
            f"{shape.max_position_embeddings} positions that the model has: lower it"
        )
    return limit


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Raises a UserError where a token of the tokenizer is beyond the model's vocabulary."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if size > vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: it has tokens up to number {size - 1}, the "
            f"model's vocabulary ends at {vocab_size - 1}: put the model's own tokenizer beside it"
        )


def _check_settings(settings: Mapping[str, Any], templates: Any) -> None:
    """Values that stand for a choice, and one description of the rows."""
    described = {
        "model.task_templates": bool(templates),
        "model.data.prompt_template": settings.get("prompt_template") is not None,
        "model.data.chat": bool(settings.get("chat")),
    }
    several = [name for name, given in described.items() if given]
    if len(several) > 1:
        raise UserError(
            f"{' and '.join(several)} both say how rows are read: keep one (task_templates: [], "
            f"prompt_template: null, chat: False)"
        )
    choices = {"over_long": OVER_LONG, "unlabelled": UNLABELLED, "truncation_method": METHODS}
    for key, allowed in choices.items():
        if settings.get(key, allowed[0]) not in allowed:
            named = ", ".join("null" if value is None else value for value in allowed)
            raise UserError(f"model.data.{key}={settings[key]!r}; allowed: {named}")
