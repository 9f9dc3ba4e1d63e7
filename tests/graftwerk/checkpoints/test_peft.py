"""peft's folders on every family: adapters there and back, what is refused, what peft reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwerk.adapters import IA3Config, LoRAConfig, PrefixTuningConfig, PromptTuningConfig
from graftwerk.adapters.configs import MethodConfig, PTuningConfig, SelectiveConfig, UnionConfig
from graftwerk.adapters.methods.hub_lora import HubLoRAConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints import load_adapter, load_base, read_adapters
from graftwerk.checkpoints.inspect import inspect
from graftwerk.checkpoints.peft import CONFIG, PICKLED, WEIGHTS, save_peft
from graftwerk.errors import UserError
from graftwerk.models import BERT, T5
from tests.graftwerk.families import BERT as BERT_SIZES
from tests.graftwerk.families import GPTS, T5S
from tests.graftwerk.tiny import shake

FAMILIES: dict[str, Any] = {
    "gpt2": GPTS["gpt2"],
    "gptj": GPTS["gptj"],
    "neox": GPTS["neox"],
    "opt": GPTS["opt"],
    "llama": GPTS["llama"],
    "nemotron": GPTS["nemotron"],
    "t5": T5S["t5_v1.1"],
    "bert": hf.BertConfig(**BERT_SIZES),
}
WORDS: dict[str, Any] = {"place": "word_embedding"}
PREFIX: dict[str, Any] = {
    "prefix_length": 3, "reparametrise": False, "shifts_positions": True,
    "relative_positions": "both", "cross_prefix": False,
}  # fmt: skip
METHODS: dict[str, MethodConfig] = {
    "lora": LoRAConfig(dim=3, alpha=5, target_modules=("all",)),
    "apart": LoRAConfig(dim=2, target_modules=("all",), variant="canonical"),
    "stabilised": LoRAConfig(dim=2, alpha=3, rank_stabilised=True, layer_selection=(2,)),
    "hub": HubLoRAConfig(places=("query", "value", "fc2"), r=3, alpha=7),
    "dora": LoRAConfig(dim=2, target_modules=("query", "key", "value"), dora=True),
    "ia3": IA3Config(),
    "ia3_more": IA3Config(places=("values", "value", "fc2")),
    "prompt": PromptTuningConfig(virtual_tokens=3, **WORDS),
    "p_tuning": PTuningConfig(virtual_tokens=2, embedding_dim=6, bottleneck_dim=4, **WORDS),
    "prefix": PrefixTuningConfig(**PREFIX),
    "ranks": UnionConfig(
        configs=(
            LoRAConfig(dim=1, target_modules=("fc2",)),
            LoRAConfig(dim=4, alpha=2, target_modules=("output", "query")),
        )
    ),
    "whole": UnionConfig(
        configs=(
            LoRAConfig(dim=2, target_modules=("output",)),
            SelectiveConfig(parameters=("*.mlp.linear_fc2.*", "*.0.self_attention.linear_qkv.*")),
        )
    ),
}


def base_of(family: str) -> hf.PreTrainedModel:
    config = FAMILIES[family]
    kind = {"t5": hf.AutoModelForSeq2SeqLM, "bert": hf.AutoModel}
    made = kind.get(family, hf.AutoModelForCausalLM)
    torch.manual_seed(0)
    model = made.from_config(config, attn_implementation="eager").eval()
    shake(model)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bases") / request.param
    base_of(request.param).save_pretrained(path)
    return path


INPUTS = torch.tensor([[5, 9, 2, 7, 30, 8], [11, 3, 40, 6, 2, 17]])


@torch.no_grad()
def answer(model: AdapterModel) -> Tensor:
    if isinstance(model, T5):
        return model(INPUTS[:, :4], source=INPUTS)
    return model(INPUTS)


def trained(folder: Path, method: MethodConfig) -> AdapterModel:
    model = load_base(folder)
    model.add_adapter("mine", method)
    for number, (_, _, part) in enumerate(model.parts("mine")):
        shake(part, number)
    for key, parameter in model.replacements.of("mine").items():
        with torch.no_grad():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
        assert key
    model.set_active("mine")
    return model


EVERYWHERE = ("gpt2", "llama", "t5", "bert")  # the others differ in names alone


def skip_more_of_the_same(folder: Path, name: str) -> None:
    if folder.name not in EVERYWHERE and name not in ("lora", "ia3", "prefix"):
        pytest.skip(f"as on {', '.join(EVERYWHERE)}")


def sayable(folder: Path, name: str) -> bool:
    """Whether peft has the method on a family: see docs/export.md."""
    if folder.name == "t5":
        return name not in ("prefix",)  # three decoder layers, two in the encoder
    if name == "dora":
        return folder.name not in ("gpt2", "neox")  # at some rows of a fused projection
    return True


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_computes_the_same_when_it_is_read(folder, name, tmp_path):
    skip_more_of_the_same(folder, name)
    method = METHODS[name]
    if folder.name == "t5" and name == "prefix":
        method = PrefixTuningConfig(**PREFIX, encoder_prefix=False)
    model = trained(folder, method)
    if not sayable(folder, name):
        with pytest.raises(UserError, match="peft"):
            save_peft(model, "mine", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    save_peft(model, "mine", tmp_path / "out", str(folder))
    other = load_base(folder)
    before = answer(other)
    other.set_active(load_adapter(other, tmp_path / "out"))
    torch.testing.assert_close(answer(other), answer(model), atol=2e-5, rtol=2e-5)
    assert (answer(other) - before).abs().max() > 1e-3
    save_peft(other, "out", tmp_path / "again", str(folder))
    first, second = (load_file(tmp_path / place / WEIGHTS) for place in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_the_same_with_what_we_write(folder, name, tmp_path):
    peft = pytest.importorskip("peft")
    skip_more_of_the_same(folder, name)
    if not sayable(folder, name):
        pytest.skip("peft has no words for it")
    method = METHODS[name]
    model = trained(folder, method)
    save_peft(model, "mine", tmp_path / "out", str(folder))
    theirs = peft.PeftModel.from_pretrained(base_of(folder.name), tmp_path / "out").eval()
    more = {"decoder_input_ids": INPUTS[:, :4]} if isinstance(model, T5) else {}
    with torch.no_grad():
        made = theirs(INPUTS, attention_mask=torch.ones_like(INPUTS), **more)
    states = made.last_hidden_state if isinstance(model, BERT) else made.logits
    ours = answer(model)
    torch.testing.assert_close(states[:, -ours.shape[1] :], ours, atol=2e-5, rtol=2e-5)


# ---- a head, ranks by module, files


def written(path: Path, model: str = "gpt2", **settings: Any) -> Path:
    """A LoRA of rank 2 on one module of the tiny GPT-2, as peft would write it."""
    path.mkdir(parents=True)
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_fc"], **settings}
    (path / CONFIG).write_text(json.dumps(told))
    name = "base_model.model.transformer.h.1.mlp.c_fc"
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{name}.lora_B.weight": torch.randn(128, 2, generator=generator),
    }
    save_file(tensors, path / WEIGHTS)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    base_of("gpt2").save_pretrained(path)
    return path


def test_a_pattern_gives_its_modules_their_alpha(gpt2, tmp_path):
    for pattern, alpha in ((r".*\.1\.mlp\.c_fc", 32), ("c_fc", 32), ("c_proj", 4), ("1.mlp", 4)):
        file = written(tmp_path / str(len(pattern)), alpha_pattern={pattern: 32})
        (adapter,) = read_adapters(file).on(load_base(gpt2)).adapters
        assert adapter.config["alpha"] == alpha
        assert adapter.config["layer_selection"] == (2,)


def test_a_pickled_file_gives_the_same_tensors(gpt2, tmp_path):
    file = written(tmp_path / "a")
    torch.save(load_file(file / WEIGHTS), tmp_path / "b.bin")
    (expected,) = read_adapters(file).on(load_base(gpt2)).adapters
    (file / WEIGHTS).unlink()
    (tmp_path / "b.bin").rename(file / PICKLED)
    (adapter,) = read_adapters(file).on(load_base(gpt2)).adapters
    assert adapter.state.keys() == expected.state.keys()
    assert all(torch.equal(adapter.state[key], expected.state[key]) for key in expected.state)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not known: one of LORA, IA3, P_TUNING"),
        ({"bias": "all"}, "bias='all': biases that were trained with a LoRA are not read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alpha_pattern": {"(": 2}}, "is no pattern of names"),
        ({"rank_pattern": [2]}, "rank_pattern"),
        ({"lora_alpha": "big"}, "lora_alpha"),
    ],
)
def test_a_setting_that_we_cannot_hold_is_refused_by_name(gpt2, settings, line, tmp_path):
    file = written(tmp_path / "a", **settings)
    with pytest.raises(UserError, match=line.replace("(", r"\(").replace("[", r"\[")):
        read_adapters(file).on(load_base(gpt2))


def test_an_adapter_of_another_model_names_the_module(gpt2, tmp_path):
    file = written(tmp_path / "a")
    tensors = load_file(file / WEIGHTS)
    save_file({k.replace("h.1", "h.7"): t for k, t in tensors.items()}, file / WEIGHTS)
    with pytest.raises(UserError, match=r"weights for transformer.h.7.mlp.c_fc"):
        load_adapter(load_base(gpt2), file)


def test_inspect_tells_peft_type_settings_and_base(tmp_path):
    report = inspect(written(tmp_path / "a", base_model_name_or_path="gpt2", use_rslora=False))
    assert (report.kind, report.format, report.method) == ("adapter", "peft (folder)", "LORA")
    assert (report.parameters, report.base) == (2 * (32 + 128), "gpt2")
    assert report.settings == {"r": 2, "lora_alpha": 4, "target_modules": ["c_fc"]}
