"""Folders of AdapterHub through its methods, names of the Hub, and what is refused."""

import json

import pytest
import torch

from graftwerk.adapterhub import AutoAdapterModel, Fuse, PrefixTuningConfig, Stack
from graftwerk.adapterhub.hub_names import OLDER, older_names
from graftwerk.checkpoints import save_adapter
from graftwerk.errors import UserError
from tests.graftwerk.adapterhub.small import rows, shaken, small


def with_task(kind: str = "gpt2") -> AutoAdapterModel:
    model = small(kind)
    model.add_adapter("task", config="seq_bn[reduction_factor=4]")
    model.add_classification_head("task", num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    shaken(model, "task")
    model.set_active_adapters("task")
    return model


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "t5", "masked"])
def test_an_adapter_and_its_head_come_back(tmp_path, kind, safe):
    model, ids = with_task(kind), rows()
    ids[:, 4] = 2
    model.save_adapter(tmp_path / "out", "task", use_safetensors=safe)
    weights = {file.suffix for file in (tmp_path / "out").iterdir()}
    assert weights == {".json", ".safetensors" if safe else ".bin"}
    fresh = small(kind)
    assert fresh.load_adapter(tmp_path / "out", set_active=True) == "task"
    assert fresh.get_labels() == ["x", "y", "z"]
    torch.testing.assert_close(fresh(ids).logits, model(ids).logits)


def test_an_adapter_gets_another_name_and_leaves_its_head_behind(tmp_path):
    with_task().save_adapter(str(tmp_path), "task")
    model = small("gpt2")
    name = model.load_adapter(
        str(tmp_path / "adapter_config.json"), load_as="mine", with_head=False
    )
    assert name == "mine"
    assert list(model.heads) == ["default"]
    assert model.load_adapter(str(tmp_path), load_as="upper", leave_out=[0]) == "upper"
    assert [slot.site.layer for _, slot, _ in model.base.parts("upper")] == [1, 2]
    assert "upper" in model.heads


def test_every_adapter_is_saved_in_a_folder_of_its_name(tmp_path):
    model = with_task()
    model.add_adapter("other", config="lora[r=2]")
    model.save_all_adapters(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "task"]
    said = json.loads((tmp_path / "task" / "head_config.json").read_text())
    assert said["config"]["num_labels"] == 3
    assert said["name"] == "task"


def test_a_fusion_is_saved_without_its_adapters_and_found_again(tmp_path):
    model = with_task()
    model.add_adapter("other", config="seq_bn[reduction_factor=4]")
    model.add_adapter_fusion(["task", "other"], config="static")
    model.save_adapter_fusion(tmp_path / "fusion", "task,other")
    model.set_active_adapters(Fuse("task", "other"))
    answer = model(rows(), head="task").logits
    state = {k: v.clone() for k, v in model.base.fusion_state("task,other").items()}
    model.delete_adapter_fusion(Fuse("task", "other"))
    assert model.load_adapter_fusion(tmp_path / "fusion", set_active=True) == "task,other"
    assert model.active_adapters == Fuse("task", "other")
    loaded = model.base.fusion_state("task,other")
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    torch.testing.assert_close(model(rows(), head="task").logits, answer)


def test_a_setup_comes_back_with_its_head_and_is_active_on_request(tmp_path):
    model = with_task()
    model.add_adapter("lang", config="seq_bn_inv[reduction_factor=4]")
    setup = Stack("lang", "task")
    model.set_active_adapters(setup)
    model.save_adapter_setup(tmp_path, setup, head_setup="task")
    fresh = small("gpt2")
    composition, heads = fresh.load_adapter_setup(tmp_path)
    assert (composition, heads, fresh.active_adapters) == (setup, "task", None)
    fresh = small("gpt2")
    fresh.load_adapter_setup(tmp_path, set_active=True)
    assert (fresh.active_adapters, fresh.active_head) == (setup, "task")
    torch.testing.assert_close(fresh(rows()).logits, model(rows()).logits)


