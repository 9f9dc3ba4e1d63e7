"""Compositions on the command line: the grammar, what is named where, what eval takes of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.adapters.composition import Composition, parse, width
from graftwerk.errors import UserError
from launcher_scripts.compositions import HOLDS, names_in, read
from tests.launcher_scripts.test_schema import refused

PEFT = "peft.model.peft"
FROZEN = "[{name: a, path: /a}, {name: b, path: /b}]"


def call(command, *words, **keys):
    """The stage peft with LoRA, and other keys of `model.peft`."""
    given = {"peft_scheme": "lora", **keys}
    return command("stages=peft", *(f"{PEFT}.{key}={v}" for key, v in given.items()), *words)


# ---- the grammar


def texts() -> st.SearchStrategy[str]:
    """Compositions of any shape, most of which some rule forbids, with and without a mistake."""
    numbers = ["", ", splits=[1, 2]", ", batch_sizes=[2]", ", weights=[0.5, 1]", ", splits=[0, 1]"]

    def block(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        inside = st.lists(children, max_size=3).map(", ".join)
        names = st.sampled_from([*HOLDS, "Stak"])
        return st.builds("{}({}{})".format, names, inside, st.sampled_from(numbers))

    tree = st.recursive(st.sampled_from(["a", "b-1", "_c"]), block, max_leaves=6)
    marks = st.text(st.sampled_from("(),=[] aS1."), max_size=3)
    return st.one_of(tree, st.builds("{}{}".format, tree, marks), marks)


@settings(max_examples=400, deadline=None)
@given(texts())
def test_the_launcher_reads_what_the_job_reads(text):
    """Text by text: both refuse it, or both read the same names in the same blocks."""
    try:
        found = parse(text)
        width(found)
    except UserError:
        with pytest.raises(ValueError, match=r"."):
            read(text)
        return
    assert shape(found) == shape(read(text))


def shape(tree) -> str:
    """Blocks and names without numbers."""
    if isinstance(tree, str):
        return tree
    name = type(tree).__name__ if isinstance(tree, Composition) else tree.block
    return f"{name}({','.join(map(shape, tree.children))})"


def test_names_are_read_from_left_to_right():
    assert list(names_in(read("Stack(z, Fuse(a, Stack(c, b)))"))) == ["z", "a", "c", "b"]


# ---- stage peft


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"composition": "Stack(a"}, "',' is missing before the end"),
        ({"composition": "Stak(lora)"}, "Stak is no block; there are Stack, Fuse, Parallel"),
        ({"composition": "Fuse(Parallel(lora))"}, "Fuse cannot hold Parallel; it holds adapters"),
        ({"composition": "Split(lora)"}, "Split needs splits=[...]"),
        ({"composition": "Stack(a, lorra)", "adapters": FROZEN}, "lorra is none of a, b, lora; di"),
        ({"composition": "a", "adapters": FROZEN}, "a leaves out lora, which peft_scheme trains"),
        ({"composition": "MultiTask(lora)"}, "no MultiTask in a stage: it needs the task of each"),
        ({"composition": "BatchSplit(lora, batch_sizes=[2])"}, "no BatchSplit in a stage"),
        ({"adapters": FROZEN, "adapter_names": "[b]"}, "adapters: b must name one adapter, and n"),
        ({"adapters": "[{name: a, path: /a}, {name: a, path: /b}]"}, "a must name one adapter"),
        ({"adapters": "[{name: a b, path: /a}]"}, "adapters.0.name: must be a name of letters, d"),
        ({"adapters": "[{name: a}]"}, "adapters.0.path: is missing"),
        ({"adapter_names": "[x, x]"}, "x,x must be one name for each of lora, each another"),
        ({"peft_scheme": "[lora,ia3]", "adapter_names": "x"}, "one name for each of lora, ia3"),
        (
            {"peft_scheme": "fusion", "adapter_names": "x", "adapters": FROZEN},
            "one name for each of no method",
        ),
        ({"peft_scheme": "fusion"}, 'must say what is fused, such as "Fuse(a, b)"'),
        (
            {"peft_scheme": "fusion", "adapters": FROZEN, "composition": "Stack(a, b)"},
            "Stack(a, b) has no Fuse, and peft_scheme names fusion",
        ),
        ({"peft_scheme": "none", "composition": "a"}, "composition: goes with a method; peft_sc"),
        ({"peft_scheme": "none", "adapters": FROZEN}, "adapters: goes with a method"),
        ({"peft_scheme": "none", "adapter_drop.layers": "[0]"}, "adapter_drop.layers: goes with"),
        ({"peft_scheme": "[fusion,none]"}, "goes with no other method"),
        ({"fusion_tuning.preset": "dynamik"}, "must be one of dynamic, static, not dynamik; did"),
        ({"fusion_tuning.dropout_prob": "2"}, "dropout_prob: must be a number of at least 0 and"),
        ({"adapter_drop.layers": "[-1]"}, "adapter_drop.layers.0: must be a whole number of at l"),
    ],
)
def test_what_is_wrong_in_a_composition_is_one_line(command, keys, said):
    refused(call(command, **keys), said)


def test_layers_that_the_base_does_not_have_are_named(command, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"n_layer": 3, "n_head": 4, "n_embd": 8}')
    base = f"peft.model.language_model_path={tmp_path}/base"
    for layers in ("4", "[0, 3]"):
        answer = call(command, base, **{"adapter_drop.layers": layers})
        refused(answer, f"{layers} is beyond the model's 3 layers, 0 to 2")
    assert call(command, base, **{"adapter_drop.layers": "3"}).code == 0


def test_a_composition_reaches_the_job_as_it_was_typed(command):
    text = "Stack(a, Parallel(b, lora))"
    answer = call(command, adapters=FROZEN, composition=text)
    assert answer.code == 0, answer.lines
    peft = answer.config("peft")["model"]["peft"]
    assert peft["composition"] == text
    assert peft["adapters"] == [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}]


def test_files_of_frozen_adapters_must_be_there(command):
    words = ("cluster_type=interactive", "dry_run=False", "peft.trainer.devices=1")
    lines = call(command, *words, adapters=FROZEN).lines
    missing = [line for line in lines if line.startswith(f"{PEFT}.adapters")]
    assert [line.split()[1] for line in missing] == ["/a", "/b"]
    assert all("does not exist, and no stage before writes it" in line for line in missing)


def test_a_fusion_without_its_scheme_is_told_as_without_effect(command):
    answer = call(command, **{"fusion_tuning.preset": "static"})
    assert any("without effect" in line and "fusion_tuning" in line for line in answer.lines)


# ---- eval


def scored(answer) -> tuple:
    assert answer.code == 0, answer.lines
    model = answer.config("eval")["model"]
    names = [(each["name"], each["path"].rsplit("/", 1)[-1]) for each in model["adapters"]]
    return names, model["composition"]


LEFT = "megatron_gpt_peft.nemo"


@pytest.mark.parametrize(
    ("keys", "names", "composition"),
    [
        ({}, [("peft", LEFT)], None),
        ({"adapter_names": "[x, y]"}, [("peft", LEFT)], None),
        (
            {"adapters": FROZEN},
            [("a", "a"), ("b", "b"), ("lora", LEFT)],
            "Stack(a, b, lora)",
        ),
        (
            {"adapters": FROZEN, "peft_scheme": "fusion"},
            [("a", "a"), ("b", "b"), ("peft", LEFT)],
            "Fuse(a, b)",
        ),
        (
            {"adapter_names": "[x, y]", "composition": "Parallel(x, y)"},
            [("x", LEFT), ("y", LEFT)],
            "Parallel(x, y)",
        ),
    ],
)
def test_eval_scores_what_peft_trained_as_it_was_trained(command, keys, names, composition):
    assert scored(call(command, "stages=[peft,eval]", **keys)) == (names, composition)


def test_eval_scores_other_adapters_beside_a_composition(command):
    answer = call(command, "stages=[peft,ia3_learning,eval]", adapters=FROZEN)
    names, composition = scored(answer)
    assert [name for name, _ in names] == ["a", "b", "lora", "ia3_learning"]
    assert composition == ["Stack(a, b, lora)", "ia3_learning"]


def test_a_composition_of_evals_own_is_scored(command):
    words = ("stages=[peft,eval]", "eval.model.composition=[lora, 'Stack(a, lora)']")
    answer = call(command, *words, adapters=FROZEN)
    assert scored(answer)[1] == ["lora", "Stack(a, lora)"]
    assert scored(call(command, "stages=[peft,eval]", "eval.model.composition=null"))[1] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.model.composition=Stack(a, x)"], "x is none of a, b"),
        (["eval.model.composition=Stack(a"], "',' is missing before the end"),
        (["eval.model.composition=[a, 'MultiTask(b)']"], "no MultiTask in a stage"),
        (["eval.model.skip_layers=[-1]"], "skip_layers.0: must be a whole number of at least 0"),
    ],
)
def test_what_eval_cannot_score_is_one_line(command, words, said):
    refused(command("stages=eval", f"eval.model.adapters={FROZEN}", *words), said)
