"""Stages peft and fine_tuning: what they train, leave, resume and refuse, by one method or many."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters import Stack
from graftwerk.adapters.configs import (
    METHODS,
    SCHEMES,
    BnConfig,
    HubLoRAConfig,
    HubMTLLoRAConfig,
    ReftConfig,
    UnionConfig,
    methods_from_config,
)
from graftwerk.checkpoints import load_adapters, load_base, read_adapters
from graftwerk.errors import UserError
from graftwerk.models import GPT
from graftwerk.stages import eval as evaluation
from graftwerk.stages import learning
from graftwerk.training.base import Base
from graftwerk.training.learner import build_learner, open_base, tokenizer_of
from graftwerk.training.module import LearningModule
from tests.graftwerk.learning_stage import base, cfg, elsewhere, read_metrics, rows, run_killed
from tests.graftwerk.tiny_families import as_family, eval_cfg, save_tiny

__all__ = ["base", "cfg", "rows"]

CPU = torch.device("cpu")
SMALL = {
    "adapter_tuning": {"adapter_dim": 4},
    "lora_tuning": {"adapter_dim": 4, "adapter_dropout": 0.1},
    "p_tuning": {"virtual_tokens": 3, "embedding_dim": 8, "bottleneck_dim": 8},
    "prompt_tuning": {"virtual_tokens": 3},
    "prefix_tuning": {"prefix_length": 4, "bottleneck_dim": 8, "adapter_dropout": 0.1},
    "selective_tuning": {"tunable_base_param_names": ["mlp"]},
}
Weights = dict[str, torch.Tensor]


@pytest.fixture
def peft(cfg: DictConfig) -> DictConfig:
    """A peft stage of one epoch of 6 steps, with small methods and no scheme yet."""
    cfg.trainer.max_epochs = 1
    del cfg.model["adapter_tuning"]
    cfg.model.nemo_path = str(Path(cfg.run.results_dir) / "results" / "result")
    return OmegaConf.merge(cfg, {"model": {"peft": {"peft_scheme": "none", **SMALL}}})  # pyright: ignore


def results(cfg: DictConfig) -> Path:
    return Path(cfg.exp_manager.explicit_log_dir)


def summary(cfg: DictConfig) -> dict:
    return json.loads((results(cfg) / "summary.json").read_text())


def whole(path: str) -> Weights:
    return {name: p.detach() for name, p in load_base(path).named_parameters()}


def left(cfg: DictConfig) -> Weights:
    """Every weight that a run has written, of adapters or of a model."""
    if (Path(cfg.model.nemo_path) / "model_config.yaml").exists():
        return whole(cfg.model.nemo_path)
    adapters = read_adapters(cfg.model.nemo_path).adapters
    return {f"{a.name} {key}": value for a in adapters for key, value in a.state.items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- what is asked for


def test_every_method_of_nemo_has_a_scheme():
    hubs = {BnConfig, HubLoRAConfig, HubMTLLoRAConfig, ReftConfig, UnionConfig}
    assert {method for method, _ in SCHEMES.values()} == set(METHODS.values()) - hubs


@pytest.mark.parametrize(
    "given", ["lora,ptuning,ia3", "lora, ptuning, ia3", ["lora", "ptuning", "ia3"]]
)
def test_several_methods_are_joined_by_commas_or_a_list(given):
    methods = methods_from_config({"peft": {"peft_scheme": given}}, "peft")
    assert [name for name, _ in methods] == ["lora", "ptuning", "ia3"]


@pytest.mark.parametrize("given", ["none", None, ["none"]])
def test_no_method_trains_the_whole_model(given):
    assert methods_from_config({"peft": {"peft_scheme": given}}, "peft") == []


def test_the_stages_of_one_method_are_peft_with_other_defaults():
    block = {"adapter_dim": 3, "layer_selection": [2]}
    for stage, scheme in (("adapter_learning", "adapter"), ("ia3_learning", "ia3")):
        tuning = {f"{scheme}_tuning": {} if scheme == "ia3" else block}
        wanted = methods_from_config({"peft": {"peft_scheme": scheme, **tuning}}, "peft")
        assert methods_from_config(tuning, stage) == wanted


def test_qlora_is_lora_by_another_base():
    block = {"adapter_dim": 3}
    plain, four_bits = (
        methods_from_config({"peft": {"peft_scheme": name, "lora_tuning": block}}, "peft")
        for name in ("lora", "qlora")
    )
    assert plain == four_bits


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"peft_scheme": "loar"}, r"peft_scheme=loar: 'loar' is not known: use some of adapter,"),
        ({"peft_scheme": "lora,lora"}, "name each method once"),
        ({"peft_scheme": "lora,qlora"}, "lora or qlora"),
        ({"peft_scheme": "none,ia3"}, "goes with no other method"),
        ({"peft_scheme": []}, "is empty: none trains the whole model"),
        (
            {"peft_scheme": "lora", "lora_tuning": {"r": 8}},
            r"model.peft.lora_tuning.r is not known",
        ),
        ({"peft_scheme": "lora", "lora_tuning": {"target_modules": ["q"]}}, "target_modules: 'q'"),
        (
            {"peft_scheme": "selective"},
            r"model.peft.selective_tuning.tunable_base_param_names is empty",
        ),
        ({"peft_scheme": "adapter", "adapter_tuning": {"type": "houlsby"}}, "type='houlsby'"),
    ],
)
def test_a_wrong_scheme_or_block_is_one_line(peft, message):
    with pytest.raises(UserError, match=message):
        methods_from_config({"peft": peft}, "peft")


@pytest.mark.parametrize("layers", [[0], [1, 3]])
def test_layers_that_the_base_does_not_have_are_named_before_anything_is_written(layers, peft):
    block = {"lora_tuning": {"layer_selection": layers}}
    cfg = OmegaConf.merge(peft, {"model": {"peft": {"peft_scheme": "lora", **block}}})
    with pytest.raises(
        UserError, match=rf"\[{layers[-1]}\] are none of the model's layers, 1 to 2"
    ):
        learning.run("peft", cfg)
    assert not results(cfg).exists()


def test_names_of_selective_tuning_are_parts_of_names_or_patterns(base):
    def chosen(*names: str) -> set[str]:
        block = {"tunable_base_param_names": list(names)}
        wanted = {"peft": {"peft_scheme": "selective", "selective_tuning": block}}
        ((_, method),) = methods_from_config(wanted, "peft")
        return {name for name, _ in load_base(base).named_parameters() if method.replaces(name)}

    assert chosen("word_embeddings") == {"embedding.word_embeddings.weight"}
    assert all(".self_attention." in name for name in chosen("self_attention"))
    assert len(chosen("self_attention")) == 2 * 4
    assert chosen("*.linear_fc1.bias") == {
        f"decoder.layers.{n}.mlp.linear_fc1.bias" for n in (0, 1)
    }


# ---- what is trained and left


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "qlora"])
def test_each_method_trains_and_its_file_gives_the_trained_outputs(scheme, peft, base, monkeypatch):
    learners, finish = [], learning.finish
    monkeypatch.setattr(learning, "finish", lambda *a: (learners.append(a[2]), finish(*a))[1])
    peft.model.peft.peft_scheme = scheme
    before = whole(str(base))
    assert learning.run("peft", peft) == 0
    assert same(whole(str(base)), before)
    trained = learners[0].model.eval()
    fresh = load_base(base)
    tokens = torch.arange(4, 20)[None] % fresh.config.vocab_size
    plain = fresh(tokens)
    fresh.set_active(load_adapters(fresh, peft.model.nemo_path)[0])
    assert torch.equal(fresh(tokens), trained(tokens))
    assert not torch.allclose(fresh(tokens), plain, atol=1e-4)
    count = sum(value.numel() for value in left(peft).values())
    assert summary(peft)["trainable_parameters"] == count
    assert summary(peft)["method"] == SCHEMES[scheme][0].__name__


@pytest.mark.parametrize("file", ["result", "result.nemo"])
def test_several_methods_are_one_file_and_act_together(file, peft, base, monkeypatch):
    learners, finish = [], learning.finish
    monkeypatch.setattr(learning, "finish", lambda *a: (learners.append(a[2]), finish(*a))[1])
    peft.model.peft.peft_scheme = "lora,ptuning,adapter"
    peft.model.nemo_path = str(results(peft) / file)
    learning.run("peft", peft)
    assert [a.name for a in read_adapters(peft.model.nemo_path).adapters] == [
        "lora",
        "ptuning",
        "adapter",
    ]
    fresh = load_base(base)
    fresh.set_active(Stack(*load_adapters(fresh, peft.model.nemo_path)))
    tokens = torch.arange(4, 20)[None] % fresh.config.vocab_size
    torch.testing.assert_close(fresh(tokens), learners[0].model.eval()(tokens))


@pytest.mark.parametrize("stage", ["peft", "fine_tuning"])
def test_without_a_method_the_whole_model_is_trained_and_left(stage, peft, base):
    learning.run(stage, peft)
    assert summary(peft)["trainable_parameters"] == summary(peft)["total_parameters"]
    before, after = whole(str(base)), left(peft)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    losses = [float(row["val_loss"]) for row in read_metrics(peft) if row["val_loss"]]
    assert losses[-1] < losses[0]


def test_a_whole_model_is_a_nemo_file_where_its_name_says_so(peft, tmp_path):
    folder = elsewhere(peft, tmp_path / "folder")
    folder.model.nemo_path = str(tmp_path / "folder" / "model")
    learning.run("fine_tuning", folder)
    peft.model.nemo_path = str(results(peft) / "model.nemo")
    learning.run("fine_tuning", peft)
    one, other = load_base(folder.model.nemo_path), load_base(peft.model.nemo_path)
    tokens = torch.arange(4, 20)[None] % one.config.vocab_size
    assert torch.equal(one(tokens), other(tokens))


def test_a_nemo_file_that_could_not_say_the_model_is_refused_before_training(peft, tmp_path):
    bert = as_family(peft, save_tiny("bert", tmp_path / "bert"), tmp_path, 2)
    bert.model.nemo_path = str(tmp_path / "out" / "model.nemo")
    with pytest.raises(UserError, match=r"a BERT has no .nemo form: leave out"):
        learning.run("fine_tuning", bert)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["selective", "none"])
def test_parameters_of_the_base_train_in_float32_under_bfloat16(scheme, peft, monkeypatch):
    peft.trainer.precision = "bf16"
    peft.model.peft.peft_scheme = scheme
    types, step = set(), LearningModule.training_step

    def watching(self, batch, batch_idx):
        types.update((p.dtype, self.settings.autocast) for p in self.model.parameters())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LearningModule, "training_step", watching)
    learning.run("peft", peft)
    assert types == {(torch.float32, True)}
    assert all(value.dtype == torch.float32 for value in left(peft).values())


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_qlora_without_its_library_is_one_line_before_anything_is_written(peft):
    peft.model.peft.peft_scheme = "qlora"
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        learning.run("peft", peft)
    assert not results(peft).exists()


def test_qlora_reads_the_base_in_four_bits(peft, monkeypatch):
    given = []
    load = Base.load

    def watching(self, dtype, device, seed=0, quantize=None, mesh=None):
        given.append(quantize)
        return load(self, dtype, device, seed)

    monkeypatch.setattr(Base, "load", watching)
    for scheme in ("lora", "qlora,ptuning"):
        peft.model.peft.peft_scheme = scheme
        peft.exp_manager.resume_if_exists = False
        learning.run("peft", peft)
    assert given == [None, "nf4"]
    peft.model.peft.peft_scheme = "qlora,selective"
    with pytest.raises(UserError, match="use lora beside it"):
        learning.run("peft", peft)


# ---- keys


def learned(cfg: DictConfig, training: bool) -> torch.Tensor:
    """What the stage's model says before a step, parts that begin as zeros made others."""
    base = open_base("peft", cfg.model)
    model = build_learner("peft", cfg, base, tokenizer_of(cfg.model, base), CPU).model
    assert isinstance(model, GPT)
    for name in model.adapters:
        for _, _, part in model.parts(name):
            part.train(training)
    for parameter in model.replacements.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.arange(4, 20)[None] % model.config.vocab_size)


