"""Compositions from YAML: on frozen adapters, of them, several at once on one batch; scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters import BottleneckConfig, Fuse, LoRAConfig, Stack
from graftwerk.checkpoints import (
    load_adapters,
    load_base,
    read_adapters,
    save_adapter,
    save_adapters,
)
from graftwerk.data.jsonl import read_rows
from graftwerk.errors import UserError
from graftwerk.generation import Sampling
from graftwerk.models import GPT
from graftwerk.stages import eval as evaluation
from graftwerk.stages import learning
from graftwerk.training.base import Base
from graftwerk.training.frozen import add_frozen, read_frozen
from graftwerk.training.goal import Goal
from graftwerk.training.learner import build_learner, open_base, tokenizer_of
from tests.graftwerk.learning_stage import (
    TEMPLATE,
    WORDS,
    base,
    cfg,
    elsewhere,
    read_metrics,
    rows,
    run_killed,
)
from tests.graftwerk.ranks import start_stage
from tests.graftwerk.tiny import shake
from tests.graftwerk.tiny_families import as_family, save_tiny

__all__ = ["base", "cfg", "rows"]

CPU = torch.device("cpu")
BOTTLENECK = BottleneckConfig(dim=4)
SMALL = {
    "adapter_tuning": {"adapter_dim": 4},
    "lora_tuning": {"adapter_dim": 4},
    "prompt_tuning": {"virtual_tokens": 3},
}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bottlenecks `a`, `b` and `c` on the base, each in a file of its own."""
    folder, model = tmp_path_factory.mktemp("files"), load_base(base)
    torch.manual_seed(0)
    for seed, name in enumerate("abc"):
        model.add_adapter(name, BOTTLENECK)
        for _, _, part in model.parts(name):
            shake(part, seed)
        save_adapter(model, name, folder / name)
    return {name: str(folder / name) for name in "abc"}


@pytest.fixture
def peft(cfg: DictConfig) -> DictConfig:
    """A peft stage of one epoch of 6 steps; what it trains is to be said."""
    cfg.trainer.max_epochs = 1
    del cfg.model["adapter_tuning"]
    cfg.model.nemo_path = str(Path(cfg.run.results_dir) / "results" / "result")
    return OmegaConf.merge(cfg, {"model": {"peft": {"peft_scheme": "adapter", **SMALL}}})  # pyright: ignore


def listed(files: dict[str, str], names: str = "abc") -> list[dict[str, str]]:
    return [{"name": name, "path": files[name]} for name in names]


def wants(cfg: DictConfig, **keys) -> DictConfig:
    """The stage with other keys of `model.peft`."""
    return OmegaConf.merge(cfg, {"model": {"peft": keys}})  # pyright: ignore


def learned(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Weights]:
    """Runs the stage; its model, and every weight of that before the first step."""
    learners, before = [], {}
    finish, build = learning.finish, learning.build_learner

    def building(*args):
        learner = build(*args)
        before.update({n: p.detach().clone() for n, p in learner.model.named_parameters()})
        return learner

    with monkeypatch.context() as patch:
        patch.setattr(learning, "finish", lambda *a: (learners.append(a[2]), finish(*a))[1])
        patch.setattr(learning, "build_learner", building)
        assert learning.run("peft", cfg) == 0
    return learners[0].model.eval(), before


def moved(model: Any, before: Weights) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def losses(cfg: DictConfig, column: str = "val_loss") -> list[float]:
    return [float(row[column]) for row in read_metrics(cfg) if row[column]]


def inputs(model: Any) -> torch.Tensor:
    return torch.arange(4, 20)[None] % model.config.vocab_size


def learner_of(cfg: DictConfig) -> Any:
    base = open_base("peft", cfg.model)
    return build_learner("peft", cfg, base, tokenizer_of(cfg.model, base), CPU)


# ---- what is trained, and what is left


def test_an_adapter_learns_on_top_of_a_frozen_one(peft, files, base, monkeypatch):
    peft = wants(peft, peft_scheme="lora", adapters=listed(files, "a"), adapter_names="task")
    model, before = learned(peft, monkeypatch)
    assert model.active == Stack("a", "task")
    trained = {n for n in before if ".adapter_layer.task." in n}
    assert moved(model, before) == trained
    assert losses(peft)[-1] < losses(peft)[0]
    (saved,) = read_adapters(peft.model.nemo_path).adapters
    assert saved.name == "task"
    fresh = load_base(base)
    paths = {"a": files["a"], "task": peft.model.nemo_path}
    add_frozen(fresh, paths, read_frozen(paths), [Stack("a", "task")])
    fresh.set_active(Stack("a", "task"))
    assert torch.equal(fresh(inputs(fresh)), model(inputs(model)))


