"""Tensor parallelism over two gloo processes against one process, in double precision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from graftwerk.errors import UserError
from graftwerk.parallel.tensor import parallelize
from tests.graftwerk import tiny
from tests.graftwerk.parallel import cases
from tests.graftwerk.parallel.compare import compare, generated
from tests.graftwerk.parallel.two_ranks import on_two_ranks

# What reads or scales biases, which the T5 has none of, and what several layers share.
BIASED = ("lora_tied", "dora", "hub_lora", "hub_dora", "vera_dora", "ia3_everywhere", "hub_ia3")
BIASED += ("hub_ia3_gated", "bottleneck", "compacter", "invertible", "prefix", "selective")
BIASED += ("fuse", "stack", "split")
PAIRS = [
    *(("t5", name) for name in cases.CASES),
    *(("gpt2", name) for name in BIASED),
    *(("llama", name) for name in ("lora_fused", "lora_apart", "ia3", "prefix", "selective")),
    *(("native_t5", name) for name in ("dora", "ia3_everywhere", "selective", "stack")),
    *(("bert", name) for name in ("lora_fused", "bottleneck", "unipelt", "stack", "selective")),
]


def all_pairs(mesh: DeviceMesh) -> dict[str, list[str]]:
    found = {f"{shape} {name}": compare(shape, name, mesh) for shape, name in PAIRS}
    return found | {"generated": [generated(mesh)]}


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    return on_two_ranks(all_pairs, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(("shape", "name"), PAIRS)
def test_gradients_norm_and_answer_on_two_ranks_are_those_of_one(shape, name, differences):
    for of_rank in differences:
        assert of_rank[f"{shape} {name}"] == []


def test_generation_on_two_ranks_gives_the_ids_of_one(differences):
    assert [of_rank["generated"] for of_rank in differences] == [["same"], ["same"]]


SIZES = [
    (
        tiny.GPT2,
        3,
        r"size=3 does not divide the base's num_attention_heads=4, .*: use one of 1, 2,",
    ),
    (tiny.LLAMA, 4, r"size=4 does not divide the base's num_query_groups=2: use one of 1, 2$"),
    (replace(tiny.GPT2, ffn_hidden_size=51), 2, r"ffn_hidden_size=51: use one of 1$"),
]


@pytest.mark.parametrize(("shape", "ranks", "message"), SIZES)
def test_a_size_that_does_not_divide_is_refused_with_the_numbers_that_would(
    shape, ranks, message, tmp_path: Path
):
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        object.__setattr__(mesh, "size", lambda: ranks)
        with pytest.raises(UserError, match=message):
            parallelize(tiny.tiny_gpt(shape), mesh)
    finally:
        dist.destroy_process_group()