def test_a_head_for_another_model_leaves_nothing_behind(tmp_path):
    with_task().save_adapter(tmp_path, "task")
    said = json.loads((tmp_path / "head_config.json").read_text())
    said["config"]["num_labels"] = 4
    (tmp_path / "head_config.json").write_text(json.dumps(said))
    model = small("gpt2")
    with pytest.raises(UserError, match="no classification head"):
        model.load_adapter(tmp_path)
    assert not model.base.adapters
    assert (list(model.heads), model.active_head) == (["default"], "default")


def test_other_labels_name_those_of_the_file(tmp_path):
    with_task().save_adapter(tmp_path, "task")
    model = small("gpt2")
    model.load_adapter(tmp_path, id2label={0: "low", 1: "mid", 2: "high"}, set_active=True)
    assert model.get_labels() == ["low", "mid", "high"]
    assert model.config.id2label[2] == "high"
    for given, said in (
        ({"id2label": {0: "low", 1: "high"}}, "num_labels=3"),
        ({"id2label": {0: "low"}, "with_head": False}, "none is loaded"),
        ({"cache_dir": "x"}, "cache_dir= has no meaning"),
        ({"source": "git"}, "source='git'"),
    ):
        with pytest.raises(UserError, match=said):
            model.load_adapter(tmp_path, load_as="again", **given)
    assert list(model.base.adapters) == ["task"]


def test_of_a_folder_with_both_forms_the_one_that_was_asked_for_is_read(tmp_path):
    model = with_task()
    model.save_adapter(tmp_path / "torch", "task")
    expected = {k: v.clone() for k, v in model.base.adapter_state("task").items()}
    shaken(model, "task", seed=5)
    model.save_adapter(tmp_path / "both", "task", use_safetensors=True)
    weights = "pytorch_adapter.bin"
    (tmp_path / "torch" / weights).rename(tmp_path / "both" / weights)
    fresh = small("gpt2")
    fresh.load_adapter(tmp_path / "both", load_as="torch", use_safetensors=False)
    fresh.load_adapter(tmp_path / "both", load_as="safe", use_safetensors=True)
    torch_state, safe = (fresh.base.adapter_state(name) for name in ("torch", "safe"))
    assert all(torch.equal(torch_state[key], value) for key, value in expected.items())
    assert all(torch.equal(safe[k], v) for k, v in model.base.adapter_state("task").items())


def test_an_adapter_of_our_own_folder_is_known_by_what_is_in_it(tmp_path):
    model = with_task()
    save_adapter(model.base, "task", tmp_path / "own")
    fresh = small("gpt2")
    assert fresh.load_adapter(tmp_path / "own", load_as="again") == "again"
    state = fresh.base.adapter_state("again")
    assert all(torch.equal(state[k], v) for k, v in model.base.adapter_state("task").items())


# ---- means and merging


def lora_pair() -> AutoAdapterModel:
    model = small("gpt2")
    for name in ("one", "two"):
        model.add_adapter(name, config="lora[r=2, alpha=4, init_weights=bert]")
    return shaken(model, "one", "two")


def deltas(model: AutoAdapterModel, name: str) -> dict[str, torch.Tensor]:
    state, scale = model.base.adapter_state(name), 4 / model.base.adapters[name].r
    return {
        key: scale * state[key.replace("lora_A", "lora_B")] @ state[key]
        for key in state
        if key.endswith("lora_A")
    }


def test_a_linear_mean_is_one_of_weights():
    model = lora_pair()
    model.average_adapter("mean", ["one", "two"], weights=[3, 1])
    states = [model.base.adapter_state(name) for name in ("one", "two", "mean")]
    for key, value in states[2].items():
        torch.testing.assert_close(value, 0.75 * states[0][key] + 0.25 * states[1][key])


def test_negative_weights_negate_b_alone():
    model = lora_pair()
    model.average_adapter(
        "less",
        ["one", "two"],
        weights=[1, -1],
        combine_strategy="lora_linear_only_negate_b",
        normalize_weights=False,
    )
    one, two, less = (model.base.adapter_state(name) for name in ("one", "two", "less"))
    for key, value in less.items():
        sign = 1 if key.endswith("lora_A") else -1
        torch.testing.assert_close(value, one[key] + sign * two[key])


