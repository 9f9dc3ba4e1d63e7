"""Compositions as values: what they may hold, equality, and the text that they are written as."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.adapters import (
    Average,
    BatchSplit,
    Composition,
    Fuse,
    IA3Config,
    LoRAConfig,
    MultiTask,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Split,
    Stack,
    parse,
)
from graftwerk.adapters.composition import BLOCKS, branches, fusions, last, names, width
from graftwerk.adapters.configs import BnConfig
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_interpreter import compositions
from tests.graftwerk.tiny import tiny_gpt

# AdapterHub's table of what may be in what, and a Fuse in a Parallel besides.
HOLDS = {
    "Stack": {"Fuse", "Split", "BatchSplit", "Parallel", "Average", "MultiTask"},
    "Fuse": {"Stack"},
    "Split": {"Split", "Stack", "BatchSplit", "Average"},
    "BatchSplit": {"Stack", "Split", "BatchSplit", "Average"},
    "Parallel": {"Stack", "BatchSplit", "Average", "Fuse"},
    "Average": {"Stack", "Split", "BatchSplit"},
    "MultiTask": set(),
}


def block(kind: str, *children: Composition | str) -> Composition:
    numbers = {"Split": {"splits": 2}, "BatchSplit": {"batch_sizes": 1}}
    return BLOCKS[kind](*children, **numbers.get(kind, {}))


@settings(max_examples=60, deadline=None)
@given(tree=compositions())
def test_text_and_python_give_the_same_composition_back(tree):
    assert parse(str(tree)) == tree
    assert str(parse(str(tree))) == str(tree)
    assert parse(f"  {str(tree).replace(',', ' ,  ')} ") == tree
    assert eval(repr(tree), dict(BLOCKS)) == tree
    assert copy.deepcopy(tree) == pickle.loads(pickle.dumps(tree)) == tree
    assert hash(parse(str(tree))) == hash(tree)


@settings(max_examples=60, deadline=None)
@given(one=compositions(), two=compositions())
def test_compositions_are_equal_where_their_texts_are(one, two):
    assert (one == two) == (str(one) == str(two))


@given(st.text("SplitackFuse(),=[]ab1 .-e", max_size=30))
def test_any_text_is_a_composition_or_a_mistake_that_is_explained(text):
    try:
        tree = parse(text)
    except UserError as error:
        reason = str(error)
    else:
        reason = str(tree)
        assert parse(reason) == tree
    assert "\n" not in reason


def test_numbers_and_kinds_tell_compositions_apart():
    assert Stack("a") != Stack("a", "b")
    assert Stack("a") != Parallel("a")
    assert Split("a", "b", splits=[1, 2]) != Split("a", "b", splits=[2, 1])
    assert Average("a", "b") != Average("a", "b", weights=[1, 1])
    assert Average("a", weights=[2]) != Average("a", weights=[2], normalize_weights=False)
    assert Stack("a", Parallel("b", "c")) == Stack("a", Parallel("b", "c"))
    assert Split("a", "b", splits=3) == Split("a", "b", splits=[3, 3])


def test_a_composition_is_printed_as_it_is_written():
    tree = Stack("a", Split("b-1", Average("c", "d", weights=[0.1, 2]), splits=[3, 4]))
    text = "Stack(a, Split(b-1, Average(c, d, weights=[0.1, 2.0]), splits=[3, 4]))"
    assert str(tree) == text
    assert repr(tree) == text.replace("b-1", '"b-1"').replace("a,", '"a",', 1).replace(
        "(c, d", '("c", "d"'
    )
    assert str(Average("a", normalize_weights=False)) == "Average(a, normalize_weights=False)"


def test_names_that_adapters_may_have_can_be_written():
    model = tiny_gpt()
    for name in ("Stack", "ünï", "_x", "a-b_2", "splits"):
        model.add_adapter(name, IA3Config(layer_selection=(1,)))
    tree = Stack(*model.adapters)
    assert parse(str(tree)) == tree
    with pytest.raises(UserError, match="use letters, digits"):
        model.add_adapter("-a", IA3Config())


def test_a_composition_cannot_be_changed():
    with pytest.raises(AttributeError):
        Stack("a").children = ("b",)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("outer", BLOCKS)
@pytest.mark.parametrize("inner", BLOCKS)
def test_a_block_holds_what_the_table_says(outer, inner):
    child = block(inner, "a", "b")
    if inner in HOLDS[outer]:
        assert list(names(block(outer, child, "c"))) == ["a", "b", "c"]
    else:
        with pytest.raises(UserError, match=f"{outer} cannot hold {inner}; it holds adapters"):
            block(outer, child, "c")


MISTAKES = [
    (lambda: Stack(), r"Stack\(\) needs at least one adapter"),
    (lambda: Stack(3), "holds names and compositions, not 3"),
    (lambda: Average(Stack(Parallel("a", "b"))), "Parallel repeats the whole batch"),
    (lambda: Fuse(Stack("a", Average("b"))), "a Stack in a Fuse must end in an adapter"),
    (lambda: Split("a", "b", splits=[1]), r"splits=\[1\]: one number above 0 for each of 2"),
    (lambda: Split("a", splits=[0]), "one number above 0"),
    (lambda: BatchSplit("a", batch_sizes=[1.5]), r"batch_sizes=\[1.5\]"),
    (lambda: BatchSplit("a", batch_sizes=[True]), r"batch_sizes=\[True\]"),
    (lambda: Average("a", "b", weights=[1]), "Average of 2 has 1 weights: one each"),
    (lambda: Average("a", "b", weights=[1, -1]), "add up to 0"),
    (lambda: Average("a", weights=[float("nan")]), "finite"),
    (lambda: width(Stack(Parallel("a", "b"), Parallel("a", "b", "c"))), "must be of one width"),
    (lambda: parse(""), "an adapter's name is missing before the end"),
    (lambda: parse("Stack(a"), "'[(),]+' is missing before the end"),
    (lambda: parse("Stack(a b)"), "',' is missing before 'b' at"),
    (lambda: parse("a, b"), "the end is missing before ','"),
    (lambda: parse("Stuck(a)"), "'Stuck' is no block: use one of Stack, Fuse"),
    (lambda: parse("Stack(a; b)"), "';' at 7 is no word"),
    (lambda: parse("Stack(a, weights=[1])"), "Stack has no 'weights': it takes none"),
    (lambda: parse("Average(a, splits=[1])"), "has no 'splits': its argument is weights"),
    (lambda: parse("Split(a, b)"), r"Split needs splits=\[...\]"),
    (lambda: parse("Split(a, splits=[1], splits=[1])"), "has 'splits' twice"),
    (lambda: parse("Split(a, splits=[x])"), "a number is missing before 'x'"),
    (lambda: parse("Average(a, weights=[1e999])"), "finite"),
    (lambda: parse("Split(a, splits=[" + "9" * 5000 + "])"), "is missing before"),
    (lambda: parse("Split(" * 5000), "blocks deep"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_composition_without_meaning_is_refused_with_the_reason(number):
    make, reason = MISTAKES[number]
    with pytest.raises(UserError, match=reason):
        make()


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (Split("prefix", "bn", splits=1), "'prefix' cannot be in Split: a prefix stands before"),
        (Split(Stack("bn", "prompt"), splits=1), "'prompt' cannot be in Split: a prompt stands"),
        (Average("prefix", "bn"), "'prefix' cannot be in Average: prefixes are rows of their own"),
        (Stack(Fuse("bn", "lora")), "'lora' cannot be in Fuse: AdapterFusion weighs"),
        (Parallel(Fuse("bn", Stack("ia3", "bn")), "bn"), "'ia3' cannot be in Fuse"),
        (Fuse("bn", "inverse"), "'inverse' cannot be in Fuse: its invertible adapter"),
        (Fuse("bn"), r"there is no fusion 'bn': add it with add_fusion"),
        (Parallel("prompt", "bn"), r"put \[2, 0\] virtual tokens before a row"),
        (Stack(Parallel("bn", "lora"), Parallel("bn", "lora", "ia3")), "must be of one width"),
        ("nobody", "no adapter is called 'nobody': this model has bn, inverse"),
    ],
    ids=str,
)
def test_a_part_that_a_block_has_no_use_for_is_refused_when_it_is_set(tree, reason):
    model = tiny_gpt()
    for name, config in {
        "bn": BnConfig(),
        "inverse": BnConfig(inv_adapter="nice"),
        "lora": LoRAConfig(dim=2),
        "ia3": IA3Config(),
        "prefix": PrefixTuningConfig(prefix_length=2, reparametrise=False),
        "prompt": PromptTuningConfig(virtual_tokens=2),
    }.items():
        model.add_adapter(name, config)
    model.set_active("lora")
    with pytest.raises(UserError, match=reason):
        model.set_active(tree)
    assert model.active == "lora"


def test_what_a_tree_holds_can_be_read_off_it():
    tree = Stack("x", Parallel(Fuse("a", Stack("b", "c")), "d"), MultiTask("e"))
    assert list(names(tree)) == ["x", "a", "b", "c", "d", "e"]
    assert [fuse.name for fuse in fusions(tree)] == ["a,c"]
    assert last(tree) == "e"
    assert width(tree) == 2
    assert branches(tree) == [
        Stack("x", Fuse("a", Stack("b", "c")), MultiTask("e")),
        Stack("x", "d", MultiTask("e")),
    ]
