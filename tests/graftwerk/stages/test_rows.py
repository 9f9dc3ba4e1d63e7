"""Rows of supervised fine-tuning and conversations, from files to learned adapters and answers."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from graftwerk.checkpoints import load_tokenizer
from graftwerk.errors import UserError
from graftwerk.stages import eval as evaluation
from graftwerk.stages import learning
from tests.graftwerk.learning_stage import base, cfg, read_metrics, rows

__all__ = ["base", "cfg", "rows"]

CHAT = """{% for m in messages %}{{ 'question : ' if m.role == 'user' else 'answer : ' }}
{{- m.content + (eos_token if m.role == 'assistant' else ' ') }}{% endfor %}
{%- if add_generation_prompt %}{{ 'answer : ' }}{% endif %}"""


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def as_sft(row):
    return {"input": row["context"], "output": row["answer"], "source": "made"}


def as_chat(row):
    said = [("user", row["context"]), ("assistant", row["answer"])]
    return {"messages": [{"role": role, "content": text} for role, text in said], "source": "made"}


@pytest.fixture(params=["sft", "chat"])
def stage(request, cfg, base, tmp_path):
    """The stage on the same rows in another form, and the questions of `eval`."""
    form = as_sft if request.param == "sft" else as_chat
    model = cfg.model
    given = [json.loads(line) for line in Path(model.data.train_ds[0]).read_text().splitlines()]
    path = write(tmp_path / "train.jsonl", map(form, given))
    test = write(
        tmp_path / "test.jsonl", ({"id": n, **form(row)} for n, row in enumerate(given[:6]))
    )
    model.task_templates, model.new_tasks = [], []
    model.data.train_ds = model.data.validation_ds = [path]
    if request.param == "sft":
        model.data.prompt_template = "{input} answer : {output}"
        model.data.label_key = "output"
    else:
        model.data.chat = True
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = CHAT
        own = tmp_path / "base"
        own.mkdir()
        for file in base.iterdir():
            (own / file.name).write_bytes(file.read_bytes())
        tokenizer.save_pretrained(own)
        model.language_model_path = str(own)
    cfg.trainer.max_epochs = 1
    return cfg, test


def test_they_are_learned_answered_and_carry_their_metadata(stage, tmp_path):
    cfg, test = stage
    assert learning.run("adapter_learning", cfg) == 0
    losses = [float(row["val_loss"]) for row in read_metrics(cfg) if row["val_loss"]]
    assert losses[-1] < losses[0]
    data = {
        k: v for k, v in cfg.model.data.items() if k in ("chat", "prompt_template", "label_key")
    }
    asked = OmegaConf.create(
        {
            "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "precision": 32},
            "exp_manager": {"explicit_log_dir": str(tmp_path / "eval")},
            "model": {
                "seed": 1,
                "language_model_path": cfg.model.language_model_path,
                "adapters": [{"name": "mine", "path": cfg.model.nemo_path}],
                "evaluate_base": False,
                "task_templates": [],
                "encoder_seq_length": 64,
                "data": {"test_ds": [test], "ground_truth_ds": [test], "batch_size": 4, **data},
                "inference": {"greedy": True, "tokens_to_generate": 2, "end_strings": []},
            },
        }
    )
    assert evaluation.run(asked) == 0
    lines = (tmp_path / "eval" / "mine" / "predictions.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    gold = [json.loads(line) for line in Path(test).read_text().splitlines()]
    wanted = [row.get("output") or row["messages"][-1]["content"] for row in gold]
    assert [row["answer"] for row in said] == [[answer] for answer in wanted]
    assert all(row["source"] == "made" for row in said)
    assert all(row.keys() == {"id", "source", "pred", "answer"} for row in said)


def test_a_template_with_virtual_tokens_needs_a_method_that_makes_them(cfg):
    template = cfg.model.task_templates[0]
    template.prompt_template = "<|VIRTUAL_PROMPT_0|>" + template.prompt_template
    template.total_virtual_tokens = 3
    template.virtual_token_splits = [3]
    with pytest.raises(UserError, match="adapters put 0 virtual tokens before each row"):
        learning.run("adapter_learning", cfg)
    cfg.model.peft = {"peft_scheme": "prompt", "prompt_tuning": {"virtual_tokens": 3}}
    cfg.trainer.max_epochs, cfg.trainer.max_steps = -1, 1
    assert learning.run("peft", cfg) == 0
