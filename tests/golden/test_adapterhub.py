"""AdapterHub's own files: what they compute here, what trains, and what is written back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from graftwerk import adapterhub
from graftwerk.adapterhub.inputs import Inputs, Tokens
from graftwerk.adapters.composition import Composition
from graftwerk.adapters.merge import merge
from graftwerk.adapters.slots import Record
from graftwerk.checkpoints import load_base
from graftwerk.checkpoints.adapterhub import (
    About,
    load_adapterhub,
    load_adapterhub_fusion,
    load_adapterhub_setup,
    save_adapterhub,
    save_adapterhub_fusion,
)
from graftwerk.checkpoints.adapterhub_adapter import family_of, sites_of, table_of
from graftwerk.checkpoints.adapterhub_files import (
    ADAPTER,
    FUSION,
    HEAD,
    Kind,
    read_adapterhub,
    setup_dict,
    setup_of,
    write_setup,
)
from graftwerk.checkpoints.adapterhub_names import fusion_table
from graftwerk.checkpoints.huggingface import FAMILIES
from graftwerk.generation.decoding import generate
from graftwerk.models import BERT, GPT, T5
from tests.golden.conftest import Case, cases

CASES = cases("adapters")
pytestmark = pytest.mark.skipif(not CASES, reason="no golden cases: set GRAFTWERK_SHARED")


def those(chosen: Callable[[Case], Any]) -> Any:
    """Runs a test with every case that has something."""
    found = [case for case in CASES if chosen(case)]
    return pytest.mark.parametrize("case", found, ids=[case["path"] for case in found])


def headed(case: Case) -> bool:
    """Whether the case is of a model with AdapterHub's own heads."""
    return case["model_class"].endswith("AdapterModel")


def close(case: Case, name: str, ours: Tensor, theirs: Tensor | None = None) -> None:
    """Compares an output within the case's tolerance."""
    theirs = case.tensors[name] if theirs is None else theirs
    torch.testing.assert_close(
        ours.detach().float().reshape(theirs.shape),
        theirs,
        **case["tolerance"],
        msg=lambda said: f"{name}: {said}",
    )


def add_all(base: GPT | T5 | BERT, case: Case) -> Composition | str | None:
    """Loads the adapters and fusions of a case and activates its setup, which is returned."""
    if "adapter_setup" in case.files:
        return load_adapterhub_setup(base, case.folder / case.files["adapter_setup"])[1]
    changes = case.get("config_override") or {}
    for name, path in case.files.get("adapters", {}).items():
        assert load_adapterhub(base, case.folder / path, name, changes.get(name)) == name
    for key, path in case.files.get("fusions", {}).items():
        assert load_adapterhub_fusion(base, case.folder / path) == key
    setup = setup_of(case.get("setup"), case["path"])
    base.set_active(setup, case.get("skip_layers") or ())
    if case.get("merged"):
        base.set_active(case["merged"])
        merge(base)
    return setup


def engine(case: Case) -> GPT | T5 | BERT:
    """The case's base with its adapters active."""
    base = load_base(case.folder / case["base"])
    add_all(base, case)
    return base


def special(case: Case) -> Tokens:
    config = json.loads((case.folder / case["base"] / "config.json").read_text())
    start = config.get("decoder_start_token_id", 0)
    return Tokens(config.get("pad_token_id"), config.get("eos_token_id"), start)


def passed(base: GPT | T5 | BERT, case: Case, record: Record | None = None) -> Tensor:
    """Logits of the case's inputs."""
    names = ("input_ids", "attention_mask", "decoder_input_ids", "token_type_ids")
    inputs = Inputs(**{name: case.tensors[name] for name in names if name in case.tensors})
    task_ids = case.tensors.get("task_ids")
    arguments = inputs.arguments(base, special(case))
    return base(**arguments, task_ids=task_ids, record=record)


def loss_of(base: GPT | T5 | BERT, logits: Tensor, labels: Tensor) -> Tensor:
    if isinstance(base, GPT):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@those(lambda case: not headed(case))
@torch.no_grad()
def test_logits_and_losses_are_those_of_the_library(case):
    base = engine(case)
    logits = passed(base, case)
    columns = case.tensors["input_ids" if isinstance(base, BERT) else "logits"].shape[1]
    close(case, "logits", logits, case.tensors["logits"][:, -columns:])  # without a prompt's
    if "train_loss" in case.tensors:
        close(case, "train_loss", loss_of(base, logits, case.tensors["labels"]))
    if "fusion_reg_loss" in case.tensors:
        close(case, "fusion_reg_loss", base.fusion_loss())


