"""Every method in packed rows and trees against padded rows: what shares, and what must not."""

from dataclasses import replace

import pytest

from graftwerk.adapters import (
    Average,
    BottleneckConfig,
    Fuse,
    LoRAConfig,
    Parallel,
    Split,
    Stack,
)
from graftwerk.adapters.configs import (
    BnConfig,
    HubLoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
)
from graftwerk.adapters.fusion import FusionConfig
from graftwerk.adapters.packing import bound_to_rows, bound_to_texts
from tests.graftwerk.adapters.test_matrix import METHODS
from tests.graftwerk.data.rows import (
    Rows,
    adapted,
    assert_same,
    learned,
    losses,
    packed,
    padded,
    plain,
    relabelled,
)
from tests.graftwerk.tiny import SHAPES

LORA = LoRAConfig(dim=3, target_modules=("all",))
# Duplicates, a row that is another's beginning, several labels of a token, four levels.
TREE = Rows(
    [
        ([1, 2, 3, 4, 5, 6], [(4, 7), (5, 8)]),
        ([1, 2, 3, 4, 5, 6], [(4, 7), (5, 8)]),
        ([1, 2, 3, 4], [(3, 9)]),
        ([1, 2, 3, 9, 9, 1, 4], [(2, 11), (5, 3), (6, 2)]),
        ([1, 2, 3, 9, 9, 1, 7, 8], [(6, 1), (7, 2)]),
        ([1, 2, 3, 9, 8], [(4, 5)]),
        ([4, 4, 4], [(1, 3), (2, 3)]),
        ([4, 4, 9], [(2, 1)]),
    ]
)
MORE = {
    "reft_end": ReftConfig(r=2, suffix_positions=2, dropout=0.0),
    "reft_few": ReftConfig(r=2, prefix_positions=4, orthogonality=False, dropout=0.0),
    "prefix_shifted": PrefixTuningConfig(prefix_length=3, bottleneck_dim=6, shifts_positions=True),
    "prefix_gated": PrefixTuningConfig(prefix_length=3, reparametrise=False, use_gating=True),
    "dora_plain": LoRAConfig(dim=3, target_modules=("mlp",), dora=True),
}
ALL = {name: m for name, m in {**METHODS, **MORE}.items() if name != "mtl_lora"}
LOOK_AHEAD = ("reft_end", "par_bn", "hub_lora", "prefix_gated")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ALL)
def test_a_method_learns_the_same_packed_and_shared_or_says_that_it_would_not(method, shape):
    model = adapted(shape, a=ALL[method])
    model.set_active("a")
    assert bound_to_rows(model) is None
    assert (bound_to_texts(model) is not None) == (method in LOOK_AHEAD)
    expected = learned(model, padded(TREE, micro_batch_size=1)[TREE.step])
    assert_same(learned(model, packed(TREE, 20)[TREE.step]), expected)
    found = learned(model, packed(TREE, 20, share=True, minimum=1)[TREE.step])
    if bound_to_texts(model) is None:
        assert_same(found, expected)
    else:
        with pytest.raises(AssertionError):
            assert_same(found, expected)


