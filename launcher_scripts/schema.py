"""Every key that a user may set: its type, its range and its default.

The key names are those of the published launcher. A stage's YAML may leave out what has a default
here; what it holds besides is a mistake. A default that refers to other keys is an interpolation.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, dataclass_transform

from launcher_scripts.validate import INERT, FilePath, Form, Range


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def keys(cls: type) -> type:
    """A dataclass of keys, without the methods that nobody calls and that take time to make."""
    return dataclass(cls, kw_only=True, repr=False, eq=False, match_args=False)  # pyright: ignore


Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
Path = Annotated[str, FilePath()]
Checkpoint = Annotated[str, FilePath("a path or a name of the Hub", hub=True)]
Name = Annotated[str, Form(r"[A-Za-z0-9][\w.@+=-]*", "a name of letters, digits, . _ - + = @")]
AdapterName = Annotated[str, Form(r"[A-Za-z_][\w-]*", "a name of letters, digits, _ and -")]
Scalar = str | int | float | bool | None

_MINUTES = r"\d+(:[0-5]?\d){0,2}"
_DAYS = r"\d+-\d{1,2}(:[0-5]?\d){0,2}"
TimeLimit = Annotated[
    str,
    Form(
        rf"({_DAYS}|{_MINUTES})",
        "a time limit in quotes: minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
        "days-hours:minutes or days-hours:minutes:seconds",
    ),
]
_JOBS = r"(after|afterany|afternotok|afterok|aftercorr|afterburstbuffer)(:\d+(_\d+)?(\+\d+)?)+"
Dependency = Annotated[
    str,
    Form(
        rf"(singleton|{_JOBS})([,?](singleton|{_JOBS}))*",
        "singleton or Slurm's after...:JOB_ID, joined by commas",
    ),
]
MaxTime = Annotated[str, Form(r"(\d+:){1,3}\d+", "a time as days:hours:minutes:seconds")]
EnvName = Annotated[str, Form(r"[A-Za-z_]\w*", "the name of an environment variable")]
EndString = Annotated[str, Form(r"(?s).+", "text that is not empty")]
Monitor = Literal["val_loss", "train_loss"]
NoPrompt = Literal["no-prompts"]
Precision = Literal["bf16", "bf16-mixed", "bf16-true", 32, "32", "32-true", "auto"]
Scheduler = Literal[
    "CosineAnnealing",
    "WarmupAnnealing",
    "SquareAnnealing",
    "SquareRootAnnealing",
    "InverseSquareRootAnnealing",
    "WarmupPolicy",
    "WarmupHoldPolicy",
    "ReduceLROnPlateau",
    "constant",
]
Side = Literal["left", "right"]
InitMethod = Literal["xavier", "zero", "normal", "uniform", "kaiming"]
PositionStrategy = Literal["add", "concat", "mlpconcat", "biasadd"]
Targets = Literal[
    "attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2", "attention", "mlp", "all"
]
Layers = list[Annotated[int, Range(1)]] | None
PROFILE: Any = "${profile}"
CACHE: Any = "${data_dir}/cache"


# ---- all stages


@keys
class Run:
    """What a job is called, how long it may take, where it leaves its files."""

    name: Name
    results_dir: Path
    time_limit: TimeLimit | None = "04:00:00"
    dependency: Dependency | None = "singleton"
    max_requeues: Count = 10  # how often a signal or a lost node may start the job anew
    # Parts that names and paths are put together from.
    task_name: str | None = None
    model_train_name: str | None = None
    convert_name: str | None = None
    convert_dir: Path | None = None


@keys
class LearningRun(Run):
    """A stage that checkpoints and goes on."""

    signal_seconds: Annotated[int, Range(0, 65535)] = 120  # before the time limit; 0: none


@keys
class ConversionRun(Run):
    """The parts of the converted checkpoint's path."""

    train_dir: Path | None = None
    nemo_file_name: Name | None = None


