"""The loss of T5 and BERT against transformers, whatever a batch is padded with."""

from pathlib import Path

import pytest
import torch

from graftwerk.checkpoints import load_base
from graftwerk.data.dataset import collate
from graftwerk.data.encoding import Example, Label
from graftwerk.data.question_answering import SpanEncoder
from graftwerk.data.seq2seq import Seq2SeqEncoder
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.training.loss import label_losses
from tests.graftwerk.tiny_families import TEMPLATE, WORDS, bert_tokenizer, task_rows

ROWS = task_rows(6, 0)
TASK = TaskTemplate("mark", TEMPLATE)


def summed(model, examples: list[Example], pad: int = 0) -> torch.Tensor:
    batch = collate(examples, pad)
    return label_losses(model(**batch.inputs()), batch.labels, batch.weights).sum()


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory):
    """transformers' model, ours from its files, and rows."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = build_tokenizer("word", [" ".join(WORDS)])
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **shape)
    theirs = T5ForConditionalGeneration(config).eval()
    path = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(path)
    encoder = Seq2SeqEncoder(TASK, tokenizer, 64, start=0)
    return theirs, load_base(path), [encoder.encode(row)[0] for row in ROWS]


def test_a_padded_batch_of_t5_has_the_loss_of_its_rows_alone(t5):
    _, model, examples = t5
    assert len({len(example.source) for example in examples}) > 1
    alone = sum(summed(model, [example]) for example in examples)
    for pad in (0, 5):
        torch.testing.assert_close(summed(model, examples, pad), alone, rtol=1e-5, atol=1e-5)


def test_the_loss_of_t5_is_that_of_transformers(t5):
    theirs, model, examples = t5
    batch = collate(examples)
    targets = [[label.token for label in example.labels] for example in examples]
    width = max(map(len, targets))
    labels = torch.tensor([target + [-100] * (width - len(target)) for target in targets])
    assert batch.source is not None
    assert batch.source_documents is not None
    expected = theirs(
        input_ids=batch.source, attention_mask=batch.source_documents + 1, labels=labels
    ).loss
    found = summed(model, examples) / batch.weights.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_filler_of_t5_has_no_loss_and_no_gradient_that_is_none(t5):
    _, model, _ = t5
    filler = Example([0], source=[1])
    loss = summed(model, [filler])
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss == 0
    assert gradients
    assert not any(gradient.any() or gradient.isnan().any() for gradient in gradients)
    model.zero_grad()


@pytest.fixture(scope="module", params=["bert", "roberta"])
def bert(request, tmp_path_factory: pytest.TempPathFactory):
    import transformers

    tokenizer = bert_tokenizer()
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    if request.param == "bert":
        theirs = transformers.BertForQuestionAnswering(transformers.BertConfig(**shape))
        types = 2
    else:
        config = transformers.RobertaConfig(**shape, pad_token_id=0, type_vocab_size=1)
        theirs, types = transformers.RobertaForQuestionAnswering(config), 1
    path: Path = tmp_path_factory.mktemp(request.param)
    theirs.eval().save_pretrained(path)
    encoder = SpanEncoder(TASK, tokenizer, 60, types)
    outcomes = list(encoder.encode_all(ROWS))
    return theirs, load_base(path), [outcome.examples[0] for outcome in outcomes]


def test_the_loss_of_a_span_is_that_of_transformers(bert):
    theirs, model, examples = bert
    for example in examples:
        types = None if example.token_types is None else torch.tensor([example.token_types])
        expected = theirs(
            input_ids=torch.tensor([example.tokens]),
            token_type_ids=types,
            start_positions=torch.tensor([example.span[0]]),
            end_positions=torch.tensor([example.span[1]]),
        ).loss
        torch.testing.assert_close(summed(model, [example]) / 2, expected, rtol=1e-5, atol=1e-5)


def test_a_padded_batch_of_spans_has_the_loss_of_its_rows_alone(bert):
    _, model, examples = bert
    assert len({len(example.tokens) for example in examples}) > 1
    alone = sum(summed(model, [example]) for example in examples)
    torch.testing.assert_close(summed(model, examples), alone, rtol=1e-5, atol=1e-5)


def test_a_filler_of_spans_has_no_loss_and_no_gradient(bert):
    _, model, examples = bert
    typed = examples[0].token_types is not None
    filler = Example([0], token_types=[0] if typed else None, span=(0, 0))
    batch = collate([], filler=filler)
    loss = label_losses(model(**batch.inputs()), batch.labels, batch.weights).sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss == 0
    assert not any(gradient.any() or gradient.isnan().any() for gradient in gradients)
    model.zero_grad()


def test_labels_of_a_gpt_still_reach_the_model_as_positions():
    batch = collate([Example([1, 2], [Label(1, 2)])])
    assert batch.inputs().keys() == {"tokens", "select"}