@pytest.mark.parametrize("file", ["fused", "fused.nemo"])
def test_of_a_fusion_its_own_weights_move_alone(file, peft, files, monkeypatch):
    peft = wants(peft, peft_scheme="fusion", adapters=listed(files))
    peft.model.nemo_path = str(Path(peft.run.results_dir) / file)
    model, before = learned(peft, monkeypatch)
    assert model.active == Fuse("a", "b", "c")
    assert moved(model, before) == {n for n in before if ".fusion_layer.a,b,c." in n}
    assert losses(peft)[-1] < losses(peft)[0]
    file = read_adapters(peft.model.nemo_path)
    assert (file.adapters, [fusion.name for fusion in file.fusions]) == ([], ["a,b,c"])
    summary = json.loads((Path(peft.exp_manager.explicit_log_dir) / "summary.json").read_text())
    h, slots = 16, 4
    assert summary["trainable_parameters"] == slots * (2 * h * (h + 1) + h * h)
    assert summary["method"] == "FusionConfig"


def test_a_fusion_and_an_adapter_behind_it_learn_together(peft, files, monkeypatch):
    peft = wants(
        peft,
        peft_scheme="lora,fusion",
        adapters=listed(files, "ab"),
        composition="Stack(Fuse(a, b), lora)",
    )
    model, before = learned(peft, monkeypatch)
    new = {n for n in before if ".fusion_layer." in n or ".adapter_layer.lora." in n}
    assert moved(model, before) == new
    file = read_adapters(peft.model.nemo_path)
    assert [a.name for a in file.adapters] == ["lora"]
    assert [f.name for f in file.fusions] == ["a,b"]


def test_on_a_bert_a_fusion_answers_with_the_last_adapters_head(peft, tmp_path, monkeypatch):
    base = save_tiny("bert", tmp_path / "bert")
    model = load_base(base, head="question_answering")
    for seed, name in enumerate("ab"):
        model.add_adapter(name, BOTTLENECK)
        for _, _, part in model.parts(name):
            shake(part, seed)
        shake(model.head_of(name), seed)
        save_adapter(model, name, tmp_path / name)
    peft = as_family(peft, base, tmp_path, 2)
    peft = wants(
        peft, peft_scheme="fusion", adapters=listed({n: str(tmp_path / n) for n in "ab"}, "ab")
    )
    peft.model.nemo_path = str(tmp_path / "fused")
    trained, before = learned(peft, monkeypatch)
    assert moved(trained, before) == {n for n in before if ".fusion_layer.a,b." in n}
    tokens = torch.arange(4, 12)[None]
    heads = {name: trained.head_of(name) for name in "ab"}
    assert torch.equal(trained(tokens)[0], heads["b"].head(trained.hidden_states(tokens))[0, :, 0])


def test_the_regularisation_is_part_of_the_loss_once_a_step(peft, files):
    """Two micro-batches, and a value matrix that is far from the identity."""
    peft.trainer.max_steps = 1
    found = {}
    for regularization in (True, False):
        tuning = {"value_initialized": False, "regularization": regularization}
        one = wants(
            elsewhere(peft, Path(peft.run.results_dir) / str(regularization)),
            peft_scheme="fusion",
            adapters=listed(files),
            fusion_tuning=tuning,
        )
        learning.run("peft", one)
        found[regularization] = losses(one, "train_loss")[0]
    state = learner_of(one).model.fusion_state("a,b,c")
    values = [value for key, value in state.items() if key.endswith("value.weight")]
    expected = sum(0.01 * (torch.eye(16) - value).square().sum().item() for value in values)
    assert expected > 0.5
    assert found[True] - found[False] == pytest.approx(expected, rel=1e-4)


# ---- several adapters on one batch


def start_of_two(path: Path, stage_base: Path, head: str | None = None) -> dict[str, str]:
    """Files of adapters `a` and `b` with first weights, and of both in one."""
    model = load_base(stage_base, head=head)
    for seed, name in enumerate("ab"):
        model.add_adapter(name, LoRAConfig(dim=4))
        for _, _, part in model.parts(name):
            shake(part, seed)
        save_adapter(model, name, path / name)
    save_adapters(model, ["a", "b"], path / "both")
    return {name: str(path / name) for name in ("a", "b", "both")}


