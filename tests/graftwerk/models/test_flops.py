"""Operations that are counted from shapes against those that torch counts as it runs them."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graftwerk.adapters import BottleneckConfig, Fuse, LoRAConfig, Parallel, Stack
from graftwerk.adapters.methods.ia3 import IA3Config
from graftwerk.adapters.methods.prefix import PrefixTuningConfig
from graftwerk.adapters.methods.prompt import PromptTuningConfig
from graftwerk.models import GPT, TransformerConfig, build_model
from graftwerk.models.flops import Flops, Training, Work
from tests.graftwerk.tiny import GPT2, LLAMA, tiny_gpt
from tests.graftwerk.tiny_families import bert_shape, t5_shape

PARALLEL = replace(GPT2, parallel_residual=True)
GPTS = {"gpt2": GPT2, "llama": LLAMA, "parallel": PARALLEL}


def inputs(family: str, rows: int = 2, width: int = 12, read: int = 9) -> dict[str, torch.Tensor]:
    """A batch of some columns, of which two reach the output layer."""
    tokens = torch.arange(rows * width).reshape(rows, width) % 11
    if family == "bert":
        return {"tokens": tokens}
    given = {"tokens": tokens, "select": torch.tensor([3, width + 5])}
    if family == "t5":
        given["source"] = torch.arange(rows * read).reshape(rows, read) % 11
    return given


def counted(model, given: dict[str, torch.Tensor]) -> Flops:
    """What torch counts: attention in its plain form, of which it sees every product."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as there:
            loss = model(**given).sum()
        with FlopCounterMode(display=False) as back:
            loss.backward()
    return Flops(there.get_total_flops(), back.get_total_flops())


def agrees(model, given: dict[str, torch.Tensor], within: float = 0.0) -> Flops:
    found = Training.of(model).flops(Work.of(given, model.virtual_tokens))
    real = counted(model, given)
    assert found.forward == pytest.approx(real.forward, rel=within)
    assert found.backward == pytest.approx(real.backward, rel=within)
    return found


def adapted(model, method, name: str = "a"):
    model.add_adapter(name, method)
    model.train_only([name])
    model.set_active(name)
    return model


@pytest.mark.parametrize("shape", GPTS)
def test_a_whole_gpts_operations_are_those_that_run(shape: str):
    found = agrees(tiny_gpt(GPTS[shape]), inputs("gpt"))
    # But for the inputs of the first projections, which have gradients as the embeddings have.
    assert found.backward == 2 * found.forward


@pytest.mark.parametrize(
    "shape", [t5_shape(31), bert_shape(31, "question_answering"), bert_shape(31, "masked_lm")]
)
def test_a_whole_encoders_operations_are_those_that_run(shape: TransformerConfig):
    agrees(build_model(shape), inputs(shape.architecture))


@pytest.mark.parametrize("shape", [*GPTS.values(), t5_shape(31), bert_shape(31, "masked_lm")])
@pytest.mark.parametrize(
    "method",
    [
        LoRAConfig(dim=4),
        LoRAConfig(dim=4, target_modules=("attention_dense", "mlp_fc1", "mlp_fc2")),
        BottleneckConfig(dim=4),
        IA3Config(),
    ],
)
def test_an_adapters_operations_are_those_that_run(shape: TransformerConfig, method):
    model = adapted(build_model(shape), method)
    found = agrees(model, inputs(shape.architecture))
    assert found.backward < 1.2 * found.forward  # frozen weights ask for no gradient


@pytest.mark.parametrize("first", [1, 2, 3])
def test_backward_stops_below_the_lowest_layer_that_is_trained(first: int):
    method = LoRAConfig(dim=4, layer_selection=tuple(range(first, 4)))
    agrees(adapted(tiny_gpt(GPT2), method), inputs("gpt"))


def test_adapters_of_a_t5s_decoder_leave_its_encoder_without_gradients():
    shape = t5_shape(31)
    agrees(adapted(build_model(shape), LoRAConfig(dim=4, layer_selection=(3, 4))), inputs("t5"))


def test_columns_and_keys_of_prompts_count():
    for method in (PromptTuningConfig(virtual_tokens=5), PrefixTuningConfig(prefix_length=5)):
        given = inputs("gpt")
        bare = Training.of(tiny_gpt(GPT2)).flops(Work.of(given)).forward
        found = agrees(adapted(tiny_gpt(GPT2), method), given)
        assert found.forward > bare


def test_copies_of_a_batch_count_from_where_they_are_made():
    model = tiny_gpt(GPT2)
    for name in ("a", "b"):
        model.add_adapter(name, LoRAConfig(dim=4, layer_selection=(2, 3)))
    model.train_only(["a", "b"])
    model.set_active(Parallel("a", "b"))
    agrees(model, inputs("gpt"))


def test_frozen_adapters_and_fusions_count():
    model = tiny_gpt(GPT2)
    for name in ("a", "b", "c"):
        model.add_adapter(name, BottleneckConfig(dim=4))
    model.train_only(["c"])
    model.set_active(Stack("a", "c"))
    agrees(model, inputs("gpt"))
    model.add_fusion("a,b")
    model.train_only(fusions=["a,b"])
    model.set_active(Fuse("a", "b"))
    agrees(model, inputs("gpt"), within=0.05)  # but for the products of a fusion's weights


def test_nothing_but_the_number_of_pairs_grows_with_the_square_of_a_row():
    model = adapted(GPT(GPT2), LoRAConfig(dim=4))
    training = Training.of(model)
    once, twice = (training.flops(Work.of(inputs("gpt", width=w))).forward for w in (12, 24))
    pairs = 4 * GPT2.query_size * GPT2.num_layers * 2
    answers = 2 * 2 * GPT2.vocab_size * GPT2.hidden_size
    assert twice - answers - pairs * 24**2 == 2 * (once - answers - pairs * 12**2)


def test_useful_work_is_of_tokens_and_of_pairs_that_are_seen():
    # A trunk of 3 tokens with branches of 2 and 3, then 2 columns of padding.
    end = torch.tensor([[8, 8, 8, 5, 5, 8, 8, 8, 9, 10]])
    given = {"tokens": torch.zeros_like(end), "end": end, "select": torch.tensor([2, 4, 7])}
    found = Work.useful(given, 8, "gpt")
    assert (found.tokens, found.pairs, found.answers) == (8, 1 + 2 + 3 + 4 + 5 + 4 + 5 + 6, 3)
    plain = Work.useful({"tokens": torch.zeros(2, 5)}, 10, "gpt")
    assert plain.pairs == 2 * (1 + 2 + 3 + 4 + 5)


def test_useful_work_of_encoders_is_that_of_their_documents():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]])
    tokens = torch.zeros(2, 6)
    found = Work.useful({"tokens": tokens, "documents": documents}, 9, "bert")
    assert (found.tokens, found.pairs) == (9, 9 + 4 + 16)
    given = {
        "tokens": torch.zeros(2, 3),
        "source": tokens,
        "source_documents": documents.clamp(max=0),
    }
    found = Work.useful(given, 6 + 9, "t5")
    assert (found.tokens, found.source, found.source_pairs) == (6, 9, 25 + 16)
    assert found.cross_pairs == 3 * 5 + 3 * 4


def test_work_of_batches_adds_up():
    one, other = (Work.of(inputs("t5", width=w)) for w in (12, 7))
    training = Training.of(build_model(t5_shape(31)))
    apart = training.flops(one) + training.flops(other)
    assert training.flops(one + other) == apart