@keys
class Devices:
    """Where a stage that runs on devices runs (`trainer` of a stage that does not learn)."""

    devices: Positive = 1
    num_nodes: Positive = 1
    accelerator: Literal["gpu", "cpu", "auto"] = "gpu"
    precision: Precision = "bf16"


@keys
class Trainer(Devices):
    """Length, validation and gradients of a training run, in Lightning's names."""

    max_epochs: Annotated[int, Range(-1)] | None = -1
    max_steps: Annotated[int, Range(-1)] = -1
    max_time: MaxTime | None = None
    val_check_interval: Annotated[float, Range(above=0, high=1)] | Positive | None = 1.0
    check_val_every_n_epoch: Positive = 1
    num_sanity_val_steps: Count = 0
    limit_train_batches: Share | Positive | None = None
    limit_val_batches: Share | Count | None = None
    log_every_n_steps: Positive = 10
    accumulate_grad_batches: Positive = 1
    gradient_clip_val: NonNegative | None = 1.0
    resume_from_checkpoint: Path | None = None
    profile: bool = PROFILE
    logger: Literal[False] = field(default=False, metadata=INERT)
    enable_checkpointing: bool = field(default=False, metadata=INERT)
    use_distributed_sampler: bool = field(default=False, metadata=INERT)
    replace_sampler_ddp: bool = field(default=False, metadata=INERT)


@keys
class WandbLogger:
    project: str | None = None
    name: str | None = None


@keys
class CheckpointCallback:
    """Which checkpoints a training run keeps."""

    monitor: Monitor = "val_loss"
    mode: Literal["min", "max"] = "min"
    save_top_k: Annotated[int, Range(-1)] = 5
    filename: str | None = None
    save_last: bool = True
    every_n_train_steps: Count | None = None
    save_best_model: bool = True
    save_nemo_on_train_end: bool = field(default=False, metadata=INERT)
    model_parallel_size: Positive | None = field(default=None, metadata=INERT)


@keys
class ExpManager:
    """Logs, checkpoints and resuming of a training run."""

    explicit_log_dir: Path | None = None  # with exp_dir null too: run.results_dir/results
    exp_dir: Path | None = None
    name: str = "graftwerk"
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: WandbLogger = field(default_factory=WandbLogger)
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    max_time_per_run: MaxTime | None = None
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointCallback = field(default_factory=CheckpointCallback)


@keys
class TaskTemplate:
    """How a row of one task becomes a prompt and an answer."""

    taskname: str
    prompt_template: str
    answer_field: str | None = "answer"
    answer_only_loss: bool = True
    truncate_field: str | None = None
    total_virtual_tokens: Count = 0
    virtual_token_splits: list[Positive] = field(default_factory=list)


# ---- data_prep


@keys
class Split:
    """Paragraphs (squad) or rows (custom): counts, or shares of the whole."""

    train: Count | Share
    val: Count | Share = 0
    test: Count | Share = 0


@keys
class Sources:
    train: str
    val: str | None = None
    test: str | None = None


@keys
class Rows:
    train: Count = 8000
    val: Count = 200
    test: Count = 200


@keys
class SquadPrep:
    """`data_prep` of SQuAD's own JSON."""

    run: Run
    output_dir: Path
    kind: Literal["squad"] = "squad"
    prefix: Name = "squad"
    source: Path | None = None
    split: Split | None = None
    unanswerable_answer: str | None = None
    tokenizer: Checkpoint | None = None
    seed: Count = 1234


@keys
class CustomPrep:
    """`data_prep` of any JSONL, CSV, Parquet or Hub data set."""

    run: Run
    output_dir: Path
    prefix: Name
    source: str | Sources
    prompt_template: str
    kind: Literal["custom"] = "custom"
    field_map: dict[str, str] = field(default_factory=dict)
    answer_words: dict[Any, str] = field(default_factory=dict)
    subset: str | None = None
    split: Split | None = None
    tokenizer: Checkpoint | None = None
    seed: Count = 1234


