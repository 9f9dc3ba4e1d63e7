"""Settings of the property tests of this folder, and real questions."""

import json

import pytest
from hypothesis import settings
from transformers import AutoTokenizer

from graftwerk.data.dataset import AnswerDataset
from graftwerk.data.encoding import Encoder
from graftwerk.data.templates import TaskTemplate

# A loaded machine is no fault of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

PROMPT = "context: {context} question: {question} answer: {answer}"


@pytest.fixture(scope="session")
def questions(shared, tmp_path_factory):
    """1190 questions on 240 paragraphs in GPT-2's tokens."""
    path = tmp_path_factory.mktemp("rows") / "xquad.jsonl"
    articles = json.loads((shared / "data/squad/xquad.en.json").read_text("utf-8"))["data"]
    with open(path, "w") as file:
        for paragraph in (p for article in articles for p in article["paragraphs"]):
            for asked in paragraph["qas"]:
                row = {"context": paragraph["context"], "question": asked["question"]}
                file.write(json.dumps({**row, "answer": asked["answers"][0]["text"]}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/gpt2_tokenizer")
    template = TaskTemplate.from_config({"taskname": "squad", "prompt_template": PROMPT})
    return AnswerDataset([path], {"squad": Encoder(template, tokenizer, 1024)})
