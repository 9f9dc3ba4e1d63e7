"""`AdapterTrainer`: that of `transformers`, with checkpoints that hold no base."""

from pathlib import Path
from typing import Any

import transformers

from graftwerk.adapterhub.auto import AutoAdapterModel


class AdapterTrainer(transformers.Trainer):
    """Trains adapters; needs the package `accelerate`, as `transformers.Trainer` does.

    A checkpoint holds the trained tensors, to go on from, and adapters, heads and fusions as
    folders of AdapterHub's, each to be loaded by itself.
    """

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        model = self.model
        assert isinstance(model, AutoAdapterModel)
        if state_dict is None:
            trained = {name for name, value in model.named_parameters() if value.requires_grad}
            state_dict = {k: v for k, v in model.state_dict().items() if k in trained}
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        model.save_all_adapters(folder)
        model.save_all_adapter_fusions(folder)
        model.save_all_heads(folder)
