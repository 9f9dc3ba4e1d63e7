"""AdapterHub's methods for its folders: adapters with their heads, fusions, setups."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwerk.adapterhub.adapter_methods import AdapterMethods
from graftwerk.adapterhub.context import Setup, composition_of, head_names
from graftwerk.adapterhub.default_head import BaseWords
from graftwerk.adapterhub.head_methods import HeadMethods, Labels
from graftwerk.adapterhub.hub_names import find_adapter
from graftwerk.adapters.composition import Composition
from graftwerk.checkpoints.adapter import load_adapter as load_any
from graftwerk.checkpoints.adapterhub import (
    About,
    load_adapterhub,
    load_adapterhub_fusion,
    load_adapterhub_setup,
    only,
    save_adapterhub,
    save_adapterhub_fusion,
    save_adapterhub_head,
    save_adapterhub_setup,
)
from graftwerk.checkpoints.adapterhub_files import HEAD, HubPart, is_adapterhub, read_adapterhub
from graftwerk.errors import UserError

PathLike = str | Path


class FileMethods(AdapterMethods, HeadMethods):
    """Saving and loading."""

    # ---- adapters

    def save_adapter(
        self,
        save_directory: PathLike,
        adapter_name: str,
        with_head: bool = True,
        use_safetensors: bool = False,
    ) -> None:
        """Writes an adapter into a folder, and the head that is called as it is.

        Args:
            use_safetensors: `adapter.safetensors` instead of `pytorch_adapter.bin`.

        Raises:
            UserError: for an adapter that AdapterHub's files cannot hold, before anything is
                written.
        """
        folder = Path(save_directory)
        save_adapterhub(self.base, adapter_name, folder, self._about, use_safetensors)
        if with_head and adapter_name in self.heads:
            self.save_head(folder, adapter_name, use_safetensors)

    def save_all_adapters(
        self, save_directory: PathLike, with_head: bool = True, use_safetensors: bool = False
    ) -> None:
        """Writes every adapter into a folder of its name."""
        for name in self.base.adapters:
            folder = Path(save_directory) / name
            self.save_adapter(folder, name, with_head, use_safetensors)

    def load_adapter(
        self,
        adapter_name_or_path: PathLike,
        config: Mapping[str, Any] | str | None = None,
        version: str | None = None,
        model_name: str | None = None,
        load_as: str | None = None,
        with_head: bool = True,
        leave_out: Sequence[int] | None = None,
        set_active: bool = False,
        *,
        source: str | None = None,
        id2label: Labels = None,
        use_safetensors: bool = True,
        **others: Any,
    ) -> str:
        """Adds a saved adapter, and the head beside it; returns its name.

        Args:
            adapter_name_or_path: a folder, a file in one, a name of the Hub
                (`AdapterHub/bert-base-uncased-pf-sst2`), or one of the older forms:
                `sentiment/sst-2@ukp`, which stands for one adapter for each base, and
                `@ukp/bert-base-uncased_sentiment_sst-2_pfeiffer`. Files of peft, of NeMo and of our
                own are known by what is in them.
            config: of the older form: its architecture (`pfeiffer`); a dictionary: keys of the
                adapter's configuration that get other values.
            version: a branch, tag or commit of a name of the Hub.
            model_name: the base's name, which the older form hangs on; None: as it was loaded.
            load_as: what it is called here; None: as in the file, or the data set of the older
                form.
            leave_out: layers, numbered from 0, that get no part of it.
            source: `hf`: a name that is no path is one of the Hub; `ah`: it is of an older form.
            id2label: the labels of its head, instead of those in the file.
            use_safetensors: which weights are read where a folder has both forms.

        Raises:
            UserError: where there is none, says where it was looked for; where it does not fit; for
                an argument that has no meaning here.
        """
        for key in others:
            known = "source, id2label, use_safetensors"
            raise UserError(
                f"load_adapter: {key}= has no meaning here: leave it out ({known} have)"
            )
        wanted = config if isinstance(config, str) else None
        changes = None if isinstance(config, str) or config is None else dict(config)
        own_name = model_name or getattr(self.config, "name_or_path", None)
        path = Path(adapter_name_or_path).expanduser()
        if path.is_file() or (path.is_dir() and not is_adapterhub(path)):
            known = path.parent if path.is_file() and is_adapterhub(path.parent) else None
            if known is None:
                if id2label is not None:
                    raise UserError(f"{path}: id2label is for AdapterHub's folders with a head")
                return self._load_other(path, load_as, leave_out, set_active)
        found = find_adapter(str(adapter_name_or_path), own_name, wanted, version, source)
        folder, left = found.folder, tuple(leave_out or ())
        heads = read_adapterhub(folder, safetensors=use_safetensors).heads if with_head else []
        if id2label is not None and not heads:
            raise UserError(
                f"{folder}: id2label names labels of a head, and none is loaded with it"
            )
        name = load_as or found.name
        name = load_adapterhub(self.base, folder, name, changes, left, use_safetensors)
        if heads:
            try:
                self._take_head(only(heads, folder, "head"), str(folder), name, id2label)
            except UserError:
                self.base.delete_adapter(name)
                raise
        if set_active:
            self.set_active_adapters(name)
        return name

    def _load_other(
        self,
        path: Path,
        load_as: str | None,
        leave_out: Sequence[int] | None,
        set_active: bool,
    ) -> str:
        """An adapter of another library's file, or of ours."""
        if leave_out:
            raise UserError(f"{path}: leave_out is for AdapterHub's folders")
        name = load_any(self.base, path, load_as)
        if set_active:
            self.set_active_adapters(name)
        return name

    # ---- heads

    def save_head(
        self, save_directory: PathLike, head_name: str, use_safetensors: bool = False
    ) -> None:
        """Writes a head into a folder."""
        head = self._saved_head(head_name)
        save_adapterhub_head(self.base, head, save_directory, self._about, use_safetensors)

    def save_all_heads(self, save_directory: PathLike, use_safetensors: bool = False) -> None:
        """Writes every head into a folder of its name, but one for words that is the base's own."""
        for name, head in self.heads.items():
            if not isinstance(head, BaseWords):
                self.save_head(Path(save_directory) / name, name, use_safetensors)

    def load_head(self, save_directory: PathLike, load_as: str | None = None) -> str:
        """Adds the head of a folder and activates it; returns its name.

        A head of that name that is there already is replaced.

        Raises:
            UserError: where there is none, and where it does not fit the model.
        """
        part = only(read_adapterhub(save_directory, [HEAD]).heads, str(save_directory), "head")
        return self._take_head(part, str(save_directory), load_as or part.name)

    def _take_head(self, part: HubPart, where: str, name: str, labels: Labels = None) -> str:
        config = part.config if labels is None else {**part.config, "id2label": dict(labels)}
        before = dict(self.heads.items()).get(name)
        active = list(self._active_heads)
        try:
            self.add_head(name, config, overwrite_ok=True).load_file_state(part.tensors)
        except UserError as error:
            if before is not None:
                self.heads[name] = before
            elif name in self.heads:
                del self.heads[name]
            self._active_heads = active
            raise UserError(f"{where}: head {part.name!r}: {error}") from None
        return name

    def _saved_head(self, name: str) -> HubPart:
        head = self._head(name)
        tensors = head.file_state(self.base.embedding.word_embeddings.weight)
        return HubPart(name, head.config, {}, tensors)

    # ---- fusions and setups

    def save_adapter_fusion(
        self, save_directory: PathLike, adapter_names: Setup, use_safetensors: bool = False
    ) -> None:
        """Writes a fusion into a folder, without its adapters."""
        key = self._fusion_key(adapter_names)
        save_adapterhub_fusion(self.base, key, save_directory, self._about, use_safetensors)

    def load_adapter_fusion(
        self,
        adapter_fusion_name_or_path: PathLike,
        load_as: str | None = None,
        set_active: bool = False,
    ) -> str:
        """Adds the fusion of a folder, whose adapters are there already; returns their names.

        Args:
            load_as: other adapters' names, as many, joined by commas.
        """
        path = str(adapter_fusion_name_or_path)
        folder = find_adapter(path, None).folder
        key = load_adapterhub_fusion(self.base, folder, load_as)
        if set_active:
            self._activate_fusion(key)
        return key

    def save_all_adapter_fusions(
        self, save_directory: PathLike, use_safetensors: bool = False
    ) -> None:
        """Writes every fusion into a folder of its name."""
        for key in self.base.fusions:
            self.save_adapter_fusion(Path(save_directory) / key, key, use_safetensors)

    def save_adapter_setup(
        self,
        save_directory: PathLike,
        adapter_setup: Setup,
        head_setup: str | Sequence[str] | Composition | None = None,
        use_safetensors: bool = False,
    ) -> None:
        """Writes a composition with its adapters, its fusions and its heads.

        Args:
            head_setup: the heads that go with it; None: those that are active.
        """
        composition = composition_of(adapter_setup)
        if composition is None:
            raise UserError("save_adapter_setup: name the adapters to save")
        heads = head_names(head_setup) or list(self._active_heads)
        parts = [self._saved_head(name) for name in heads]
        active = heads[0] if len(heads) == 1 else heads or None
        save_adapterhub_setup(
            self.base, composition, save_directory, self._about, use_safetensors, parts, active
        )

    def load_adapter_setup(
        self, adapter_setup_name_or_path: PathLike, set_active: bool = False
    ) -> tuple[Composition | str | None, Any]:
        """Adds all that a setup's folder holds; returns the composition and its heads.

        Args:
            set_active: activate both.
        """
        folder = find_adapter(str(adapter_setup_name_or_path), None).folder
        before = self.base.active
        read, composition = load_adapterhub_setup(self.base, folder)
        for part in read.heads:
            self._take_head(part, str(folder), part.name)
        heads: Any = read.head_setup
        if set_active:
            self.set_active_adapters(composition)
            if heads:
                self.active_head = heads
        else:
            self.base.set_active(before)
        return composition, heads

    @property
    def _about(self) -> About:
        """What files say of the model that they are of."""
        name = getattr(self.config, "name_or_path", "") or None
        return About(name, type(self).__name__)
