"""A model with heads: who answers, with which labels, on which rows, in which thread."""

import threading

import numpy as np
import pytest
import torch

import graftwerk.adapterhub.composition as ac
from graftwerk.adapterhub import (
    AdapterSetup,
    BatchSplit,
    Fuse,
    LoRAConfig,
    MTLLoRAConfig,
    MultiHeadOutput,
    MultiTask,
    MultiTaskConfig,
    Parallel,
    Stack,
)
from graftwerk.errors import UserError
from tests.graftwerk.adapterhub.small import rows, shaken, small

MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7, [1] * 4 + [0] * 3])


def two_tasks(kind: str = "bert"):
    model = small(kind)
    for name, count in (("a", 2), ("b", 3)):
        model.add_adapter(name, config="seq_bn[reduction_factor=4]")
        model.add_classification_head(name, num_labels=count)
    return shaken(model, "a", "b")


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ---- heads and adapters


def test_a_head_of_the_adapters_name_answers_with_it():
    model = two_tasks()
    model.set_active_adapters("a")
    assert model.active_head == "a"
    assert model(rows()).logits.shape == (4, 2)
    model.active_adapters = Stack("a", "b")
    assert (model.active_head, model.active_adapters) == ("b", Stack("a", "b"))
    model.set_active_adapters(None)
    assert (model.active_head, model.active_adapters) == ("b", None)
    assert model(rows(), head="a").logits.shape == (4, 2)


def test_without_a_head_the_states_are_the_answer_and_gates_are_told():
    model = small()
    model.add_adapter("gated", config="seq_bn[use_gating=True, reduction_factor=4]")
    model.set_active_adapters("gated")
    assert model.active_head is None
    answer = model(rows(), output_adapter_gating_scores=True)
    assert answer.last_hidden_state.shape == (4, 7, 32)
    scores = answer.adapter_gating_scores["gated"]
    assert sorted(scores) == [0, 1]
    assert isinstance(scores[0]["output_adapter"], np.ndarray)
    assert scores[0]["output_adapter"].shape == (4,)
    assert model(rows()).adapter_gating_scores is None


@torch.no_grad()
def test_an_adapter_that_is_named_twice_tells_the_gates_of_all_its_rows():
    model = small()
    for name in "ab":
        model.add_adapter(name, config="lora[r=2, use_gating=True]")
    shaken(model, "a", "b")

    def gates(composition, ids):
        model.set_active_adapters(composition)
        answer = model(ids, output_adapter_gating_scores=True)
        return {
            name: layers[0]["selfattn_lora"]
            for name, layers in answer.adapter_gating_scores.items()
        }

    told = gates(BatchSplit(Stack("a", "b"), "b", batch_sizes=[1, 3]), rows())
    alone = gates("b", rows())
    assert told["a"].shape == (1, 2)
    assert told["b"].shape == alone["b"].shape == (4, 2)
    np.testing.assert_allclose(told["b"], alone["b"], rtol=1e-5)
    assert gates(Stack("a", Parallel("a", "b")), rows())["a"].shape == (8 + 4, 2)


def test_an_output_is_a_tuple_on_request():
    model = two_tasks()
    model.set_active_adapters("a")
    loss, logits = model(rows(), labels=torch.tensor([0, 1, 0, 1]), return_dict=False)
    assert (loss.shape, logits.shape) == ((), (4, 2))


def test_a_deleted_head_answers_no_more():
    model = two_tasks()
    model.set_active_adapters("a")
    model.delete_head("a")
    assert model.active_head is None
    with pytest.raises(UserError, match="no head is called 'a': this model has b"):
        model(rows(), head="a")


def test_labels_have_the_names_that_the_head_was_given():
    model = small()
    model.add_tagging_head("tags", num_labels=2, id2label={0: "O", 1: "B"})
    assert model.get_labels() == ["O", "B"]
    assert model.config.id2label == {0: "O", 1: "B"}
    assert model.get_labels_dict("tags") == {0: "O", 1: "B"}


@pytest.mark.parametrize(
    ("kind", "add", "said"),
    [
        ("t5", lambda m: m.add_tagging_head("x"), "t5 has no head of type 'tagging'"),
        ("gpt2", lambda m: m.add_masked_lm_head("x"), "gpt has no head of type 'masked_lm'"),
        ("bert", lambda m: m.add_classification_head("x", use_pooler=True), "has no pooler"),
        ("gpt2", lambda m: m.add_classification_head("default"), "overwrite_ok=True"),
    ],
)
def test_a_head_that_the_model_cannot_have_is_refused(kind, add, said):
    model = small(kind)
    heads = list(model.heads)
    with pytest.raises(UserError, match=said):
        add(model)
    assert list(model.heads) == heads


