"""Files are encoded once: what the cache gives is what encoding gives, whatever becomes of it."""

import errno
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.data import token_cache, tokenized
from graftwerk.data.dataset import AnswerDataset
from graftwerk.data.encoding import Encoder, RowReport
from graftwerk.data.jsonl import parts_of, read_rows
from graftwerk.data.question_answering import SpanEncoder
from graftwerk.data.seq2seq import Seq2SeqEncoder
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.token_cache import TokenCache, encoded_in_memory
from graftwerk.data.tokenized import Encoding, write_encoded
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from tests.graftwerk.tiny_families import TEMPLATE, bert_tokenizer
from tests.graftwerk.tiny_families import write_lines as write_text

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
word = build_tokenizer("word", [" ".join([*WORDS, "context question answer :"])])
bert = bert_tokenizer(WORDS)


def template(task, **more):
    return TaskTemplate.from_config({"taskname": task, "prompt_template": TEMPLATE} | more)


def encoders(family, limit=14):
    """Of two tasks, of which one cuts contexts that are too long and the other drops such rows."""
    if family == "bert":
        return {"cut": SpanEncoder(template("cut"), bert, limit, 2)}
    kind, more = (Encoder, ()) if family == "gpt" else (Seq2SeqEncoder, (7,))
    return {
        "cut": kind(template("cut", truncate_field="context"), word, limit, *more),
        "drop": kind(template("drop"), word, limit, *more),
    }


def write_lines(path, rows):
    return Path(write_text(path, rows))


def one_row(context="a b c", answer="b", task="cut"):
    return {"taskname": task, "context": context, "question": "d", "answer": answer}


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
rows = st.lists(
    st.builds(one_row, texts, st.sampled_from(WORDS), st.sampled_from(["cut", "drop", "other"])),
    min_size=1,
    max_size=12,
)


def assert_same(one, other):
    """Two data sets hold the same, to the type."""
    assert (len(one), one.sizes, one.report) == (len(other), other.sizes, other.report)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    for number in range(len(one)):
        assert one.source_of(number) == other.source_of(number)
        for mine, its in zip(one.arrays(number), other.arrays(number), strict=True):
            np.testing.assert_equal(mine, its)
            assert getattr(mine, "dtype", None) == getattr(its, "dtype", None)


@pytest.mark.parametrize("family", ["gpt", "t5", "bert"])
@settings(max_examples=8)
@given(files=st.lists(rows, min_size=3, max_size=3), at_once=st.sampled_from([1, 30, 2**20]))
def test_rows_of_the_cache_are_those_that_are_encoded_in_memory(
    tmp_path_factory, family, files, at_once
):
    folder = tmp_path_factory.mktemp("rows")
    paths = [str(write_lines(folder / f"{n}.jsonl", part)) for n, part in enumerate(files)]
    given = [paths[0], paths[1:]], encoders(family), False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenized, "NUMBERS_AT_ONCE", at_once)  # so many chunks
        patch.setattr(tokenized, "ROWS_AT_ONCE", 3)
        made = AnswerDataset(*given, cache=TokenCache(folder / "cache"))
    again = AnswerDataset(*given, cache=TokenCache(folder / "cache"))
    expected = AnswerDataset(*given)
    assert_same(made, expected)
    assert_same(again, expected)


@pytest.fixture
def path(tmp_path):
    return write_lines(tmp_path / "rows.jsonl", [one_row(answer=word) for word in WORDS])


def files_of(cache):
    (entry,) = [p for p in Path(cache.folder).iterdir() if p.is_dir()]
    return entry


def read(path, folder, **how):
    """The tokens of a file through a cache, and what the cache said."""
    said: list[str] = []
    dataset = AnswerDataset(
        [path], encoders("gpt"), cache=TokenCache(folder, say=said.append, **how)
    )
    return [row.tokens for row in dataset], said


def test_a_file_is_encoded_once(path, tmp_path, monkeypatch):
    first, said = read(path, tmp_path / "cache")
    assert "8 rows encoded" in said[0]
    monkeypatch.setattr(Encoder, "encode_all", None)
    renamed = path.rename(tmp_path / "other.jsonl")  # it is the content that counts
    assert read(renamed, tmp_path / "cache") == (first, [])


