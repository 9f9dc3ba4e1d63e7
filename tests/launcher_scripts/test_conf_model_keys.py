"""Keys of the stages' models that no other test turns: each changes the model or the run."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.data.datamodule import AnswerDataModule
from graftwerk.stages import learning
from graftwerk.training.learner import build_learner, open_base, tokenizer_of
from graftwerk.training.loggers import build_loggers
from graftwerk.training.schedules import build_schedule
from tests.graftwerk.learning_stage import base, cfg, read_metrics, rows

__all__ = ["base", "cfg", "rows"]

CPU = torch.device("cpu")
TOKENS = torch.arange(4, 20)[None]


def logits(stage: str, cfg: DictConfig, training: bool = False) -> torch.Tensor:
    """What the stage's model says before it has learned anything."""
    base = open_base(stage, cfg.model)
    tokenizer = tokenizer_of(cfg.model, base)
    model = build_learner(stage, cfg, base, tokenizer, CPU).model.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        return model(TOKENS % len(tokenizer))


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not torch.equal(one, other)


@pytest.fixture
def whole(cfg: DictConfig) -> DictConfig:
    """`training` of a small model from its first weights."""
    shape = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 32,
        "num_query_groups": None,
        "kv_channels": None,
        "max_position_embeddings": 64,
        "tokenizer": {"type": "word", "path": None, "vocab_size": None},
    }
    return OmegaConf.merge(cfg, {"model": shape})  # pyright: ignore


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 3),
        ("hidden_size", 32),
        ("ffn_hidden_size", 48),
        ("num_attention_heads", 2),
        ("num_query_groups", 2),
        ("kv_channels", 8),
        ("normalization", "rmsnorm"),
        ("layernorm_epsilon", 0.1),
        ("activation", "swiglu"),
        ("position_embedding_type", "rope"),
        ("share_embeddings_and_output_weights", False),
        ("init_method_std", 0.2),
        ("seed", 7),
    ],
)
def test_an_architecture_key_changes_the_model(whole, key, value):
    before = logits("training", whole)
    whole.model[key] = value
    assert differs(before, logits("training", whole))


@pytest.mark.parametrize("key", ["bias", "qkv_bias"])
def test_biases_are_parameters(whole, key):
    def count() -> int:
        learner = build_learner("training", whole, None, tokenizer_of(whole.model, None), CPU)
        return sum(p.numel() for p in learner.model.parameters())

    before = count()
    whole.model[key] = False
    assert count() < before


def test_rotary_base_turns_positions_otherwise(whole):
    whole.model.position_embedding_type = "rope"
    before = logits("training", whole)
    whole.model.rotary_base = 100.0
    assert differs(before, logits("training", whole))


def test_max_position_embeddings_is_the_size_of_the_table(whole):
    tokenizer = tokenizer_of(whole.model, None)
    model = build_learner("training", whole, None, tokenizer, CPU).model
    whole.model.max_position_embeddings = 80
    longer = build_learner("training", whole, None, tokenizer, CPU).model
    extra = sum(p.numel() for p in longer.parameters()) - sum(p.numel() for p in model.parameters())
    assert extra == 16 * whole.model.hidden_size


@pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout", "embedding_dropout"])
def test_dropout_of_the_whole_model_acts_in_training(whole, key):
    before = [logits("training", whole, training) for training in (False, True)]
    whole.model[key] = 0.5
    after = [logits("training", whole, training) for training in (False, True)]
    assert not differs(before[0], after[0])
    assert differs(before[1], after[1])


def test_the_tokenizer_is_of_the_asked_type_and_size(whole, base):
    def size(**tokenizer: object) -> int:
        whole.model.tokenizer = {"type": "word", "path": None, "vocab_size": None, **tokenizer}
        return len(tokenizer_of(whole.model, None))

    assert size() != size(type="byte") == 259
    assert size(vocab_size=8) == 8
    assert size(type="pretrained", path=str(base)) > 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("type", "linear_adapter"),
        ("adapter_dim", 8),
        ("norm_position", "post"),
        ("column_init_method", "kaiming"),
    ],
)
def test_a_key_of_adapter_tuning_changes_the_adapter(cfg, key, value):
    cfg.model.adapter_tuning.row_init_method = "normal"  # else no adapter changes anything
    before = logits("adapter_learning", cfg)
    cfg.model.adapter_tuning[key] = value
    assert differs(before, logits("adapter_learning", cfg))


def test_row_init_method_zero_starts_from_the_base(cfg):
    before = logits("adapter_learning", cfg)
    cfg.model.adapter_tuning.row_init_method = "normal"
    assert differs(before, logits("adapter_learning", cfg))


def test_check_val_every_n_epoch_leaves_epochs_out(cfg):
    cfg.trainer.val_check_interval = 1.0
    cfg.trainer.check_val_every_n_epoch = 2
    learning.run("adapter_learning", cfg)
    assert [row["step"] for row in read_metrics(cfg) if row["val_loss"]] == ["12"]


def test_save_last_false_keeps_no_last_checkpoint(cfg):
    cfg.exp_manager.checkpoint_callback_params.save_last = False
    learning.run("adapter_learning", cfg)
    folder = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints"
    assert list(folder.glob("*.ckpt"))
    assert not list(folder.glob("*last.ckpt"))


def test_wandb_gets_the_project_and_the_name(cfg, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", lambda **keys: given.update(keys))
    cfg.exp_manager.create_wandb_logger = True
    cfg.exp_manager.wandb_logger_kwargs = {"project": "p", "name": "n"}
    build_loggers(cfg.exp_manager, tmp_path, 0)
    assert (given["project"], given["name"]) == ("p", "n")


def test_pin_memory_reaches_the_loader_where_there_is_a_gpu(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tokenizer = tokenizer_of(cfg.model, open_base("adapter_learning", cfg.model))
    for wanted in (True, False):
        cfg.model.data.pin_memory = wanted
        data = AnswerDataModule(cfg.model, tokenizer, rank=0, world_size=1, seed=1)
        assert data.train_dataloader().pin_memory is wanted


PLATEAU = {"name": "ReduceLROnPlateau", "patience": 1, "factor": 0.5, "threshold": 0.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [("patience", 3), ("factor", 0.1), ("threshold", 0.9), ("cooldown", 4), ("min_lr", 0.9)],
)
def test_a_key_of_the_plateau_changes_the_rates(key, value):
    def rates(**changed: float) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = build_schedule({**PLATEAU, **changed}, optimizer, 1.0, None)
        found = []
        for loss in [9.0, 8.0, 7.0, 7.5, 7.6, 7.7, 7.8, 7.9, 8.0, 8.1]:
            schedule.step(loss)  # pyright: ignore
            found.append(optimizer.param_groups[0]["lr"])
        return found

    assert rates() != rates(**{key: value})
