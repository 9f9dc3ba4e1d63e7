"""Virtual tokens, prefixes and replaced parameters on every kind of model."""

import pytest
import torch
from torch.nn import functional as F

from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    Stack,
)
from graftwerk.adapters.slots import Site
from graftwerk.errors import UserError
from graftwerk.models import KeyValueCache, build_model
from tests.graftwerk.models.test_encoders import BERT_SHAPE, CONFIGS, DOCUMENTS
from tests.graftwerk.tiny import GPT2, LLAMA, shake, tokens

SHAPES = {"gpt2": GPT2, "llama": LLAMA, **CONFIGS, "bert": BERT_SHAPE}
PROMPTS = {
    "prompt": PromptTuningConfig(virtual_tokens=3),
    "mlp": PTuningConfig(virtual_tokens=3, embedding_dim=8, bottleneck_dim=6),
    "lstm": PTuningConfig(virtual_tokens=3, embedding_dim=8, encoder="lstm"),
}
PREFIXES = {
    "plain": PrefixTuningConfig(prefix_length=3, reparametrise=False),
    "network": PrefixTuningConfig(prefix_length=3, bottleneck_dim=6),
}
METHODS = {
    **PROMPTS,
    **PREFIXES,
    "selective": SelectiveConfig(parameters=("*mlp.linear_fc2.weight",)),
}
SOURCE, TARGET = tokens(2, 9), tokens(2, 5, seed=1)


def make(shape: str, **adapters):
    torch.manual_seed(0)
    model = build_model(SHAPES[shape])
    shake(model)
    for seed, (name, config) in enumerate(adapters.items()):
        model.add_adapter(name, config)
        for _, _, part in model.parts(name):
            shake(part, seed + 1)
        for copy in model.replacements.of(name).values():
            with torch.no_grad():
                copy.add_(0.1 * torch.randn_like(copy))
    return model.eval()


def run(model, **how):
    """The model's answer to a batch of two rows, one of them padded."""
    if model.config.architecture == "t5":
        return model(TARGET, source=SOURCE, source_documents=DOCUMENTS, **how)
    if model.config.architecture == "bert":
        return model(SOURCE, documents=DOCUMENTS, **how)
    return model(SOURCE, **how)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_method_changes_the_answer_and_switched_off_leaves_the_base(shape, method):
    model = make(shape)
    base = run(model)
    model = make(shape, a=METHODS[method])
    assert torch.equal(run(model), base)
    model.set_active("a")
    active = run(model)
    assert active.shape == base.shape
    assert not torch.allclose(active, base, atol=1e-3, equal_nan=True)
    model.set_active(None)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("method", [*PROMPTS, *PREFIXES])
