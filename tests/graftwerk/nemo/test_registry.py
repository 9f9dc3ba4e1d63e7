"""Pairs of a class and its subclass with adapters."""

import sys

import pytest
from torch import nn

from graftwerk.nemo import AdapterModuleMixin, get_registered_adapter, register_adapter
from tests.graftwerk.nemo.modules import Adapted, Plain

PLAIN, ADAPTED = "tests.graftwerk.nemo.modules.Plain", "tests.graftwerk.nemo.modules.Adapted"


@pytest.mark.parametrize("asked", [Plain, Adapted, PLAIN, ADAPTED])
def test_a_pair_is_found_by_base_by_adapter_and_by_the_path_of_either(asked):
    info = get_registered_adapter(asked)
    assert info is not None
    assert (info.base_class, info.adapter_class) == (Plain, Adapted)
    assert (info.base_class_path, info.adapter_class_path) == (PLAIN, ADAPTED)


def test_what_was_never_registered_is_none():
    assert get_registered_adapter(nn.Linear) is None


def test_a_path_is_looked_up_and_not_imported():
    assert get_registered_adapter("antigravity.Adapter") is None
    assert "antigravity" not in sys.modules


def test_a_base_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        register_adapter(Plain, Adapted)


def test_an_adapter_class_must_be_a_subclass():
    class Stranger(nn.Module, AdapterModuleMixin):
        pass

    with pytest.raises(ValueError, match="no subclass"):
        register_adapter(nn.Bilinear, Stranger)
    assert get_registered_adapter(nn.Bilinear) is None