@pytest.mark.parametrize("family", ["gpt", "t5", "bert"])
def test_adapters_side_by_side_are_those_that_learn_alone(family, peft, base, tmp_path):
    """Float32, dropout, Adam with an `eps` that makes its step smooth; gradients are clipped."""
    if family != "gpt":
        base = save_tiny(family, tmp_path / family)
        peft = as_family(peft, base, tmp_path, 4)
    head = "question_answering" if family == "bert" else None
    starts = start_of_two(tmp_path / "starts", base, head)
    peft.model.optim.update(eps=1.0, lr=0.1)
    peft.trainer.update(max_steps=4, gradient_clip_val=0.2)
    ends = {}
    for name, names in {"both": ["a", "b"], "a": "a", "b": "b"}.items():
        one = elsewhere(peft, tmp_path / name)
        one.model.nemo_path = str(tmp_path / name / "results" / "out")
        composition = "Parallel(a, b)" if name == "both" else None
        one.model.restore_path = starts[name]
        one = wants(one, peft_scheme="lora", adapter_names=names, composition=composition)
        one.model.peft.lora_tuning.adapter_dropout = 0.1
        assert learning.run("peft", one) == 0
        ends |= {(name, a.name): a.state for a in read_adapters(one.model.nemo_path).adapters}
        if name == "both":
            each = zip(
                losses(one), losses(one, "val_loss_of_a"), losses(one, "val_loss_of_b"), strict=True
            )
            assert all(total == pytest.approx(a + b) for total, a, b in each)
    start = {a.name: a.state for a in read_adapters(starts["both"]).adapters}
    for name in "ab":
        together, alone = ends["both", name], ends[name, name]
        assert together.keys() == alone.keys()
        assert (head is not None) == any(key.startswith("head.") for key in alone)
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, atol=1e-6, rtol=0)
        assert any((alone[key] - start[name][key]).abs().max() > 1e-3 for key in alone)


def test_all_of_a_batch_below_the_adapters_is_computed_once(peft, files, monkeypatch):
    seen = []
    peft = wants(
        peft,
        adapters=[],
        adapter_names=["x", "y"],
        composition="Parallel(x, y)",
        adapter_tuning={"layer_selection": [2]},
    )
    model = learner_of(peft).model
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    model(inputs(model))
    assert seen == [1, 2]


# ---- going on


def test_a_fusion_that_was_killed_goes_on_to_the_same_bits(peft, files, tmp_path):
    """With a temperature, which moves though no gradient reaches it, and dropout of the scores."""
    peft = wants(
        peft,
        peft_scheme="fusion",
        adapters=listed(files),
        fusion_tuning={"temperature": True, "dropout_prob": 0.2},
    )
    straight = elsewhere(peft, tmp_path / "straight")
    straight.model.nemo_path = str(tmp_path / "straight" / "out")
    learning.run("peft", straight)
    run_killed("peft", peft, 4)
    assert learning.run("peft", peft) == 0
    one, other = (read_adapters(each.model.nemo_path).fusions[0].state for each in (straight, peft))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    temperatures = [value.item() for key, value in one.items() if key.endswith("temperature")]
    assert temperatures == pytest.approx([50 - 0.05 * 6] * 4)  # 6 steps, of 11 micro-batches


def test_key_restore_path_goes_on_with_a_fusion(peft, files, tmp_path):
    peft = wants(peft, peft_scheme="fusion", adapters=listed(files))
    learning.run("peft", peft)
    more = elsewhere(peft, tmp_path / "more")
    more.model.restore_path = peft.model.nemo_path
    state = learner_of(more).model.fusion_state("a,b,c")
    written = read_adapters(peft.model.nemo_path).fusions[0].state
    assert all(torch.equal(state[key], written[key]) for key in written)
    with pytest.raises(UserError, match="holds a fusion with temperature False instead of True"):
        learner_of(wants(more, fusion_tuning={"temperature": True}))


# ---- AdapterDrop


