"""One cluster for the tests of a file, and what they share."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, cluster, lacking


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """A real Slurm of three nodes, one for each file of tests."""
    if why := lacking():
        pytest.skip(why)
    with cluster(nodes=3) as running:
        yield running


@pytest.fixture(autouse=True)
def quiet(slurm: Cluster) -> Iterator[None]:
    """Each test begins with whole nodes and ends with an empty queue."""
    slurm.mend()
    yield
    slurm.clear()
