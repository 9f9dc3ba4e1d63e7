"""Slots as adapter modules, and the names that adapters may have."""

import pytest

from graftwerk.adapters import IA3Config, LoRAConfig, Stack
from graftwerk.adapters.mixin import AdapterModuleMixin
from graftwerk.errors import UserError
from tests.graftwerk.tiny import tiny_gpt


def test_a_slot_is_an_adapter_module_whose_model_says_what_is_active():
    model = tiny_gpt()
    model.add_adapter("scales", IA3Config())
    model.add_adapter("low", LoRAConfig(dim=2))
    slot = model.decoder.layers[0].self_attention.keys
    assert isinstance(slot, AdapterModuleMixin)
    assert slot.is_adapter_available()
    assert slot.get_enabled_adapters() == []
    model.set_active(Stack("scales", "low"))
    assert slot.get_enabled_adapters() == ["scales"]
    assert slot.get_adapter_module("scales") is slot.adapter_layer["scales"]
    with pytest.raises(ValueError, match="to the model"):
        slot.add_adapter("more", IA3Config())


@pytest.mark.parametrize("name", ["keys", "train", "two words", ""])
def test_a_name_that_cannot_be_a_modules_is_refused(name):
    with pytest.raises(UserError, match="adapter name"):
        tiny_gpt().add_adapter(name, IA3Config())