@pytest.mark.parametrize("shape", ["gpt2", "llama", *CONFIGS])
@torch.no_grad()
def test_padding_selection_and_the_cache_change_nothing(shape, method):
    model = make(shape, a=METHODS[method])
    model.set_active("a")
    if model.config.architecture == "t5":
        whole = run(model)
        alone = model(TARGET[1:], source=SOURCE[1:, :6])
        torch.testing.assert_close(whole[1:], alone, rtol=1e-5, atol=1e-5)
        cache = KeyValueCache(model.config.decoder_num_layers)
        how = {"source": SOURCE, "source_documents": DOCUMENTS}
        pieces = [model(TARGET[:, :2], cache=cache, **how), model(TARGET[:, 2:], cache=cache)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
        return
    whole = run(model)
    select = torch.tensor([2, 12])
    torch.testing.assert_close(run(model, select=select), whole.flatten(0, 1)[select])
    # Padded on the left, as in generation, and in pieces.
    batch = F.pad(SOURCE, (4, 0))
    index = torch.arange(13)
    positions = (index - 4).clamp(min=0).expand(2, -1)
    end = torch.where(index >= 4, torch.iinfo(torch.int64).max, index + 1).expand(2, -1)
    padded = model(batch, positions, end)[:, 4:]
    torch.testing.assert_close(padded, whole, rtol=1e-5, atol=1e-5)
    cache = KeyValueCache(model.config.num_layers)
    pieces = [model(batch[:, :7], positions[:, :7], end[:, :7], cache)[:, 4:]]
    pieces += [model(batch[:, i : i + 1], positions[:, i : i + 1], cache=cache) for i in (7, 8)]
    pieces.append(model(batch[:, 9:], positions[:, 9:], end[:, 9:], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prompt_is_the_text_whose_embeddings_it_has():
    model = make("llama", a=PromptTuningConfig(virtual_tokens=3))
    words = torch.tensor([[5, 6, 7]])
    ((_, _, part),) = model.parts("a")
    part.embedding.copy_(model.embedding.word_embeddings.weight[words[0]])
    expected = model(torch.cat([words.expand(2, -1), SOURCE], 1))[:, 3:]
    model.set_active("a")
    torch.testing.assert_close(model(SOURCE), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_documents_packed_into_one_row_share_a_prompt():
    model = make("llama", a=PROMPTS["prompt"])
    model.set_active("a")
    packed = torch.cat([SOURCE[:1], SOURCE[1:]], 1)
    positions = torch.arange(9).repeat(2)[None]
    end = torch.tensor([[9] * 9 + [18] * 9])
    torch.testing.assert_close(
        model(packed, positions, end).view(2, 9, -1), model(SOURCE), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", ["llama", "t5", "bert"])
@pytest.mark.parametrize("method", ["prompt", "network"])
@torch.no_grad()
def test_prompts_side_by_side_give_what_each_gives_alone(shape, method):
    model = make(shape, a=METHODS[method], b=METHODS[method], low=LoRAConfig(dim=2))
    alone = []
    for name in ("a", "b"):
        model.set_active(Stack("low", name))
        alone.append(run(model))
    model.set_active(Stack("low", Parallel("a", "b")))
    got = run(model)
    if shape == "bert":  # start scores of all rows, then end scores
        got = got.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompts_of_a_stack_stand_one_after_the_other():
    model = make("llama", a=PROMPTS["prompt"], b=PromptTuningConfig(virtual_tokens=2))
    model.set_active(Stack("a", "b"))
    assert model.virtual_tokens == 5
    assert model.longest == 59
    joined = make("llama", both=PromptTuningConfig(virtual_tokens=5))
    parts = [next(model.parts(name))[2] for name in ("a", "b")]
    next(joined.parts("both"))[2].embedding.copy_(torch.cat([p.embedding for p in parts]))
    joined.set_active("both")
    torch.testing.assert_close(model(SOURCE), joined(SOURCE))


def test_prompts_of_different_lengths_side_by_side_are_refused():
    model = make("llama", a=PROMPTS["prompt"], b=PromptTuningConfig(virtual_tokens=2))
    with pytest.raises(UserError, match=r"\[3, 2\] virtual tokens .* must be as many"):
        model.set_active(Parallel("a", "b"))
    assert model.active is None


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_the_formulas(shape):
    config = SHAPES[shape]
    h, kv, layers = config.hidden_size, config.key_size, config.num_layers
    t5 = config.architecture == "t5"
    stacks, places = (3, layers + 2 * config.decoder_num_layers) if t5 else (1, layers)
    expected = {
        "prompt": 3 * h,
        "mlp": 3 * 8 + 8 * 6 + 6 + 6 * h + h,
        "lstm": 3 * 8 + 2 * 2 * (4 * 4 * (8 + 4) + 2 * 4 * 4) + 8 * 8 + 8 + 8 * h + h,
        "plain": 2 * 3 * kv * places,
        "network": (3 * h + h * 6 + 6) * stacks + 2 * kv * (6 + 1) * places,
    }
    for method, count in expected.items():
        model = make(shape, a=METHODS[method])
        count += 0 if model.head_of("a") is None else 2 * h + 2
        assert sum(value.numel() for value in model.adapter_state("a").values()) == count, method
        model.freeze_base()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_an_lstm_prompt_for_a_model_of_125m_has_the_published_8_3_million():
    config = PTuningConfig(embedding_dim=768, encoder="lstm")
    part = config.create(Site("embedding", -1, 768, 768))
    assert part is not None
    assert round(sum(parameter.numel() for parameter in part.parameters()) / 1e6, 1) == 8.3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["llama", "t5", "bert"])
@torch.no_grad()
def test_weights_saved_and_loaded_give_the_same_answer(shape, method):
    model = make(shape, a=METHODS[method])
    model.set_active("a")
    expected, state = run(model), model.adapter_state("a")
    fresh = make(shape)
    fresh.add_adapter("b", METHODS[method])
    fresh.load_adapter_state("b", state)
    fresh.set_active("b")
    assert torch.equal(run(fresh), expected)


@pytest.mark.parametrize("method", METHODS)
def test_one_step_changes_the_adapter_and_nothing_else(method):
    model = make("llama", a=METHODS[method])
    before = {name: p.detach().clone() for name, p in model.base_parameters()}
    born = {name: value.clone() for name, value in model.adapter_state("a").items()}
    model.set_active("a")
    model.freeze_base()
    trained = [p for p in model.parameters() if p.requires_grad]
    model(SOURCE).square().mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    assert all(torch.equal(p, before[name]) for name, p in model.base_parameters())
    after = model.adapter_state("a")
    assert not any(torch.equal(after[name], value) for name, value in born.items())


def test_selected_layers_alone_get_parts():
    model = make("llama", a=IA3Config(layer_selection=(1, 3)))
    assert {slot.site.layer for _, slot, _ in model.parts("a")} == {0, 2}
    with pytest.raises(UserError, match=r"layer_selection=\(9,\) has no place in this model"):
        model.add_adapter("b", BottleneckConfig(layer_selection=(9,)))
    assert "b" not in model.adapters
    with pytest.raises(UserError, match=r"the names norms \(.*\) has no place in this model"):
        model.add_adapter("b", SelectiveConfig(parameters=("norms",)))
    chosen = SelectiveConfig(parameters=("*.mlp.linear_fc1.weight",), layer_selection=(2,))
    model.add_adapter("c", chosen)
    assert list(model.adapter_state("c")) == ["decoder.layers.1.mlp.linear_fc1.weight"]


@torch.no_grad()
def test_tied_layers_share_their_weights_and_save_them_once():
    model = make("llama", a=LoRAConfig(dim=2, weight_tying=True))
    parts = [part for _, _, part in model.parts("a")]
    assert len(parts) == 3
    assert len({id(part.linear_in.weight) for part in parts}) == 1
    assert len(model.adapter_state("a")) == 2
    fresh = make("llama")
    fresh.add_adapter("a", LoRAConfig(dim=2, weight_tying=True))
    fresh.load_adapter_state("a", model.adapter_state("a"))
    for each in (model, fresh):
        each.set_active("a")
    assert torch.equal(model(SOURCE), fresh(SOURCE))


def test_parameters_of_the_base_cannot_be_replaced_side_by_side_or_twice():
    model = make("llama", a=METHODS["selective"], b=METHODS["selective"], c=IA3Config())
    with pytest.raises(UserError, match="can be in a Stack only"):
        model.set_active(Parallel("a", "c"))
    with pytest.raises(UserError, match="two adapters have their own"):
        model.set_active(Stack("a", "b"))


def test_a_pattern_without_a_match_is_refused():
    model = make("llama")
    with pytest.raises(UserError, match=r"SelectiveConfig .* has no place"):
        model.add_adapter("a", SelectiveConfig(parameters=("*.nothing",)))


# ---- AdapterHub's prompts and peft's


@pytest.mark.parametrize("shape", ["gpt2", "llama", "bert"])
@torch.no_grad()
def test_a_prompt_in_the_place_of_words_is_the_text_of_these_words(shape):
    model = make(shape, a=PromptTuningConfig(virtual_tokens=3, place="word_embedding"))
    words = torch.tensor([[5, 6, 7]])
    ((path, _, part),) = model.parts("a")
    assert path == "embedding.words"
    part.embedding.copy_(model.embedding.word_embeddings.weight[words[0]])
    text = torch.cat([words.expand(2, -1), SOURCE], 1)
    if shape == "bert":  # its prompt reads the text, but no answer is given for it
        expected = model.hidden_states(text)[:, 3:]
        model.set_active("a")
        got = model.hidden_states(SOURCE)
    else:
        expected = model(text)[:, 3:]
        model.set_active("a")
        got = model(SOURCE)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "bert"])
@torch.no_grad()
def test_a_prompt_behind_everything_need_not_shift_learned_positions(shape):
    config = PromptTuningConfig(virtual_tokens=3, shifts_positions=False)
    model = make(shape, a=config)
    embedding = model.embedding
    words = torch.tensor([5, 6, 7])
    vectors = embedding.word_embeddings.weight[words] + embedding.position_embeddings.weight[:3]
    if embedding.token_type_embeddings is not None:
        vectors = vectors + embedding.token_type_embeddings.weight[0]
    if embedding.layernorm is not None:
        vectors = embedding.layernorm(vectors)
    next(model.parts("a"))[2].embedding.copy_(vectors)
    text = torch.cat([words.expand(2, -1), SOURCE], 1)
    positions = torch.cat([torch.arange(3), torch.arange(SOURCE.shape[1])]).expand_as(text)
    answer = model.hidden_states(text, positions)[:, 3:]
    assert model.longest == 64
    model.set_active("a")
    torch.testing.assert_close(model.hidden_states(SOURCE), answer, rtol=1e-5, atol=1e-5)
    assert model.longest == 64


def test_prompts_are_born_as_they_are_told_to():
    torch.manual_seed(0)
    site = Site("embedding", -1, 400, 400, stack="encoder")
    normal = PromptTuningConfig(virtual_tokens=50).create(site).embedding
    uniform = PromptTuningConfig(virtual_tokens=50, prompt_init="random_uniform").create(site)
    assert normal.std().item() == pytest.approx(0.023, rel=0.02)
    assert uniform.embedding.abs().max().item() == pytest.approx(0.5, rel=0.001)
    assert uniform.embedding.abs().max().item() <= 0.5
    assert uniform.embedding.std().item() == pytest.approx(12**-0.5, rel=0.01)


def test_a_prompt_that_begins_with_a_text_repeats_it():
    config = PromptTuningConfig(
        virtual_tokens=5, prompt_init="from_string", prompt_init_text="two words"
    )
    part = config.create(Site("embedding", -1, 4, 4))
    words = torch.randn(2, 4)
    part.begin_with(words)
    assert torch.equal(part.embedding, words[[0, 1, 0, 1, 0]])
    part.begin_with(torch.cat([words] * 4))
    assert torch.equal(part.embedding, words[[0, 1, 0, 1, 0]])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"place": "words"}, "place='words': use one of embedding, word_embedding"),
        ({"prompt_init": "zero"}, "prompt_init='zero': use one of normal, random_uniform"),
        ({"prompt_init": "from_string"}, "has no prompt_init_text: say the words"),
        ({"combine": "suffix"}, "combine='suffix': use prefix or prefix_after_bos"),
        ({"combine": "prefix_after_bos"}, "needs shifts_positions=False"),
    ],
)
def test_settings_of_prompts_without_a_meaning_are_refused(settings, said):
    with pytest.raises(UserError) as error:
        PromptTuningConfig(**settings)
    assert said in str(error.value)


@torch.no_grad()
def test_where_a_prompt_stands_is_all_one_to_an_encoder_and_not_to_a_decoder():
    after = PromptTuningConfig(combine="prefix_after_bos", shifts_positions=False, virtual_tokens=3)
    before = PromptTuningConfig(shifts_positions=False, virtual_tokens=3)
    model = make("bert", a=after, b=before)
    model.load_adapter_state("a", model.adapter_state("b"))
    model.set_active("a")
    answer = run(model)
    model.set_active("b")
    assert torch.equal(run(model), answer)
    with pytest.raises(UserError, match="is for encoders: use combine='prefix'"):
        make("gpt2", a=after)