@keys
class SyntheticPrep:
    """`data_prep` of generated question answering."""

    run: Run
    output_dir: Path
    kind: Literal["synthetic"] = "synthetic"
    tasks: list[Literal["lookup", "translate"]] = field(
        default_factory=lambda: ["lookup", "translate"]
    )
    rows: Rows = field(default_factory=Rows)
    tokenizer: Checkpoint | None = None
    seed: Count = 1234


# ---- conversion


@keys
class ConversionModel:
    """Which checkpoint becomes which, and where."""

    checkpoint_folder: Checkpoint
    output_path: Path
    target: Literal["nemo", "huggingface", "graftwerk"]
    model_type: Literal["gpt", "t5"] | None = None
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    mcore_gpt: bool = True
    architecture: Name = "auto"
    tokenizer: Checkpoint | None = None
    revision: str | None = None
    overwrite: bool = False


@keys
class ConversionStage:
    run: ConversionRun
    model: ConversionModel


# ---- learning


@keys
class DataFile:
    """One file of several, or some that are counted as one."""

    path: Path | None = None
    file_names: list[Path] | None = None
    name: Name | None = None
    weight: NonNegative | None = None


@keys
class DataFiles:
    """Files in NeMo's form. What is null is as in `model.data`, `model` or the files."""

    file_names: Path | list[Path]
    names: str | list[Name] | None = None
    prompt_template: str | None = None
    label_key: str | None = None
    truncation_field: str | list[str] | None = None
    truncation_method: Side | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_sep: bool | None = None
    tokens_to_generate: Count | None = None
    max_seq_length: Annotated[int, Range(2)] | None = None
    num_workers: Count | None = None
    pin_memory: bool | None = None
    global_batch_size: Positive | None = field(default=None, metadata=INERT)
    micro_batch_size: Positive | None = field(default=None, metadata=INERT)
    min_seq_length: Count | None = field(default=None, metadata=INERT)
    memmap_workers: Count | None = field(default=None, metadata=INERT)
    index_mapping_dir: str | None = field(default=None, metadata=INERT)
    hf_dataset: Literal[False] = field(default=False, metadata=INERT)


@keys
class TrainFiles(DataFiles):
    concat_sampling_probabilities: list[Share] | None = None
    shuffle: bool | None = None
    drop_last: bool | None = None


@keys
class LossMetric:
    name: Literal["loss"] = field(default="loss", metadata=INERT)
    average: None = field(default=None, metadata=INERT)
    num_classes: None = field(default=None, metadata=INERT)


@keys
class ValidationFiles(DataFiles):
    shuffle: Literal[False] = field(default=False, metadata=INERT)
    drop_last: Literal[False] = field(default=False, metadata=INERT)
    metric: LossMetric = field(default_factory=LossMetric)
    write_predictions_to_file: Literal[False] = field(default=False, metadata=INERT)
    output_file_path_prefix: str | None = field(default=None, metadata=INERT)


@keys
class RowFormat:
    """How rows without `task_templates` are read: `prompt_template`, or conversations."""

    chat: bool = False
    prompt_template: str | None = None
    label_key: str = "output"
    truncation_field: str | list[str] | None = None
    truncation_method: Side = "right"
    over_long: Literal["cut", "drop"] | None = None
    tokens_to_generate: Count = 0
    add_bos: bool = False
    add_sep: bool = False


@keys
class Data(RowFormat):
    """The rows that a learning stage reads, and how it feeds them."""

    train_ds: Path | list[Path | DataFile] | TrainFiles
    validation_ds: Path | list[Path | DataFile] | ValidationFiles = field(default_factory=list)
    answer_only_loss: bool = True
    unlabelled: Literal["error", "drop"] = "error"
    add_eos: bool = True
    shuffle: bool = True
    drop_last: bool = False
    packed_sequence_size: Positive | None = None
    share_prefixes: Literal["auto"] | bool = "auto"
    num_workers: Count | None = None  # null: 2 on a GPU, else 0
    pin_memory: bool | None = None  # null: on a GPU
    cache_dir: Path | Literal[False] | None = CACHE


