"""Every family against `transformers`: logits, gradients, decoding, files there and back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftwerk.checkpoints import load_base
from graftwerk.checkpoints.base import open_checkpoint
from graftwerk.checkpoints.huggingface import write_folder
from graftwerk.checkpoints.tensors import read_parameter
from graftwerk.models import KeyValueCache
from tests.graftwerk import families
from tests.graftwerk.tiny import tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (their model, the folder that it wrote), made once."""
    made = {}

    def get(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = families.write(name, path), path
        return made[name]

    return get


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a tolerance that grows with the largest value above 1 (T5's logits are large)."""
    atol = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=atol)


LENGTHS = torch.tensor([14, 11, 7])
INDEX = torch.arange(14)
RIGHT = LENGTHS[:, None] > INDEX  # which tokens are real
LEFT = RIGHT.flip(1)


def documents(real: Tensor) -> Tensor:
    return torch.where(real, 0, -1)


def positions_of(real: Tensor) -> Tensor:
    return (real.long().cumsum(1) - 1).clamp(min=0)


# ---- GPT


@pytest.mark.parametrize("name", families.GPTS)
@torch.no_grad()
def test_logits_of_a_gpt(name: str, folders):
    theirs, path = folders(name)
    ours, batch = load_base(path), tokens(3, 14)
    close(ours(batch), theirs(batch).logits)
    right = theirs(batch, attention_mask=RIGHT.long()).logits
    close(ours(batch)[RIGHT], right[RIGHT])
    # OPT counts positions by the mask; the others are told.
    told = {} if name.startswith("opt") else {"position_ids": positions_of(LEFT)}
    left = theirs(batch, attention_mask=LEFT.long(), **told).logits
    end = torch.where(LEFT, 14, INDEX + 1)
    close(ours(batch, positions_of(LEFT), end)[LEFT], left[LEFT])


@pytest.mark.parametrize("name", families.GPTS)
@torch.no_grad()
def test_logits_of_a_gpt_in_bfloat16(name: str, folders):
    theirs, path = folders(name)
    batch = tokens(3, 14)
    expected = theirs(batch).logits
    got = load_base(path, dtype=torch.bfloat16)(batch)
    # bfloat16 has 8 bits; relative to the size of logits, as transformers' own differ too.
    assert (got.float() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("name", families.GPTS)
@torch.no_grad()
def test_a_gpt_fed_in_pieces_through_the_cache(name: str, folders):
    _, path = folders(name)
    ours, batch = load_base(path), tokens(3, 14)
    positions, end = positions_of(LEFT), torch.where(LEFT, 14, INDEX + 1)
    expected, cache = ours(batch, positions, end), KeyValueCache(ours.config.num_layers)
    pieces = [
        ours(batch[:, a:b], positions[:, a:b], end[:, a:b], cache)
        for a, b in ((0, 8), (8, 9), (9, 12), (12, 14))
    ]
    close(torch.cat(pieces, 1)[LEFT], expected[LEFT])


@pytest.mark.parametrize("name", families.GPTS)
def test_gradients_of_a_gpt(name: str, folders):
    theirs, path = folders(name)
    # Their embedding of the padding token gets no gradient.
    ours, batch = load_base(path).requires_grad_(True), tokens(2, 10).clamp(min=2)
    theirs.zero_grad()
    theirs(batch, labels=batch).loss.backward()
    logits, labels = ours(batch)[:, :-1], batch[:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    compare_gradients(ours, theirs, path)


def compare_gradients(ours, theirs, path: Path) -> None:
    """Their gradients, joined by our table, are ours."""
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # GPT-NeoX's file has another name for it than the module.
    wanted["embed_out.weight"] = wanted.get("lm_head.weight")
    with open_checkpoint(path) as checkpoint:
        for name, parameter in ours.named_parameters():
            entry = checkpoint.table[name]
            grads = [wanted[key] for key in entry.names]
            assert parameter.grad is not None, name
            close(parameter.grad, entry.reshape.join(entry.reshape.parts(grads)), 1e-4)


@pytest.mark.parametrize("name", families.GPTS)
@torch.no_grad()
def test_greedy_ids_of_a_gpt(name: str, folders):
    from graftwerk.generation import generate

    theirs, path = folders(name)
    prompts = [row[:n].tolist() for row, n in zip(tokens(3, 9), (9, 6, 2), strict=True)]
    ours = generate(load_base(path), prompts, 12)
    for prompt, got in zip(prompts, ours, strict=True):
        batch = torch.tensor([prompt])
        expected = theirs.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        assert got == expected[0, len(prompt) :].tolist()


# ---- T5


def target(rows: int = 3, length: int = 6) -> Tensor:
    batch = tokens(rows, length, seed=1)
    batch[:, 0] = 0  # what the decoder reads first
    return batch


@pytest.mark.parametrize("name", families.T5S)
@torch.no_grad()
def test_logits_of_a_t5(name: str, folders):
    theirs, path = folders(name)
    ours, source = load_base(path), tokens(3, 14)
    expected = theirs(input_ids=source, decoder_input_ids=target()).logits
    close(ours(target(), source=source), expected)
    for real in (RIGHT, LEFT):
        expected = theirs(
            input_ids=source, attention_mask=real.long(), decoder_input_ids=target()
        ).logits
        got = ours(target(), source=source, source_documents=documents(real))
        close(got, expected)
    bf16 = load_base(path, dtype=torch.bfloat16)
    got = bf16(target(), source=source, source_documents=documents(LEFT))
    assert (got.float() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("name", families.T5S)
@torch.no_grad()
def test_a_t5_fed_in_pieces_through_the_cache(name: str, folders):
    _, path = folders(name)
    ours, source, batch = load_base(path), tokens(3, 14), target()
    expected = ours(batch, source=source, source_documents=documents(RIGHT))
    cache = KeyValueCache(ours.config.decoder_num_layers)
    pieces = [ours(batch[:, :2], cache=cache, source=source, source_documents=documents(RIGHT))]
    pieces += [ours(batch[:, a:b], cache=cache) for a, b in ((2, 3), (3, 6))]
    close(torch.cat(pieces, 1), expected)


@pytest.mark.parametrize("name", families.T5S)
def test_gradients_of_a_t5(name: str, folders):
    theirs, path = folders(name)
    ours, source, batch = load_base(path).requires_grad_(True), tokens(2, 10), target(2)
    theirs.zero_grad()
    labels = tokens(2, 6, seed=2)
    theirs(input_ids=source, decoder_input_ids=batch, labels=labels).loss.backward()
    logits = ours(batch, source=source)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    compare_gradients(ours, theirs, path)


# ---- BERT


@pytest.mark.parametrize("name", families.BERTS)
@torch.no_grad()
def test_outputs_of_a_bert(name: str, folders):
    theirs, path = folders(name)
    ours, batch = load_base(path), tokens(3, 14).clamp(min=2)  # RoBERTa's padding is 1
    types = None if "roberta" in name else (INDEX > 5).long().expand(3, -1)
    told = {} if types is None else {"token_type_ids": types}
    for real in (RIGHT, LEFT):
        ids = torch.where(real, batch, 1 if "roberta" in name else 0)
        # RoBERTa counts positions from the first real token.
        positions = positions_of(real) if "roberta" in name else None
        expected = theirs(ids, attention_mask=real.long(), **told)
        got = ours(ids, positions, documents(real), types)
        if ours.config.head == "question_answering":
            start, end = got.chunk(2)
            close(start[real], expected.start_logits[real])
            close(end[real], expected.end_logits[real])
            assert torch.isinf(got[:3][~real]).all()
        elif ours.config.head == "classification":
            if real is RIGHT:  # the first token is what they pool
                close(got, expected.logits)
        elif ours.config.head is None:
            close(got[real], expected.last_hidden_state[real])
            if real is RIGHT:
                close(ours.pooled(got), expected.pooler_output)
        else:
            close(got[real], expected.logits[real])
    half = load_base(path, dtype=torch.bfloat16)(batch, None, None, types).float()
    full = ours(batch, None, None, types)
    assert (half - full).norm() / full.norm() < 2e-2


@pytest.mark.parametrize("name", ["bert_masked_lm", "roberta_classification"])
def test_gradients_of_a_bert(name: str, folders):
    theirs, path = folders(name)
    ours, batch = load_base(path).requires_grad_(True), tokens(2, 10).clamp(min=2)
    theirs.zero_grad()
    theirs(batch).logits.square().mean().backward()
    ours(batch).square().mean().backward()
    compare_gradients(ours, theirs, path)


@torch.no_grad()
def test_selected_positions_alone_reach_the_masked_words_head(folders):
    _, path = folders("bert_masked_lm")
    ours, batch = load_base(path), tokens(3, 14)
    select = torch.tensor([0, 5, 20])
    close(ours(batch, select=select), ours(batch).flatten(0, 1)[select])


# ---- files


@pytest.mark.parametrize("name", families.ALL)
@torch.no_grad()
def test_what_we_write_as_hugging_face_is_what_we_read(name: str, folders, tmp_path: Path):
    theirs, path = folders(name)
    with open_checkpoint(path) as first:
        kind = write_folder(
            first.config,
            lambda ours: read_parameter(first.table[ours], first.source),
            tmp_path / "again",
            model_type=first.variant,
        )
        assert kind == first.variant
        with open_checkpoint(tmp_path / "again") as second:
            assert second.config == first.config
            assert set(second.table) == set(first.table)
            for ours in first.table:
                for a, b in zip(first.table[ours].names, second.table[ours].names, strict=True):
                    assert torch.equal(first.source.read(a), second.source.read(b))
    again = type(theirs).from_pretrained(tmp_path / "again").eval()
    batch = tokens(2, 9).clamp(min=2)
    feed = {"input_ids": batch}
    if name in families.T5S:
        feed["decoder_input_ids"] = target(2)
    for mine, yours in zip(again(**feed).to_tuple(), theirs(**feed).to_tuple(), strict=True):
        if torch.is_tensor(mine):
            close(mine, yours)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("gpt2_untied", None), ("llama", "mistral"), ("mistral_no_window", "llama")],
)
@torch.no_grad()
def test_a_model_is_written_as_another_family_that_can_say_all_of_it(
    name: str, nearest: str | None, folders, tmp_path: Path
):
    theirs, path = folders(name)
    with open_checkpoint(path) as checkpoint:
        write_folder(
            checkpoint.config,
            lambda ours: read_parameter(checkpoint.table[ours], checkpoint.source),
            tmp_path / "other",
            model_type=nearest,
        )
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    close(other(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5_v1.1", "bert_question_answering"])
@torch.no_grad()
def test_pickled_and_sharded_weights_are_read(name: str, folders, tmp_path: Path):
    theirs, path = folders(name)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    theirs.config.save_pretrained(tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    expected = load_base(path).state_dict()
    for folder in ("shards", "bin"):
        got = load_base(tmp_path / folder).state_dict()
        assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_output_weights_that_equal_the_embeddings_are_tied(folders):
    assert load_base(folders("t5")[1]).config.share_embeddings_and_output_weights
    assert not load_base(folders("t5_v1.1")[1]).config.share_embeddings_and_output_weights
