"""A validation loss for each of several files, beside the one of all rows."""

import json
from pathlib import Path

import pytest

from graftwerk.stages import learning
from tests.graftwerk.learning_stage import base, cfg, read_metrics, rows, write_rows

__all__ = ["base", "cfg", "rows"]


@pytest.fixture
def several(cfg, tmp_path):
    """The stage with two validation files, of 5 rows and of 3 that all have one long answer."""
    one = write_rows(tmp_path / "one.jsonl", 5, 3)
    two = tmp_path / "two.jsonl"
    row = {"taskname": "first", "context": "w1 w2", "question": "first", "answer": "w1 w2 w3 w4"}
    two.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    cfg.model.data.validation_ds = [str(one), {"path": str(two), "name": "long"}]
    cfg.trainer.max_epochs = 1
    return cfg


def val_losses(cfg, key="val_loss"):
    return [float(row[key]) for row in read_metrics(cfg) if row.get(key)]


def test_each_file_has_its_own_validation_loss(several, tmp_path):
    from tests.graftwerk.learning_stage import elsewhere

    learning.run("adapter_learning", several)
    together = val_losses(several), val_losses(several, "val_loss_one")
    assert len(together[0]) == 2
    labels = {"one": 5 * 2, "long": 3 * 5}  # answers and their end tokens
    for whole, one, long in zip(*together, val_losses(several, "val_loss_long"), strict=True):
        mean = (one * labels["one"] + long * labels["long"]) / sum(labels.values())
        assert whole == pytest.approx(mean, rel=1e-5)
    for number, name in enumerate(("one", "long")):
        alone = elsewhere(several, tmp_path / name)
        alone.model.data.validation_ds = [several.model.data.validation_ds[number]]
        learning.run("adapter_learning", alone)
        assert val_losses(alone) == pytest.approx(val_losses(several, f"val_loss_{name}"), rel=1e-5)
        assert f"val_loss_{name}" not in read_metrics(alone)[0]


def test_the_summary_counts_the_rows_of_all_files(several):
    learning.run("adapter_learning", several)
    folder = Path(several.exp_manager.explicit_log_dir)
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert rows["validation"]["rows"] == 8


def test_a_mixture_resumes_to_the_same_bits(several, tmp_path):
    import torch

    from graftwerk.checkpoints.adapter import read_adapter
    from tests.graftwerk.learning_stage import elsewhere

    train = several.model.data.train_ds[0]
    other = write_rows(tmp_path / "other.jsonl", 7, 9)
    several.model.data.train_ds = [
        {"path": train, "weight": 1.0},
        {"path": str(other), "weight": 2.0},
    ]
    several.trainer.max_epochs = -1
    several.trainer.max_steps = 10
    several.model.optim.sched = {"name": "constant", "warmup_steps": 0}
    learning.run("adapter_learning", several)
    broken = elsewhere(several, tmp_path / "broken")
    broken.trainer.max_steps = 5
    learning.run("adapter_learning", broken)
    broken.trainer.max_steps = 10
    learning.run("adapter_learning", broken)
    states = [read_adapter(run.model.nemo_path)[1] for run in (several, broken)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
