import pytest

from graftwerk.checkpoints import hub
from tests.graftwerk.adapterhub.stand_in import fill


@pytest.fixture(scope="session")
def filled_cache(tmp_path_factory):
    """A cache of the Hub with small models and adapters in it."""
    cache = tmp_path_factory.mktemp("hub") / "cache"
    fill(cache)
    return cache


@pytest.fixture
def cache(filled_cache, monkeypatch):
    """That cache as this process's, and no way to the Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(filled_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.folder_of.cache_clear()
    yield filled_cache
    hub.folder_of.cache_clear()