KEYS = [
    ("adapter", "adapter_tuning.type", "linear_adapter"),
    ("adapter", "adapter_tuning.adapter_dim", 3),
    ("adapter", "adapter_tuning.adapter_dropout", 0.5),
    ("adapter", "adapter_tuning.norm_position", "post"),
    ("adapter", "adapter_tuning.column_init_method", "kaiming"),
    ("adapter", "adapter_tuning.row_init_method", "uniform"),
    ("adapter", "adapter_tuning.layer_selection", [2]),
    ("adapter", "adapter_tuning.weight_tying", True),
    ("lora", "lora_tuning.target_modules", ["all"]),
    ("lora", "lora_tuning.variant", "canonical"),
    ("lora", "lora_tuning.adapter_dim", 3),
    ("lora", "lora_tuning.alpha", 16),
    ("lora", "lora_tuning.adapter_dropout", 0.5),
    ("lora", "lora_tuning.dropout_position", "post"),
    ("lora", "lora_tuning.column_init_method", "kaiming"),
    ("lora", "lora_tuning.row_init_method", "uniform"),
    ("lora", "lora_tuning.rank_stabilised", True),
    ("lora", "lora_tuning.layer_selection", [2]),
    ("lora", "lora_tuning.weight_tying", True),
    ("ptuning", "p_tuning.virtual_tokens", 4),
    ("ptuning", "p_tuning.bottleneck_dim", 6),
    ("ptuning", "p_tuning.embedding_dim", 6),
    ("ptuning", "p_tuning.encoder", "lstm"),
    ("ptuning", "p_tuning.init_std", 1.0),
    ("prompt", "prompt_tuning.virtual_tokens", 4),
    ("prompt", "prompt_tuning.init_std", 1.0),
    ("prefix", "prefix_tuning.prefix_length", 5),
    ("prefix", "prefix_tuning.bottleneck_dim", 6),
    ("prefix", "prefix_tuning.reparametrise", False),
    ("prefix", "prefix_tuning.adapter_dropout", 0.5),
    ("prefix", "prefix_tuning.init_std", 1.0),
    ("prefix", "prefix_tuning.layer_selection", [2]),
    ("selective", "selective_tuning.tunable_base_param_names", ["self_attention"]),
    ("selective", "selective_tuning.layer_selection", [2]),
]


