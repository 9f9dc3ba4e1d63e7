"""IA3 adapters as T-Few saves them: one torch file of vectors by modules of `transformers`' T5.

Liu et al. 2022, arXiv:2205.05638. `<module>.multi_lora_b` [out, 1] scales what a module makes; that
of the second half of a gated MLP scales what goes into the next projection just as well.
"""

from pathlib import Path

from torch import Tensor

from graftwerk.adapters.configs import IA3Config, settings_of
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.adapter_form import AdapterFile, SavedAdapter
from graftwerk.checkpoints.peft_lora import VECTOR, Weights, read_ia3, union_of
from graftwerk.checkpoints.peft_modules import modules_for, usable_name
from graftwerk.checkpoints.torch_files import TorchFiles
from graftwerk.errors import UserError

LEAF = ".multi_lora_b"


def is_torch_file(path: Path) -> bool:
    """Whether a file is the zip that torch writes."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_tfew(path: Path) -> AdapterFile:
    """The adapter of a file; `AdapterFile.on` gives it under our names.

    Raises:
        UserError: where it is damaged, or holds something else.
    """
    with TorchFiles([path]) as source:
        tensors = {name: source.read(name).clone() for name in sorted(source.names)}
    other = next((name for name in tensors if not name.endswith(LEAF)), None)
    if other is not None or not tensors:
        raise UserError(
            f"{path} is no adapter that can be read: a file of torch's is read if its tensors are "
            f"called ...{LEAF}, as T-Few's IA3; {other or 'nothing'} is in it"
        )
    name = usable_name(path.stem)

    def fit(model: AdapterModel) -> list[SavedAdapter]:
        weights = {key.removesuffix(LEAF): tensor for key, tensor in tensors.items()}
        modules = modules_for(model, weights, path)
        placed: Weights = {}
        for module, vector in weights.items():
            found = modules.find(module)
            if found is not None and found.slot.endswith(".up"):  # [in] of the next projection
                (module,) = modules.names_of(f"{found.owner}.linear_fc2")
                vector = vector.t()
            placed[module] = {VECTOR: vector}
        methods, state = read_ia3(modules, placed, path)
        return [SavedAdapter(name, settings_of(union_of(methods)), state)]

    config = {"method": IA3Config.__name__}
    return AdapterFile([SavedAdapter(name, config, dict[str, Tensor](tensors))], {}, fit)