def test_layers_are_left_out_by_chance_in_steps_and_never_in_validation(peft, monkeypatch):
    seen = []
    drawn = wants(peft, adapter_drop={"layers": 2})
    forward = GPT.forward

    def watching(self, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), self.plan.skip_layers))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", watching)
    learning.run("peft", drawn)
    steps = {layers for training, layers in seen if training}
    assert steps <= {(), (0,), (0, 1)}
    assert len(steps) > 1
    assert {layers for training, layers in seen if not training} == {()}


def test_layers_that_are_always_left_out_do_not_move(peft, monkeypatch):
    model, before = learned(wants(peft, adapter_drop={"layers": [0]}), monkeypatch)
    assert moved(model, before) == {
        n for n in before if ".adapter_layer." in n and n.startswith("decoder.layers.1.")
    }
    assert model.plan.skip_layers == (0,)


# ---- keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preset", "static"),
        ("key", False),
        ("query", False),
        ("value", False),
        ("query_before_ln", True),
        ("residual_before", True),
        ("temperature", True),
        ("value_initialized", False),
        ("dropout_prob", 0.5),
    ],
)
def test_a_key_of_fusion_tuning_changes_the_fusion(key, value, peft, files):
    peft = wants(peft, peft_scheme="fusion", adapters=listed(files))
    plain = Goal.of(peft.model, "peft").fusion
    other = Goal.of(wants(peft, fusion_tuning={key: value}).model, "peft").fusion
    assert plain != other
    if key == "query_before_ln":  # another query only where a norm comes before the adapter
        return
    said = []
    for tuning in ({}, {key: value}):
        model = learner_of(wants(peft, fusion_tuning=tuning)).model
        for _, _, layer in model.fusion_layers("a,b,c"):
            layer.train()
            if key == "residual_before":  # the value matrix acts on the residual too
                layer.value.weight.data.mul_(2)
            for linear in (layer.query, layer.key):
                if linear is not None:
                    linear.weight.data.fill_diagonal_(1.0)
        torch.manual_seed(0)
        said.append(model(inputs(model)))
    assert not torch.allclose(*said, atol=1e-6)


def test_without_a_composition_frozen_ones_come_first():
    peft = {
        "peft_scheme": "lora,ia3",
        "adapters": [{"name": "z", "path": "/z"}, {"name": "y", "path": "/y"}],
    }
    assert Goal.of({"peft": peft}, "peft").composition == Stack("z", "y", "lora", "ia3")
    assert Goal.of({"peft": {"peft_scheme": "lora"}}, "peft").composition == "lora"


def test_one_scheme_makes_as_many_adapters_as_it_has_names():
    goal = Goal.of({"peft": {"peft_scheme": "ia3", "adapter_names": ["x", "y"]}}, "peft")
    assert goal.trained == ["x", "y"]
    goal = Goal.of({"peft": {"peft_scheme": "ia3,lora", "adapter_names": "x, y"}}, "peft")
    assert [type(m).__name__ for _, m in goal.methods] == ["IA3Config", "LoRAConfig"]


def test_of_a_file_of_several_the_one_of_that_name_is_meant(peft, base, tmp_path):
    starts = start_of_two(tmp_path, base)
    items = [{"name": "b", "path": starts["both"]}]
    model = learner_of(wants(peft, peft_scheme="ia3", adapters=items)).model
    assert list(model.adapters) == ["b", "ia3"]
    state = read_adapters(starts["b"]).adapters[0].state
    assert all(torch.equal(model.adapter_state("b")[key], state[key]) for key in state)


def test_virtual_tokens_side_by_side_are_counted_once():
    peft = {**SMALL, "peft_scheme": "prompt", "adapter_names": ["x", "y"]}
    assert Goal.of({"peft": peft}, "peft").virtual_tokens == 6
    beside = {**peft, "composition": "Parallel(x, y)"}
    assert Goal.of({"peft": beside}, "peft").virtual_tokens == 3


