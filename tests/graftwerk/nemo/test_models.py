"""The documented calls one by one, in one process, on a tiny GPT and a tiny T5."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints import read_adapters
from graftwerk.errors import UserError
from graftwerk.nemo import (
    CanonicalAdaptersPEFTConfig,
    IA3PEFTConfig,
    LoraPEFTConfig,
    MegatronGPTSFTModel,
    MegatronT5SFTModel,
    MegatronTrainerBuilder,
    PtuningPEFTConfig,
    QLoraPEFTConfig,
    SelectivePEFTConfig,
)
from tests.graftwerk.nemo.small import small_config, write_base

KINDS = {"gpt": MegatronGPTSFTModel, "t5": MegatronT5SFTModel}
LISTS = {
    "lora": [LoraPEFTConfig],
    "prompt and bottlenecks": [PtuningPEFTConfig, CanonicalAdaptersPEFTConfig],
    "lora and ia3": [LoraPEFTConfig, IA3PEFTConfig],
}
Begin = Callable[..., tuple[Any, Any, DictConfig]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_base(family, folder / family) for family in KINDS}


@pytest.fixture
def begin(bases: dict[str, str], tmp_path: Path) -> Begin:
    """Trainer, model and its configuration, with values put at dotted keys."""

    def made(family: str = "gpt", **changes: Any) -> tuple[Any, Any, DictConfig]:
        config = OmegaConf.create(small_config(bases[family], tmp_path))
        for key, value in changes.items():
            OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
        trainer = MegatronTrainerBuilder(config).create_trainer()
        model_cfg = KINDS[family].merge_cfg_with(bases[family], config)
        model = KINDS[family].restore_from(bases[family], model_cfg, trainer)
        return trainer, model, model_cfg

    return made


def saved(folder: Path) -> Path:
    return folder / "log" / "checkpoints" / "small.nemo"


# ---- configuration and restoring


def test_a_models_configuration_has_the_bases_shape_and_the_users_keys(begin: Begin) -> None:
    _, model, model_cfg = begin()
    assert (model_cfg.hidden_size, model_cfg.num_layers) == (32, 2)
    assert model_cfg.data.test_ds.tokens_to_generate == 3
    assert model.cfg is model_cfg


def test_restore_from_takes_configuration_and_trainer_in_any_order(
    begin: Begin, bases: dict[str, str]
) -> None:
    trainer, model, cfg = begin()
    path = bases["gpt"]
    others = [
        MegatronGPTSFTModel.restore_from(path, trainer, cfg),
        MegatronGPTSFTModel.restore_from(path, trainer=trainer, model_cfg=cfg),
        MegatronGPTSFTModel.restore_from(path, cfg, trainer=trainer),
        MegatronGPTSFTModel.restore_from(path, override_config_path=cfg, trainer=trainer),
    ]
    for other in others:
        for own, same in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(own, same)


def test_restore_from_says_what_it_lacks(begin: Begin, bases: dict[str, str]) -> None:
    trainer, _, cfg = begin()
    path = bases["gpt"]
    with pytest.raises(TypeError, match="one model_cfg and one trainer"):
        MegatronGPTSFTModel.restore_from(path, cfg)
    with pytest.raises(TypeError, match="what merge_cfg_with returns"):
        MegatronGPTSFTModel.restore_from(path, OmegaConf.create({}), trainer)
    with pytest.raises(TypeError, match="create_trainer"):
        MegatronGPTSFTModel.restore_from(path, cfg, pl.Trainer(logger=False))


def test_a_base_of_another_shape_or_family_is_refused(begin: Begin, bases: dict[str, str]) -> None:
    trainer, _, cfg = begin()
    cfg.num_layers = 3
    with pytest.raises(UserError, match="num_layers=3, but"):
        MegatronGPTSFTModel.restore_from(bases["gpt"], cfg, trainer)
    with pytest.raises(UserError, match="is a t5 model, MegatronGPTSFTModel is for gpt"):
        MegatronGPTSFTModel.restore_from(bases["t5"], cfg, trainer)


# ---- adapters


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("kinds", LISTS.values(), ids=list(LISTS))
def test_what_fit_writes_gives_the_same_predictions_again(
    begin: Begin, tmp_path: Path, kinds: list[Any], family: str
) -> None:
    trainer, model, cfg = begin(family)
    base = trainer.predict(model)
    peft_cfgs = [kind(cfg) for kind in kinds]
    model.add_adapter(peft_cfgs)
    trainer.fit(model)
    trained = trainer.predict(model)
    assert trainer.global_step == 4
    assert trained != base
    trainer, model, _ = begin(family)
    model.load_adapters(saved(tmp_path), peft_cfgs)
    assert trainer.predict(model) == trained


def test_rows_may_be_packed(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, model, cfg = begin(model__data__packed_sequence_size=64)
    model.add_adapter(LoraPEFTConfig(cfg))
    trainer.fit(model)
    assert "packing: rows of 64 tokens" in capsys.readouterr().out


def test_training_leaves_the_base_as_it_was(begin: Begin) -> None:
    trainer, model, cfg = begin()
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    model.add_adapter(LoraPEFTConfig(cfg))
    trainer.fit(model)
    after = dict(model.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_load_adapters_takes_names_configurations_lists_or_nothing(
    begin: Begin, tmp_path: Path
) -> None:
    trainer, model, cfg = begin()
    model.add_adapter([LoraPEFTConfig(cfg), IA3PEFTConfig(cfg)])
    trainer.fit(model)
    both = ["lora", "ia3"]
    for wanted, names in (
        (None, both),
        ("ia3", ["ia3"]),
        (["lora", IA3PEFTConfig(cfg)], both),
        (LoraPEFTConfig(cfg), ["lora"]),
    ):
        _, other, _ = begin()
        other.load_adapters(saved(tmp_path), wanted)
        assert list(other.model.adapters) == names
    _, other, _ = begin()
    other.load_adapters(saved(tmp_path))
    assert str(other.model.active) == "Stack(lora, ia3)"


def test_a_configuration_must_agree_with_the_file(begin: Begin, tmp_path: Path) -> None:
    trainer, model, cfg = begin()
    model.add_adapter(LoraPEFTConfig(cfg))
    trainer.fit(model)
    _, other, cfg = begin(model__peft__lora_tuning__adapter_dim=8)
    with pytest.raises(UserError, match="with dim 4 instead of 8"):
        other.load_adapters(saved(tmp_path), LoraPEFTConfig(cfg))
    with pytest.raises(UserError, match="holds no adapter 'ia3': it has lora"):
        other.load_adapters(saved(tmp_path), IA3PEFTConfig(cfg))
    assert not other.model.adapters


def test_a_checkpoint_of_the_run_can_be_loaded(begin: Begin, tmp_path: Path) -> None:
    trainer, model, cfg = begin()
    model.add_adapter([LoraPEFTConfig(cfg), PtuningPEFTConfig(cfg)])
    trainer.fit(model)
    trained = trainer.predict(model)
    (last,) = (tmp_path / "log" / "checkpoints").glob("*last.ckpt")
    trainer, other, _ = begin()
    with pytest.raises(UserError, match="give the PEFT configurations"):
        other.load_adapters(last)
    with pytest.raises(UserError, match="holds other weights"):
        other.load_adapters(last, LoraPEFTConfig(cfg))
    assert not other.model.adapters
    other.load_adapters(last, [LoraPEFTConfig(cfg), PtuningPEFTConfig(cfg)])
    assert trainer.predict(other) == trained


def test_an_adapter_that_is_there_already_is_refused(begin: Begin) -> None:
    _, model, cfg = begin()
    model.add_adapter(LoraPEFTConfig(cfg))
    with pytest.raises(UserError, match="'lora' exists already"):
        model.add_adapter(LoraPEFTConfig(cfg))


@pytest.mark.parametrize("layers", [[0], [1, 99]])
def test_a_layer_that_the_model_does_not_have_is_named(begin: Begin, layers: list[int]) -> None:
    _, model, cfg = begin()
    cfg.peft.lora_tuning = {"layer_selection": layers}
    with pytest.raises(
        UserError, match=rf"layer_selection of LoRAConfig: \[{layers[-1]}\] are none"
    ):
        model.add_adapter(LoraPEFTConfig(cfg))
    assert not model.model.adapters


def test_selective_tuning_trains_in_float32_under_bf16(begin: Begin) -> None:
    block = {"tunable_base_param_names": ["input_layernorm"], "layer_selection": [2]}
    trainer, model, cfg = begin(trainer__precision="bf16", model__peft__selective_tuning=block)
    model.add_adapter(LoraPEFTConfig(cfg))
    model.add_adapter(SelectivePEFTConfig(cfg))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    trainer.fit(model)
    assert trainer.predict(model)


def test_qlora_without_its_base_or_its_package_is_refused(begin: Begin) -> None:
    _, model, cfg = begin()
    with pytest.raises(UserError, match="peft_scheme: qlora before restore_from"):
        model.add_adapter(QLoraPEFTConfig(cfg))
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(UserError, match="bitsandbytes"):
            begin(model__peft__peft_scheme="qlora")


# ---- training


def test_without_an_adapter_the_whole_model_is_trained_and_written(
    begin: Begin, tmp_path: Path
) -> None:
    trainer, model, _ = begin()
    base = trainer.predict(model)
    trainer.fit(model)
    tuned = trainer.predict(model)
    assert tuned != base
    path = tmp_path / "log" / "checkpoints" / "small"
    cfg = OmegaConf.create(small_config(str(path), tmp_path))
    model_cfg = MegatronGPTSFTModel.merge_cfg_with(path, cfg)
    assert trainer.predict(MegatronGPTSFTModel.restore_from(path, model_cfg, trainer)) == tuned


def test_the_whole_model_under_bf16_has_float32_weights(begin: Begin) -> None:
    trainer, model, _ = begin(trainer__precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    trainer.fit(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert trainer.predict(model)


def test_a_second_process_goes_on_from_the_last_checkpoint(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, model, cfg = begin()
    model.add_adapter(LoraPEFTConfig(cfg))
    trainer.fit(model)
    trainer, model, cfg = begin(trainer__max_steps=6)
    model.add_adapter(LoraPEFTConfig(cfg))
    trainer.fit(model)
    assert trainer.global_step == 6
    assert "going on from step 4" in capsys.readouterr().out


def test_a_loaded_adapter_can_be_trained_on(begin: Begin, tmp_path: Path) -> None:
    trainer, model, cfg = begin()
    model.add_adapter(LoraPEFTConfig(cfg))
    trainer.fit(model)
    before = model.model.adapter_state("lora")
    before = {key: value.clone() for key, value in before.items()}
    trainer, model, _ = begin(exp_manager__explicit_log_dir=str(tmp_path / "more"))
    model.load_adapters(saved(tmp_path))
    trainer.fit(model)
    after = model.model.adapter_state("lora")
    assert any(not torch.equal(after[key], value) for key, value in before.items())


def test_a_frozen_model_is_not_trained(begin: Begin) -> None:
    trainer, model, cfg = begin()
    model.add_adapter(LoraPEFTConfig(cfg))
    model.freeze()
    with pytest.raises(UserError, match="nothing to train"):
        trainer.fit(model)


def test_another_trainer_is_refused(begin: Begin) -> None:
    _, model, cfg = begin()
    model.add_adapter(LoraPEFTConfig(cfg))
    plain = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(TypeError, match="MegatronTrainerBuilder"):
        plain.fit(model, torch.utils.data.DataLoader([0]))  # type: ignore[arg-type]


def test_a_users_callbacks_are_called(begin: Begin, bases: dict[str, str], tmp_path: Path) -> None:
    class Counting(pl.Callback):
        steps = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.steps += 1

    counting = Counting()
    config = small_config(bases["gpt"], tmp_path)
    trainer = MegatronTrainerBuilder(config).create_trainer(callbacks=[counting])
    cfg = MegatronGPTSFTModel.merge_cfg_with(bases["gpt"], config)
    model = MegatronGPTSFTModel.restore_from(bases["gpt"], cfg, trainer)
    model.add_adapter(LoraPEFTConfig(cfg))
    trainer.fit(model)
    assert counting.steps == 4


def test_more_devices_than_processes_are_refused(bases: dict[str, str], tmp_path: Path) -> None:
    config = small_config(bases["gpt"], tmp_path)
    config["trainer"]["devices"] = 2
    with pytest.raises(UserError, match="needs 2 processes"):
        MegatronTrainerBuilder(config).create_trainer()


# ---- prediction


@pytest.mark.parametrize("family", KINDS)
def test_predictions_are_batches_of_the_test_rows_in_order(begin: Begin, family: str) -> None:
    trainer, model, _ = begin(family)
    batches = trainer.predict(model)
    assert [len(batch["answers"]) for batch in batches] == [2, 2, 1]
    rows = [row for batch in batches for row in batch["rows"]]
    assert [row["mark"] for row in rows] == list(range(5))
    for batch in batches:
        assert all(text.startswith("first of") for text in batch["inputs"])
        for text, answer, whole in zip(
            batch["inputs"], batch["answers"], batch["sentences"], strict=True
        ):
            assert whole.startswith(text)
            assert whole.endswith(answer)


def test_answers_have_at_most_the_tokens_asked_for(begin: Begin) -> None:
    trainer, model, _ = begin(model__data__test_ds__tokens_to_generate=1)
    for batch in trainer.predict(model):
        assert all(len(answer.split()) <= 1 for answer in batch["answers"])


def test_drawn_answers_differ_by_row_and_repeat_by_seed(begin: Begin) -> None:
    drawn = {"inference__greedy": False, "inference__compute_logprob": True}
    trainer, model, _ = begin(**drawn)
    first = trainer.predict(model)
    assert first == trainer.predict(model)
    assert len({answer for batch in first for answer in batch["answers"]}) > 1
    assert all(
        len(t) == len(p) for b in first for t, p in zip(b["tokens"], b["logprob"], strict=True)
    )
    trainer, model, _ = begin(**drawn, model__seed=7)
    assert trainer.predict(model) != first


def test_predict_without_test_files_says_so(begin: Begin) -> None:
    trainer, model, _ = begin(model__data__test_ds=None)
    with pytest.raises(UserError, match=r"model\.data\.test_ds\.file_names is empty"):
        trainer.predict(model)


def test_fit_without_training_files_says_so(begin: Begin) -> None:
    trainer, model, cfg = begin(model__data__train_ds=None)
    model.add_adapter(LoraPEFTConfig(cfg))
    with pytest.raises(UserError, match=r"model\.data\.train_ds\.file_names is empty"):
        trainer.fit(model)


def test_a_file_holds_all_adapters_of_the_run(begin: Begin, tmp_path: Path) -> None:
    path = tmp_path / "two"
    trainer, model, cfg = begin(model__nemo_path=str(path))
    model.add_adapter([LoraPEFTConfig(cfg), IA3PEFTConfig(cfg)])
    trainer.fit(model)
    assert [adapter.name for adapter in read_adapters(path).adapters] == ["lora", "ia3"]