@pytest.mark.parametrize(("scheme", "key", "value"), KEYS)
def test_a_key_of_a_block_changes_the_adapter(scheme, key, value, peft):
    peft.model.peft.peft_scheme = scheme
    for block in ("adapter_tuning", "lora_tuning"):  # else they change nothing before training
        OmegaConf.update(peft, f"model.peft.{block}.row_init_method", "normal", force_add=True)
    dropout = "dropout" in key
    before = learned(peft, dropout)
    OmegaConf.update(peft, f"model.peft.{key}", value, force_add=True)
    after = learned(peft, dropout)
    assert before.shape == after.shape
    assert not torch.equal(before, after)


@pytest.mark.parametrize("scheme", ["adapter", "lora"])
@pytest.mark.parametrize("strategy", ["add", "concat", "mlpconcat", "biasadd"])
def test_key_position_embedding_strategy_tells_tied_layers_apart(scheme, strategy, peft):
    peft.model.peft.peft_scheme = scheme
    block = peft.model.peft[SCHEMES[scheme][1]]
    block.update(weight_tying=True)
    learning.run("peft", peft)
    plain = summary(peft)["trainable_parameters"]
    block.update(position_embedding_strategy=strategy)
    peft.exp_manager.resume_if_exists = False
    learning.run("peft", peft)
    assert summary(peft)["trainable_parameters"] > plain


