"""What the user is told: mistakes, notices, and our names for what others call otherwise."""

from collections.abc import Iterable, Sequence

# Stages and groups of the published launcher that are ours under another name.
RENAMED_STAGES = {"data_preparation": "data_prep", "evaluation": "eval"}
# Stages and groups of the published launcher, and of later versions of ours, that are not here.
ABSENT_STAGES = (
    "prompt_learning",
    "conversion_hf2nemo",
    "external_conversion",
    "quantization",
    "ptq",
    "autoconfigurator",
    "search_config",
    "rag_indexing",
    "rag_generation",
    "rlhf_rm",
    "rlhf_ppo",
    "reward_model",
    "steerlm_reg",
)
ABSENT_CLUSTERS = ("k8s",)
# Keys beside the stages that the published launcher has and that change nothing here.
ABSENT_KEYS = ("debug", "numa_mapping")
# Keys of other tools: what a person who types them is after.
FOREIGN_KEYS = {
    **dict.fromkeys(
        ("r", "lora_r", "rank", "bottleneck_size", "adapter_size"),
        "the width of an adapter is adapter_dim, in model.adapter_tuning or model.peft.lora_tuning",
    ),
    "reduction_factor": "the width of an adapter is adapter_dim, in features",
    "lora_alpha": "ours is model.peft.lora_tuning.alpha, of stage peft",
    "lora_dropout": "ours is model.peft.lora_tuning.adapter_dropout, of stage peft",
    "target_modules": "ours is model.peft.lora_tuning.target_modules, of stage peft",
    "use_dora": "ours is model.peft.lora_tuning.dora, of stage peft",
    "use_rslora": "ours is model.peft.lora_tuning.rank_stabilised, of stage peft",
    "num_virtual_tokens": "ours is model.peft.p_tuning.virtual_tokens, of stage peft",
    **{
        name: f"it is model.peft.{name}, of stage peft"
        for name in ("peft_scheme", "lora_tuning", "p_tuning", "prefix_tuning", "selective_tuning")
    },
    "peft_type": "ours is model.peft.peft_scheme, of stage peft",
    "learning_rate": "ours is model.optim.lr",
    "lr_scheduler_type": "ours is model.optim.sched.name",
    "num_train_epochs": "ours is trainer.max_epochs",
    "warmup_ratio": "ours is model.optim.sched.warmup_steps, in steps",
    "per_device_train_batch_size": "ours is model.micro_batch_size",
    "train_batch_size": "ours is model.global_batch_size",
    "gradient_accumulation_steps": "ours is trainer.accumulate_grad_batches",
    "max_grad_norm": "ours is trainer.gradient_clip_val",
    "model_name_or_path": "ours is model.language_model_path",
    **dict.fromkeys(
        ("activations_checkpoint_method", "activations_checkpoint_num_layers"),
        "ours is model.activations_checkpoint_granularity alone: full recomputes every layer",
    ),
    "torch_compile": "ours is model.compile",
    "gradient_checkpointing": "ours is model.activations_checkpoint_granularity: full",
    "max_seq_length": "ours is model.encoder_seq_length",
    "output_dir": "ours is run.results_dir",
    "max_new_tokens": "ours is model.inference.tokens_to_generate",
    "gpus": "ours is trainer.devices",
    "nodes": "ours is trainer.num_nodes",
    **dict.fromkeys(
        ("gres", "qos", "constraint", "reservation", "exclude"),
        'ours is cluster.sbatch_args, such as ["--gres=gpu:8"]',
    ),
    "results": "it goes with action=status, logs, cancel or resume",
    "watch": "it goes with action=status or action=logs",
    **dict.fromkeys(("stage", "point"), "it goes with action=logs"),
    "walltime": "ours is run.time_limit",
}


class Mistakes(Exception):
    """Wrong configuration: one line for each mistake; nothing was written."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


def stage_hint(name: str, known: Iterable[str]) -> str | None:
    """Why `name` is no stage of ours, where it is one elsewhere."""
    if name in RENAMED_STAGES:
        return f"it is called {RENAMED_STAGES[name]} here"
    if name in ABSENT_STAGES:
        return f"it is not here; there are {', '.join(known)}"
    return None


def without_effect(keys: Sequence[tuple[str, str]]) -> list[str]:
    """The one notice that names accepted keys that change nothing here, given as (stage, key)."""
    if not keys:
        return []
    stages = ", ".join(dict.fromkeys(stage for stage, _ in keys if stage))
    names = ", ".join(dict.fromkeys(key for _, key in keys))
    return [f"accepted without effect{f' in {stages}' if stages else ''}: {names}"]


def one_line(error: BaseException) -> str:
    """An exception and its cause as one line."""
    parts = [str(error)]
    if error.__cause__ is not None and str(error.__cause__) not in parts[0]:
        parts.append(str(error.__cause__))
    text = " ".join(" ".join(parts).split())
    return text or type(error).__name__
