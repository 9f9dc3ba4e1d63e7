"""The keys that name a base and an adapter."""

import pytest

from graftwerk.checkpoints.base_path import adapter_of, base_of
from graftwerk.errors import UserError


@pytest.mark.parametrize(
    ("model", "base", "adapter"),
    [
        ({"language_model_path": "/a"}, "/a", None),
        ({"restore_from_path": "/a", "language_model_path": None}, "/a", None),
        ({"restore_from_path": "/a", "language_model_path": "/a"}, "/a", None),
        ({"language_model_path": "/a", "restore_path": "/b"}, "/a", "/b"),
        ({"restore_from_path": "/a", "restore_path": "/b"}, "/a", "/b"),
        ({"language_model_path": None, "restore_path": "/b"}, "/b", None),
    ],
)
def test_each_key_names_what_it_stands_for(model, base, adapter):
    assert base_of(model) == base
    assert adapter_of(model) == adapter


def test_two_bases_are_refused_by_the_names_of_their_keys():
    with pytest.raises(UserError, match=r"language_model_path=/a and model.restore_from_path=/b"):
        base_of({"language_model_path": "/a", "restore_from_path": "/b"})


def test_no_base_is_refused():
    with pytest.raises(UserError, match=r"model.language_model_path is missing"):
        base_of({"language_model_path": None})
