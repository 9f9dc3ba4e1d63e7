"""Prediction heads: the layers of AdapterHub's files, and losses by their formulas."""

import math

import pytest
import torch

from graftwerk.errors import UserError
from graftwerk.models.heads import States, build_head

HIDDEN = 8
LAYERS = {  # of AdapterHub's files: number and name -> shape
    ("classification", 3): {"1.weight": (8, 8), "1.bias": (8,), "4.weight": (3, 8), "4.bias": (3,)},
    ("multiple_choice", 2): {
        "1.weight": (8, 8),
        "1.bias": (8,),
        "4.weight": (1, 8),
        "4.bias": (1,),
    },
    ("tagging", 3): {"1.weight": (3, 8), "1.bias": (3,)},
    ("question_answering", 2): {"1.weight": (2, 8), "1.bias": (2,)},
    ("masked_lm", 11): {
        "0.weight": (8, 8),
        "0.bias": (8,),
        "2.weight": (8,),
        "2.bias": (8,),
        "3.weight": (11, 8),
        "3.bias": (11,),
    },
    ("causal_lm", 11): {"0.weight": (11, 8)},
}


def head_of(kind, count=3, **settings):
    torch.manual_seed(0)
    size = "vocab_size" if kind.endswith("_lm") else "num_labels"
    size = "num_choices" if kind == "multiple_choice" else size
    return build_head({"head_type": kind, size: count, **settings}, HIDDEN).eval()


def states_of(rows=2, length=5, **more):
    hidden = torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(1))
    return States(hidden, lambda: hidden[:, 0], **more)


@pytest.mark.parametrize(("kind", "count"), LAYERS)
def test_layers_are_numbered_as_in_adapterhubs_files(kind, count):
    head = head_of(kind, count)
    state = head.file_state(torch.zeros(0))
    assert {key: tuple(value.shape) for key, value in state.items()} == LAYERS[kind, count]


def test_classification_is_two_layers_with_tanh_over_the_rows_state():
    head, states = head_of("classification"), states_of()
    inner = torch.tanh(states.hidden[:, 0] @ head[1].weight.T + head[1].bias)
    expected = inner @ head[4].weight.T + head[4].bias
    given = {"labels": torch.tensor([2, 0])}
    out = head(states, given)
    torch.testing.assert_close(out["logits"], expected)
    loss = -expected.log_softmax(-1)[[0, 1], [2, 0]].mean()
    torch.testing.assert_close(out["loss"], loss)


def test_one_label_is_a_number_by_squared_error():
    head, states = head_of("classification", 1), states_of()
    out = head(states, {"labels": torch.tensor([2, 0])})
    errors = out["logits"][:, 0] - torch.tensor([2.0, 0.0])
    torch.testing.assert_close(out["loss"], errors.square().mean())


def test_several_labels_of_a_row_are_judged_apart():
    head, states = head_of("multilabel_classification"), states_of()
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    out = head(states, {"labels": labels})
    sure = torch.sigmoid(out["logits"])
    expected = -torch.where(labels == 1, sure.log(), (1 - sure).log()).mean()
    torch.testing.assert_close(out["loss"], expected)


def test_choices_are_rows_that_belong_together():
    head, states = head_of("multiple_choice", 2), states_of(rows=4)
    out = head(states, {"labels": torch.tensor([1, 0])})
    assert out["logits"].shape == (2, 2)
    chosen = out["logits"].log_softmax(-1)[[0, 1], [1, 0]]
    torch.testing.assert_close(out["loss"], -chosen.mean())
    with pytest.raises(UserError, match="2 choices got 3 rows"):
        head(states_of(rows=3), {})


def test_tags_of_padding_do_not_count():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    head, states = head_of("tagging"), states_of(mask=mask)
    labels = torch.tensor([[0, 1, 2, 0, -100], [1, 1, 2, 2, 2]])
    out = head(states, {"labels": labels})
    counted = [(0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, 0), (1, 0, 1), (1, 1, 1)]
    chosen = [out["logits"].log_softmax(-1)[place] for place in counted]
    torch.testing.assert_close(out["loss"], -torch.stack(chosen).mean())


def test_positions_behind_the_row_are_ignored():
    head, states = head_of("question_answering", 2), states_of()
    start, end = torch.tensor([1, 2]), torch.tensor([3, 900])
    out = head(states, {"start_positions": start, "end_positions": end})
    first = -out["start_logits"].log_softmax(-1)[[0, 1], [1, 2]].mean()
    second = -out["end_logits"].log_softmax(-1)[0, 3]
    torch.testing.assert_close(out["loss"], (first + second) / 2)
    assert end.tolist() == [3, 900]
    nowhere = {"start_positions": torch.tensor([9, 9]), "end_positions": torch.tensor([9, 9])}
    assert head(states, nowhere)["loss"].item() == 0