FROZEN = [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}]


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"composition": "Stack(lora, x)"}, "'x' is neither trained here nor in model.peft.adap"),
        ({"adapters": FROZEN, "composition": "a"}, "'lora' is trained and not in it"),
        ({"adapters": [*FROZEN, FROZEN[0]]}, "two of them have one name"),
        ({"adapters": FROZEN, "adapter_names": "a"}, "'a' is the name of an adapter that is tra"),
        ({"adapter_names": []}, "adapter_names=: give as many names"),
        ({"peft_scheme": "lora,ia3", "adapter_names": "x"}, "adapter_names=x: give as many names"),
        ({"adapter_names": ["x", "x"]}, "adapter_names=x,x: give as many names, each another"),
        ({"peft_scheme": "fusion"}, "composition is missing: peft_scheme names fusion"),
        (
            {"peft_scheme": "lora,fusion", "adapters": FROZEN},
            "composition is missing: peft_scheme names fusion",
        ),
        (
            {"peft_scheme": "fusion", "adapters": FROZEN, "composition": "Stack(a, b)"},
            "there is no Fuse in it",
        ),
        ({"composition": "Stack(lora"}, r"'\,' is missing before the end"),
        ({"composition": "Average(Fuse(lora))"}, "Average cannot hold Fuse"),
        ({"composition": "MultiTask(lora)"}, "no MultiTask in a stage: it needs the task of each"),
        (
            {"composition": "BatchSplit(lora, batch_sizes=[2])"},
            "no BatchSplit in a stage: its numbers are those of one batch",
        ),
        ({"peft_scheme": "none", "composition": "a"}, "peft.composition: the whole model is tra"),
        ({"peft_scheme": "none", "adapters": FROZEN}, "peft.adapters: the whole model is trained"),
        ({"fusion_tuning": {"keys": 1}, "peft_scheme": "fusion"}, "fusion_tuning.keys is not kno"),
        ({"adapter_drop": {"layers": [-1]}}, r"layers=\[-1\]"),
    ],
)
def test_what_does_not_go_together_is_one_line(peft, message):
    with pytest.raises(UserError, match=message) as told:
        Goal.of({"peft": {"peft_scheme": "lora", **peft}}, "peft")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"composition": "Stack(a, adapter)"}, "nothing of 'b'"),
        (
            {"composition": "Stack(b, Fuse(a, adapter))"},
            "there is no fusion of a,adapter: name fusion in",
        ),
        ({"peft_scheme": "lora,fusion", "composition": "Stack(b, Fuse(a, lora))"}, "AdapterFusion"),
        ({"adapter_drop": {"layers": [2]}}, r"\[2\] are beyond the model's layers, 0 to 1"),
        ({"adapter_drop": {"layers": 3}}, r"\[2\] are beyond the model's layers, 0 to 1"),
    ],
)
def test_what_files_and_model_do_not_allow_is_named_before_anything_is_written(
    keys, message, peft, files
):
    peft = wants(peft, adapters=listed(files, "ab"), **keys)
    with pytest.raises(UserError, match=message):
        learning.run("peft", peft)
    assert not Path(peft.exp_manager.explicit_log_dir).exists()


def test_a_fusion_of_a_file_stays_as_it_is(peft, files, tmp_path, monkeypatch):
    fused = wants(peft, peft_scheme="fusion", adapters=listed(files))
    learning.run("peft", fused)
    items = [*listed(files), {"name": "fused", "path": fused.model.nemo_path}]
    more = wants(elsewhere(peft, tmp_path / "more"), adapters=items)
    more = wants(more, peft_scheme="lora", composition="Stack(Fuse(a, b, c), lora)")
    model, before = learned(more, monkeypatch)
    assert moved(model, before) == {n for n in before if ".adapter_layer.lora." in n}
    with pytest.raises(UserError, match="and stays as it is"):
        learner_of(wants(more, peft_scheme="lora,fusion"))


# ---- eval


@pytest.fixture
def scored(base: Path, files: dict[str, str], tmp_path: Path) -> DictConfig:
    """An eval stage of four questions, with log-probabilities."""
    asked = [
        {"taskname": "first", "id": f"q{n}", "context": " ".join(WORDS[n : n + 3])}
        for n in range(4)
    ]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({**row, "question": "first"}) + "\n" for row in asked))
    truth = tmp_path / "truth.jsonl"
    truth.write_text("".join(json.dumps({"id": r["id"], "answer": "w1"}) + "\n" for r in asked))
    return OmegaConf.create(
        {
            "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "precision": 32},
            "exp_manager": {"explicit_log_dir": str(tmp_path / "scored")},
            "model": {
                "seed": 1,
                "language_model_path": str(base),
                "adapters": listed(files),
                "evaluate_base": False,
                "task_templates": [{"taskname": "first", "prompt_template": TEMPLATE}],
                "encoder_seq_length": 64,
                "data": {
                    "test_ds": [str(test)],
                    "ground_truth_ds": [str(truth)],
                    "batch_size": 4,
                    "add_bos": False,
                },
                "inference": {"greedy": True, "tokens_to_generate": 3, "compute_logprob": True},
            },
        }
    )


