"""NeMo's configuration: what of it counts, what may stay, what is refused."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from graftwerk.errors import UserError
from graftwerk.nemo import PEFT_CONFIG_MAP
from graftwerk.nemo.config import read_config

# The keys of NeMo's `megatron_gpt_finetuning_config.yaml` with its values, but for what this engine
# does not carry out: `precision: 16` and early stopping.
NEMOS = """
name: megatron_gpt_peft_${model.peft.peft_scheme}_tuning
trainer: {devices: 1, accelerator: cpu, num_nodes: 1, precision: bf16, logger: False,
  enable_checkpointing: False, use_distributed_sampler: False, max_epochs: 9999, max_steps: 20000,
  log_every_n_steps: 10, val_check_interval: 200, gradient_clip_val: 1.0}
exp_manager:
  explicit_log_dir: null
  exp_dir: null
  name: ${name}
  create_wandb_logger: False
  wandb_logger_kwargs: {project: null, name: null}
  resume_if_exists: True
  resume_ignore_no_checkpoint: True
  create_checkpoint_callback: True
  checkpoint_callback_params:
    monitor: validation_${model.data.validation_ds.metric.name}
    save_top_k: 1
    mode: min
    save_nemo_on_train_end: True
    filename: '${name}--{validation_loss:.3f}-{step}-{consumed_samples}'
    model_parallel_size: ${model.tensor_model_parallel_size}
    always_save_nemo: False
    save_best_model: True
  create_early_stopping_callback: False
  early_stopping_callback_params: {monitor: val_loss, mode: min, patience: 10}
model:
  seed: 1234
  tensor_model_parallel_size: 1
  pipeline_model_parallel_size: 1
  global_batch_size: 128
  micro_batch_size: 4
  restore_from_path: base.nemo
  resume_from_checkpoint: null
  save_nemo_on_validation_end: False
  sync_batch_comm: False
  megatron_amp_O2: False
  sequence_parallel: False
  activations_checkpoint_granularity: null
  activations_checkpoint_method: null
  activations_checkpoint_num_layers: null
  activations_checkpoint_layers_per_pipeline: null
  answer_only_loss: True
  gradient_as_bucket_view: False
  hidden_dropout: 0.0
  attention_dropout: 0.0
  ffn_dropout: 0.0
  fsdp: False
  fsdp_sharding_strategy: full
  fsdp_grad_reduce_dtype: fp32
  fsdp_sharded_checkpoint: False
  fsdp_use_orig_params: False
  peft:
    peft_scheme: adapter
    restore_from_path: null
    adapter_tuning: {type: parallel_adapter, adapter_dim: 32, adapter_dropout: 0.0,
      norm_position: pre, column_init_method: xavier, row_init_method: zero,
      norm_type: mixedfusedlayernorm, layer_selection: null, weight_tying: False,
      position_embedding_strategy: null}
    lora_tuning: {variant: nemo, target_modules: [attention_qkv], adapter_dim: 32,
      alpha: "${model.peft.lora_tuning.adapter_dim}", adapter_dropout: 0.0,
      column_init_method: xavier, row_init_method: zero, layer_selection: null,
      weight_tying: False, position_embedding_strategy: null}
    p_tuning: {virtual_tokens: 10, bottleneck_dim: 1024, embedding_dim: 1024, init_std: 0.023}
    ia3_tuning: {layer_selection: null}
    selective_tuning: {tunable_base_param_names: [self_attention, word_embeddings]}
  data:
    train_ds: {file_names: [train.jsonl], global_batch_size: "${model.global_batch_size}",
      micro_batch_size: "${model.micro_batch_size}", shuffle: True, num_workers: 0,
      memmap_workers: 2, pin_memory: True, max_seq_length: 2048, min_seq_length: 1,
      drop_last: True, concat_sampling_probabilities: null, label_key: output, add_eos: True,
      add_sep: False, add_bos: False, truncation_field: input, index_mapping_dir: null,
      prompt_template: "{input} {output}", truncation_method: right, global_sample_mapping: False}
    validation_ds: {file_names: [val.jsonl], names: null, memmap_workers: 2,
      label_key: "${model.data.train_ds.label_key}", write_predictions_to_file: False,
      output_file_path_prefix: null, tokens_to_generate: 32,
      metric: {name: loss, average: null, num_classes: null}}
    test_ds: {file_names: null, metric: {name: loss, average: null, num_classes: null}}
  optim: {name: fused_adam, lr: 1e-4, weight_decay: 0.01, betas: [0.9, 0.98],
    sched: {name: CosineAnnealing, warmup_steps: 50, min_lr: 0.0, constant_steps: 0,
      monitor: val_loss, reduce_on_plateau: false}}