def test_a_causal_head_says_the_next_word_and_a_masked_one_this():
    labels = torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 7, 8]])
    causal, states = head_of("causal_lm", 11), states_of()
    out = causal(states, {"labels": labels})
    sure = out["logits"].log_softmax(-1)
    said = [(0, 0, 2), (0, 1, 3), (1, 0, 5), (1, 1, 6), (1, 2, 7), (1, 3, 8)]
    torch.testing.assert_close(out["loss"], -torch.stack([sure[place] for place in said]).mean())
    masked = head_of("masked_lm", 11)
    out = masked(states, {"labels": labels})
    sure = out["logits"].log_softmax(-1)
    said = [(0, 0, 1), (0, 1, 2), (0, 2, 3), *((1, i, 4 + i) for i in range(5))]
    torch.testing.assert_close(out["loss"], -torch.stack([sure[place] for place in said]).mean())


def test_a_tied_projection_is_the_embeddings_and_in_the_file_all_the_same():
    words = torch.randn(11, HIDDEN)
    head = build_head({"head_type": "causal_lm", "vocab_size": 11}, HIDDEN, embeddings=words)
    assert not list(head.parameters())
    states = states_of(embeddings=words, before_words=lambda x: 2 * x)
    torch.testing.assert_close(head(states, {})["logits"], 2 * states.hidden @ words.T)
    state = head.file_state(words)
    assert torch.equal(state["0.weight"], words)
    head.load_file_state(state)


def test_weights_of_another_head_are_refused_by_name():
    with pytest.raises(UserError, match=r"no classification head: 4\.bias is \[3\], not \[2\]"):
        head_of("classification", 2).load_file_state(head_of("classification", 3).state_dict())


def test_labels_have_names_and_the_dictionary_is_whole():
    config = head_of("classification", 2).config
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}
    assert (config["layers"], config["use_pooler"], config["dropout_prob"]) == (2, False, None)
    named = head_of("tagging", 2, id2label={0: "O", 1: "B"})
    assert named.config["label2id"] == {"O": 0, "B": 1}
    assert "id2label" not in named.config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"head_type": "pooling"}, "head_type 'pooling' is not known"),
        ({"head_type": "tagging", "labels": 3}, "tagging head has no key 'labels'"),
        ({"head_type": "classification", "activation_function": "x"}, "'x' is not known"),
        ({"head_type": "classification", "num_labels": 0}, "num_labels=0 of a classification"),
        ({"head_type": "tagging", "num_labels": True}, "num_labels=True"),
        ({"head_type": "tagging", "layers": 0}, "layers=0 of a tagging head"),
        ({"head_type": "causal_lm", "vocab_size": 5, "layers": -1}, "layers=-1"),
        ({"head_type": "multiple_choice", "num_choices": 0}, "num_choices=0"),
        ({"head_type": "question_answering", "num_labels": 3}, "num_labels=3 .* must be 2"),
        ({"head_type": "tagging", "num_labels": 3, "id2label": {0: "O", 1: "B"}}, "num_labels=3"),
        ({"head_type": "tagging", "id2label": {1: "O", 2: "B"}}, "id2label=.* each of 0 to 1"),
        ({"head_type": "tagging", "id2label": {0: "O", 1: "O"}}, "id2label="),
        ({"head_type": "multiple_choice", "id2label": {0: "a"}}, "num_choices=2"),
        ({"head_type": "tagging", "id2label": {"O": 0, "B": 1}}, "labels by their numbers"),
    ],
)
def test_a_wrong_dictionary_is_refused(config, said):
    with pytest.raises(UserError, match=said):
        build_head(config, HIDDEN)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("classification", {"labels": [0, 3]}, "labels holds 3, and the head has 3 labels"),
        ("classification", {"labels": [0, -1]}, "labels holds -1"),
        ("tagging", {"labels": [[0] * 4 + [7]] * 2}, "labels holds 7"),
        ("classification", {"labels": [0, 1, 2]}, r"labels has shape \[3\], .* for \[2\]"),
        ("tagging", {"labels": [0, 1]}, r"labels has shape \[2\], .* for \[2, 5\]"),
        ("masked_lm", {"labels": [[1] * 4] * 2}, r"labels has shape \[2, 4\]"),
        ("causal_lm", {"labels": [[1] * 4] * 2}, r"labels has shape \[2, 4\]"),
        ("multilabel_classification", {"labels": [1, 0]}, r"for \[2, 3\]"),
        (
            "question_answering",
            {"start_positions": [0, 1], "end_positions": [1]},
            r"end_positions has shape \[1\], .* for \[2\]",
        ),
    ],
)
def test_labels_that_do_not_fit_are_named_in_one_line(kind, given, said):
    head = head_of(kind, 2 if kind == "question_answering" else 3)
    labels = {key: torch.tensor(value) for key, value in given.items()}
    with pytest.raises(UserError, match=said) as caught:
        head(states_of(mask=torch.ones(2, 5)), labels)
    assert "\n" not in str(caught.value)


def test_too_few_numbers_are_refused_and_not_spread_over_the_rows():
    with pytest.raises(UserError, match=r"labels has shape \[1\]"):
        head_of("classification", 1)(states_of(), {"labels": torch.tensor([0.5])})


def test_a_fresh_head_is_near_indifferent():
    out = head_of("classification", 3)(states_of(), {"labels": torch.tensor([0, 1])})
    assert abs(out["loss"].item() - math.log(3)) < 0.2