def answers(cfg: DictConfig, place: str) -> list[list[float]]:
    file = Path(cfg.exp_manager.explicit_log_dir) / place / "predictions.jsonl"
    return [row["logprobs"] for _, row in read_rows(str(file))]


def said_by(model: Any, cfg: DictConfig) -> list[list[float]]:
    """The log-probabilities of greedy answers, without a cache."""
    one = Base.open(str(cfg.model.language_model_path))
    tokenizer = one.tokenizer()
    sampling = Sampling.from_keys(cfg.model.inference, 1)
    questions = evaluation.read_questions(cfg.model, one, tokenizer)
    found = evaluation.answerer_of(one, tokenizer, sampling, 4, None).answer(
        model, questions.prompts
    )
    return [answer.logprobs for answer in found]


def test_a_fresh_process_scores_a_fusion_with_the_logits_it_was_trained_to(
    peft, files, scored, tmp_path, monkeypatch
):
    peft = wants(peft, peft_scheme="fusion", adapters=listed(files))
    model, _ = learned(peft, monkeypatch)
    scored.model.adapters.append({"name": "fused", "path": peft.model.nemo_path})
    scored.model.composition = "Fuse(a, b, c)"
    (process,) = start_stage(scored, tmp_path / "job", stage="eval")
    assert process.wait() == 0, process.complained
    assert answers(scored, "Fuse-a-b-c") == said_by(model, scored)
    (told,) = json.loads((tmp_path / "scored" / "metrics.json").read_text())["results"]
    assert told["name"] == "Fuse(a, b, c)"
    assert told["adapter"] == peft.model.nemo_path
    assert told["steps"] == 6


def test_compositions_are_scored_one_by_one_and_those_of_a_parallel_apart(scored, files, base):
    scored.model.composition = ["c", "Parallel(a, Stack(a, b))"]
    evaluation.run(scored)
    told = json.loads((Path(scored.exp_manager.explicit_log_dir) / "metrics.json").read_text())
    assert [one["name"] for one in told["results"]] == ["c", "a", "Stack(a, b)"]
    model = load_base(base)
    for name in "abc":
        load_adapters(model, files[name], name)
    for composition, place in (("c", "c"), ("a", "a"), (Stack("a", "b"), "Stack-a-b")):
        model.set_active(composition)
        assert answers(scored, place) == said_by(model, scored)


def test_key_skip_layers_leaves_layers_without_adapters(scored, files, base):
    scored.model.update(composition="Stack(a, b, c)", skip_layers=[1])
    evaluation.run(scored)
    model = load_base(base)
    for name in "abc":
        load_adapters(model, files[name], name)
    model.set_active(Stack("a", "b", "c"), skip_layers=[1])
    assert answers(scored, "Stack-a-b-c") == said_by(model, scored)
    model.set_active(Stack("a", "b", "c"))
    assert answers(scored, "Stack-a-b-c") != said_by(model, scored)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"composition": "Stack(a, x)"}, "model.adapters has no 'x': it has a, b, c"),
        ({"composition": "Stack(a, b)"}, "model.adapters: nothing of 'c'"),
        ({"composition": "Fuse(a, b, c)"}, "there is no fusion of a,b,c: name a file that holds"),
        ({"composition": "MultiTask(a, b, c)"}, "no MultiTask in a stage"),
        ({"skip_layers": [2]}, r"model.skip_layers: \[2\] are beyond the model's layers, 0 to 1"),
    ],
)
def test_eval_names_what_cannot_be_scored(keys, message, scored):
    scored.model.update(**keys)
    with pytest.raises(UserError, match=message):
        evaluation.run(scored)
    assert not Path(scored.exp_manager.explicit_log_dir).exists()


def test_a_fusion_alone_says_that_a_composition_is_missing(scored, files, base, tmp_path):
    model = load_base(base)
    for name in "ab":
        model.add_adapter(name, BOTTLENECK)
    model.add_fusion("a,b")
    save_adapters(model, [], tmp_path / "fused", fusions=["a,b"])
    scored.model.adapters = [{"name": "fused", "path": str(tmp_path / "fused")}]
    with pytest.raises(UserError, match=r"holds a fusion of a,b, which acts in a Fuse of these"):
        evaluation.run(scored)
