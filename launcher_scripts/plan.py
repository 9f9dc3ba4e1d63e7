"""What Hydra is asked to compose for one command line, and what is wrong with that line.

The primary file's defaults list and the words together say which stages run; the groups of these,
and those that they refer to, are composed.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.core.default_element import GroupDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from launcher_scripts import overrides as words
from launcher_scripts.notices import (
    ABSENT_STAGES,
    RENAMED_STAGES,
    Mistakes,
    one_line,
    stage_hint,
)
from launcher_scripts.schema import CLUSTERS
from launcher_scripts.stages import STAGES
from launcher_scripts.validate import Report, nearest

GROUPS = (*STAGES, "cluster", "experiment")
REFERENCE = re.compile(r"\$\{(\w+)\.")


class Plan:
    """What to compose for one command line."""

    def __init__(self, composer: Any, typed: Sequence[str], whole: bool = False) -> None:
        self.composer = composer
        self.whole = whole
        self.notices: list[str] = []
        self.for_data_prep: list[str] = []  # words that count only if it is put in front
        self.problems: list[str] = []
        report = collector(self.problems)
        parsed = words.read(typed, tuple(STAGES), report)
        parsed = [o for o in parsed if words.check_sweep(o, report)]
        self.repo = self._repository(parsed)
        self.primary = self._primary()
        self.defaults = self._defaults()
        self.choices = [o for o in parsed if self._is_choice(o)]
        self.values = [o for o in parsed if o not in self.choices]
        self.choices = [o for o in self.choices if self._check_choice(o, report)]
        self.stages = self._stages(report)
        self.values = [o for o in self.values if words.check_key(o, self.stages, report)]
        self.cluster_type = self._value("cluster_type", "bcm")
        self.needed = set(self.stages)
        learners = {stage.name for stage in STAGES.values() if stage.learns}
        if not learners & self.needed and {"eval", "export"} & self.needed:
            # What its `auto` values are taken from, where there is such a file.
            self.needed |= {name for name in learners if self._exists(name)}
        if {"eval", *learners} & self.needed:
            self.needed.add("data_prep")  # may have to be put in front
        self.lacking = [name for name in self.stages if self._lacks(name)]

    # -- what there is

    def _repository(self, parsed: list[Override]) -> Any:
        lines = [o.input_line for o in parsed if o.is_hydra_override()]
        loader = self.composer.loader
        loader.repository.unset = frozenset()
        try:
            return loader._parse_overrides_and_create_caching_repo(self.composer.name, lines)[1]
        except HydraException as error:
            raise Mistakes([one_line(error)]) from None
        except yaml.YAMLError as error:
            raise Mistakes([f"{self.composer.name}.yaml: {one_line(error)}"]) from None

    def _primary(self) -> Any:
        loaded = self.repo.load_config(self.composer.name)
        if loaded is None:
            places = [s.path for s in self.repo.get_sources() if s.scheme() == "file"]
            raise Mistakes([f"no {self.composer.name}.yaml in {', '.join(places)}"])
        return loaded

    def _defaults(self) -> dict[str, Any]:
        """The groups of the primary file's defaults list, each with its option."""
        entries = self.primary.defaults_list or []
        return {
            entry.group: entry.value
            for entry in entries
            if isinstance(entry, GroupDefault) and entry.group and not entry.override
        }

    def _is_choice(self, override: Override) -> bool:
        key = override.key_or_group
        return (
            "." not in key
            and (override.value() is None or isinstance(override.value(), str | list))
            and ("/" in key or key in {*GROUPS, *self.defaults} or self.repo.group_exists(key))
        )

    def _check_choice(self, override: Override, report: Report) -> bool:
        group, option = override.key_or_group, override.value()
        base, _, folder = group.partition("/")
        hint = stage_hint(group, STAGES)
        if hint is not None and not self.whole:
            report(f"{group}={option}", f"{group} is no group; {hint}")
        elif base in GROUPS and folder:
            report(f"{group}={option}", f"no such group; did you mean {base}={folder}/{option}?")
        elif not self.repo.group_exists(group):
            report(f"{group}={option}", f"no such group{nearest(base, GROUPS)}")
        elif isinstance(option, str) and not self.repo.config_exists(f"{group}/{option}"):
            known = options_of(self.repo, group)
            near = nearest(option, known)
            listed = f" (there are {', '.join(known)})" if near.startswith("; did") else ""
            report(f"{group}={option}", f"no such option{near}{listed}")
        else:
            return True
        return False

    def _lacks(self, stage: str) -> bool:
        """Report an option of the defaults list that there is no file for, here or there."""
        option = self._chosen(stage)
        if not isinstance(option, str) or self.whole or self._exists(stage):
            return False
        self.problems.append(self._not_here(stage, option, stage))
        return True

    def _not_here(self, group: str, option: str, stage: str) -> str:
        line = f"{group}: {option} (in {self.composer.name}.yaml) is not here; choose one with "
        return line + f"{stage}={'|'.join(options_of(self.repo, stage))}"

    # -- what is asked for

    def _value(self, key: str, default: Any = None) -> Any:
        """A top-level value as it will be: typed, else of the experiment, else of the primary."""
        typed = [o for o in self.values if o.key_or_group == key and not o.is_delete()]
        if typed:
            return typed[-1].value()
        for name in self._experiments():
            loaded = self.repo.load_config(f"experiment/{name}")
            if loaded is not None and key in loaded.config:
                return loaded.config[key]
        return self.primary.config.get(key, default)

    def _experiments(self) -> list[str]:
        option: Any = self.defaults.get("experiment")
        for override in self.choices:
            if override.key_or_group == "experiment":
                option = override.value()
        return [str(o) for o in option] if isinstance(option, list) else [option] if option else []

    def _stages(self, report: Report) -> list[str]:
        typed = any(o.key_or_group == "stages" for o in self.values)
        asked = self._value("stages")
        if OmegaConf.is_list(asked):
            asked = OmegaConf.to_container(asked)  # pyright: ignore
        names = asked.split(",") if isinstance(asked, str) else asked
        if not isinstance(names, list) or not names:
            report("stages", f"must name at least one stage; there are {', '.join(STAGES)}")
            return []
        stages = [self._stage(str(name).strip(), typed, report) for name in names]
        found = [stage for stage in stages if stage is not None]
        ordered = [stage for stage in STAGES if stage in found]
        if found != ordered:
            self.notices.append(f"stages run in this order: {', '.join(ordered)}")
        return ordered

    def _stage(self, name: str, typed: bool, report: Report) -> str | None:
        if name in STAGES:
            return name
        if name in RENAMED_STAGES and not typed:
            self.notices.append(f"stages: {name} is {RENAMED_STAGES[name]} here")
            return RENAMED_STAGES[name]
        hint = stage_hint(name, STAGES)
        report(f"stages={name}", f"{hint}" if hint else _unknown_stage(name))
        return None

    # -- what Hydra is told

    def compose(self) -> DictConfig:
        while True:
            unset = self.unset()
            cfg = self.composer.load(self.words(), unset)
            for group in unset:
                cfg.hydra.runtime.choices[group] = self._chosen(group)
            HydraConfig.instance().set_config(cfg)
            OmegaConf.set_struct(cfg, False)
            del cfg["hydra"]
            referred = self._referred(cfg)
            self.for_data_prep = [] if "data_prep" in referred else self._typed("data_prep")
            if referred <= self.needed or self.whole:
                return self._own_groups(cfg)
            self.needed |= referred

    def _typed(self, stage: str) -> list[str]:
        """The words that set a stage's values."""
        return [str(o.input_line) for o in self.values if o.key_or_group.split(".")[0] == stage]

    def _exists(self, group: str) -> bool:
        return self.repo.config_exists(f"{group}/{self._chosen(group)}")

    def _chosen(self, group: str) -> Any:
        typed = [o.value() for o in self.choices if o.key_or_group == group]
        return typed[-1] if typed else self.defaults.get(group)

    def _referred(self, cfg: DictConfig) -> set[str]:
        """The stages that interpolations of the requested ones name."""
        text = [str(OmegaConf.to_container(cfg[name])) for name in self.needed if cfg.get(name)]
        names = {name for part in text for name in REFERENCE.findall(part)}
        return {name for name in names if name in STAGES}

    def _own_groups(self, cfg: DictConfig) -> DictConfig:
        """Take out what has no meaning here, and what an experiment sets of idle stages."""
        idle = [] if self.whole else [name for name in STAGES if name not in self.needed]
        for name in (*ABSENT_STAGES, *RENAMED_STAGES, *idle):
            cfg.pop(name, None)
        for name in [str(key) for key in cfg if str(key).endswith("_config")]:
            del cfg[name]
        return cfg

    def words(self) -> list[str]:
        """Every word for Hydra: choices of groups, then values."""
        chosen = self._group_words()
        idle = set() if self.whole else {name for name in STAGES if name not in self.needed}
        values = [
            str(o.input_line) if o.is_hydra_override() else words.forced(o)
            for o in self.values
            if o.key_or_group.split(".")[0] not in idle
        ]
        return [*chosen, *values, *self._one_base()]

    def _one_base(self) -> list[str]:
        """Who types one name of the base means it alone, not beside the YAML's other one."""
        keys = {str(o.key_or_group) for o in self.values if o.value() is not None}
        typed = (key.split(".") for key in keys if key.endswith(".model.restore_from_path"))
        others = [f"{stage}.model.language_model_path" for stage, *_ in typed if stage in STAGES]
        said = {str(o.key_or_group) for o in self.values}
        return [f"++{key}=null" for key in others if key not in said]

    def idle(self) -> list[str]:
        """The words that set values of stages that are not composed."""
        return [word for name in STAGES if name not in self.needed for word in self._typed(name)]

    def unset(self) -> frozenset[str]:
        """Groups of the primary file that are not composed."""
        groups = {name for name in self.defaults if name in ABSENT_STAGES or name in RENAMED_STAGES}
        for override in self.choices:
            if override.value() is None:
                groups.add(override.key_or_group)
        idle = {name for name in self.defaults if name in STAGES and name not in self.needed}
        if self.whole:  # leave out only what there is no file for
            idle = {name for name in idle if not self._exists(name)}
        groups |= {*idle, *self.lacking}
        return frozenset(groups)

    def _group_words(self) -> list[str]:
        unset = self.unset()
        said = {}
        for override in self.choices:
            group = override.key_or_group
            known = group in self.defaults or group.startswith("hydra/")
            idle = group in STAGES and group not in self.needed and not self.whole
            if override.is_delete():
                said[group] = override.input_line
            elif group not in unset and not idle:
                said[group] = _choice("" if known else "+", override)
        for stage in sorted(self.needed - set(said)):
            if self.defaults.get(stage) is None and self._chosen(stage) is None:
                option = self._substitute(stage)
                if option is not None:
                    said[stage] = f"{'' if stage in self.defaults else '+'}{stage}={option}"
        cluster = self._cluster()
        if cluster is not None:
            said["cluster"] = f"{'' if 'cluster' in self.defaults else '+'}cluster={cluster}"
        return [str(word) for word in said.values()]

    def _substitute(self, stage: str) -> str | None:
        """The option of a stage that the primary file leaves open, or calls otherwise."""
        if stage == "data_prep":
            return "squad"
        other = next((name for name, ours in RENAMED_STAGES.items() if ours == stage), None)
        option = self.defaults.get(other) if other else None
        if not isinstance(option, str):
            return None
        # Its evaluation has one file for each method (adapter_gpt3/squad), ours one for all.
        ours = re.sub(r"^(adapter|ia3|prompt)_", "", option)
        if self.repo.config_exists(f"{stage}/{ours}"):
            return ours
        line = self._not_here(str(other), option, stage)
        if stage in self.stages and line not in self.problems:
            self.problems.append(line)
        return None

    def _cluster(self) -> str | None:
        """The cluster's file where it is not chosen by hand: that of `cluster_type`."""
        typed = [o for o in self.choices if o.key_or_group == "cluster"]
        chosen = typed[-1].value() if typed else self.defaults.get("cluster")
        kind = self.cluster_type
        if kind not in CLUSTERS or chosen == kind or (typed and chosen not in CLUSTERS):
            return None
        if typed and chosen != "bcm":
            line = f"cluster={chosen}: goes with cluster_type={chosen}, not cluster_type={kind}"
            if line not in self.problems:
                self.problems.append(line)
        return str(kind) if typed or chosen in CLUSTERS or chosen is None else None


def options_of(repo: Any, group: str) -> list[str]:
    """All options of a group, those of its folders too."""
    found = list(repo.get_group_options(group, ObjectType.CONFIG))
    for folder in repo.get_group_options(group, ObjectType.GROUP):
        found += [f"{folder}/{option}" for option in options_of(repo, f"{group}/{folder}")]
    return found


def _choice(add: str, override: Override) -> str:
    option = override.get_value_string()
    return f"{add}{override.get_key_element().lstrip('+')}={option}"


def collector(problems: list[str]) -> Report:
    return lambda key, what: problems.append(f"{key}: {what}")


def _unknown_stage(name: str) -> str:
    near = nearest(name, [*STAGES, *RENAMED_STAGES])
    for other, ours in RENAMED_STAGES.items():
        near = near.replace(f"mean {other}?", f"mean {ours}?")
    if near.startswith("; did"):
        return f"no such stage{near}"
    return f"no such stage; there are {', '.join(STAGES)}"
