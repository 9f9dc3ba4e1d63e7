"""What stages read must be there, or be written by one before; what they write must not be."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launcher_scripts.stages import BASES, STAGES
from launcher_scripts.validate import HUB_NAME, Report

LOCAL = ("bcp", "interactive")  # clusters whose stages run on this machine
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the first that is set counts


def check_paths(
    cfg: DictConfig, stages: Sequence[str], root: dict[str, Any], report: Report
) -> list[str]:
    """Report the paths of all stages that are wrong; returns what the user should know.

    Where the jobs run on another machine, a path that is missing on this one is a warning. Those
    inside of a container are not looked at.
    """
    local = root["cluster_type"] in LOCAL
    if not local and root["container"] is not None:
        return []
    return _Paths(cfg, report, severe=local and not cfg.dry_run).run(stages, root)


class _Paths:
    def __init__(self, cfg: DictConfig, report: Report, severe: bool) -> None:
        self.cfg, self.report, self.severe = cfg, report, severe
        self.notices: list[str] = []
        self.written: list[str] = []

    def run(self, stages: Sequence[str], root: dict[str, Any]) -> list[str]:
        for name in stages:
            for key in BASES if name in ("eval", "export") or STAGES[name].adapts else ():
                self.other_place(name, key)
            for key, path in self.read_keys(name):
                if not os.path.isabs(path) and HUB_NAME.fullmatch(path):
                    self.repository(f"{name}.{key}", path)
                elif not os.path.exists(path) and not self.made(path):
                    self.missing(f"{name}.{key}", path)
            if name == "conversion":
                self.in_the_way("conversion", "conversion.model", self.cfg[name].model)
            if name == "export":
                self.in_the_way("export", "export", self.cfg[name])
            self.written += STAGES[name].writes(self.cfg[name])
            self.written.append(str(self.cfg[name].run.results_dir))
        key_file = root.get("wandb_api_key_file")
        if key_file is not None and not os.path.exists(key_file):
            self.missing("wandb_api_key_file", key_file)
        return self.notices

    def made(self, path: str) -> bool:
        """Whether a stage before writes it."""
        return any(path == made or path.startswith(made.rstrip("/") + "/") for made in self.written)

    def wrong(self, key: str, what: str, here: str) -> None:
        """A mistake where the job runs on this machine, elsewhere a warning."""
        if self.severe:
            self.report(key, what)
        else:
            self.notices.append(f"warning: {key}: {here}")

    def missing(self, key: str, path: str) -> None:
        what = f"{path} does not exist, and no stage before writes it"
        self.wrong(key, what, f"{path} does not exist on this machine")

    def in_the_way(self, stage: str, key: str, section: DictConfig) -> None:
        path = str(section.output_path)
        if os.path.exists(path) and not section.overwrite:
            what = (
                f"{path} exists already: leave {stage} out of stages to use it, set "
                f"{key}.overwrite=True to replace it, or choose another path"
            )
            self.wrong(f"{key}.output_path", what, what)

    def repository(self, key: str, name: str) -> None:
        """A name of the Hub is looked up by the job, not here."""
        line = f"{key}: {name} is no path here; the job takes it from the Hugging Face Hub"
        variables = self.cfg.get("env_vars") or {}
        given = [v for v in OFFLINE if variables.get(v) is not None]
        if given and str(variables[given[0]]).upper() in ("1", "ON", "YES", "TRUE"):
            line += f"'s cache: env_vars.{given[0]} forbids to download it (0 allows it)"
        if line not in self.notices:
            self.notices.append(line)

    def read_keys(self, name: str) -> list[tuple[str, str]]:
        """(key, path) of everything that `STAGES[name].reads` counts as a path."""
        part = self.cfg[name]
        paths = dict.fromkeys(STAGES[name].reads(part))
        leaves = {
            value: key for key, value in _text_leaves(OmegaConf.to_container(part, resolve=True))
        }
        return [(leaves.get(str(path), ""), str(path)) for path in paths]

    def other_place(self, name: str, key: str) -> None:
        """The checkpoint where the launcher's files have it, or where its documentation has it."""
        path = OmegaConf.select(self.cfg[name], f"model.{key}")
        if not isinstance(path, str) or os.path.exists(path) or self.made(path):
            return
        given = Path(path)
        if given.parent.name == "results":
            other = given.parent.parent / given.name
        else:
            other = given.parent / "results" / given.name
        if given.is_absolute() and other.exists():
            self.cfg[name].model[key] = str(other)
            line = f"{name}.model.{key}: {given} does not exist; taking {other}"
            self.notices.append(line)


def _text_leaves(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        items = [(f"{key}.{k}" if key else str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(key, v) for v in value]
    else:
        return [(key, value)] if isinstance(value, str) else []
    return [leaf for name, item in items for leaf in _text_leaves(item, name)]
