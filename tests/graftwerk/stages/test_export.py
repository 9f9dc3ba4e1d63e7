"""The stage `export`: one adapter in every form, several, merged; what a form cannot say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    Stack,
)
from graftwerk.checkpoints import load_adapters, load_base, save_adapters, save_base
from graftwerk.checkpoints.adapter import form_of
from graftwerk.errors import UserError
from graftwerk.models import GPT
from graftwerk.stages.export import run
from tests.graftwerk.tiny import GPT2, LLAMA, shake, tiny_gpt, tokens

BASES = {"gpt2": GPT2, "llama": LLAMA}
METHODS: dict[str, Any] = {
    "lora": LoRAConfig(dim=2, alpha=6),
    "apart": LoRAConfig(dim=2, target_modules=("attention_qkv",), variant="canonical"),
    "ia3": IA3Config(),
}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / request.param
    save_base(tiny_gpt(BASES[request.param]), None, path)
    return path


def trained(base: Path, folder: Path, **methods: Any) -> GPT:
    """A model with random adapters, each saved into a folder of ours by its name."""
    model = load_base(base)
    assert isinstance(model, GPT)
    for number, (name, method) in enumerate(methods.items()):
        model.add_adapter(name, method)
        for _, _, part in model.parts(name):
            shake(part, number + 1)
        save_adapters(model, [name], folder / name)
    return model


def settings(base: Path, folder: Path, *names: str, **changes: Any) -> DictConfig:
    values = {
        "format": "peft",
        "merge": False,
        "output_path": str(folder / "out"),
        "overwrite": False,
        "dtype": "keep",
        "model": {
            "language_model_path": str(base),
            "restore_from_path": None,
            "revision": None,
            "adapters": [{"name": name, "path": str(folder / name)} for name in names],
        },
    }
    return OmegaConf.create({**values, **changes})


@torch.no_grad()
def answer(base: Path, path: Path | None, *names: str) -> torch.Tensor:
    """Logits of the base with the adapters of a file active."""
    model = load_base(base)
    assert isinstance(model, GPT)
    if path is not None:
        loaded = load_adapters(model, path)
        assert not names or tuple(loaded) == names
        model.set_active(Stack(*loaded))
    return model(tokens())


@pytest.mark.parametrize("form", ["graftwerk", "adapterhub", "peft", "nemo"])
@pytest.mark.parametrize("method", ["lora", "apart"])
@torch.no_grad()
def test_each_form_computes_what_the_adapter_did(base, form, method, tmp_path):
    model = trained(base, tmp_path, mine=METHODS[method])
    model.set_active("mine")
    out = tmp_path / ("out.nemo" if form == "nemo" else "out")
    assert run(settings(base, tmp_path, "mine", format=form, output_path=str(out))) == 0
    assert form_of(out) == form
    made = answer(base, out)
    torch.testing.assert_close(made, model(tokens()), atol=1e-5, rtol=1e-5)
    assert (made - answer(base, None)).abs().max() > 0.1


@torch.no_grad()
def test_out_of_one_librarys_form_into_anothers(base, tmp_path):
    model = trained(base, tmp_path, mine=METHODS["lora"])
    model.set_active("mine")
    source = "mine"
    for form in ("peft", "adapterhub", "graftwerk", "peft"):
        changes = {"format": form, "output_path": str(tmp_path / form), "overwrite": True}
        run(settings(base, tmp_path, source, **changes))
        source = form
    torch.testing.assert_close(
        answer(base, tmp_path / "peft"), model(tokens()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("form", ["graftwerk", "adapterhub", "peft", "nemo"])
def test_several_adapters_are_one_file_or_a_folder_each(base, form, tmp_path):
    trained(base, tmp_path, one=METHODS["apart"], two=LoRAConfig(dim=3, variant="canonical"))
    out = tmp_path / ("out.nemo" if form == "nemo" else "out")
    cfg = settings(base, tmp_path, "one", "two", format=form, output_path=str(out))
    if form == "nemo":
        with pytest.raises(UserError, match="NeMo has no words for two adapters of one method"):
            run(cfg)
        assert not out.exists()
        return
    run(cfg)
    if form == "graftwerk":
        answer(base, out, "one", "two")
    else:
        assert sorted(each.name for each in out.iterdir()) == ["one", "two"]
        torch.testing.assert_close(answer(base, out / "two"), answer(base, tmp_path / "two"))


@pytest.mark.parametrize("form", ["graftwerk", "huggingface"])
@torch.no_grad()
def test_merged_it_is_a_model_of_its_own(base, form, tmp_path):
    model = trained(base, tmp_path, one=METHODS["lora"], two=METHODS["ia3"])
    model.set_active(Stack("one", "two"))
    run(settings(base, tmp_path, "one", "two", format=form, merge=True))
    made = answer(tmp_path / "out", None)
    torch.testing.assert_close(made, model(tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "form", "line"),
    [
        (BottleneckConfig(dim=2), "peft", "peft has no adapter that is a BottleneckConfig"),
        (BottleneckConfig(dim=2), "adapterhub", "AdapterHub has no words for BottleneckConfig"),
        (LoRAConfig(dim=2, dora=True), "adapterhub", "no words for this DoRA"),
        (LoRAConfig(dim=2, dora=True), "nemo", "NeMo has no words for dora=True"),
        (PrefixTuningConfig(bottleneck_dim=2), "peft", "shifts_positions=False"),
        (PrefixTuningConfig(bottleneck_dim=2), "nemo", "no words for PrefixTuningConfig"),
        (PromptTuningConfig(), "nemo", "NeMo has no words for PromptTuningConfig"),
        (LoRAConfig(dim=2, target_modules=("query",)), "nemo", "no words for LoRA at query alone"),
    ],
)
def test_what_a_form_cannot_say_is_refused_by_name_and_nothing_written(
    base, method, form, line, tmp_path
):
    trained(base, tmp_path, mine=method)
    out = tmp_path / "new" / ("out.nemo" if form == "nemo" else "out")
    with pytest.raises(UserError, match=line):
        run(settings(base, tmp_path, "mine", format=form, output_path=str(out)))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"format": "onnx"}, "format='onnx': use one of graftwerk, adapterhub, peft, nemo"),
        ({"merge": True}, "format=peft holds adapters and no model"),
        ({"format": "huggingface"}, "format=huggingface holds a whole model"),
        ({"format": "nemo"}, "a file that ends in .nemo"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(base, changes, line, tmp_path):
    trained(base, tmp_path, mine=METHODS["lora"])
    with pytest.raises(UserError, match=line):
        run(settings(base, tmp_path, "mine", **changes))
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_left_alone_unless_asked(base, tmp_path):
    trained(base, tmp_path, mine=METHODS["lora"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already: set overwrite=True"):
        run(settings(base, tmp_path, "mine"))
    with pytest.raises(UserError, match="holds no adapter or checkpoint"):
        run(settings(base, tmp_path, "mine", overwrite=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    again = {"output_path": str(tmp_path / "again")}
    run(settings(base, tmp_path, "mine", **again))
    run(settings(base, tmp_path, "mine", **again, overwrite=True))


def test_weights_are_written_in_the_asked_type(base, tmp_path):
    trained(base, tmp_path, mine=METHODS["lora"])
    run(settings(base, tmp_path, "mine", dtype="bf16"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