def test_the_mean_of_updates_is_exact_where_the_rank_holds_it():
    model = lora_pair()
    names = ["one", "two"]
    model.average_adapter("mean", names, combine_strategy="lora_delta_w_svd", svd_rank=4)
    one, two, mean = (deltas(model, name) for name in ("one", "two", "mean"))
    for key, value in mean.items():
        torch.testing.assert_close(value, (one[key] + two[key]) / 2, atol=1e-5, rtol=1e-4)
    model.average_adapter("same", ["one", "one"], combine_strategy="lora_delta_w_svd")
    for key, value in deltas(model, "same").items():
        torch.testing.assert_close(value, one[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"combine_strategy": "best"}, "'best' is not known: one of linear"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, -1.0]}, "weights add up to 0"),
        ({"adapter_list": ["one", "bn"]}, "have different configurations"),
        (
            {"adapter_list": ["bn", "bn"], "combine_strategy": "lora_delta_w_svd"},
            "is for LoRA",
        ),
    ],
)
def test_a_mean_that_has_no_meaning_is_refused(given, said):
    model = lora_pair()
    model.add_adapter("bn")
    with pytest.raises(UserError, match=said):
        model.average_adapter("mean", **{"adapter_list": ["one", "two"], **given})
    assert "mean" not in model.base.adapters


def test_a_mean_of_heads_is_one_of_weights_and_not_active():
    model = small()
    for number, name in enumerate("ab"):
        model.add_classification_head(name, num_labels=2, dropout_prob=number / 10)
    model.add_tagging_head("tags")
    a, b = (dict(model.heads[name].state_dict()) for name in "ab")
    model.average_head("mean", ["a", "b"], weights=[1, 3])
    model.average_head("sum", ["a", "b"], weights=[1, 3], normalize_weights=False)
    for key, value in model.heads["mean"].state_dict().items():
        torch.testing.assert_close(value, 0.25 * a[key] + 0.75 * b[key])
        torch.testing.assert_close(model.heads["sum"].state_dict()[key], a[key] + 3 * b[key])
    assert model.active_head == "tags"
    masked = small("masked")
    for given, said in (
        (("x", []), "head_list is empty"),
        (("x", ["a", "tags"]), "different configurations"),
        (("x", ["a", "b"], [1.0]), "average_head: 1 weights for 2"),
        (("mean", ["a", "b"]), "overwrite_ok=True"),
        (("x", ["c"]), "no head is called 'c'"),
    ):
        with pytest.raises(UserError, match=said):
            model.average_head(*given)
    with pytest.raises(UserError, match="the base's own"):
        masked.average_head("x", ["default"])


def test_merging_changes_the_base_and_resetting_puts_it_back_to_the_bit():
    model = lora_pair()
    before = {key: value.clone() for key, value in model.base.state_dict().items()}
    model.set_active_adapters("one")
    apart = model(rows()).logits
    model.merge_adapter("one")
    assert model.active_adapters is None
    torch.testing.assert_close(model(rows()).logits, apart, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="merged already"):
        model.merge_adapter("two")
    model.reset_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.base.state_dict().items())
    assert torch.equal(model(rows()).logits, apart)
    with pytest.raises(UserError, match="no adapter is merged"):
        model.reset_adapter()


def test_the_summary_counts_what_is_there():
    model = lora_pair()
    model.train_adapter("one")
    one, two, whole = model.adapter_summary(as_dict=True)
    own = sum(value.numel() for value in model.base.adapter_state("one").values())
    assert (one["name"], one["architecture"], one["#param"]) == ("one", "lora", own)
    assert (one["active"], one["train"], two["active"], two["train"]) == (True, True, False, False)
    assert whole["#param"] == sum(p.numel() for _, p in model.base.base_parameters())
    text = model.adapter_summary()
    assert "Full model" in text
    assert f"{own:,}" in text


# ---- text


