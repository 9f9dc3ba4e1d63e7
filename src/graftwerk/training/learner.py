"""What a learning stage trains: the model, on its device, with the trained parts unfrozen."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters import SelectiveConfig
from graftwerk.adapters.configs import schemes
from graftwerk.checkpoints import load_tokenizer
from graftwerk.checkpoints.adapter import read_adapters
from graftwerk.checkpoints.base_path import adapter_of, base_of
from graftwerk.data.datamodule import data_files, encoders_from_config, longest_row
from graftwerk.data.jsonl import read_rows
from graftwerk.data.tasks import template_words
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, TransformerConfig
from graftwerk.parallel.mesh import Mesh
from graftwerk.parallel.tensor import parallelize
from graftwerk.training.adapter_drop import LayerChoice
from graftwerk.training.base import Base, revision_of
from graftwerk.training.frozen import add_frozen, check_fusions
from graftwerk.training.goal import KEY, Goal, check_layers, check_selection
from graftwerk.training.sweep import Point
from graftwerk.training.trainer import precision_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Learner:
    """A model with its trained parts unfrozen.

    `adapters` and `fusions` are those that are trained; neither: all of the model is. `drop`: the
    layers that each step leaves out. `sweep`: the points that the adapters are.
    """

    model: GPT | T5 | BERT
    tokenizer: "PreTrainedTokenizerBase"
    adapters: list[str]
    base: str
    autocast: bool
    fusions: list[str] = field(default_factory=list)
    drop: LayerChoice | None = None
    sweep: tuple[Point, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all of the model is trained."""
        return not self.adapters and not self.fusions


def open_base(stage: str, model: DictConfig) -> Base | None:
    """The checkpoint that a run begins with; None for `training` from first weights.

    Raises:
        UserError: where it cannot be used for the stage.
    """
    if stage != "training":
        return Base.open(base_of(model), revision_of(model), model.get("head"))
    if not model.get("restore_path"):
        return None
    base = Base.open(str(model.restore_path), revision_of(model))
    if base.config.architecture != "gpt":
        raise UserError(
            f"model.restore_path={base.path} is a {base.config.architecture} model: stage training "
            f"trains GPTs; use stage fine_tuning, or an adapter on it by stage peft"
        )
    return base


def tokenizer_of(model: DictConfig, base: Base | None) -> "PreTrainedTokenizerBase":
    """The base's tokenizer; for a model from first weights the one that `model.tokenizer` says."""
    if base is not None:
        return base.tokenizer()
    wanted = model.get("tokenizer") or {}
    kind = wanted.get("type", "word")
    if kind == "pretrained":
        if not wanted.get("path"):
            raise UserError("model.tokenizer.path is missing: type pretrained reads it from there")
        return load_tokenizer(wanted["path"])
    return build_tokenizer(kind, _texts(model), wanted.get("vocab_size"))


def _texts(model: DictConfig) -> Iterator[str]:
    """All that a model may have to read: the templates' own words and the rows' fields."""
    yield from template_words(model)
    encoders_from_config(model, _NoTokens())  # type: ignore[arg-type]  (checks the tasks' names)
    for key in ("train_ds", "validation_ds"):
        for path in data_files(model, key):
            for _, row in read_rows(path):
                yield from (value for value in row.values() if isinstance(value, str))


class _NoTokens:
    """Stands for a tokenizer before there is one."""

    bos_token_id = eos_token_id = sep_token_id = pad_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return []


def build_learner(
    stage: str,
    cfg: DictConfig,
    base: Base | None,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
    goal: Goal | None = None,
    mesh: Mesh | None = None,
) -> Learner:
    """The model on its device, with what is trained unfrozen and the rest frozen.

    A frozen base is held in `trainer.precision`; what is trained is float32. `goal` is what the
    configuration says, where the caller has looked already. On a `mesh` the model holds what this
    process has of the base, and whole adapters, of which `Placement` keeps a stage's.
    """
    dtype, model_cfg = precision_of(cfg.trainer, device), cfg.model
    goal = Goal.of(model_cfg, stage) if goal is None else goal
    mixed = dtype == torch.bfloat16
    if base is None:
        model = _first_weights(model_cfg, tokenizer, device)
        if mesh is not None and mesh.tensor_devices is not None:
            parallelize(model, mesh.tensor_devices, mesh.sequence)
        return Learner(model, tokenizer, [], str(model_cfg.nemo_path), autocast=mixed)
    if goal.whole:
        model = base.load(torch.float32, device, model_cfg.seed, mesh=mesh)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # they may be views of the file
        return Learner(model.requires_grad_(True), tokenizer, [], base.path, autocast=mixed)
    # Copies of the base's own parameters are trained in float32, beside a base of the same type.
    mixed = mixed and any(isinstance(method, SelectiveConfig) for _, method in goal.methods)
    four_bits = stage == "peft" and "qlora" in schemes(model_cfg.peft)
    if four_bits and any(isinstance(method, SelectiveConfig) for _, method in goal.methods):
        raise UserError(
            "model.peft.peft_scheme: selective trains parameters of the base, which qlora holds in "
            "4 bits: use lora beside it"
        )
    if four_bits and model_cfg.get("use_fsdp"):
        raise UserError(
            "model.use_fsdp=True: 4-bit weights are not sharded: set it to False, or leave qlora "
            "out of model.peft.peft_scheme"
        )
    kind = torch.float32 if mixed else dtype
    # A sharded base goes to its device layer by layer, by `fsdp.shard_base`.
    place = torch.device("cpu") if model_cfg.get("use_fsdp") else device
    model = base.load(kind, place, model_cfg.seed, "nf4" if four_bits else None, mesh)
    drop = _compose(model, goal, model_cfg)
    fusions = goal.fusions_to_train()
    return Learner(model, tokenizer, goal.trained, base.path, mixed, fusions, drop, goal.sweep)