def test_the_bases_own_words_are_the_head_called_default():
    model = small("gpt2")
    model.set_active_adapters(None)
    assert model.active_head == "default"
    ids = rows()
    close(model(ids).logits, model.base(ids))
    sure = model.base(ids)[:, :-1].log_softmax(-1)
    expected = -sure.gather(-1, ids[:, 1:, None]).mean()
    close(model(ids, labels=ids).loss, expected)


# ---- rows


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_rows_answer_does_not_hang_on_padding(kind):
    model = two_tasks(kind)
    model.set_active_adapters("a")
    answer = model(rows(), attention_mask=MASK).logits
    close(answer[3:], model(rows()[3:, :4]).logits)


def test_a_gpt_reads_the_last_token_wherever_padding_is():
    model = two_tasks("llama")  # its positions are relative
    model.set_active_adapters("a")
    short = rows()[:1, :4]
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    close(model(left, attention_mask=mask).logits, model(short).logits)


def test_a_t5_reads_its_source_in_the_decoder_up_to_the_end():
    model = two_tasks("t5")
    model.set_active_adapters("a")
    ids = rows()
    ids[:, 5] = 2
    moved = torch.cat([torch.zeros(4, 1, dtype=torch.long), ids[:, :-1]], 1)
    close(model(ids).logits, model(ids, decoder_input_ids=moved).logits)
    states = model.base.hidden_states(moved, source=ids)
    close(model.heads["a"].through(states[:, 5]), model(ids).logits)
    with pytest.raises(UserError, match="every row of input_ids needs one"):
        model(rows())
    with pytest.raises(UserError, match="must be as long as input_ids"):
        model(ids, decoder_input_ids=moved[:, :4])


def test_a_t5s_words_are_learned_from_labels_alone():
    model = small("t5")
    ids, labels = rows(), rows(4, 5, seed=3)
    labels[0, 3:] = -100
    moved = torch.cat([torch.zeros(4, 1, dtype=torch.long), labels[:, :-1]], 1)
    answer = model(ids, labels=labels)
    close(answer.logits, model(ids, decoder_input_ids=moved.clamp(min=0)).logits)
    sure = answer.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    close(answer.loss, -sure[labels >= 0].mean())


@pytest.mark.parametrize(("combine", "column"), [("prefix", 0), ("prefix_after_bos", 3)])
def test_a_berts_head_for_rows_reads_the_first_column_prompts_included(combine, column):
    model = two_tasks()
    model.add_adapter("p", config=f"prompt_tuning[prompt_length=3, combine={combine}]")
    model.set_active_adapters("p")
    states = model.base.hidden_states(rows(), prompts=True)
    close(model(rows(), head="a").logits, model.heads["a"].through(states[:, column]))


# ---- several heads


def test_below_parallel_each_head_has_its_adapters_rows_and_labels():
    model = two_tasks()
    labels = {"a": torch.tensor([0, 1, 1, 0]), "b": torch.tensor([2, 1, 0, 2])}
    alone = []
    for name in ("a", "b"):
        model.set_active_adapters(name)
        alone.append(model(rows(), attention_mask=MASK, labels=labels[name]))
    model.set_active_adapters(Parallel("a", "b"))
    assert model.active_head == ["a", "b"]
    for given in (labels, [labels["a"], labels["b"]]):
        answer = model(rows(), attention_mask=MASK, labels=given)
        assert isinstance(answer, MultiHeadOutput)
        assert len(answer) == 2
        for part, one in zip(answer, alone, strict=True):
            close(part.logits, one.logits)
            close(part.loss, one.loss)
        close(answer.loss, alone[0].loss + alone[1].loss)
    shared = model(rows(), attention_mask=MASK, labels=labels["a"])
    close(shared[0].loss, alone[0].loss)


def test_batch_split_sends_rows_and_labels_to_their_heads():
    model = two_tasks()
    labels = torch.tensor([0, 1, 1, 2])
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[3, 1]))
    answer = model(rows(), labels=labels)
    model.set_active_adapters("b")
    alone = model(rows()[3:], labels=labels[3:])
    assert answer[0].logits.shape == (3, 2)
    close(answer[1].logits, alone.logits)
    close(answer[1].loss, alone.loss)