def test_text_under_parallel_is_that_of_each_adapter():
    model = small("gpt2")
    for name in ("a", "b"):
        config = PrefixTuningConfig(prefix_length=3, bottleneck_size=8)
        model.add_adapter(name, config=config)
    for seed in range(8):
        shaken(model, "a", "b", seed=seed)
    alone = []
    for name in ("a", "b"):
        model.set_active_adapters(name)
        alone.append(model.generate(rows(2, 4), max_new_tokens=5, eos_token_id=[]))
    model.active_adapters = "Parallel(a, b)"
    both = model.generate(rows(2, 4), max_new_tokens=5, eos_token_id=[])
    assert torch.equal(both, torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


def test_a_row_that_has_ended_is_filled():
    model = small("gpt2")
    free = model.generate(rows(3, 4), max_new_tokens=6, eos_token_id=[])
    end = int(free[0, 5])
    ended = model.generate(rows(3, 4), max_new_tokens=6, eos_token_id=end, pad_token_id=1)
    first = free[0, 4:].tolist().index(end)
    assert ended[0, 4 : 5 + first].tolist() == free[0, 4 : 5 + first].tolist()
    assert set(ended[0, 5 + first :].tolist()) <= {1}


def test_drawing_follows_torchs_random_state():
    model = small("t5")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(rows(2, 4), max_length=9, do_sample=True, eos_token_id=[]))
    assert drawn[0].shape == (2, 9)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_bert_continues_nothing():
    with pytest.raises(UserError, match="a BERT continues no text"):
        small().generate(rows())


# ---- names


def test_the_older_form_stands_for_names_of_the_hub():
    older = OLDER.fullmatch("sentiment/sst-2@ukp")
    assert older
    assert older_names(older, "bert-base-uncased", None) == [
        "AdapterHub/bert-base-uncased_sentiment_sst-2_pfeiffer",
        "AdapterHub/bert-base-uncased-sst-2_pfeiffer",
    ]
    names = older_names(older, "FacebookAI/roberta-base", "double_seq_bn")
    assert "AdapterHub/roberta-base_sentiment_sst-2_houlsby" in names
    assert "AdapterHub/roberta-base-sst-2_houlsby" in names


def test_adapters_of_the_hub_come_from_its_cache_under_their_names(cache):
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    assert type(model).__name__ == "BertAdapterModel"
    assert model.load_adapter("sentiment/sst-2@ukp", set_active=True) == "sst-2"
    assert model.active_head == "sst-2"
    name = model.load_adapter("AdapterHub/bert-base-uncased_nli_qnli_pfeiffer", with_head=False)
    assert name == "qnli"


def test_a_source_says_which_forms_of_names_are_meant(cache):
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    whole = "bert-base-uncased_sentiment_sst-2_pfeiffer"
    assert model.load_adapter(f"@ukp/{whole}", source="ah") == "sst-2"
    assert model.load_adapter(f"AdapterHub/{whole}", load_as="b", source="hf") == "b"
    assert model.load_adapter(f"@ukp/{whole}", load_as="c") == "c"
    assert model.load_adapter("sts/qqp@ukp", source="ah") == "qqp"
    with pytest.raises(UserError, match="source='hf'"):
        model.load_adapter(f"@ukp/{whole}", source="hf")
    with pytest.raises(UserError, match="source='ah' takes"):
        model.load_adapter(f"AdapterHub/{whole}", source="ah")
    with pytest.raises(UserError, match=r"looked for at .*/AdapterHub/other_x"):
        model.load_adapter("@ukp/other_x")


def test_a_prompt_may_begin_as_a_text(cache):
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    text = "prompt_tuning[prompt_length=5, prompt_init=from_string, prompt_init_text='fine film']"
    model.add_adapter("p", config=text)
    (state,) = model.base.adapter_state("p").values()
    words = model.base.embedding.word_embeddings.weight
    assert torch.equal(state[0], state[2])
    assert any(torch.equal(state[0], word) for word in words)
    assert not torch.equal(state[0], state[1])


def test_without_a_network_the_error_says_where_it_was_looked_for(cache):
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    with pytest.raises(UserError) as caught:
        model.load_adapter("comsense/cosmosqa@ukp")
    said = str(caught.value)
    assert "huggingface.co/AdapterHub/bert-base-uncased_comsense_cosmosqa_pfeiffer" in said
    assert str(cache) in said
    assert "\n" not in said
    with pytest.raises(UserError, match="no such folder or file"):
        model.load_adapter("nowhere")


def test_a_class_for_another_kind_of_base_is_refused(cache):
    from graftwerk.adapterhub import T5AdapterModel

    with pytest.raises(UserError, match="is a bert model, T5AdapterModel is for t5"):
        T5AdapterModel.from_pretrained("bert-base-uncased")
