"""The data_prep stage as a job runs it: files, report, second runs, what is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from graftwerk.data.prepared import prepare
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from graftwerk.stages import data_prep

SPLITS = ("train", "val", "test", "test_ground_truth")


def squad_file(path, paragraphs=10):
    data = [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": f"text {n} " * (n + 1),
                    "qas": [
                        {"id": f"q{n}", "question": f"what {n}?", "answers": [{"text": f"a{n}"}]}
                    ],
                }
            ],
        }
        for n in range(paragraphs)
    ]
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


@pytest.fixture
def config(tmp_path):
    return OmegaConf.create(
        {
            "run": {"results_dir": str(tmp_path / "results")},
            "kind": "squad",
            "source": str(squad_file(tmp_path / "x.json")),
            "output_dir": str(tmp_path / "out"),
            "prefix": "squad",
            "tokenizer": None,
            "seed": 1,
            "split": None,
            "unanswerable_answer": None,
        }
    )


def report_of(config):
    path = Path(config.run.results_dir) / "results" / "report.json"
    return json.loads(path.read_text())["outputs"]


def contents(config):
    folder = Path(config.output_dir)
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def stamps(config):
    return {path: path.stat().st_mtime_ns for path in Path(config.output_dir).glob("*.jsonl")}


def test_files_report_and_table_agree(config, capsys):
    data_prep.run(config)
    (report,) = report_of(config)
    files = contents(config)
    assert set(files) == {f"squad_{name}.jsonl" for name in SPLITS} == set(report["files"])
    for name, entry in report["files"].items():
        assert entry["rows"] == files[name].count(b"\n")
        assert entry["bytes"] == len(files[name])
    assert report["rows_in"] == 10
    assert report["rows_out"] == {"train": 8, "val": 1, "test": 1}
    table = capsys.readouterr().out
    assert "written to train" in table
    assert "10" in table


def test_lengths_are_nearest_ranks_in_characters(config, tmp_path):
    config.source = str(squad_file(tmp_path / "x.json", paragraphs=40))
    config.split = {"train": 40}
    data_prep.run(config)
    lengths = report_of(config)[0]["lengths"]["train"]
    contexts = sorted(len(f"text {n} " * (n + 1)) for n in range(40))
    assert lengths["context"]["characters"] == {
        "median": contexts[19], "p95": contexts[37], "max": contexts[39],
    }  # fmt: skip
    assert lengths["answer"]["characters"] == {"median": 3, "p95": 3, "max": 3}
    assert "tokens" not in lengths["context"]


def test_with_a_tokenizer_lengths_are_in_tokens_too(config, tmp_path):
    build_tokenizer("word", ["text what a ?"]).save_pretrained(tmp_path / "tokenizer")
    config.tokenizer = str(tmp_path / "tokenizer")
    config.split = {"train": 10}
    data_prep.run(config)
    lengths = report_of(config)[0]["lengths"]["train"]
    assert lengths["context"]["tokens"]["max"] == 20
    assert lengths["question"]["tokens"] == {"median": 3, "p95": 3, "max": 3}
    assert lengths["row"]["tokens"]["max"] == 20 + 3 + 1


def test_a_second_run_leaves_the_files_and_reports_again(config, capsys):
    data_prep.run(config)
    before, report = stamps(config), report_of(config)
    Path(config.run.results_dir, "results", "report.json").unlink()
    data_prep.run(config)
    assert stamps(config) == before
    assert report_of(config) == report
    assert "prepared already" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["seed", "split", "source", "unanswerable_answer"])
def test_a_changed_config_or_source_prepares_anew(config, tmp_path, key):
    data_prep.run(config)
    before = contents(config)
    if key == "source":
        squad_file(tmp_path / "x.json", paragraphs=11)
    elif key == "unanswerable_answer":
        document = json.loads((tmp_path / "x.json").read_text())
        for article in document["data"]:
            article["paragraphs"][0]["qas"][0]["is_impossible"] = True
        (tmp_path / "x.json").write_text(json.dumps(document))
        config.unanswerable_answer = "none"
    else:
        config[key] = {"seed": 2, "split": {"train": 5, "test": 5}}[key]
    data_prep.run(config)
    assert contents(config) != before


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "report gone", "report broken"])
def test_harmed_files_are_prepared_anew(config, harm):
    data_prep.run(config)
    before = contents(config)
    path = Path(config.output_dir) / "squad_test.jsonl"
    report = Path(config.output_dir) / "squad_report.json"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif harm == "changed":
        path.write_bytes(path.read_bytes().replace(b"what", b"whut"))
    elif harm == "gone":
        path.unlink()
    elif harm == "report gone":
        report.unlink()
    else:
        report.write_text('{"fingerprint":')
    data_prep.run(config)
    assert contents(config) == before


def test_a_failure_leaves_the_earlier_files_and_nothing_half_done(config, tmp_path, monkeypatch):
    data_prep.run(config)
    before = contents(config)
    config.seed = 2

    def breaking(plan, output_dir, tokenizer):
        rows = plan.rows

        def broken(sieve):
            for count, row in enumerate(rows(sieve)):
                if count == 4:
                    raise KeyboardInterrupt
                yield row

        object.__setattr__(plan, "rows", broken)
        return prepare(plan, output_dir, tokenizer)

    monkeypatch.setattr(data_prep, "prepare", breaking)
    with pytest.raises(KeyboardInterrupt):
        data_prep.run(config)
    assert contents(config) == before
    left = {path.name for path in Path(config.output_dir).iterdir()}
    assert left == {*before, "squad_report.json"}


def test_a_source_without_training_rows_is_refused_and_nothing_written(config, tmp_path):
    squad_file(tmp_path / "x.json", paragraphs=0)
    with pytest.raises(UserError, match="nothing to train on"):
        data_prep.run(config)
    assert not list(Path(config.output_dir).glob("*"))
    assert not Path(config.run.results_dir).exists()


def test_an_unknown_kind_is_refused(config):
    config.kind = "sqaud"
    with pytest.raises(UserError, match=r"data_prep\.kind.*sqaud.*squad, custom, synthetic"):
        data_prep.run(config)


def in_a_process(config, tmp_path, *check):
    path = tmp_path / "job.yaml"
    path.write_text(OmegaConf.to_yaml(config))
    source = str(Path(data_prep.__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-u", *(check or ["-m", "graftwerk", "data_prep"]), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
        check=False,
    )


def test_the_command_exits_with_0_or_with_2_and_one_line(config, tmp_path):
    done = in_a_process(config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    config.source = str(tmp_path / "nowhere.json")
    refused = in_a_process(config, tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "data_prep.source" in refused.stderr
    assert "nowhere.json" in refused.stderr


@pytest.mark.parametrize("kind", ["squad", "synthetic"])
def test_preparing_imports_no_heavy_library(config, tmp_path, kind):
    if kind == "synthetic":
        config.update({"kind": kind, "tasks": ["lookup"], "rows": {"train": 20}})
    code = (
        "import sys, yaml; from omegaconf import OmegaConf; from graftwerk.stages import data_prep;"
        "data_prep.run(OmegaConf.load(sys.argv[1]));"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pytorch_lightning', 'numpy'};"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = in_a_process(config, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_shipped_configs_hold_the_keys_of_the_docstring():
    documented = (data_prep.__doc__ or "").split("```yaml\n")[1].split("```")[0]
    keys = {line.split(":")[0] for line in documented.splitlines() if line[:1].isalpha()}
    folder = Path(__file__).parents[3] / "conf" / "data_prep"
    shipped = {name: set(yaml.safe_load((folder / f"{name}.yaml").read_text())) for name in
               ("squad", "custom", "synthetic")}  # fmt: skip
    assert set.union(*shipped.values()) - {"run"} == keys
    common = {"kind", "output_dir", "tokenizer", "seed"}
    assert shipped["squad"] - {"run"} == common | {
        "prefix",
        "source",
        "split",
        "unanswerable_answer",
    }
    assert shipped["synthetic"] - {"run"} == common | {"tasks", "rows"}
