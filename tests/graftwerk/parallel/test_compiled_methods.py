"""Every method and composition in compiled layers, as in layers that are not."""

import pytest

from graftwerk.adapters import Fuse, Stack
from graftwerk.adapters.fusion import FusionConfig
from graftwerk.adapters.packing import bound_to_texts
from graftwerk.parallel.compiled import compile_layers
from tests.graftwerk.data.rows import adapted, assert_same, learned, packed
from tests.graftwerk.data.test_shared_methods import ALL, BESIDE, COMPOSITIONS, TREE
from tests.graftwerk.models import test_packed_documents as documents
from tests.graftwerk.parallel.test_compiled import Graphs

pytestmark = pytest.mark.long


def check(model, batches, learn) -> None:
    expected = learn(model, batches)
    graphs = Graphs()
    compile_layers(model, graphs)
    for _ in range(2):
        assert_same(learn(model, batches), expected)
    assert graphs.made


@pytest.mark.parametrize(
    "active", [*ALL, *COMPOSITIONS.values(), Stack("p", "lora", "d", "c", "f")], ids=str
)
def test_gpts_learn_the_same(active):
    model = adapted("gpt2", **({active: ALL[active]} if active in ALL else BESIDE))
    if isinstance(active, Fuse):
        model.add_fusion("a,b", FusionConfig())
    model.set_active(active)
    share = bound_to_texts(model) is None
    prompt = model.virtual_tokens if model.plan.own_prompts else 0
    check(model, packed(TREE, 40, share, minimum=1, prompt=prompt)[TREE.step], learned)


@pytest.mark.parametrize("methods", documents.METHODS)
@pytest.mark.parametrize("shape", documents.SHAPES)
def test_t5s_and_berts_learn_the_same(shape: str, methods: str):
    model = documents.adapted(shape, methods)
    check(model, documents.packed_rows(model), documents.learned)