def test_parallel_words_are_those_of_each_adapter_inverse_and_all():
    model = small("gpt2")
    for name in ("a", "b"):
        model.add_adapter(name, config="seq_bn_inv[reduction_factor=4]")
        model.add_causal_lm_head(name)
    shaken(model, "a", "b")
    alone = []
    for name in ("a", "b"):
        model.set_active_adapters(name)
        alone.append(model(rows()).logits)
    model.set_active_adapters(Parallel("a", "b"))
    answer = model(rows())
    for part, logits in zip(answer, alone, strict=True):
        close(part.logits, logits)


def test_heads_that_are_not_as_many_as_the_branches_are_refused():
    model = two_tasks()
    model.add_adapter("c")
    model.set_active_adapters(Parallel("a", "b", "c"))
    model.active_head = ["a", "b"]
    with pytest.raises(UserError, match="2 heads are active"):
        model(rows())


# ---- setups


def test_a_setup_holds_within_its_block_and_brings_its_heads():
    model = two_tasks()
    model.set_active_adapters("b")
    outside = model(rows()).logits
    with AdapterSetup("a"):
        inside = model(rows()).logits
        with AdapterSetup(Stack("a", "b"), head_setup="a"):
            assert model(rows()).logits.shape == (4, 2)
        close(model(rows()).logits, inside)
    close(model(rows()).logits, outside)
    model.set_active_adapters("a")
    close(model(rows()).logits, inside)
    with pytest.raises(UserError, match="no adapter is called 'z'"), AdapterSetup("z"):
        model(rows())