"""


def config(**changes: Any) -> Any:
    """A short sound configuration with values put at keys, `__` for a dot."""
    made = OmegaConf.create({"trainer": {"max_steps": 1}, "model": {"restore_from_path": "base"}})
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value, force_add=True)
    return made


def test_nemos_own_file_is_read() -> None:
    read = read_config(OmegaConf.create(NEMOS))
    params = read.exp_manager.checkpoint_callback_params
    assert params.monitor == "val_loss"
    assert params.filename.startswith("megatron_gpt_peft_adapter_tuning--{val_loss:.3f}-{step}")
    assert read.model.data.answer_only_loss
    assert read.model.data.validation_ds.prompt_template == "{input} {output}"
    assert "test_ds" not in read.model.data
    assert read.trainer.max_steps == 20000
    assert "fsdp" not in read.model


def test_every_method_reads_its_block_of_nemos_file() -> None:
    model_cfg = read_config(OmegaConf.create(NEMOS)).model
    for scheme in ("adapter", "lora", "ptuning", "ia3", "selective"):
        kind = PEFT_CONFIG_MAP[scheme]
        assert kind is not None
        assert kind(model_cfg).method is not None


def test_a_plain_mapping_is_a_configuration_too() -> None:
    plain = {"trainer": {"max_steps": 3}, "model": {"restore_from_path": "base"}}
    assert read_config(plain).trainer.max_steps == 3


def test_what_is_left_out_has_nemos_defaults() -> None:
    read = read_config(config())
    assert (read.model.global_batch_size, read.model.micro_batch_size) == (128, 4)
    assert read.exp_manager.resume_if_exists
    assert read_config(config(name="mine")).exp_manager.name == "mine"


def test_a_null_is_as_if_the_key_were_left_out() -> None:
    given = config(model__optim=None, trainer__precision=None, exp_manager__name=None)
    assert read_config(given) == read_config(config())


def test_the_section_inference_may_stand_at_the_top() -> None:
    assert read_config(config(inference__greedy=False)).model.inference.greedy is False


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model__data__train_ds__file_name", ["a"], "did you mean model.data.train_ds.file_names"),
        ("trainer__max_step", 5, "did you mean trainer.max_steps"),
        ("models", {}, "did you mean model?"),
        ("model__peft__lora", {}, "model.peft.lora is not known"),
        ("model__fsdp", True, "set it to False, or leave it out"),
        ("model__tensor_model_parallel_size", 0, "must be a whole number, at least 1"),
        ("model__hidden_dropout", 0.1, "model.hidden_dropout=0.1 is not carried out here"),
        ("exp_manager__create_early_stopping_callback", True, "set it to False"),
        ("model__data__validation_ds__metric__name", "rouge", "set it to loss"),
        ("model__data", "rows.jsonl", "must be a section with keys of its own"),
        ("trainer__max_steps", "many", "trainer.max_steps='many' must be a whole number"),
        ("trainer__devices", True, "trainer.devices=True must be a whole number, at least 1"),
        ("model__global_batch_size", 0, "must be a whole number, at least 1"),
        ("model__optim__lr", "1e-4x", "must be a number"),
        ("model__restore_from_path", "???", "model.restore_from_path is missing"),
    ],
)
def test_what_is_not_carried_out_is_refused_by_name(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        read_config(config(**{key: value}))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
