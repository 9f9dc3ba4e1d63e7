"""docs/quickstart_python.md, run as it stands: training in one process, prediction in another."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from graftwerk.checkpoints import read_adapters
from graftwerk.checkpoints.resume import read_checkpoint
from tests.graftwerk.learning_stage import ROOT
from tests.graftwerk.nemo.small import write_base, write_rows
from tests.graftwerk.ranks import on_processes

PAGE = ROOT / "docs" / "quickstart_python.md"
CLASSES = {"gpt": "MegatronGPTSFTModel", "t5": "MegatronT5SFTModel"}


def drive(rank: int, script: str, folders: list[Path]) -> None:
    """Runs one of the page's files in each folder and keeps what it has predicted, and with what
    base."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for folder in folders:
        os.chdir(folder)
        made: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(Path(script).read_text(), script, "exec"), made)
        made["model"].model.set_active(None)
        kept = {
            "predictions": made["predictions"],
            "base": made["trainer"].predict(made["model"]),
            "steps": made["trainer"].global_step,
            "frozen": not any(p.requires_grad for p in made["model"].parameters()),
        }
        Path(f"{script}.json").write_text(json.dumps(kept))


def files_of_the_page() -> dict[str, str]:
    """The code blocks that begin with the name of a file."""
    blocks = re.findall(r"^```\w+\n(# ([\w.]+)\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    return {name: text for text, name in blocks}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family a folder in which the page's files have run, one process for each file."""
    made = {family: tmp_path_factory.mktemp(family) for family in CLASSES}
    for family, folder in made.items():
        write_base(family, folder / "base")
        for name, rows, seed in (("train", 64, 1), ("validation", 8, 2), ("test", 10, 3)):
            write_rows(folder / f"{name}.jsonl", rows, seed)
        for name, text in files_of_the_page().items():
            (folder / name).write_text(text.replace(CLASSES["gpt"], CLASSES[family]))
    for script in ("train.py", "predict.py"):
        on_processes(1, drive, script, list(made.values()))
    return made


def kept(folder: Path, script: str) -> dict[str, Any]:
    return json.loads((folder / f"{script}.json").read_text())


@pytest.mark.parametrize("family", CLASSES)
def test_a_new_process_predicts_what_the_trained_model_did(
    folders: dict[str, Path], family: str
) -> None:
    trained = kept(folders[family], "train.py")
    restored = kept(folders[family], "predict.py")
    assert trained["steps"] >= 20
    assert restored["steps"] == 0
    assert restored["predictions"] == trained["predictions"]
    assert sum(len(batch["answers"]) for batch in restored["predictions"]) == 10


@pytest.mark.parametrize("family", CLASSES)
def test_predictions_differ_from_the_bases(folders: dict[str, Path], family: str) -> None:
    restored = kept(folders[family], "predict.py")
    assert restored["base"] == kept(folders[family], "train.py")["base"]
    assert restored["base"] != restored["predictions"]


@pytest.mark.parametrize("family", CLASSES)
def test_freeze_leaves_nothing_to_train(folders: dict[str, Path], family: str) -> None:
    assert kept(folders[family], "predict.py")["frozen"]
    assert not kept(folders[family], "train.py")["frozen"]


@pytest.mark.parametrize("family", CLASSES)
def test_only_the_adapters_weights_are_saved(folders: dict[str, Path], family: str) -> None:
    results = folders[family] / "results"
    (adapter,) = read_adapters(results / "lora.nemo").adapters
    count = sum(tensor.numel() for tensor in adapter.state.values())
    assert count == json.loads((results / "summary.json").read_text())["trainable_parameters"]
    for path in (results / "checkpoints").glob("*.ckpt"):
        state = read_checkpoint(path)["state_dict"]
        assert sum(tensor.numel() for tensor in state.values()) == count
        assert all(".adapter_layer.lora." in name for name in state)
