"""docs/adapterhub.md runs: what moved, that losses fell, and that a fresh process says the same."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from graftwerk.adapterhub import AutoAdapterModel, MultiHeadOutput, Stack
from graftwerk.checkpoints import hub
from tests.graftwerk.learning_stage import environment

ROOT = Path(__file__).resolve().parents[3]
BLOCK = re.compile(r"^```python(?P<needs> trainer)?\n(?P<code>.*?)^```", re.M | re.S)
HAS_TRAINER = importlib.util.find_spec("accelerate") is not None

# What each folder of the page may have trained, by what stands in the names of parameters.
TRAINED = {
    "fused": (".fusion_layer.", "heads.mood."),
    "saved": (".adapter_layer.reviews.", "heads.reviews."),
    "dropped": (".adapter_layer.dropped.", "heads.dropped."),
    "lightning": (".adapter_layer.lightning.", "heads.lightning."),
    "both": (".adapter_layer.mood.", ".adapter_layer.topic.", "heads.mood.", "heads.topic."),
    "mix": (".adapter_layer.mix.", "heads.mix."),
    "gated": (".adapter_layer.gated.", "heads.gated."),
}
FRESH = """
import sys, torch
from transformers import AutoTokenizer
from graftwerk.adapterhub import AutoAdapterModel
torch.manual_seed(99)
tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
batch = torch.load("batch.pt")
said = {}
for folder in sys.argv[1:]:
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    if folder in ("fused", "both"):
        model.load_adapter_setup(folder, set_active=True)
    else:
        model.load_adapter("saved/reviews" if folder == "saved" else folder, set_active=True)
    with torch.no_grad():
        answer = model(**batch)
    heads = answer.head_outputs if "head_outputs" in answer else [answer]
    said[folder] = [head.logits for head in heads]
torch.save(said, "said.pt")
"""


def logits(model: AutoAdapterModel, batch: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        answer = model(**batch)
    heads = answer.head_outputs if isinstance(answer, MultiHeadOutput) else [answer]
    assert heads is not None
    return [head.logits for head in heads]


@pytest.fixture(scope="module")
def page(filled_cache, tmp_path_factory):
    """The page, run: of each folder that it saves the losses, what moved, and the logits."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("page")
    results: dict[str, SimpleNamespace] = {}
    names: dict = {"__name__": "__main__"}
    before: dict[str, torch.Tensor] = {}

    def noting(method):
        def noted(self, *args, **kwargs):
            method(self, *args, **kwargs)
            before.update({key: p.detach().clone() for key, p in self.named_parameters()})

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(filled_cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.chdir(folder)
        hub.folder_of.cache_clear()
        for name in ("train_adapter", "train_adapter_fusion"):
            patch.setattr(AutoAdapterModel, name, noting(getattr(AutoAdapterModel, name)))
        torch.manual_seed(0)
        for found in BLOCK.finditer((ROOT / "docs" / "adapterhub.md").read_text()):
            if found["needs"] and not HAS_TRAINER:
                continue
            before.clear()
            held = set(os.listdir(folder))
            exec(compile(found["code"], "docs/adapterhub.md", "exec"), names)
            (new, *_) = [*(set(os.listdir(folder)) - held - {"runs"}), None]
            if new is not None:
                model = names["model"].eval()
                parameters = dict(model.named_parameters())
                moved = {k for k, was in before.items() if not torch.equal(was, parameters[k])}
                results[new] = SimpleNamespace(
                    losses=list(names["losses"]),
                    moved=moved,
                    logits=logits(model, names["batch"]),
                    summary=model.adapter_summary(as_dict=True),
                )
        hub.folder_of.cache_clear()
    torch.save(names["batch"], folder / "batch.pt")
    return SimpleNamespace(folder=folder, names=names, results=results, cache=filled_cache)


def needs_trainer(folder: str):
    reason = "transformers.Trainer needs the package accelerate: pip install accelerate"
    skip = pytest.mark.skipif(not HAS_TRAINER, reason=reason)
    return pytest.param(folder, marks=[skip] if folder == "dropped" else [])


@pytest.mark.parametrize("folder", [needs_trainer(folder) for folder in TRAINED])
def test_a_use_moves_its_own_parameters_and_its_loss_falls(page, folder):
    result = page.results[folder]
    assert result.moved
    for part in TRAINED[folder]:
        assert any(part in name for name in result.moved), f"nothing of {part} moved"
    strangers = [n for n in result.moved if not any(part in n for part in TRAINED[folder])]
    assert not strangers
    first, last = result.losses[0], result.losses[-1]
    assert last < (0.8 if folder == "dropped" else 0.5) * first


def test_a_fresh_process_says_what_the_page_said(page):
    environment_ = {**environment(), "HF_HUB_CACHE": str(page.cache), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", FRESH, *page.results],
        cwd=page.folder,
        env=environment_,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert len(page.results) >= 6
    said = torch.load(page.folder / "said.pt")
    for folder, result in page.results.items():
        for fresh, here in zip(said[folder], result.logits, strict=True):
            torch.testing.assert_close(fresh, here, atol=1e-5, rtol=1e-5, msg=folder)


def test_the_hubs_adapters_have_their_documented_names_and_fuse(page):
    (setup,) = (page.folder / "fused").glob("adapter_setup.json")
    assert {path.name for path in setup.parent.iterdir() if path.is_dir()} == {
        "sst-2",
        "qqp",
        "qnli",
        "sst-2,qqp,qnli",
        "mood",
    }
    attention = page.names["attention"]["sst-2,qqp,qnli"]
    assert sorted(attention) == [0, 1]
    weights = attention[1]["output_adapter"]
    assert weights.shape == (*page.names["batch"]["input_ids"].shape, 3)
    assert abs(weights.sum(-1) - 1).max() < 1e-5


def test_gates_are_told_by_layer_and_place(page):
    gates = page.names["gates"]["gated"]
    assert sorted(gates) == [0, 1]
    shapes = {place: scores.shape for place, scores in gates[0].items()}
    assert shapes == {"output_adapter": (6,), "selfattn_lora": (6, 2), "self_prefix": (6,)}
    assert all(((scores > 0) & (scores < 1)).all() for scores in gates[0].values())


def test_a_setup_a_mean_and_a_merge_leave_the_model_as_it_was(page):
    names = page.names
    model, mix = names["model"], page.results["mix"].logits[0]
    torch.testing.assert_close(names["within"], mix, atol=1e-5, rtol=1e-5)
    assert model.active_adapters == Stack("mean")
    torch.testing.assert_close(names["merged"], names["apart"], atol=1e-4, rtol=1e-4)
    assert torch.equal(model(**names["batch"]).logits, names["apart"])


def test_text_goes_on_behind_the_prompt(page):
    written = page.names["written"]
    assert written.shape[0] == 2
    assert written[:, :3].tolist() == [[5, 6, 7], [8, 9, 10]]
    assert 4 <= written.shape[1] <= 7
