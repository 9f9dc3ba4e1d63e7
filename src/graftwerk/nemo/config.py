"""The configuration of NeMo's PEFT scripts: which of its keys count here, and which must be idle.

NeMo's `megatron_gpt_finetuning_config.yaml` names much that this engine has no need of. Such a key
may be there with the value that asks for nothing; any other value, and any key that is not known,
is an error, so that no setting is lost in silence.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters.configs import SCHEMES
from graftwerk.data import sources
from graftwerk.errors import UserError
from graftwerk.training.trainer import CHECKPOINT_KEYS


class Read(Enum):
    """What becomes of a key: the engine reads it, or its value makes no difference."""

    KEPT = "kept"
    IDLE = "idle"


KEPT, IDLE = Read.KEPT, Read.IDLE
# A rule is KEPT, IDLE, the values that ask for nothing, or the rules of a section.
Rules = Mapping[str, Any]


def _kept(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, KEPT)


TRAINER: Rules = {
    **_kept("devices", "num_nodes", "accelerator", "precision", "logger", "enable_checkpointing"),
    **_kept("max_epochs", "max_steps", "max_time", "log_every_n_steps", "val_check_interval"),
    **_kept("check_val_every_n_epoch", "num_sanity_val_steps", "accumulate_grad_batches"),
    **_kept("limit_train_batches", "limit_val_batches", "gradient_clip_val"),
    **_kept("resume_from_checkpoint"),
    "use_distributed_sampler": (False,),
    "replace_sampler_ddp": (False,),
    "enable_model_summary": (False,),
    "benchmark": (False,),
}
EXP_MANAGER: Rules = {
    **_kept("explicit_log_dir", "exp_dir", "name", "create_tensorboard_logger"),
    **_kept("create_wandb_logger", "wandb_logger_kwargs", "resume_if_exists"),
    **_kept("resume_ignore_no_checkpoint", "max_time_per_run", "create_checkpoint_callback"),
    "checkpoint_callback_params": {
        **_kept(*CHECKPOINT_KEYS),
        "always_save_nemo": (False,),
    },
    "create_early_stopping_callback": (False,),
    "early_stopping_callback_params": IDLE,
}
DATA_SET: Rules = {
    **_kept(*sources.SETTINGS, *sources.BATCHES),
    **_kept("file_names", "names", "concat_sampling_probabilities"),
    "memmap_workers": IDLE,
    "index_mapping_dir": IDLE,
    "min_seq_length": (1,),
    "global_sample_mapping": (False,),
}
EVALUATED_SET: Rules = {
    **DATA_SET,
    "write_predictions_to_file": (False,),
    "output_file_path_prefix": IDLE,
    "metric": {"name": ("loss",), "average": IDLE, "num_classes": IDLE},
}
INFERENCE: Rules = {
    **_kept("greedy", "temperature", "top_k", "top_p", "repetition_penalty", "tokens_to_generate"),
    **_kept("min_tokens_to_generate", "end_strings", "compute_logprob"),
    "add_BOS": (False,),
    "all_probs": (False,),
    "compute_attention_mask": IDLE,
}
MODEL: Rules = {
    **_kept("seed", "global_batch_size", "micro_batch_size", "restore_from_path", "nemo_path"),
    **_kept("revision", "encoder_seq_length", "optim"),
    "peft": {
        **_kept("peft_scheme", *(block for _, block in SCHEMES.values())),
        "restore_from_path": (None,),
    },
    "data": {
        "train_ds": DATA_SET,
        "validation_ds": EVALUATED_SET,
        "test_ds": EVALUATED_SET,
        **_kept("over_long", "unlabelled", "answer_only_loss", "chat"),
        **_kept("packed_sequence_size", "share_prefixes"),
    },
    "inference": INFERENCE,
    "answer_only_loss": KEPT,
    "resume_from_checkpoint": KEPT,
    **_kept(
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "pipeline_model_parallel_split_rank",
        "sequence_parallel",
        "activations_checkpoint_granularity",
        "compile",
    ),
    "virtual_pipeline_model_parallel_size": (None,),
    "save_nemo_on_validation_end": (False,),
    "sync_batch_comm": (False,),
    "megatron_amp_O2": IDLE,
    "gradient_as_bucket_view": IDLE,
    "activations_checkpoint_method": IDLE,
    "activations_checkpoint_num_layers": IDLE,
    "activations_checkpoint_layers_per_pipeline": IDLE,
    "hidden_dropout": (0,),
    "attention_dropout": (0,),
    "ffn_dropout": (0,),
    "fsdp": (False,),
    **dict.fromkeys(
        ("fsdp_sharding_strategy", "fsdp_grad_reduce_dtype", "fsdp_sharded_checkpoint"), IDLE
    ),
    "fsdp_use_orig_params": IDLE,
}
CONFIG: Rules = {
    "name": KEPT,
    "trainer": TRAINER,
    "exp_manager": EXP_MANAGER,
    "model": MODEL,
    "inference": INFERENCE,
}
# The least value, and whether it must be whole; the engine checks further.
NUMBERS: dict[str, tuple[int, bool]] = {
    "trainer.devices": (1, True),
    "trainer.num_nodes": (1, True),
    "trainer.max_epochs": (-1, True),
    "trainer.max_steps": (-1, True),
    "trainer.log_every_n_steps": (1, True),
    "trainer.accumulate_grad_batches": (1, True),
    "trainer.check_val_every_n_epoch": (1, True),
    "trainer.num_sanity_val_steps": (0, True),
    "trainer.val_check_interval": (0, False),
    "trainer.limit_train_batches": (0, False),
    "trainer.limit_val_batches": (0, False),
    "trainer.gradient_clip_val": (0, False),
    "model.seed": (0, True),
    "model.global_batch_size": (1, True),
    "model.micro_batch_size": (1, True),
    "model.tensor_model_parallel_size": (1, True),
    "model.pipeline_model_parallel_size": (1, True),
    "model.optim.lr": (0, False),
}
NAME = "megatron_peft"  # of a run that has none
# NeMo's defaults for what a short configuration leaves out.
DEFAULTS = {
    "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "auto", "precision": 32},
    "exp_manager": {
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
    },
    "model": {
        "seed": 1234,
        "global_batch_size": 128,
        "micro_batch_size": 4,
        "optim": {"name": "fused_adam", "lr": 1e-4},
        "peft": {},
        "data": {},
    },
}
# Sections whose settings NeMo's YAML always gives.
SFT_DEFAULTS = {"prompt_template": "{input} {output}", "label_key": "output"}


def read_config(config: Mapping[Any, Any]) -> DictConfig:
    """NeMo's configuration as the sections `trainer`, `exp_manager` and `model` of a stage.

    Raises:
        UserError: for a key that is not known, and for a value that asks for what is not carried
            out here.
    """
    if not isinstance(config, DictConfig):
        config = DictConfig(dict(config))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is missing (???): give it a value")
    given: Any = OmegaConf.to_container(config, resolve=True)
    kept = _checked(given, CONFIG, "")
    made: Any = OmegaConf.to_container(OmegaConf.merge(DEFAULTS, kept))
    _translate(made)
    read = DictConfig(made)
    _check_numbers(read)
    return read


def _checked(given: Mapping[str, Any], rules: Rules, where: str) -> dict[str, Any]:
    """The keys of a section that the engine reads."""
    kept: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{where}{key}"
        if key not in rules:
            near = get_close_matches(str(key), list(rules), n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"allowed: {', '.join(rules)}"
            raise UserError(f"{name} is not known; {hint}")
        rule = rules[key]
        if value is None:  # as if it were left out
            continue
        if rule is KEPT:
            kept[key] = value
        elif isinstance(rule, Mapping):
            if not isinstance(value, Mapping):
                raise UserError(f"{name}={value!r} must be a section with keys of its own")
            kept[key] = _checked(value, rule, f"{name}.")
        elif isinstance(rule, tuple) and value not in rule:
            raise UserError(
                f"{name}={value!r} is not carried out here: set it to {rule[0]}, or leave it out"
            )
    return kept


def _translate(config: dict[str, Any]) -> None:
    """Puts what NeMo says in a place of its own where the engine reads it."""
    model, data, manager = config["model"], config["model"]["data"], config["exp_manager"]
    for key in ("train_ds", "validation_ds", "test_ds"):
        if data.get(key) is None or not data[key].get("file_names"):
            data.pop(key, None)
    if not data.get("chat"):
        for own in (data[key] for key in data if key.endswith("_ds")):
            for key, default in SFT_DEFAULTS.items():
                own[key] = own.get(key) or default
    if (only := model.pop("answer_only_loss", None)) is not None:
        data.setdefault("answer_only_loss", only)
    if (path := model.pop("resume_from_checkpoint", None)) is not None:
        config["trainer"].setdefault("resume_from_checkpoint", path)
    model["inference"] = {**model.get("inference", {}), **config.pop("inference", {})}
    manager["name"] = manager.get("name") or config.get("name") or NAME
    config.pop("name", None)
    params = manager.get("checkpoint_callback_params")
    if params and params.get("monitor") == "validation_loss":
        params["monitor"] = "val_loss"  # NeMo's name of the same figure
        if params.get("filename"):
            params["filename"] = params["filename"].replace("{validation_loss", "{val_loss")


def answers_apart(model: DictConfig) -> None:
    """Takes `tokens_to_generate` from a T5's rows, whose prompts need not leave room for it."""
    for key in ("train_ds", "validation_ds", "test_ds"):
        length = (model.data.get(key) or {}).pop("tokens_to_generate", None)
        if key == "test_ds" and length is not None:
            model.inference.setdefault("tokens_to_generate", length)


def _check_numbers(config: DictConfig) -> None:
    for key, (least, whole) in NUMBERS.items():
        value = OmegaConf.select(config, key)
        kind = int if whole else int | float
        if value is None or (
            isinstance(value, kind) and type(value) is not bool and value >= least
        ):
            continue
        what = "a whole number" if whole else "a number"
        raise UserError(f"{key}={value!r} must be {what}, at least {least}")


def result_path(model: Mapping[Any, Any], folder: Path, name: str, adapters: bool) -> str:
    """Where a run's result goes: `model.nemo_path`, else beside the checkpoints, as NeMo does."""
    if model.get("nemo_path"):
        return str(model["nemo_path"])
    return str(folder / "checkpoints" / (f"{name}.nemo" if adapters else name))