def test_threads_have_setups_of_their_own():
    model = two_tasks()
    expected = {}
    for name in ("a", "b"):
        model.set_active_adapters(name)
        expected[name] = model(rows()).logits
    model.set_active_adapters(None)
    wrong, gate = [], threading.Barrier(2)

    def work(name):
        with AdapterSetup(name):
            gate.wait()
            for _ in range(5):
                if not torch.allclose(model(rows()).logits, expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_setup_is_resolved_once(monkeypatch):
    model = two_tasks()
    plans = []
    planned = model.base.planned
    monkeypatch.setattr(model.base, "planned", lambda *a: plans.append(a) or planned(*a))
    with AdapterSetup("a"):
        for _ in range(3):
            model(rows())
    assert len(plans) == 1


def test_skipped_layers_do_nothing_until_they_are_back():
    model = two_tasks()
    model.set_active_adapters("a")
    whole = model(rows()).logits
    model.set_active_adapters("a", skip_layers=[0, 1])
    without = model(rows()).logits
    model.set_active_adapters(None)
    close(without, model(rows(), head="a").logits)
    model.set_active_adapters("a", skip_layers=None)
    close(model(rows()).logits, whole)


# ---- training


def test_the_loss_of_a_model_in_training_holds_its_fusion_near_the_identity():
    model = two_tasks()
    fused = Fuse("a", "b")
    model.add_adapter_fusion(fused)
    model.add_classification_head("c")
    model.train_adapter_fusion(fused)
    assert model.active_head == "c"
    labels = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        for _, _, layer in model.base.fusion_layers("a,b"):
            layer.value.weight.mul_(1.5)
    plain = model(rows(), labels=labels).loss
    trained = model.train()(rows(), labels=labels).loss
    values = [layer.value.weight for _, _, layer in model.base.fusion_layers("a,b")]
    penalty = sum(0.01 * (torch.eye(32) - value).square().sum() for value in values)
    close(trained, plain + penalty)
    with pytest.raises(UserError, match="there is no Fuse in it"):
        model.train_adapter_fusion("a")


def test_names_in_a_list_within_a_list_are_fused_as_in_the_oldest_versions():
    model = two_tasks()
    model.add_adapter("c")
    model.add_fusion(["a", "b"], "dynamic")
    for setup, meant in (
        ([["a", "b"]], Stack(Fuse("a", "b"))),
        (["c", ["a", "b"]], Stack("c", Fuse("a", "b"))),
    ):
        model.train_fusion(setup)
        assert model.active_adapters == meant
        model.set_active_adapters(None)
        model.set_active_adapters(setup)
        assert model.active_adapters == meant
    model.train_fusion(["a", "b"])
    assert model.active_adapters == Fuse("a", "b")
    model.set_active_adapters(["a", "b"])
    assert model.active_adapters == Stack("a", "b")


def test_training_an_adapter_freezes_all_but_it_and_the_heads():
    model = two_tasks()
    model.train_adapter("a")
    for name, parameter in model.named_parameters():
        own = ".adapter_layer.a." in name or name.startswith("heads.")
        assert parameter.requires_grad == own, name


def test_a_state_holds_shared_parameters_once_and_fills_them_all():
    model = small()
    model.add_adapter("a", config="compacter[reduction_factor=4]")
    shaken(model, "a")
    state = model.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    other = small(seed=5)
    other.add_adapter("a", config="compacter[reduction_factor=4]")
    other.load_state_dict(state)
    model.set_active_adapters("a")
    other.set_active_adapters("a")
    close(other(rows()).last_hidden_state, model(rows()).last_hidden_state)


@pytest.mark.parametrize(
    "config",
    [
        "scaled_par_bn",
        "prefix_tuning[prefix_length=3]",
        "ia3",
        "unipelt",
        "loreft",
        "noreft[suffix_positions=1]",
        "vera",
        "dora",
        "dvora",
        "double_seq_bn_inv",
        "prompt_tuning[prompt_length=2]",
    ],
)
def test_every_method_is_added_by_name_and_says_something_else(config):
    model = small("t5")
    given = {"input_ids": rows(), "labels": rows(4, 5)}
    plain = model(**given).logits
    model.add_adapter("a", config=config, set_active=True)
    if "reft" not in config:  # these do something from birth, and their signs are no weights
        shaken(model, "a")
    assert not torch.allclose(model(**given).logits, plain)
    model.delete_adapter("a")
    close(model(**given).logits, plain)


def test_choices_are_given_as_rows_of_rows():
    model = small()
    model.add_multiple_choice_head("m", num_choices=2)
    ids = rows().view(2, 2, 7)
    mask = MASK.view(2, 2, 7)
    answer = model(ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    assert answer.logits.shape == (2, 2)
    close(answer.logits[1], model(ids[1:], attention_mask=mask[1:]).logits[0])


def test_inputs_that_are_missing_are_named():
    with pytest.raises(UserError, match="give input_ids"):
        small()()


def test_an_adapter_and_its_head_move_to_another_type_and_answer_still():
    model, tagged = two_tasks(), rows()
    model.set_active_adapters("a")
    before = model(tagged, labels=torch.tensor([0, 1, 0, 1]))
    model.adapter_to("a", dtype=torch.float64)
    types = {p.dtype for _, _, part in model.base.parts("a") for p in part.parameters()}
    assert types == {p.dtype for p in model.heads["a"].parameters()} == {torch.float64}
    assert {p.dtype for _, p in model.base.base_parameters()} == {torch.float32}
    after = model(tagged, labels=torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.loss, before.loss)
    model.add_adapter_fusion("a,b")
    model.adapter_fusion_to(Fuse("a", "b"), dtype=torch.bfloat16)
    assert {v.dtype for v in model.base.fusion_state("a,b").values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="no adapter is called 'x'"):
        model.adapter_to("x", dtype=torch.float64)


def test_a_fusion_is_called_after_what_it_fuses():
    model = two_tasks()
    model.add_adapter_fusion(["a", "b"], name="a,b")
    assert list(model.base.fusions) == ["a,b"]
    with pytest.raises(UserError, match="name='mine': a fusion is called after what it fuses"):
        model.add_adapter_fusion(["b", "a"], name="mine")


def test_names_become_a_composition_as_the_library_reads_them():
    assert ac.parse_composition("a") == Stack("a")
    assert ac.parse_composition(["a", ["b", "c"]]) == Stack("a", Fuse("b", "c"))
    assert ac.parse_composition("Parallel(a, b)") == ac.parse_composition(Parallel("a", "b"))
    assert ac.parse_composition(None) is None


def test_a_head_is_added_by_its_dictionary():
    model = small()
    config = {"head_type": "tagging", "num_labels": 2, "label2id": {"O": 0, "B": 1}}
    model.add_prediction_head_from_config("tags", config, set_active=False)
    assert model.active_head != "tags"
    assert model.get_labels("tags") == ["O", "B"]
    assert config["head_type"] == "tagging"


def test_adapters_of_several_tasks_share_their_matrices_until_they_are_loaded_again():
    assert issubclass(MTLLoRAConfig, MultiTaskConfig)
    assert not isinstance(LoRAConfig(), MultiTaskConfig)
    model = small()
    for name in "ab":
        model.add_adapter(name, config=MTLLoRAConfig(r=2))
    model.share_parameters(MultiTask("a", "b"))
    a, b = ([part for _, _, part in model.base.parts(name)] for name in "ab")
    assert all(
        x.lora_A is y.lora_A and x.weights is not y.weights for x, y in zip(a, b, strict=True)
    )