def _compose(model: GPT | T5 | BERT, goal: Goal, model_cfg: DictConfig) -> LayerChoice | None:
    """Adds to a model what a goal names, active and unfrozen as it says.

    Returns the layers that each step chooses to leave out; those that are always left out are.
    """
    add_frozen(model, goal.frozen, goal.files, [goal.composition], "model.peft.adapters")
    torch.manual_seed(model_cfg.seed)
    seeds = {point.name: point.seed for point in goal.sweep}
    for name, method in goal.methods:
        check_selection(model.config, method)
        if name in seeds:  # each is born as it would be alone
            torch.manual_seed(seeds[name])
        model.add_adapter(name, method)
    fusions = goal.fusions_to_train()
    for key in fusions:
        model.add_fusion(key, goal.fusion)
    advice = "name fusion in model.peft.peft_scheme, or a file that holds it in model.peft.adapters"
    check_fusions(model, [goal.composition], KEY, advice)
    start = start_of(model_cfg)
    if start is not None:
        _restore(model, goal.trained, fusions, start)
    model.train_only(goal.trained, fusions)
    drop, left_out = goal.drop, ()
    if drop is not None:
        # A number: up to so many of the first layers.
        last = drop.fixed if drop.most is None else range(drop.most)
        check_layers(model.config, last, "model.peft.adapter_drop.layers")
    if drop is not None and drop.most is None:
        drop, left_out = None, drop.fixed
        _freeze_layers(model, goal.trained, fusions, left_out)
    model.set_active(goal.composition, left_out)
    return drop


def _freeze_layers(
    model: GPT | T5 | BERT, names: list[str], fusions: list[str], layers: Sequence[int]
) -> None:
    """Freezes what has no part in any step, which a decay of weights would move."""
    parts = [(slot, part) for name in names for _, slot, part in model.parts(name)]
    parts += [(slot, layer) for key in fusions for _, slot, layer in model.fusion_layers(key)]
    for slot, part in parts:
        if slot.site.layer in layers:
            part.requires_grad_(False)


def start_of(model: DictConfig) -> str | None:
    """The adapter file from which training goes on: `restore_path`, or `peft.restore_from_path`.

    Raises:
        UserError: where both are given and differ.
    """
    ours, theirs = adapter_of(model), (model.get("peft") or {}).get("restore_from_path")
    if ours and theirs and ours != theirs:
        raise UserError(
            f"model.restore_path={ours} and model.peft.restore_from_path={theirs} both name the "
            f"adapter to go on from and differ: set one of them to null"
        )
    return ours or (str(theirs) if theirs else None)


def _first_weights(
    model_cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> GPT:
    given: Any = OmegaConf.to_container(model_cfg, resolve=True)
    known = {field.name for field in fields(TransformerConfig)}
    shape = {k: v for k, v in given.items() if k in known and v is not None}
    shape.setdefault("max_position_embeddings", model_cfg.encoder_seq_length)
    shape.setdefault("ffn_hidden_size", 4 * shape["hidden_size"])
    config = TransformerConfig(**{**shape, "vocab_size": len(tokenizer)})
    longest_row(model_cfg, config)  # checks that the model has the positions
    model = GPT(config)
    model.initialise(torch.Generator().manual_seed(model_cfg.seed))
    return model.to(device).requires_grad_(True)


def _restore(model: GPT | T5 | BERT, names: list[str], fusions: list[str], path: str) -> None:
    """Weights of a file into what is trained; settings that change its function agree."""
    file = read_adapters(path).on(model)
    alone = len(file.adapters) == len(names) == 1  # whatever it was called
    free = ("dropout", "column_init_method", "row_init_method")
    for adapter in file.adapters:
        name = names[0] if alone else adapter.name
        if name not in names:
            raise UserError(
                f"model.restore_path={path} holds an adapter {name!r}, and this run trains "
                f"{', '.join(names) or 'none'}: name its method in model.peft.peft_scheme"
            )
        own = {k: v for k, v in model.adapter_config(name).items() if k not in free}
        _check_alike(path, "an adapter", own, adapter.config)
        model.load_adapter_state(name, adapter.state)
    for fusion in file.fusions:
        if fusion.name not in fusions:
            raise UserError(
                f"model.restore_path={path} holds a fusion of {fusion.name}, and this run trains "
                f"{' and '.join(fusions) or 'none'}: name it in model.peft.composition"
            )
        _check_alike(path, "a fusion", asdict(model.fusions[fusion.name]), asdict(fusion.config))
        model.load_fusion_state(fusion.name, fusion.state)


def _check_alike(path: str, what: str, own: dict[str, Any], saved: dict[str, Any]) -> None:
    said = [
        f"{key} {saved.get(key)!r} instead of {value!r}"
        for key, value in own.items()
        if _plain(saved.get(key)) != _plain(value)
    ]
    if said:
        raise UserError(f"model.restore_path={path} holds {what} with {', '.join(said)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # as YAML has it