def test_a_changed_file_is_encoded_anew_and_others_are_not(path, tmp_path, monkeypatch):
    other = write_lines(tmp_path / "other.jsonl", [one_row(answer="h")])
    cache = tmp_path / "cache"
    AnswerDataset([path, other], encoders("gpt"), cache=TokenCache(cache))
    write_lines(other, [one_row(answer="g")])
    written = []
    true = token_cache.write_encoded
    monkeypatch.setattr(
        token_cache, "write_encoded", lambda *given: written.append(given[1]) or true(*given)
    )
    dataset = AnswerDataset([path, other], encoders("gpt"), cache=TokenCache(cache))
    assert written == [other]
    assert dataset[8].labels[0].token == word.convert_tokens_to_ids("g")


def test_rows_are_mapped_and_not_copied(path, tmp_path):
    dataset = AnswerDataset([path], encoders("gpt"), cache=TokenCache(tmp_path / "cache"))
    one, two = dataset.arrays(0), dataset.arrays(0)
    for mine, its in ((one.tokens, two.tokens), (one.labels, two.labels)):
        assert np.shares_memory(mine, its)
        assert not mine.flags.writeable  # it is a file


def shorten(entry):
    (file,) = entry.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-40])


def flip(entry):
    (file,) = entry.glob("*.arrow")
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


def tell(entry, **changes):
    told = json.loads((entry / "entry.json").read_text())
    (entry / "entry.json").write_text(json.dumps({**told, **changes}))


