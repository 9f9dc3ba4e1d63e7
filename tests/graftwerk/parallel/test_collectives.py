"""What two ranks send in a pass, counted by torch, against the declared table."""

from collections import Counter
from dataclasses import replace

import pytest
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode

from graftwerk.adapters import SelectiveConfig, Stack
from graftwerk.parallel.collectives import of_part, of_pass
from graftwerk.parallel.tensor import parallelize, sum_partial_gradients
from tests.graftwerk.parallel import cases
from tests.graftwerk.parallel.two_ranks import on_two_ranks

# Trained word embeddings: there is a gradient everywhere.
WORDS = SelectiveConfig(parameters=("embedding.word_embeddings.weight",))
PAIRS = [
    *(("t5", name) for name in cases.ONE_ADAPTER if name != "selective"),
    *(("gpt2", name) for name in ("lora_fused", "dora", "hub_lora", "bn_parallel", "ia3")),
    *(("bert", name) for name in ("hub_lora", "bn_parallel", "prefix")),
]
# The parts that send anything, by method: the slots, and how often forward and backward.
ROWS = ("output", "fc2")
SENDING = {
    "dora": {ROWS: (1, 0)},
    "hub_lora": {ROWS: (1, 1)},
    "hub_dora": {ROWS: (1, 1)},
    "vera_dora": {ROWS: (2, 2)},
    "hub_ia3_gated": {ROWS: (1, 1)},
    "unipelt": {ROWS: (1, 1)},
}
SENDING_ROWS = {  # where rows are split, these too
    "bn_parallel": {("attention_output", "cross_attention_output", "mlp_output"): (1, 1)},
    "unipelt": {("attention_output", "cross_attention_output", "mlp_output"): (1, 1)},
}


class AnyModule:
    """In the place of the mode's own tracker of modules, which a module that is called twice in a
    pass (a T5's embedding) breaks."""

    name, is_bw, activation_checkpointing = "", False, False

    def __init__(self) -> None:
        self.module_parents_dict = {"": set()}

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def counting() -> CommDebugMode:
    mode = CommDebugMode()
    mode.advanced_module_tracker = AnyModule()  # pyright: ignore[reportAttributeAccessIssue]
    return mode


def counted(mode: CommDebugMode) -> dict[str, int]:
    """Operations of torch, whatever they are called there."""
    found = Counter()
    for operation, count in mode.get_comm_counts().items():
        name = str(operation).replace("_", "")
        (kind,) = (kind for kind in KINDS if kind.replace("_", "") in name)
        found[kind] += count
    return dict(found)


def measure(shape: str, name: str, mesh: DeviceMesh, sequence: bool) -> list:
    """(counted, declared) forward and backward, how often partial gradients were summed, and which
    slots say that they send."""
    case = cases.CASES[name]
    adapters = {"words": WORDS, **case.adapters}
    model = cases.make(shape, replace(case, adapters=adapters, active=Stack(*adapters)))
    parallelize(model, mesh, sequence)
    declared = of_pass(model)
    with counting() as forward:
        value = cases.loss(model)
    with counting() as backward:
        value.backward()
    with counting() as reduction:
        sum_partial_gradients(model.parameters(), mesh.get_group())
    slots = {
        path: [len(sent.forward), len(sent.backward)]
        for path, sent in of_part(model, "a").items()
        if sent.forward or sent.backward
    }
    return [
        (counted(forward), dict(+declared.forward)),
        (counted(backward), dict(+declared.backward)),
        counted(reduction),
        slots,
    ]


def all_pairs(mesh: DeviceMesh) -> dict[str, list]:
    return {
        f"{shape} {name} {sequence}": measure(shape, name, mesh, sequence)
        for shape, name in PAIRS
        for sequence in (False, True)
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list]]:
    return on_two_ranks(all_pairs, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize(("shape", "name"), PAIRS)
def test_a_pass_sends_what_is_declared(shape, name, sequence, measured):
    for of_rank in measured:
        forward, backward, reduction, _ = of_rank[f"{shape} {name} {sequence}"]
        assert forward[0] == forward[1]
        assert backward[0] == backward[1]
        partial = {} if (shape, name, sequence) in NOTHING_PARTIAL else {"all_reduce": 1}
        assert reduction == partial


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize(("shape", "name"), PAIRS)
def test_only_these_parts_send_anything_of_their_own(shape, name, sequence, measured):
    expected = {**SENDING.get(name, {}), **(SENDING_ROWS.get(name, {}) if sequence else {})}
    by_slot = {slot: list(sent) for slots, sent in expected.items() for slot in slots}
    for of_rank in measured:
        slots = of_rank[f"{shape} {name} {sequence}"][3]
        for path, sent in slots.items():
            assert by_slot.get(path.rpartition(".")[2]) == sent, path
        assert bool(slots) == bool(by_slot)


# Whole parameters whose gradients are whole on every rank.
NOTHING_PARTIAL = {
    (shape, name, sequence)
    for shape, name in PAIRS
    for sequence in (False, True)
    if name in ("ia3", "prompt", "ptuning")
    or (
        not sequence
        and name in ("bottleneck", "bn", "bn_parallel", "compacter", "invertible", "reft")
    )
}