@keys
class Schedule:
    """The learning rate over the steps; each schedule takes the keys that its formula has."""

    name: Scheduler = "CosineAnnealing"
    warmup_steps: Count | None = None
    constant_steps: Count | None = None
    hold_steps: Count | None = None
    min_lr: NonNegative | None = None
    max_steps: Positive | None = None
    monitor: Monitor = "val_loss"
    reduce_on_plateau: bool = False
    factor: Annotated[float, Range(above=0, below=1)] | None = None
    patience: Count | None = None
    threshold: NonNegative | None = None
    cooldown: Count | None = None


@keys
class Optim:
    name: Literal["fused_adam", "adamw", "adam", "sgd"] = "fused_adam"
    lr: Annotated[float, Range(above=0)] = 1e-4
    weight_decay: NonNegative = 0.01
    betas: list[Annotated[float, Range(0, below=1)]] = field(default_factory=lambda: [0.9, 0.98])
    eps: Annotated[float, Range(above=0)] = 1e-8
    momentum: Annotated[float, Range(0, below=1)] = 0.0
    sched: Schedule = field(default_factory=Schedule)


@keys
class Layout:
    """How a model and its batches lie on the devices."""

    global_batch_size: Positive = 64
    micro_batch_size: Positive = 8
    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    pipeline_model_parallel_split_rank: Count | None = None  # a T5's; null: in the middle
    sequence_parallel: bool = False
    use_fsdp: bool = False
    activations_checkpoint_granularity: Literal["selective", "full"] | None = None
    compile: Literal["auto"] | bool = "auto"
    model_parallel_size: Positive | None = field(default=None, metadata=INERT)
    gradient_as_bucket_view: bool = field(default=False, metadata=INERT)


@keys
class _Learned(Layout):
    """What the models of all learning stages share."""

    seed: Count = 1234
    restore_path: Checkpoint | None = None
    existing_tasks: list[str] = field(default_factory=list)
    new_tasks: list[str] = field(default_factory=list)
    encoder_seq_length: Annotated[int, Range(2)] = 2048
    optim: Optim = field(default_factory=Optim)
    virtual_prompt_style: NoPrompt = field(default="no-prompts", metadata=INERT)


@keys
class BasedModel(_Learned):
    """What the models of the stages that begin with a base share."""

    nemo_path: Path
    language_model_path: Checkpoint | None = None
    restore_from_path: Checkpoint | None = None  # NeMo PEFT's name of language_model_path
    revision: str | None = None
    head: Literal["question_answering"] | None = None
    encoder_seq_length: Annotated[int, Range(2)] | None = None  # null: what the base reaches
    task_templates: list[TaskTemplate] = field(default_factory=list)
    data: Data


@keys
class Chosen:
    """The layers that have parts of an adapter, numbered from 1; null: all."""

    layer_selection: Layers = None


@keys
class Tied(Chosen):
    """Layers that share the weights of their parts, and how a part knows its layer (NeMo's)."""

    weight_tying: bool = False
    position_embedding_strategy: PositionStrategy | None = None


@keys
class AdapterTuning(Tied):
    """The bottleneck after attention and after the MLP of each layer."""

    type: Literal["parallel_adapter", "linear_adapter"] = "parallel_adapter"
    adapter_dim: Positive = 32
    adapter_dropout: Annotated[float, Range(0, below=1)] = 0.0
    norm_position: Literal["pre", "post"] = "pre"
    # Two names of one norm.
    norm_type: Literal["mixedfusedlayernorm", "layernorm"] = field(
        default="mixedfusedlayernorm", metadata=INERT
    )
    column_init_method: InitMethod = "xavier"
    row_init_method: InitMethod = "zero"