BOTTLENECKS = {"a": BottleneckConfig(dim=3), "b": BottleneckConfig(dim=5)}
COMPOSITIONS = {
    "stack": Stack("a", "b"),
    "parallel": Parallel("a", "b"),
    "average": Average("a", "b", weights=[0.3, 0.7]),
    "fuse": Fuse("a", "b"),
    "parallel_stack": Parallel(Stack("a", "b"), "b"),
    "split": Split("a", "b", splits=[3, 1]),
    "splits": Split("a", Split("b", "a", splits=[4, 1]), splits=[2, 1]),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_learn_the_same_as_padded(name):
    model = adapted("gpt2", **BOTTLENECKS)
    if name == "fuse":
        model.add_fusion("a,b", FusionConfig())
        model.train_only(fusions=["a,b"])
    model.set_active(COMPOSITIONS[name])
    assert bound_to_texts(model) is None
    expected = learned(model, padded(TREE, micro_batch_size=1)[TREE.step])
    for share in (False, True):
        assert_same(learned(model, packed(TREE, 20, share, minimum=1)[TREE.step]), expected)


GATED = {
    "a": BnConfig(mh_adapter=True, reduction_factor=8, use_gating=True),
    "b": BnConfig(reduction_factor=4, is_parallel=True, original_ln_before=True, use_gating=True),
    "c": HubLoRAConfig(places=("query", "fc2"), r=2, init_weights="bert", use_gating=True),
    "d": PrefixTuningConfig(prefix_length=2, reparametrise=False, use_gating=True),
    "e": PrefixTuningConfig(
        prefix_length=3, reparametrise=False, use_gating=True, shared_gating=False
    ),
    "f": PrefixTuningConfig(prefix_length=2, reparametrise=False),
}


@pytest.mark.parametrize(
    "composition",
    [
        Stack("a", "c", "b"),
        Split("a", "b", "c", splits=[2, 2, 1]),
        Split("a", Split("b", "c", splits=[4, 1]), splits=[2, 1]),
        Parallel(Average("a", "b"), "c"),
        Stack("f", "d", "e", "a"),
        Parallel("d", Stack("e", "f")),
    ],
    ids=str,
)
def test_gates_are_means_over_each_text_or_its_piece(composition):
    model = adapted("llama", **GATED)
    model.set_active(composition)
    assert bound_to_rows(model) is None
    expected = learned(model, padded(TREE, micro_batch_size=1)[TREE.step])
    for size in (20, 64):
        assert_same(learned(model, packed(TREE, size)[TREE.step]), expected)
    with pytest.raises(AssertionError):
        assert_same(learned(model, packed(TREE, 20, True, minimum=1)[TREE.step]), expected)


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_beside_a_gate_each_text_has_a_prompt_of_its_own(shape, shifts):
    prompt = PromptTuningConfig(virtual_tokens=3, shifts_positions=shifts)
    model = adapted(shape, p=prompt, q=METHODS["ptuning"], r=ReftConfig(r=2, dropout=0.0), **GATED)
    model.set_active(Stack("p", "q", "r", "a", "d", Split("a", "b", splits=[2, 2])))
    expected = learned(model, padded(TREE, micro_batch_size=1)[TREE.step])
    for size in (20, 64):
        batches = packed(TREE, size, prompt=model.virtual_tokens)[TREE.step]
        assert_same(learned(model, batches), expected)
        assert sum(batch.num_tokens for batch in batches) == sum(len(r[0]) for r in TREE.rows)


def test_a_split_behind_a_prompt_counts_the_tokens_of_each_text():
    model = adapted("gpt2", p=METHODS["ptuning"], **BOTTLENECKS)
    model.set_active(Stack("p", Split("a", "b", splits=[3, 1])))
    expected = learned(model, padded(TREE, micro_batch_size=1)[TREE.step])
    for share in (False, True):
        assert_same(learned(model, packed(TREE, 20, share, minimum=1)[TREE.step]), expected)


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("window", [2, 3, 5])
def test_a_sliding_window_is_measured_in_depth(window, layers):
    shape = replace(SHAPES["llama"], window_size=window, window_layers=layers)
    model, wide = adapted(shape, a=LORA), adapted("llama", a=LORA)
    for one in (model, wide):
        one.set_active("a")
    expected = learned(model, padded(TREE, micro_batch_size=1)[TREE.step])
    assert abs(expected[0] - learned(wide, padded(TREE)[TREE.step])[0]) > 1e-3
    for share in (False, True):
        assert_same(learned(model, packed(TREE, 20, share, minimum=1)[TREE.step]), expected)


QUESTIONS = [[1, 2, 3], [1, 2, 4], [2, 2], [1, 2, 3, 5], [1]]  # of one paragraph
BESIDE = {**BOTTLENECKS, **GATED, "p": METHODS["ptuning"], "lora": LORA}


@pytest.mark.parametrize(
    "active", [*ALL, *COMPOSITIONS.values(), Stack("p", "lora", "d", "c", "f")], ids=str
)
def test_another_question_moves_no_other_questions_loss(active):
    paragraph = [5, 6, 7, 8, 9, 10]
    rows = Rows([([*paragraph, *q], [(5 + len(q), 11 + n)]) for n, q in enumerate(QUESTIONS)])
    model = adapted("gpt2", **({active: ALL[active]} if active in ALL else BESIDE))
    if isinstance(active, Fuse):
        model.add_fusion("a,b", FusionConfig())
    model.double().set_active(active)
    how = {"minimum": 1, "prompt": model.virtual_tokens if model.plan.own_prompts else 0}

    for share in (False, True) if bound_to_texts(model) is None else (False,):
        before = losses(model, rows, packed(rows, 40, share, **how))
        assert len(before) == len(QUESTIONS)
        for number in range(len(QUESTIONS)):
            changed = relabelled(rows, number, token=60)
            after = losses(model, changed, packed(changed, 40, share, **how))
            assert before[number] != after[number]
            others = {n: pytest.approx(loss, abs=1e-9) for n, loss in before.items() if n != number}
            assert {n: after[n] for n in others} == others


def test_virtual_tokens_stand_before_each_packed_row_and_all_its_texts_read_them():
    rows = plain([6, 4, 9, 5])
    model = adapted("gpt2", a=METHODS["ptuning"], b=LORA)
    model.set_active(Stack("a", "b"))
    together = packed(rows, 24, micro_batch_size=1)[rows.step]
    assert len(together) == 1
    assert_same(learned(model, together), learned(model, padded(rows)[rows.step]))
