"""JSONL files to examples, examples to batches."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.dataset import AnswerDataset, Batch, collate, evaluation_rows
from graftwerk.data.encoding import Encoder, Example, Label
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError

tokenizer = build_tokenizer("word", ["a b c d e f g h"])
short = Encoder(TaskTemplate("short", "{question} {answer}"), tokenizer, 6)
long = Encoder(TaskTemplate("long", "{question} {answer}"), tokenizer, 60)


def jsonl(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def test_examples_come_back_as_they_were_encoded_in_the_order_of_the_files(tmp_path):
    rows = [
        {"taskname": "long", "question": "a " * (n + 1), "answer": "b " * (n % 3 + 1)}
        for n in range(20)
    ]
    rows[7]["taskname"] = "short"
    files = [jsonl(tmp_path / "1", *rows[:7]), jsonl(tmp_path / "2", *rows[7:])]
    dataset = AnswerDataset(files, {"long": long, "short": short})
    expected = [long.encode(row)[0] for row in rows if row is not rows[7]]
    assert [dataset[index] for index in range(len(dataset))] == expected
    assert dataset.report.rows == 20
    assert dataset.report.dropped == {"longer than encoder_seq_length 6, truncate_field is null": 1}
    assert dataset.report.kept == 19
    assert dataset.report.labels == sum(len(example.labels) for example in expected)
    assert dataset.report.longest == max(len(example.tokens) + 1 for example in expected)


def test_rows_of_other_tasks_are_dropped_and_counted(tmp_path):
    row = {"question": "a", "answer": "b"}
    path = jsonl(tmp_path / "x", row | {"taskname": "other"}, row | {"taskname": "long"})
    dataset = AnswerDataset([path], {"long": long})
    assert len(dataset) == 1
    assert sum(dataset.report.dropped.values()) == 1
    assert "'other'" in next(iter(dataset.report.dropped))


def test_a_row_needs_no_taskname_where_there_is_one_task(tmp_path):
    path = jsonl(tmp_path / "x", {"question": "a", "answer": "b"})
    assert len(AnswerDataset([path], {"long": long})) == 1
    with pytest.raises(UserError, match="line 1: no field 'taskname'"):
        AnswerDataset([path], {"long": long, "short": short})


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"question": "a", "answer": "b"}', "{oops"], ["line 2", "not valid JSON"]),
        (['{"question": "a", "answer": "b"}', "", "[1]"], ["line 3", "list"]),
        (['{"question": "a"}'], ["line 1", "answer"]),
        (['{"question": "a", "answer": ["b"]}'], ["line 1", "answer", "list"]),
        ([], ["empty"]),
        (['{"question": "a", "answer": ""}'], ["line 1", "empty answer", "unlabelled: drop"]),
    ],
)
def test_a_wrong_file_is_named_with_line_and_reason(tmp_path, lines, words):
    path = jsonl(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(UserError) as error:
        AnswerDataset([path], {"long": long})
    assert all(word in str(error.value) for word in ["rows.jsonl", *words]), str(error.value)


def test_a_row_without_a_label_is_an_error_or_dropped(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": " "}]
    path = jsonl(tmp_path / "x", *rows)
    with pytest.raises(UserError, match="x, line 2: empty answer: nothing is to be learned"):
        AnswerDataset([path], {"long": long})
    dataset = AnswerDataset([path], {"long": long}, drop_unlabelled=True)
    assert (len(dataset), dataset.report.dropped) == (1, {"empty answer": 1})


def test_files_of_one_source_are_counted_together(tmp_path):
    row = {"question": "a", "answer": "b"}
    counts = {"a": 2, "b": 3, "c": 1}
    files = [str(jsonl(tmp_path / name, *[row] * count)) for name, count in counts.items()]
    dataset = AnswerDataset([files[:2], files[2]], {"long": long})
    assert dataset.sizes == [5, 1]
    assert [dataset.source_of(n) for n in range(6)] == [0] * 5 + [1]


def test_a_batch_tells_where_its_labels_are_from(tmp_path):
    examples = [long.encode({"question": "a", "answer": text})[0] for text in ("b c", "d")]
    batch = collate(examples, origins=[1, 0])
    assert batch.origins is not None
    assert batch.origins.tolist() == [1, 1, 1, 0, 0]
    spans = [Example([1, 2], span=(0, 1)), Example([1], span=(0, 0))]
    assert collate(spans, origins=[2, 1]).origins.tolist() == [2, 1, 2, 1]  # pyright: ignore
    assert len(collate([], filler=examples[0], origins=[]).origins) == 3  # pyright: ignore
    assert collate(examples).origins is None


def test_evaluation_rows_keep_their_ids_or_get_their_number(tmp_path):
    path = jsonl(tmp_path / "x", {"id": "q7", "question": "a"}, {"question": "b"})
    assert [row["id"] for row in evaluation_rows(path)] == ["q7", "1"]


examples = st.lists(st.integers(1, 50), min_size=1, max_size=9).flatmap(
    lambda tokens: st.builds(
        Example,
        st.just(tokens),
        st.lists(
            st.builds(Label, st.integers(0, len(tokens) - 1), st.integers(1, 50), st.just(0.5)),
            min_size=1,
            max_size=4,
        ),
    )
)


@given(st.lists(examples, min_size=1, max_size=5), st.sampled_from([1, 4, 8]))
def test_collating_keeps_every_token_and_label(rows, multiple):
    batch = collate(rows, pad=0, multiple=multiple)
    longest = max(len(row.tokens) for row in rows)
    height, width = batch.tokens.shape
    assert height == len(rows)
    assert width % multiple == 0
    assert longest <= width < longest + multiple
    for row, tokens in zip(rows, batch.tokens.tolist(), strict=True):
        assert tokens[: len(row.tokens)] == row.tokens
        assert not any(tokens[len(row.tokens) :])
    found = zip(
        batch.label_positions.tolist(), batch.labels.tolist(), batch.weights.tolist(), strict=True
    )
    expected = [
        (r * width + x.position, x.token, 0.5) for r, row in enumerate(rows) for x in row.labels
    ]
    assert list(found) == expected
    assert batch.num_rows == len(rows)
    assert batch.num_tokens == sum(len(row.tokens) for row in rows)
    assert batch.positions is None
    assert batch.end is None


def test_a_filler_has_a_token_but_no_row_and_no_label():
    filler = collate([], pad=3)
    assert filler.tokens.tolist() == [[3]]
    assert filler.labels.shape == filler.label_positions.shape == filler.weights.shape == (0,)
    assert (filler.num_rows, filler.num_tokens) == (0, 0)


def test_a_batch_moves_whole():
    batch = collate([Example([1, 2], [Label(1, 2)])])
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if torch.is_tensor(value)]
    assert len(tensors) == 4
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.num_rows, moved.num_tokens) == (1, 2)


def test_a_batch_built_by_hand_counts_its_rows_and_tokens():
    nothing = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        torch.zeros(2, 3, dtype=torch.int64), None, None, nothing, nothing, nothing.float()
    )
    assert (batch.num_rows, batch.num_tokens) == (2, 6)