@keys
class LoRATuning(Tied):
    """Low-rank updates of projections, in NeMo's names and some of ours."""

    variant: Literal["nemo", "canonical"] = "nemo"
    target_modules: list[Targets] = field(default_factory=lambda: ["attention_qkv"])
    adapter_dim: Positive = 32
    alpha: NonNegative | None = None  # null or 0: adapter_dim
    adapter_dropout: Annotated[float, Range(0, below=1)] = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    column_init_method: InitMethod = "xavier"
    row_init_method: InitMethod = "zero"
    rank_stabilised: bool = False
    dora: bool = False


@keys
class PTuning:
    """Virtual tokens before each row, made by a small network."""

    virtual_tokens: Positive = 10
    bottleneck_dim: Positive = 1024
    embedding_dim: Positive = 1024
    encoder: Literal["mlp", "lstm"] = "mlp"
    init_std: NonNegative = 0.023


@keys
class PromptTuning:
    """Virtual tokens before each row, trained as they are."""

    virtual_tokens: Positive = 10
    init_std: NonNegative = 0.023


@keys
class PrefixTuning(Chosen):
    """Keys and values before those of each layer's attention."""

    prefix_length: Positive = 30
    bottleneck_dim: Positive = 512
    reparametrise: bool = True
    adapter_dropout: Annotated[float, Range(0, below=1)] = 0.0
    init_std: NonNegative = 0.02
    cross_prefix: bool = True


@keys
class SelectiveTuning(Chosen):
    """Parameters of the base that are trained themselves, on copies."""

    tunable_base_param_names: list[str] = field(
        default_factory=lambda: ["self_attention", "word_embeddings"]
    )


@keys
class FusionTuning:
    """How the fusions of a composition are made; null: as the preset has it."""

    preset: Literal["dynamic", "static"] = "dynamic"
    key: bool | None = None
    query: bool | None = None
    value: bool | None = None
    query_before_ln: bool | None = None
    regularization: bool | None = None
    residual_before: bool | None = None
    temperature: bool | None = None
    value_initialized: bool | None = None
    dropout_prob: Share | None = None


@keys
class AdapterDrop:
    """Layers, numbered from 0, in which adapters do nothing in training."""

    layers: Count | list[Count] | None = None


@keys
class Frozen:
    """An adapter of an earlier stage, and what it is called here."""

    name: AdapterName
    path: Path


@keys
class Peft:
    """Which methods a run trains, in NeMo's names, and a block of settings for each."""

    peft_scheme: str | list[str] | None = "adapter"
    adapter_names: str | list[AdapterName] | None = None
    adapters: list[Frozen] = field(default_factory=list)
    composition: str | None = None
    sweep: list[dict[str, Any]] | dict[str, list[Any]] | None = None
    adapter_drop: AdapterDrop = field(default_factory=AdapterDrop)
    restore_from_path: Path | None = None
    adapter_tuning: AdapterTuning = field(default_factory=AdapterTuning)
    lora_tuning: LoRATuning = field(default_factory=LoRATuning)
    ia3_tuning: Chosen = field(default_factory=Chosen)
    p_tuning: PTuning = field(default_factory=PTuning)
    prompt_tuning: PromptTuning = field(default_factory=PromptTuning)
    prefix_tuning: PrefixTuning = field(default_factory=PrefixTuning)
    selective_tuning: SelectiveTuning = field(default_factory=SelectiveTuning)
    fusion_tuning: FusionTuning = field(default_factory=FusionTuning)


@keys
class AdapterModel(BasedModel):
    """A frozen base with bottleneck adapters."""

    adapter_tuning: AdapterTuning = field(default_factory=AdapterTuning)


@keys
class IA3Model(BasedModel):
    """A frozen base with IA3's scales."""

    ia3_tuning: Chosen = field(default_factory=Chosen)