def test_key_dora_trains_the_length_of_each_row_too(peft):
    peft.model.peft.peft_scheme = "lora"
    learning.run("peft", peft)
    plain = summary(peft)["trainable_parameters"]
    peft.model.peft.lora_tuning.dora = True
    peft.exp_manager.resume_if_exists = False
    learning.run("peft", peft)
    assert summary(peft)["trainable_parameters"] == plain + 2 * 3 * 16  # 2 layers of q, k, v


def test_key_layer_selection_of_ia3_leaves_layers_out(peft):
    peft.model.peft.peft_scheme = "ia3"
    peft.model.peft.ia3_tuning = {"layer_selection": [2]}
    learning.run("peft", peft)
    assert left(peft)
    assert all(".layers.1." in name for name in left(peft))


def test_key_cross_prefix_leaves_the_cross_attention_of_a_t5_alone(peft, tmp_path):
    peft.model.peft.peft_scheme = "prefix"
    t5 = as_family(peft, save_tiny("t5", tmp_path / "t5"), tmp_path, 1)
    t5.model.nemo_path = str(tmp_path / "prefix")
    learning.run("peft", t5)
    assert any("cross_attention" in name for name in left(t5))
    t5.model.peft.prefix_tuning.cross_prefix = False
    t5.exp_manager.resume_if_exists = False
    learning.run("peft", t5)
    assert not any("cross_attention" in name for name in left(t5))


