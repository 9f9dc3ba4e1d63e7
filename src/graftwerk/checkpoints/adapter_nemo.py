"""Adapters in NeMo's container: a tar of `model_config.yaml` and `model_weights.ckpt`."""

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.adapter_form import AdapterFile, SavedAdapter, apart, joined
from graftwerk.checkpoints.archive import open_tar
from graftwerk.checkpoints.settings import SETTINGS_LIMIT, parse_settings
from graftwerk.checkpoints.torch_files import load_mapped

NEMO_CONFIG, NEMO_WEIGHTS = "./model_config.yaml", "./model_weights.ckpt"


def read_nemo_adapters(path: Path) -> AdapterFile:
    """The adapters of a `.nemo` file."""
    config, weights = (os.path.normpath(name) for name in (NEMO_CONFIG, NEMO_WEIGHTS))
    with open_tar(path) as files:
        settings = parse_settings(files.read(config, SETTINGS_LIMIT), f"{path}: {config}")
        state = load_mapped(files, weights)
        if isinstance(state, dict):  # copies: the file may be replaced while they are in use
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    return apart(path, settings, state)


def write_nemo_adapters(
    path: Path, model: AdapterModel, saved: Sequence[SavedAdapter], extra: Mapping[str, Any]
) -> None:
    """Writes adapters as a `.nemo` file."""
    config, state = joined(saved, extra)
    weights = io.BytesIO()
    torch.save(state, weights)
    with tarfile.open(path, "w") as tar:
        for member, content in (
            (NEMO_CONFIG, yaml.safe_dump(config, sort_keys=False).encode()),
            (NEMO_WEIGHTS, weights.getvalue()),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