@keys
class PeftModel(BasedModel):
    """A frozen base with adapters of any methods; with `none` all of the base is trained."""

    global_batch_size: Positive = 128
    micro_batch_size: Positive = 4
    peft: Peft = field(default_factory=Peft)


@keys
class FineTuningModel(BasedModel):
    """A base of which all is trained."""

    global_batch_size: Positive = 128
    micro_batch_size: Positive = 4


@keys
class Tokenizer:
    """What `training` cuts text into."""

    type: Literal["word", "byte", "pretrained"] = "word"
    path: Checkpoint | None = None
    vocab_size: Positive | None = None


@keys
class TrainingModel(_Learned):
    """A whole model, trained from its first weights, in Megatron's names."""

    nemo_path: Path
    num_layers: Positive
    hidden_size: Positive
    num_attention_heads: Positive
    task_templates: list[TaskTemplate] = field(default_factory=list)
    data: Data
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    ffn_hidden_size: Positive | None = None
    num_query_groups: Positive | None = None
    kv_channels: Positive | None = None
    max_position_embeddings: Positive | None = None
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    layernorm_epsilon: Annotated[float, Range(above=0)] = 1e-5
    activation: Literal[
        "gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"
    ] = "gelu_tanh"
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    rotary_base: Annotated[float, Range(above=0)] = 10000.0
    bias: bool = True
    qkv_bias: bool = True
    share_embeddings_and_output_weights: bool = True
    init_method_std: Annotated[float, Range(above=0)] = 0.02
    hidden_dropout: Share = 0.0
    attention_dropout: Share = 0.0
    embedding_dropout: Share = 0.0


@keys
class TrainingStage:
    run: LearningRun
    model: TrainingModel
    trainer: Trainer = field(default_factory=Trainer)
    exp_manager: ExpManager = field(default_factory=ExpManager)


@keys
class FineTuningStage:
    run: LearningRun
    model: FineTuningModel
    trainer: Trainer = field(default_factory=Trainer)
    exp_manager: ExpManager = field(default_factory=ExpManager)


@keys
class PeftStage:
    run: LearningRun
    model: PeftModel
    trainer: Trainer = field(default_factory=Trainer)
    exp_manager: ExpManager = field(default_factory=ExpManager)


@keys
class AdapterStage:
    run: LearningRun
    model: AdapterModel
    trainer: Trainer = field(default_factory=Trainer)
    exp_manager: ExpManager = field(default_factory=ExpManager)


@keys
class IA3Stage:
    run: LearningRun
    model: IA3Model
    trainer: Trainer = field(default_factory=Trainer)
    exp_manager: ExpManager = field(default_factory=ExpManager)


# ---- eval


@keys
class Evaluated:
    """An adapter's file, or a whole model, and what the table calls it."""

    name: Name
    path: Path


@keys
class EvalData(RowFormat):
    test_ds: list[Path]
    ground_truth_ds: list[Path] = field(default_factory=list)
    batch_size: Positive = 8


@keys
class Inference:
    """How answers are made: the likeliest tokens, or drawn ones."""

    greedy: bool = True
    temperature: Annotated[float, Range(0.001, 1000)] = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Range(above=0, high=1)] = 1.0
    repetition_penalty: Annotated[float, Range(0.001, 1000)] = 1.0
    min_tokens_to_generate: Count = 0
    tokens_to_generate: Positive = 32
    end_strings: list[EndString] = field(default_factory=list)
    compute_logprob: bool = False


@keys
class EvalModel:
    """Which model answers which rows, and how."""

    data: EvalData
    seed: Count = 1234
    language_model_path: Checkpoint | Literal["auto"] | None = "auto"
    restore_from_path: Checkpoint | None = None
    revision: str | None = "auto"
    head: Literal["question_answering", "auto"] | None = "auto"
    adapters: list[Evaluated] | Literal["auto"] = "auto"
    models: list[Evaluated] | Literal["auto"] = "auto"
    composition: str | list[str] | None = "auto"
    skip_layers: list[Count] = field(default_factory=list)
    evaluate_base: bool = True
    task_templates: list[TaskTemplate] | Literal["auto"] = "auto"
    encoder_seq_length: Annotated[int, Range(2)] | Literal["auto"] | None = "auto"
    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    pipeline_model_parallel_split_rank: Count | None = None
    compile: bool = False
    inference: Inference = field(default_factory=Inference)