def flat(said: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """What was recorded, by the names of the cases."""
    return {
        f"{prefix}/{name}/{layer}/{place}": torch.as_tensor(value)
        for name, layers in said.items()
        for layer, places in layers.items()
        for place, value in places.items()
    }


@those(lambda case: not headed(case) and case.outputs("gating/") | case.outputs("fusion_att"))
@torch.no_grad()
def test_gates_and_fusion_weights_are_recorded_under_the_librarys_names(case):
    base, record = engine(case), Record()
    passed(base, case, record)
    said = flat(record.gates, "gating") | flat(record.fusions, "fusion_attentions")
    theirs = case.outputs("gating/") | case.outputs("fusion_attentions/")
    assert said.keys() == theirs.keys()
    for name, value in said.items():
        assert value.shape == theirs[name].shape, name
        close(case, name, value)


@those(lambda case: "generated_ids" in case.tensors)
@torch.no_grad()
def test_generation_gives_the_librarys_ids_with_and_without_a_cache(case):
    base, tokens = engine(case), special(case)
    prompts, whole = case.tensors["gen_input_ids"], case.tensors["generated_ids"]
    given = 1 if isinstance(base, T5) else prompts.shape[1]
    count = whole.shape[1] - given
    eos = [] if tokens.eos is None else [tokens.eos]
    made = generate(base, prompts.tolist(), count, eos)
    ends = [
        row.index(end) if (end := tokens.eos) in row else None for row in whole[:, given:].tolist()
    ]
    assert made == [row[:end] for row, end in zip(whole[:, given:].tolist(), ends, strict=True)]
    grown = whole[:, :given]
    for _ in range(count):
        if isinstance(base, T5):
            logits = base(grown, source=prompts)
        else:
            logits = base(grown)
        grown = torch.cat([grown, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(grown, whole)


@those(lambda case: not headed(case) and case.get("grad_l2"))
def test_gradients_are_as_long_as_those_of_the_library(case):
    base = engine(case)
    fused = bool(base.fusions)
    base.train_only(() if fused else base.adapters, base.fusions)
    own = {ours: parameter for ours, parameter in base.base_parameters()}
    table = FAMILIES[
        json.loads((case.folder / case["base"] / "config.json").read_text())["model_type"]
    ]
    homes = {name: ours for ours, entry in table.table(base.config).items() for name in entry.names}
    trained = {
        name: own[homes[name]].requires_grad_(True) for name in case["grad_l2"] if name in homes
    }
    loss_of(base, passed(base, case), case.tensors["labels"]).backward()
    lengths = {name: float(grad_of(parameter).norm()) for name, parameter in trained.items()}
    root = family_of(base).root_of(case["model_class"])
    for name in () if fused else base.adapters:
        grads = gradients(base, name)
        joined = table_of(base, base.adapters[name], name, grads).join(grads)
        lengths |= {f"{root}{key}": float(grad.norm()) for key, grad in joined.items()}
    for name in base.fusions:
        grads = {
            f"{path}.{key}": grad_of(parameter)
            for path, _, layer in base.fusion_layers(name)
            for key, parameter in layer.named_parameters()
        }
        joined = fusion_table(family_of(base), sites_of(base), grads, name).join(grads)
        lengths |= {f"{root}{key}": float(grad.norm()) for key, grad in joined.items()}
    theirs = case["grad_l2"]
    assert theirs.keys() <= lengths.keys()
    assert {key: lengths[key] for key in theirs} == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def gradients(base: GPT | T5 | BERT, name: str) -> dict[str, Tensor]:
    """The gradients of an adapter's parameters; each once, as in `adapter_state`."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, _, part in base.parts(name):
        for key, parameter in part.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{key}"] = grad_of(parameter)
    return found


# ---- models with heads


def hub_model(case: Case) -> Any:
    """The case's model with adapters and heads, all active."""
    model = getattr(adapterhub, case["model_class"]).from_pretrained(case.folder / case["base"])
    if "adapter_setup" in case.files:
        model.load_adapter_setup(case.folder / case.files["adapter_setup"], set_active=True)
        return model
    for name, path in case.files.get("adapters", {}).items():
        model.load_adapter(case.folder / path, load_as=name)
    model.set_active_adapters(setup_of(case.get("setup"), case["path"]))
    return model


@those(headed)
@torch.no_grad()
def test_heads_give_the_librarys_logits_and_losses(case):
    model = hub_model(case)
    given = {
        key: case.tensors[value.removeprefix("tensor:")]
        for key, value in (case.get("forward_kwargs") or {}).items()
    }
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    inputs = {name: case.tensors[name] for name in names if name in case.tensors}
    fused = bool(case.outputs("fusion_attentions/"))
    output = model(**inputs, **given, output_adapter_fusion_attentions=fused)
    for name in [name for name in case["outputs"] if name not in given]:
        head, _, field = name.rpartition("/")
        if name.startswith("fusion_attentions/"):
            ours = flat(output.adapter_fusion_attentions, "fusion_attentions")[name]
        elif head:
            ours = output[int(head.removeprefix("head"))][field]
        else:
            ours = output[field]
        close(case, name, torch.as_tensor(ours))


# ---- written back


def folders(kind: Kind) -> Any:
    """Every folder of the cases that holds something of a kind, once."""
    found: dict[Path, Case] = {}
    for case in CASES:
        files = case.files
        paths = [*files.get("adapters", {}).values(), *files.get("fusions", {}).values()]
        held = [case.folder / path for path in paths]
        if "adapter_setup" in files:
            held += (case.folder / files["adapter_setup"]).iterdir()
        for path in held:
            if (path / kind.config).is_file():
                found.setdefault(path, case)
    ids = [str(path.relative_to(case.folder)) for path, case in found.items()]
    return pytest.mark.parametrize(("case", "path"), [(c, p) for p, c in found.items()], ids=ids)


def assert_same(kind: Kind, ours: Path, theirs: Path, beyond: Mapping[str, Any]) -> None:
    """The two folders hold the same settings and tensors."""
    settings, known = (json.loads((path / kind.config).read_text()) for path in (ours, theirs))
    known["config"] |= beyond
    assert settings == known
    (weights,) = (name for name in (kind.safe, kind.pickled) if (theirs / name).is_file())
    read = load_file if weights == kind.safe else _load
    written, given = read(ours / weights), read(theirs / weights)
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(written[name], tensor), name


def _load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def about(part: Any) -> About:
    return About(part.about["model_name"], part.about["model_class"])


@folders(ADAPTER)
def test_an_adapter_written_back_is_the_same_folder(case, path, tmp_path):
    base = load_base(case.folder / case["base"])
    (part,) = read_adapterhub(path).adapters
    beyond = (case.get("config_override") or {}).get(part.name, {})  # what the library leaves out
    name = load_adapterhub(base, path, config=beyond)
    size = save_adapterhub(base, name, tmp_path, about(part), (path / ADAPTER.safe).is_file())
    assert_same(ADAPTER, tmp_path, path, beyond)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    count = sum(value.numel() for value in base.adapter_state(name).values())
    assert size <= 4 * count + 65536


@folders(FUSION)
def test_a_fusion_written_back_is_the_same_folder(case, path, tmp_path):
    base = load_base(case.folder / case["base"])
    (part,) = read_adapterhub(path).fusions
    beside = path.parent
    for name in part.about["adapter_names"]:
        known = case.files.get("adapters", {}).get(name)
        load_adapterhub(base, beside / name if known is None else case.folder / known, name)
    key = load_adapterhub_fusion(base, path)
    save_adapterhub_fusion(base, key, tmp_path, about(part), (path / FUSION.safe).is_file())
    assert_same(FUSION, tmp_path, path, {})


@folders(HEAD)
def test_a_head_written_back_is_the_same_folder(case, path, tmp_path):
    (part,) = read_adapterhub(path).heads
    model = getattr(adapterhub, case["model_class"]).from_pretrained(case.folder / case["base"])
    model.config.name_or_path = part.about["model_name"]
    assert model.load_head(path) == part.name
    model.save_head(tmp_path, part.name, use_safetensors=(path / HEAD.safe).is_file())
    assert_same(HEAD, tmp_path, path, {})


@those(lambda case: "adapter_setup" in case.files)
def test_a_setup_written_back_is_the_same_tree(case, tmp_path):
    folder = case.folder / case.files["adapter_setup"]
    read = read_adapterhub(folder)
    write_setup(tmp_path, read.setup, read.head_setup)
    ours, theirs = (json.loads((p / "adapter_setup.json").read_text()) for p in (tmp_path, folder))
    assert ours == theirs


@those(lambda case: case.get("setup"))
def test_a_composition_goes_into_the_librarys_tree_and_back(case):
    setup = setup_of(case["setup"], case["path"])
    assert setup_dict(setup) == case["setup"]