@pytest.mark.parametrize("key", ["restore_path", "peft.restore_from_path"])
def test_key_restore_from_path_goes_on_from_a_file_of_several_adapters(key, peft, tmp_path):
    peft.model.peft.peft_scheme = "lora,prompt"
    first = elsewhere(peft, tmp_path / "first")
    first.model.nemo_path = str(tmp_path / "first" / "adapters")
    learning.run("peft", first)
    OmegaConf.update(peft, f"model.{key}", first.model.nemo_path, force_add=True)
    peft.model.optim.lr = 1e-12
    learning.run("peft", peft)
    found, begun = left(peft), left(first)
    assert found.keys() == begun.keys()
    for name, value in begun.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_adapters_to_go_on_from_that_are_of_other_methods_are_refused(peft, tmp_path):
    peft.model.peft.peft_scheme = "lora,prompt"
    learning.run("peft", peft)
    other = elsewhere(peft, tmp_path / "other")
    other.model.restore_path = peft.model.nemo_path
    other.model.peft.peft_scheme = "lora,ia3"
    with pytest.raises(
        UserError, match=r"holds an adapter 'prompt', and this run trains lora, ia3"
    ):
        learning.run("peft", other)
    other.model.peft.peft_scheme = "none"
    with pytest.raises(UserError, match="the whole model is trained"):
        learning.run("peft", other)


# ---- virtual tokens and the model's positions


def test_virtual_tokens_are_part_of_a_rows_length(peft):
    peft.model.peft.peft_scheme = "ptuning,prompt"
    peft.model.encoder_seq_length = 7
    with pytest.raises(UserError, match=r"virtual tokens"):
        learning.run("peft", peft)
    assert not results(peft).exists()


def test_rows_may_fill_what_virtual_tokens_leave_of_the_positions(peft):
    peft.model.peft.peft_scheme = "prompt"
    peft.model.encoder_seq_length = None
    peft.model.peft.prompt_tuning.virtual_tokens = 40  # of the 64 positions
    learning.run("peft", peft)
    assert summary(peft)["rows"]["train"]["dropped"] == {}
    peft.model.peft.prompt_tuning.virtual_tokens = 53
    peft.exp_manager.resume_if_exists = False
    learning.run("peft", peft)
    assert summary(peft)["rows"]["train"]["dropped"] != {}


# ---- going on


@pytest.mark.parametrize(
    ("stage", "scheme"),
    [
        ("peft", "lora,ptuning"),
        ("peft", "selective"),
        ("peft", "prefix"),
        ("fine_tuning", "none"),
    ],
)
def test_a_run_that_died_ends_with_the_same_bits(stage, scheme, peft, tmp_path):
    peft.model.peft.peft_scheme = scheme
    straight = elsewhere(peft, tmp_path / "straight")
    straight.model.nemo_path = str(tmp_path / "straight" / "result")
    assert learning.run(stage, straight) == 0

    run_killed(stage, peft, 4)
    assert learning.run(stage, peft) == 0
    assert same(left(peft), left(straight))


def test_tied_layers_resume_to_the_same_bits_and_are_saved_once(peft, tmp_path):
    peft.model.peft.peft_scheme = "lora"
    peft.model.peft.lora_tuning.weight_tying = True
    peft.trainer.max_epochs = 2
    straight = elsewhere(peft, tmp_path / "straight")
    straight.model.nemo_path = str(tmp_path / "straight" / "result")
    learning.run("peft", straight)
    half = peft.copy()
    half.trainer.max_steps = 6
    half.model.optim.sched.max_steps = 12
    learning.run("peft", half)
    learning.run("peft", peft)
    assert len(left(peft)) == 2
    assert same(left(peft), left(straight))


# ---- families, and eval behind


@pytest.mark.parametrize("family", ["t5", "bert"])
@pytest.mark.parametrize("scheme", ["lora,ptuning", "none"])
def test_other_families_learn_and_eval_sees_it(scheme, family, peft, tmp_path):
    steps = {"t5": 100, "bert": 45}[family]
    learner = as_family(peft, save_tiny(family, tmp_path / family), tmp_path, steps)
    learner.model.peft.peft_scheme = scheme
    learner.model.peft.lora_tuning.target_modules = ["all"]
    learner.model.micro_batch_size = learner.model.global_batch_size  # half the passes
    learner.model.optim.lr = 0.02 if scheme != "none" else 0.01
    learner.model.nemo_path = str(tmp_path / "learned" / "result")
    assert learning.run("peft", learner) == 0
    wanted = eval_cfg(learner, tmp_path)
    result = [{"name": "mine", "path": learner.model.nemo_path}]
    whole_model = scheme == "none"
    wanted.model.adapters = [] if whole_model else result
    wanted.model.models = result if whole_model else []
    assert evaluation.run(wanted) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    exact = {each["name"]: each["exact_match"] for each in metrics["results"]}
    assert exact["mine"] > exact["base"] + 25
