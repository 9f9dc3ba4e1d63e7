"""From the command line to one composed configuration, by Hydra.

Only the groups of the requested stages, and those that they refer to, are composed: the others are
set to null for Hydra, which is most of the time that composing takes. The search path is the
caller's folder of YAML, then ours, so that a folder of the published launcher runs with our
clusters and with stages of ours that it does not have.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launcher_scripts import resolvers
from launcher_scripts.notices import (
    Mistakes,
    one_line,
)
from launcher_scripts.plan import GROUPS, Plan, options_of

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


class _Repository(ConfigRepository):
    """Hydra's files, with some groups of the primary file's defaults list set to null.

    A `group=null` on the command line would not do: Hydra takes none, least of all for groups
    that have no folder, as the ones of the published launcher that are not here.
    """

    primary = ""
    unset: frozenset[str] = frozenset()

    def load_config(self, config_path: str) -> Any:
        loaded = super().load_config(config_path)
        if loaded is not None and config_path == self.primary:
            for entry in loaded.defaults_list or []:
                if isinstance(entry, GroupDefault) and entry.group in self.unset:
                    entry.value = None
        return loaded


@dataclass
class Composition:
    """A composed configuration, not checked yet, without Hydra's own node."""

    cfg: DictConfig
    stages: list[str]
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)  # words for stages that do not run
    for_data_prep: list[str] = field(default_factory=list)  # idle unless it is put in front


class Composer:
    """Hydra on one search path. `close` gives Hydra's global state back."""

    def __init__(
        self,
        config_name: str | None = None,
        config_path: str | None = None,
        config_dir: str | None = None,
    ) -> None:
        """Raises `Mistakes` for folders and files that do not exist."""
        self.name = config_name or "config"
        main = _folder(config_path) if config_path else CONF
        search = create_config_search_path(str(main))
        schema = SearchPathQuery(provider="schema")
        if main != CONF:
            search.prepend("graftwerk", f"file://{CONF}", anchor=schema)
        if config_dir is not None:
            extra = Path(config_dir).absolute()
            if not extra.is_dir():
                raise Mistakes([f"--config-dir: {extra} is no folder"])
            anchor = SearchPathQuery(provider="graftwerk") if main != CONF else schema
            search.prepend("command-line", f"file://{extra}", anchor=anchor)
        setbase("1.3")
        resolvers.register()
        GlobalHydra.instance().clear()
        self.hydra = Hydra.create_main_hydra2("main", search)
        self.loader: Any = self.hydra.config_loader
        self.loader.repository = _Repository(search)
        self.loader.repository.primary = self.name

    def close(self) -> None:
        GlobalHydra.instance().clear()

    def compose(self, typed: Sequence[str]) -> Composition:
        """Compose what the words ask for.

        Unknown stages, groups, options and keys are `problems` of the result, which is composed
        without them, so that its values can be checked in the same run.

        Raises:
            Mistakes: where nothing can be composed.
        """
        plan = Plan(self, typed)
        try:
            cfg = plan.compose()
        except Mistakes as mistakes:
            raise Mistakes([*plan.problems, *mistakes.lines]) from None
        return Composition(
            cfg, plan.stages, plan.notices, plan.problems, plan.idle(), plan.for_data_prep
        )

    def hydra_words(self, typed: Sequence[str]) -> list[str]:
        """The words with which Hydra itself composes everything, for `--cfg` and its kin."""
        plan = Plan(self, typed, whole=True)
        if plan.problems:
            raise Mistakes(plan.problems)
        self.loader.repository.unset = plan.unset()
        return plan.words()

    def load(self, words: list[str], unset: Iterable[str]) -> DictConfig:
        """Let Hydra compose, without the groups of `unset`."""
        self.loader.repository.unset = frozenset(unset)
        with self.mistakes():
            return self.loader.load_configuration(self.name, words, RunMode.RUN, from_shell=False)

    @contextmanager
    def mistakes(self) -> Iterator[None]:
        """Turn what Hydra raises into one line; HYDRA_FULL_ERROR=1 shows all of it."""
        try:
            yield
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise Mistakes([one_line(error)]) from None

    def options(self) -> dict[str, list[str]]:
        """The options of every group of ours that the search path has."""
        repo = self.loader.repository
        return {group: options_of(repo, group) for group in GROUPS if repo.group_exists(group)}


def _folder(config_path: str) -> Path:
    """`--config-path`: against the folder of `main.py`, as Hydra has it, or the current one."""
    places: Iterable[Path] = (ROOT / config_path, Path(config_path).absolute())
    for place in places:
        if place.is_dir():
            return place
    raise Mistakes([f"--config-path: {Path(config_path).absolute()} is no folder"])