@keys
class EvalExpManager:
    explicit_log_dir: Path = "${..run.results_dir}/results"


@keys
class EvalStage:
    run: Run
    model: EvalModel
    trainer: Devices = field(default_factory=Devices)
    exp_manager: EvalExpManager = field(default_factory=EvalExpManager)


# ---- export


@keys
class ExportModel:
    """Which adapters are exported, and the base that they lie on."""

    language_model_path: Checkpoint | Literal["auto"] | None = "auto"
    restore_from_path: Checkpoint | None = None
    revision: str | None = "auto"
    adapters: list[Evaluated] | Literal["auto"] = "auto"


@keys
class ExportStage:
    run: Run
    format: Literal["graftwerk", "adapterhub", "peft", "nemo", "huggingface"]
    merge: bool = False
    output_path: Path | Literal["auto"] = "auto"
    overwrite: bool = False
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    model: ExportModel = field(default_factory=ExportModel)


# ---- clusters and the whole


@keys
class Local:
    """What jobs need wherever they run."""

    python: str | None = None
    setup: list[str] = field(default_factory=list)


@keys
class Bcm(Local):
    """Slurm."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = True
    gpus_per_task: Positive | None = None
    gpus_per_node: Positive | None = None
    mem: str | int | None = 0
    overcommit: bool = False
    job_name_prefix: str | None = "nemo-megatron-"
    nodelist: str | None = None
    srun_args: list[str] = field(default_factory=list)
    sbatch_args: list[str] = field(default_factory=list)


@keys
class Bcp(Local):
    """Base Command Platform: the job that `main.py` was started in."""


@keys
class Interactive(Local):
    """This machine."""


CLUSTERS: dict[str, type] = {"bcm": Bcm, "bcp": Bcp, "interactive": Interactive}

# A stage's schema; that of data_prep depends on its `kind`.
PREP_KINDS: dict[str, type] = {
    "squad": SquadPrep,
    "custom": CustomPrep,
    "synthetic": SyntheticPrep,
}
STAGE_SCHEMAS: dict[str, type] = {
    "data_prep": SquadPrep,
    "training": TrainingStage,
    "conversion": ConversionStage,
    "fine_tuning": FineTuningStage,
    "peft": PeftStage,
    "adapter_learning": AdapterStage,
    "ia3_learning": IA3Stage,
    "eval": EvalStage,
    "export": ExportStage,
}


@keys
class Sweep:
    """How the points of `--multirun` run."""

    max_parallel: Positive | None = None  # points at a time on Slurm


@keys
class Root:
    """The keys beside the stages and the cluster."""

    stages: list[str]
    cluster_type: Literal["bcm", "bcp", "interactive"] = "bcm"
    launcher_scripts_path: Path = "${launcher_scripts:}"
    data_dir: Path = "${launcher_scripts_path}/data"
    base_results_dir: Path = "${launcher_scripts_path}/results"
    container: str | None = None
    container_mounts: list[str | None] = field(default_factory=list)
    wandb_api_key_file: Path | None = None
    env_vars: dict[EnvName, Scalar] = field(default_factory=dict)
    sweep: Sweep = field(default_factory=Sweep)
    dry_run: bool = False
    profile: bool = False  # of every stage that learns


def stage_schema(stage: str, kind: object = None) -> type:
    """The dataclass of a stage's configuration; `kind` is that of `data_prep`."""
    if stage == "data_prep":
        return PREP_KINDS.get(str(kind), SquadPrep)
    return STAGE_SCHEMAS[stage]
