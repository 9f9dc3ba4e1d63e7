"""AdapterDrop's callbacks, and `transformers.Trainer` with checkpoints to go on from."""

import importlib.util

import pytest
import pytorch_lightning as pl
import torch

from graftwerk.adapterhub import AdapterDropCallback
from graftwerk.errors import UserError
from graftwerk.training.adapter_drop import LayerChoice
from tests.graftwerk.adapterhub.small import rows, small

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="transformers.Trainer needs the package accelerate: pip install accelerate",
)


def learner():
    model = small()
    model.add_adapter("a", config="compacter[reduction_factor=4]")
    model.add_classification_head("a")
    model.train_adapter("a")
    return model


class Module(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.trained, self.validated = model, [], []

    def training_step(self, batch, number):
        self.trained.append(self.model.base.plan.skip_layers)
        return self.model(batch, labels=torch.tensor([0, 1, 0, 1])).loss

    def validation_step(self, batch, number):
        self.validated.append(self.model.base.plan.skip_layers)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(callback):
    module = Module(learner())
    loader = torch.utils.data.DataLoader([rows()] * 6, batch_size=None)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=3,
        callbacks=[callback],
    )
    trainer.fit(module, loader, loader)
    return module


def test_lightning_leaves_out_layers_in_training_and_none_in_validation():
    module = fit(AdapterDropCallback([1]))
    assert module.trained == [(1,)] * 6
    assert set(module.validated) == {()}
    assert module.model.base.plan.skip_layers == ()


def test_chance_says_how_many_of_the_first_layers_are_left_out():
    module = fit(AdapterDropCallback(2, seed=3))
    assert module.trained == [LayerChoice(2, seed=3).at(step) for step in range(6)]
    seen = {LayerChoice(2).at(step) for step in range(40)}
    assert seen == {(), (0,), (0, 1)}


def test_layers_below_the_first_are_refused():
    with pytest.raises(UserError, match="numbers of layers begin at 0"):
        LayerChoice([-1])


@needs_accelerate
@pytest.mark.parametrize("kind", ["Trainer", "AdapterTrainer"])
def test_a_run_of_transformers_trainer_goes_on_from_its_checkpoint(tmp_path, kind):
    import transformers

    from graftwerk.adapterhub import AdapterDropTrainerCallback, AdapterTrainer

    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": number % 2}
        for number, row in enumerate(rows(8))
    ]
    trainer_of = AdapterTrainer if kind == "AdapterTrainer" else transformers.Trainer

    def run(epochs, resume=None):
        torch.manual_seed(0)
        model = learner()
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / f"{epochs}"),
            num_train_epochs=epochs,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            save_strategy="epoch",
            eval_strategy="epoch",
            use_cpu=True,
            seed=1,
        )
        callbacks = [AdapterDropTrainerCallback(2)]
        trainer = trainer_of(
            model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer.evaluate()["eval_loss"]

    run(2)
    going_on, loss = run(4, resume=str(tmp_path / "2" / "checkpoint-2"))
    at_once, expected = run(4)
    assert abs(loss - expected) < 1e-5
    state, other = going_on.state_dict(), at_once.state_dict()
    assert all(torch.allclose(state[key], other[key], atol=1e-5) for key in state)
    if kind == "AdapterTrainer":
        saved = tmp_path / "4" / "checkpoint-4"
        assert (saved / "model.safetensors").stat().st_size < 40_000  # no base in it
        fresh = small()
        fresh.load_adapter(saved / "a", set_active=True)
        torch.testing.assert_close(fresh(rows()).logits, going_on.eval()(rows()).logits)
