"""Each key of `trainer`, `exp_manager` and `model.optim` changes the run as its name says."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.errors import UserError
from graftwerk.stages import learning
from graftwerk.training.module import LearningModule
from graftwerk.training.trainer import precision_of
from tests.graftwerk.learning_stage import elsewhere, read_metrics, write_rows

Weights = dict[str, torch.Tensor]


def run(cfg: DictConfig) -> Weights:
    assert learning.run("adapter_learning", cfg) == 0
    return read_adapter(cfg.model.nemo_path)[1]


def checkpoints(cfg: DictConfig) -> list[str]:
    return sorted(p.name for p in Path(cfg.exp_manager.explicit_log_dir).glob("checkpoints/*.ckpt"))


def steps_with(cfg: DictConfig, column: str) -> list[int]:
    return [int(row["step"]) for row in read_metrics(cfg) if row[column]]


def refused(cfg: DictConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learning.run("adapter_learning", cfg)
    assert not Path(cfg.exp_manager.explicit_log_dir).exists()


# ---- trainer


def test_key_max_epochs_bounds_the_steps(cfg):
    cfg.trainer.max_epochs = 1
    run(cfg)
    assert steps_with(cfg, "train_loss") == [1, 2, 3, 4, 5, 6]


def test_key_max_steps_stops_first(cfg):
    cfg.trainer.max_steps = 5
    run(cfg)
    assert steps_with(cfg, "train_loss") == [1, 2, 3, 4, 5]


def test_key_max_steps_is_the_length_of_the_schedule(cfg):
    cfg.trainer.max_steps = 4
    cfg.model.optim.sched = {"name": "WarmupAnnealing", "warmup_steps": 0}
    run(cfg)
    rates = [float(row["lr"]) for row in read_metrics(cfg) if row["lr"]]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_a_run_without_an_end_is_refused(cfg):
    cfg.trainer.max_epochs = -1
    refused(cfg, "nothing ends the run")


def test_key_max_time_ends_the_run_and_writes_the_adapter(cfg, monkeypatch):
    cfg.trainer.max_time = "00:00:00:01"
    cfg.trainer.max_epochs = -1
    cfg.model.optim.sched = {"name": "constant"}
    run(cfg)
    assert json.loads((Path(cfg.exp_manager.explicit_log_dir) / "summary.json").read_text())[
        "steps"
    ]


def test_key_log_every_n_steps_sets_the_lines(cfg, capsys):
    cfg.trainer.log_every_n_steps = 5
    run(cfg)
    assert steps_with(cfg, "train_loss") == [1, 5, 10]
    out = capsys.readouterr().out
    assert "step 5/12" in out
    assert "step 4/12" not in out


@pytest.mark.parametrize(
    ("interval", "steps"), [(0.5, [3, 6, 9, 12]), (4, [4, 10]), (1.0, [6, 12]), (8, [8])]
)
def test_key_val_check_interval_in_steps_or_in_shares_of_an_epoch(interval, steps, cfg):
    cfg.trainer.val_check_interval = interval
    run(cfg)
    assert steps_with(cfg, "val_loss") == steps


@pytest.mark.parametrize("interval", [0, 1.5, -1])
def test_a_val_check_interval_out_of_range_is_refused(interval, cfg):
    cfg.trainer.val_check_interval = interval
    refused(cfg, f"trainer.val_check_interval={interval} must be a share of an epoch")


def test_key_limit_val_batches_cuts_validation(cfg):
    whole = elsewhere(cfg, Path(cfg.run.results_dir) / "whole")
    run(whole)
    cfg.trainer.limit_val_batches = 1
    run(cfg)
    losses = [[row["val_loss"] for row in read_metrics(c) if row["val_loss"]] for c in (whole, cfg)]
    assert losses[0] != losses[1]


def test_key_limit_val_batches_0_switches_validation_off(cfg, capsys):
    cfg.trainer.limit_val_batches = 0
    run(cfg)
    assert steps_with(cfg, "val_loss") == []
    assert checkpoints(cfg) == ["last.ckpt", "previous.ckpt"]
    assert "no validation" in capsys.readouterr().out


def test_key_limit_train_batches_cuts_the_epoch_and_shows_other_rows_in_the_next(cfg, monkeypatch):
    cfg.trainer.limit_train_batches = 2
    cfg.trainer.max_epochs = 3
    seen = []
    whole = LearningModule.training_step

    def watching(self, batch, batch_idx):
        seen.append(torch.cat([micro.tokens.flatten() for micro in batch]).tolist())
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LearningModule, "training_step", watching)
    run(cfg)
    assert len(seen) == 6
    assert seen[0:2] != seen[2:4] != seen[4:6] != seen[0:2]


def test_key_accumulate_grad_batches_multiplies_the_global_batch(cfg):
    larger = elsewhere(cfg, Path(cfg.run.results_dir) / "larger")
    larger.model.global_batch_size = 8
    cfg.trainer.accumulate_grad_batches = 2
    cfg.trainer.val_check_interval = larger.trainer.val_check_interval = 1.0
    found, expected = run(cfg), run(larger)
    assert steps_with(cfg, "train_loss") == list(range(1, 7))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_key_gradient_clip_val_bounds_the_norm_of_all_gradients(cfg, monkeypatch):
    cfg.trainer.gradient_clip_val = 0.05
    norms = []
    whole = LearningModule.training_step

    def watching(self, batch, batch_idx):
        whole(self, batch, batch_idx)
        gradients = [p.grad for p in self.trained.values()]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    monkeypatch.setattr(LearningModule, "training_step", watching)
    run(cfg)
    before = [float(row["grad_norm"]) for row in read_metrics(cfg) if row["grad_norm"]]
    assert min(before) > 0.05
    assert norms == pytest.approx([0.05] * 12, rel=1e-3)


@pytest.mark.parametrize("value", [0, None])
def test_key_gradient_clip_val_0_clips_nothing(value, cfg):
    cfg.trainer.gradient_clip_val = 1000.0
    unclipped = run(elsewhere(cfg, Path(cfg.run.results_dir) / "unclipped"))
    cfg.trainer.gradient_clip_val = value
    found = run(cfg)
    assert all(torch.equal(found[name], unclipped[name]) for name in found)


def test_key_precision_holds_the_base_in_bfloat16_and_the_adapter_in_float32(cfg, monkeypatch):
    cfg.trainer.precision = "bf16"
    cfg.trainer.max_epochs = 1
    types = set()
    whole = LearningModule.training_step

    def watching(self, batch, batch_idx):
        types.update((n in self.trained, p.dtype) for n, p in self.model.named_parameters())
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LearningModule, "training_step", watching)
    weights = run(cfg)
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_losses_in_bfloat16_are_near_those_of_float32(cfg):
    cfg.trainer.max_epochs = 2
    losses = []
    for precision in ("32", "bf16"):
        one = elsewhere(cfg, Path(cfg.run.results_dir) / precision)
        one.trainer.precision = precision
        run(one)
        found = [float(row["train_loss"]) for row in read_metrics(one) if row["train_loss"]]
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize(("able", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_key_precision_auto_is_bfloat16_where_the_device_multiplies_it(
    cfg, able: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("graftwerk.training.trainer.multiplies_bfloat16", lambda device: able)
    cfg.trainer.precision = "auto"
    assert precision_of(cfg.trainer, torch.device("cpu")) == dtype


def test_half_precision_is_refused(cfg):
    cfg.trainer.precision = 16
    refused(cfg, "trainer.precision=16: float16 is not supported")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_key_accelerator_gpu_without_one_is_refused(cfg):
    cfg.trainer.accelerator = "gpu"
    refused(cfg, "trainer.accelerator=gpu, but torch finds no GPU")


def test_key_logger_true_is_refused(cfg):
    cfg.trainer.logger = True
    refused(cfg, "trainer.logger must be False")


def test_key_enable_checkpointing_may_not_contradict_exp_manager(cfg):
    cfg.trainer.enable_checkpointing = True
    cfg.exp_manager.create_checkpoint_callback = False
    refused(cfg, "trainer.enable_checkpointing=True contradicts")


def test_key_num_sanity_val_steps_validates_before_training(cfg, monkeypatch):
    sanity = []
    whole = LearningModule.validation_step

    def watching(self, batch, batch_idx):
        sanity.append(self.trainer.sanity_checking)
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LearningModule, "validation_step", watching)
    cfg.trainer.num_sanity_val_steps = 1
    run(cfg)
    assert sanity.count(True) == 1
    assert steps_with(cfg, "val_loss") == [3, 6, 9, 12]


# ---- exp_manager


def test_key_save_top_k_keeps_so_many(cfg):
    cfg.exp_manager.checkpoint_callback_params.save_top_k = 3
    run(cfg)
    assert len(set(checkpoints(cfg)) - {"last.ckpt", "previous.ckpt"}) == 3


def test_key_filename_names_the_checkpoints(cfg):
    cfg.exp_manager.checkpoint_callback_params.filename = "mine-{val_loss:.1f}-{step}"
    run(cfg)
    assert "mine-val_loss=2.8-step=12.ckpt" in checkpoints(cfg)


def test_key_mode_max_keeps_the_highest(cfg):
    cfg.exp_manager.checkpoint_callback_params.update(mode="max", save_top_k=1)
    run(cfg)
    losses = {int(r["step"]): float(r["val_loss"]) for r in read_metrics(cfg) if r["val_loss"]}
    worst = max(losses, key=lambda step: losses[step])
    assert [name for name in checkpoints(cfg) if name.endswith(f"step={worst}.ckpt")]


def test_key_monitor_train_loss_ranks_by_it(cfg):
    params = cfg.exp_manager.checkpoint_callback_params
    params.update(monitor="train_loss", filename="{train_loss:.4f}-{step}", save_top_k=1)
    run(cfg)
    losses = {int(r["step"]): float(r["train_loss"]) for r in read_metrics(cfg) if r["train_loss"]}
    best = min((3, 6, 9, 12), key=lambda step: losses[step])
    own = f"train_loss={losses[best]:.4f}-step={best}.ckpt"
    assert checkpoints(cfg) == ["last.ckpt", "previous.ckpt", own]


def test_an_unknown_monitor_is_refused(cfg):
    cfg.exp_manager.checkpoint_callback_params.monitor = "accuracy"
    refused(cfg, "monitor='accuracy' is not known: use one of val_loss, train_loss")


@pytest.mark.parametrize("save_best", [True, False])
def test_key_save_best_model_writes_the_best_weights_or_the_last(save_best, cfg):
    params = cfg.exp_manager.checkpoint_callback_params
    # The worst counts as the best here, so that the two are sure to differ.
    params.update(mode="max", save_top_k=1, save_best_model=save_best)
    written = run(cfg)
    folder = Path(cfg.exp_manager.explicit_log_dir)
    name = next(n for n in checkpoints(cfg) if n != "last.ckpt") if save_best else "last.ckpt"
    state = torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]
    assert sorted(v.sum().item() for v in state.values()) == pytest.approx(
        sorted(v.sum().item() for v in written.values())
    )
    losses = [float(row["val_loss"]) for row in read_metrics(cfg) if row["val_loss"]]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(max(losses) if save_best else losses[-1])
    assert max(losses) != losses[-1]


def test_key_create_checkpoint_callback_false_keeps_none(cfg):
    cfg.exp_manager.create_checkpoint_callback = False
    run(cfg)
    assert checkpoints(cfg) == []


def test_key_every_n_train_steps_saves_between_validations(cfg, monkeypatch):
    cfg.exp_manager.checkpoint_callback_params.every_n_train_steps = 4
    cfg.trainer.val_check_interval = 1.0
    whole = LearningModule.training_step

    def dying(self, batch, batch_idx):
        assert self.global_step < 5
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LearningModule, "training_step", dying)
    with pytest.raises(AssertionError):
        run(cfg)
    last = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_key_create_tensorboard_logger_writes_events(cfg):
    run(elsewhere(cfg, Path(cfg.run.results_dir) / "off"))
    cfg.exp_manager.create_tensorboard_logger = True
    run(cfg)
    events = [p.parent for p in Path(cfg.run.results_dir).rglob("events.out.tfevents.*")]
    assert events == [Path(cfg.exp_manager.explicit_log_dir)]


def test_key_create_wandb_logger_without_the_package_is_refused(cfg, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg.exp_manager.create_wandb_logger = True
    refused(cfg, "needs the package wandb: install it")


def test_key_exp_dir_and_name_make_the_folder_where_no_log_dir_is_given(cfg, tmp_path):
    cfg.exp_manager.update(explicit_log_dir=None, exp_dir=str(tmp_path / "exp"), name="mine")
    run(cfg)
    assert (tmp_path / "exp" / "mine" / "summary.json").is_file()


def test_an_unknown_checkpoint_key_is_refused(cfg):
    cfg.exp_manager.checkpoint_callback_params.save_topk = 3
    refused(cfg, "save_topk is not known; allowed: monitor")


# ---- model


def test_key_seed_changes_the_weights(cfg):
    first = run(elsewhere(cfg, Path(cfg.run.results_dir) / "first"))
    cfg.model.seed = 7
    second = run(cfg)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_key_micro_batch_size_changes_no_result(cfg):
    """Dropout is on, as `adapter_dropout` has it."""
    first = run(elsewhere(cfg, Path(cfg.run.results_dir) / "first"))
    for size in (1, 4):
        other = elsewhere(cfg, Path(cfg.run.results_dir) / str(size))
        other.model.micro_batch_size = size
        second = run(other)
        for name in first:
            torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


def test_key_adapter_dropout_is_active_in_training_alone(cfg):
    cfg.trainer.max_steps = 1
    off = elsewhere(cfg, Path(cfg.run.results_dir) / "off")
    off.model.adapter_tuning.adapter_dropout = 0.0
    cfg.model.adapter_tuning.adapter_dropout = 0.9
    found, expected = run(cfg), run(off)
    assert any(not torch.equal(found[name], expected[name]) for name in found)


def test_key_restore_path_starts_from_an_adapter(cfg):
    first = elsewhere(cfg, Path(cfg.run.results_dir) / "first")
    expected = run(first)
    cfg.model.restore_path = first.model.nemo_path
    cfg.trainer.max_steps = 0
    found = run(cfg)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_key_restore_path_of_another_adapter_is_refused(cfg):
    first = elsewhere(cfg, Path(cfg.run.results_dir) / "first")
    run(first)
    cfg.model.restore_path = first.model.nemo_path
    cfg.model.adapter_tuning.adapter_dim = 3
    refused(cfg, "model.restore_path=.* holds an adapter with dim 4 instead of 3")


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", 0.02), ("betas", [0.5, 0.5]), ("weight_decay", 5.0), ("eps", 0.1), ("name", "adam")],
)
def test_keys_of_optim_change_the_weights(key, value, cfg):
    cfg.trainer.max_epochs = 1
    cfg.model.optim.weight_decay = 1.0
    first = run(elsewhere(cfg, Path(cfg.run.results_dir) / "first"))
    cfg.model.optim[key] = value
    second = run(cfg)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_key_monitor_of_a_plateau_schedule_lowers_the_rate(cfg):
    cfg.model.optim.sched = {
        "name": "ReduceLROnPlateau",
        "factor": 0.5,
        "patience": 0,
        "threshold": 0.999,  # no loss is that much better: each validation but the first lowers it
        "monitor": "val_loss",
    }
    run(cfg)
    rates = [float(row["lr"]) for row in read_metrics(cfg) if row["lr"]]
    assert rates == pytest.approx([0.01] * 6 + [0.005] * 3 + [0.0025] * 3)


@pytest.mark.parametrize("key", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_keys_of_model_parallelism_need_as_many_processes(key, cfg):
    cfg.model[key] = 2
    refused(cfg, f"model.{key}=2 .*does not divide the 1 processes")


def test_too_many_positions_are_refused(cfg):
    cfg.model.encoder_seq_length = 100
    refused(cfg, "model.encoder_seq_length=100 is longer than the 64 positions")


def test_a_loss_that_is_not_finite_stops_the_run(cfg):
    cfg.model.optim.update(lr=1e30, sched={"name": "constant"})
    cfg.trainer.gradient_clip_val = 0
    with pytest.raises(FloatingPointError, match=r"lower model.optim.lr"):
        learning.run("adapter_learning", cfg)


def test_rows_that_were_cut_or_dropped_are_said(cfg, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", 10, 3)
    cfg.model.data.train_ds = [str(rows)]
    cfg.model.encoder_seq_length = 12
    OmegaConf.update(cfg, "trainer.val_check_interval", 1.0)
    run(cfg)
    reported = json.loads((Path(cfg.exp_manager.explicit_log_dir) / "summary.json").read_text())
    train = reported["rows"]["train"]
    assert train["rows"] == 10
    assert sum(train["dropped"].values()) == 10 - train["kept"] > 0
    assert f"train: 10 rows, {train['kept']} kept" in capsys.readouterr().out
