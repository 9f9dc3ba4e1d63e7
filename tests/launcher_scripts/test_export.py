"""The stage `export`: what it takes from learning stages, and what is refused before it runs."""

import pytest

LEARN = "adapter_learning.model.language_model_path=/base"
ADAPTER = "export.model.adapters=[{name: mine, path: /a}]"
BASE = "export.model.language_model_path=/base"


def test_export_takes_base_and_adapters_of_the_learning_stages(command):
    answer = command("stages=[adapter_learning,ia3_learning,export]", LEARN, f"ia3_{LEARN[8:]}")
    assert answer.code == 0, answer.lines
    assert answer.stages()[-3:] == ["adapter_learning", "ia3_learning", "export"]
    config = answer.config("export")
    assert config["model"]["language_model_path"] == "/base"
    assert [each["name"] for each in config["model"]["adapters"]] == [
        "adapter_learning",
        "ia3_learning",
    ]


@pytest.mark.parametrize(
    ("words", "last"),
    [
        ((), "peft"),
        (("export.format=adapterhub",), "adapterhub"),
        (("export.format=nemo",), "adapter.nemo"),
        (("export=merged",), "huggingface"),
        (("export=merged", "export.format=nemo"), "model.nemo"),
    ],
)
def test_each_form_has_a_place_of_its_own(command, words, last):
    answer = command("stages=export", BASE, ADAPTER, *words)
    assert answer.code == 0, answer.lines
    assert answer.config("export")["output_path"].endswith(f"/export_squad/results/{last}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("export.format=onnx",), "export.format: must be one of graftwerk, adapterhub"),
        (("export.merge=True",), "export.format: peft holds adapters and no model"),
        (("export.format=huggingface",), "export.format: huggingface holds a whole model"),
        (("export.format=nemo", "export.output_path=/a"), "export.output_path: /a must end in"),
        (("export.output_path=/a.nemo",), "export.output_path: /a.nemo must not end in .nemo"),
        (("export.dtype=int8",), "export.dtype: must be one of keep, fp32"),
    ],
)
def test_what_is_wrong_is_one_line(command, words, line):
    answer = command("stages=export", BASE, ADAPTER, *words)
    assert answer.code == 2
    assert len(answer.lines) == 1
    assert answer.lines[0].startswith(line)
    assert answer.written() == []


def test_a_revision_goes_with_the_base(command):
    words = ["export.model.language_model_path=org/name", "export.model.revision=v2", ADAPTER]
    answer = command("stages=export", *words)
    assert answer.code == 0, answer.lines
    assert answer.config("export")["model"]["revision"] == "v2"
    answer = command("stages=export", BASE, ADAPTER, "export.model.revision=v2")
    assert "export.model.revision: v2 goes with a name of the Hub" in answer.lines[0]


def test_export_alone_must_be_told_its_adapters(command, tmp_path):
    answer = command("stages=export", f"base_results_dir={tmp_path}/none")
    assert answer.code == 2
    assert "export.model.adapters: auto, but no learning stage says what it is; give a value" in (
        answer.lines
    )


def test_a_place_that_is_taken_is_refused_unless_it_may_be_replaced(command, tmp_path):
    for name in ("base", "a", "taken"):
        (tmp_path / name).mkdir()
    words = [
        "stages=export",
        "cluster_type=interactive",
        f"export.model.language_model_path={tmp_path}/base",
        f"export.model.adapters=[{{name: mine, path: {tmp_path}/a}}]",
        f"export.output_path={tmp_path}/taken",
        "dry_run=True",
    ]
    answer = command(*words)
    assert any("taken exists already: leave export out of stages" in line for line in answer.lines)
    answer = command(*words, "export.overwrite=True")
    assert not any("exists already" in line for line in answer.lines)
    assert answer.code == 0, answer.lines