DAMAGES = {
    "shorter": shorten,
    "one bit": flip,
    "without rows": lambda entry: next(entry.glob("*.arrow")).unlink(),
    "half a list": lambda entry: (entry / "entry.json").write_text('{"parts": {'),
    "no list": lambda entry: (entry / "entry.json").unlink(),
    "another list": lambda entry: (entry / "entry.json").write_text("[]"),
    "no parts": lambda entry: tell(entry, parts={}),
    "other reports": lambda entry: tell(entry, report={"rows": 8, "run": "it"}),
    "files elsewhere": lambda entry: tell(entry, parts={"../x.arrow": {"bytes": 0}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_noticed_and_made_anew(path, tmp_path, damage):
    first, _ = read(path, tmp_path / "cache")
    DAMAGES[damage](files_of(TokenCache(tmp_path / "cache")))
    again, said = read(path, tmp_path / "cache")
    assert again == first
    assert "rows encoded" in said[-1]
    assert read(path, tmp_path / "cache") == (first, [])
    left = [file.name for file in (tmp_path / "cache").iterdir() if file.name.startswith(".")]
    assert not left


def test_what_a_killed_process_left_is_removed(path, tmp_path):
    first, _ = read(path, tmp_path / "cache")
    entry = files_of(TokenCache(tmp_path / "cache"))
    left = entry.rename(entry.with_name(f".{entry.name}.0123456789ab"))
    assert read(path, tmp_path / "cache")[0] == first
    assert not left.exists()


def full(*given):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("reason", ["no folder can be there", "the disk is full"])
def test_without_a_cache_rows_stay_in_memory_and_one_line_says_so(
    path, tmp_path, monkeypatch, reason
):
    folder = tmp_path / "cache"
    if reason == "the disk is full":
        monkeypatch.setattr(token_cache, "write_encoded", full)
    else:
        folder = path / "cache"  # below a file
    said: list[str] = []
    cache = TokenCache(folder, say=said.append)
    datasets = [AnswerDataset([path], encoders("gpt"), cache=cache) for _ in range(2)]
    for dataset in datasets:
        assert_same(dataset, AnswerDataset([path], encoders("gpt")))
    (line,) = said
    assert "stay in memory" in line


def test_a_file_that_changes_while_it_is_read_is_not_kept(path, tmp_path, monkeypatch):
    true = token_cache.write_encoded

    def slow(coding, of, *given):
        written = true(coding, of, *given)
        write_lines(tmp_path / "new", [one_row(answer="g")]).replace(of)
        return written

    monkeypatch.setattr(token_cache, "write_encoded", slow)
    found, (line,) = read(path, tmp_path / "cache")
    assert len(found) == 1
    assert "changed while it was read" in line
    assert not list((tmp_path / "cache").glob("*/entry.json"))


def test_without_locks_the_first_to_finish_counts(path, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", full)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(read(path, tmp_path / "c")[0]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[row.tokens for row in AnswerDataset([path], encoders("gpt"))]] * 3
    assert len(list((tmp_path / "c").glob("*/entry.json"))) == 1


def test_a_wrong_row_is_named_and_leaves_no_entry(tmp_path):
    rows = write_lines(tmp_path / "x.jsonl", [one_row(), {"taskname": "cut", "question": "a"}])
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: no field 'context'"):
        read(rows, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize("leads", [True, False])
def test_of_several_at_once_one_encodes(path, tmp_path, monkeypatch, leads):
    monkeypatch.setattr(token_cache, "PATIENCE", 0.2)
    written, found = [], []
    true = token_cache.write_encoded
    monkeypatch.setattr(
        token_cache, "write_encoded", lambda *given: written.append(given[1]) or true(*given)
    )
    threads = [
        threading.Thread(target=lambda: found.append(read(path, tmp_path / "c", leads=leads)[0]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [path]
    assert found == [[row.tokens for row in AnswerDataset([path], encoders("gpt"))]] * 3


def test_others_of_a_host_let_the_first_encode(path, tmp_path):
    seen = {}

    def other():
        seen["said"] = read(path, tmp_path / "cache", leads=False)[1]

    thread = threading.Thread(target=other)
    thread.start()
    _, said = read(path, tmp_path / "cache")
    thread.join()
    assert "rows encoded" in said[-1]
    assert not any("rows encoded" in line for line in seen["said"])


@given(st.lists(st.sampled_from(["{}", "", '{"a": 1}', " "]), max_size=30), st.integers(1, 9))
def test_parts_of_a_file_are_its_lines_with_their_numbers(tmp_path_factory, lines, count):
    path = tmp_path_factory.getbasetemp() / "parts.jsonl"
    path.write_text("\n".join(lines))
    parts = parts_of(path, count)
    assert len(parts) <= count
    assert [row for part in parts for row in read_rows(path, part)] == list(read_rows(path))


def test_several_processes_give_what_one_gives(tmp_path):
    rows = [one_row(" ".join(WORDS[: n % 8 + 1]), WORDS[n % 7]) for n in range(200)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    coding, done = Encoding(encoders("gpt")), []
    files, report = write_encoded(coding, path, tmp_path, done.append, processes=2)
    assert [file.name for file in files] == ["00000-of-00002.arrow", "00001-of-00002.arrow"]
    expected = encoded_in_memory(coding, path)
    assert report == expected.report
    assert sum(done) == path.stat().st_size
    chunks = [c for file in files for c in token_cache._chunks(file, coding.fields)]
    for name in coding.fields:
        flat = [np.concatenate([c[name].flat for c in of]) for of in (chunks, expected.chunks)]
        np.testing.assert_array_equal(*flat)


@pytest.mark.long
def test_of_wrong_rows_in_several_processes_the_first_is_named(tmp_path):
    rows = [one_row() for _ in range(100)]
    rows[60] = rows[90] = {"taskname": "cut"}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="line 61: no field"):
        write_encoded(Encoding(encoders("gpt")), path, tmp_path, lambda size: None, processes=3)


def test_processes_are_as_many_as_the_size_of_the_file_is_worth(tmp_path, monkeypatch):
    path = tmp_path / "x"
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    found = []
    for size in (0, 31, 64, 100, 10_000):
        path.touch()
        monkeypatch.setattr("os.path.getsize", lambda path, size=size: size * 2**20)
        found.append(tokenized.worthwhile_processes(path))
    assert found == [1, 1, 2, 3, 4]


def test_reports_of_parts_join_to_the_whole():
    one, two = RowReport(rows=2, longest=5, tokens=7), RowReport(rows=1, longest=9, tokens=3)
    one.dropped["x"] += 1
    two.dropped["x"] += 2
    one.join(two)
    assert one == RowReport(rows=3, longest=9, tokens=10, dropped=one.dropped)
    assert one.dropped == {"x": 3}
