"""The back ends: one file and one script template each."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher_scripts.clusters.base import Backend

# cluster_type -> the module of this folder and its class; imported only when it is asked for.
CLUSTERS = {
    "bcm": ("slurm", "Slurm"),
    "bcp": ("bcp", "BaseCommand"),
    "interactive": ("interactive", "Interactive"),
}


def backend(cluster_type: str) -> "type[Backend]":
    """The class behind a `cluster_type` of CLUSTERS."""
    module, name = CLUSTERS[cluster_type]
    return getattr(import_module(f"{__name__}.{module}"), name)
