"""Sequence parallelism over two gloo processes against one process; rows of odd lengths."""

import pytest
from torch.distributed.device_mesh import DeviceMesh

from graftwerk.adapters import Split
from graftwerk.adapters.slots import Record
from graftwerk.errors import UserError
from graftwerk.parallel.tensor import parallelize
from tests.graftwerk.parallel import cases
from tests.graftwerk.parallel.compare import compare, generated
from tests.graftwerk.parallel.two_ranks import on_two_ranks

PAIRS = [
    *(("t5", name) for name in cases.CASES),
    *(("gpt2", name) for name in ("selective", "stack", "reft", "bn_parallel", "split", "fuse")),
    *(("bert", name) for name in ("selective", "bn", "unipelt", "reft", "stack")),
    ("llama", "selective"),
    ("llama", "packed_gates"),
    ("gpt2", "packed_split"),
]


AGAIN = [("native_t5", "stack"), ("t5", "vera_dora"), ("bert", "bn_parallel")]


def all_pairs(mesh: DeviceMesh) -> dict[str, list[str]]:
    found = {f"{shape} {name}": compare(shape, name, mesh, sequence=True) for shape, name in PAIRS}
    again = {
        f"again {shape} {name}": compare(shape, name, mesh, True, True) for shape, name in AGAIN
    }
    return found | again | {"refused": refused(mesh), "generated": [generated(mesh, sequence=True)]}


def refused(mesh: DeviceMesh) -> list[str]:
    """What is said of gates that would read some of a row, and of weights that lie apart."""
    said = []
    model = cases.make("gpt2", cases.Case({"a": cases.GATED, "b": cases.GATED}))
    parallelize(model, mesh, sequence=True)
    try:
        model.set_active(Split("a", "b", splits=[4, 5]))
    except UserError as error:
        said.append(str(error))
    model = cases.make("gpt2", cases.CASES["fuse"])
    parallelize(model, mesh, sequence=True)
    try:
        model(cases.SOURCE, record=Record())
    except UserError as error:
        said.append(str(error))
    return said


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    return on_two_ranks(all_pairs, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(("shape", "name"), PAIRS)
def test_gradients_norm_and_answer_of_split_rows_are_those_of_one_process(shape, name, differences):
    for of_rank in differences:
        assert of_rank[f"{shape} {name}"] == []


@pytest.mark.parametrize(("shape", "name"), AGAIN)
def test_layers_that_run_again_for_their_gradients_find_the_same(shape, name, differences):
    for of_rank in differences:
        assert of_rank[f"again {shape} {name}"] == []


def test_a_gate_in_a_split_and_a_record_of_fusions_are_refused_with_the_reason(differences):
    for of_rank in differences:
        gate, record = of_rank["refused"]
        assert "its gate is a mean over its tokens, which sequence_parallel=True spreads" in gate
        assert "weights are not recorded with sequence_parallel=True" in record


def test_generation_with_split_rows_gives_the_ids_of_one_process(differences):
    assert [of_rank["generated"] for of_rank in differences] == [["same"], ["same"]]
