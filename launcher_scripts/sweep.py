"""`--multirun`: the points of a sweep, composed together, each with its own folders and names.

A stage that no swept value reaches is the same job at every point and runs once. Any other stage
has a folder for each of its points, named by the values that lead to it.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import omegaconf.base
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig, OmegaConf

from launcher_scripts import overrides
from launcher_scripts.checks import finish
from launcher_scripts.complete import fill, plain_text
from launcher_scripts.compose import Composer, Composition
from launcher_scripts.notices import Mistakes
from launcher_scripts.plan import collector, options_of
from launcher_scripts.schema import Root
from launcher_scripts.stages import STAGES

REFERENCE = re.compile(r"\$\{\.*\s*([A-Za-z_]\w*)")
LONGEST = 80  # characters of a point's name: it becomes a part of file names
# Keys that decide what is composed, besides groups.
DECISIVE = ("stages", "cluster_type", "language_model_path", "restore_from_path")


@dataclass
class Point:
    """One run of a sweep, composed but not checked."""

    label: str
    composition: Composition
    chosen: dict[str, str] = field(default_factory=dict)  # swept key -> its word here
    hydra: Any = None  # what `${hydra:...}` refers to
    heads: dict[str, set[str]] = field(default_factory=dict)  # stage -> where its values come from

    def activate(self) -> None:
        """Let `${hydra:...}` mean this point's."""
        HydraConfig.instance().cfg = self.hydra


def points(composer: Composer, typed: Sequence[str]) -> list[Point]:
    """Compose every point of the sweep that `typed` spells, in Hydra's order and syntax.

    Raises:
        Mistakes: words that are none, and sweeps that have no points.
    """
    parsed = _parse(composer, typed)
    ways = [_ways(composer, override) for override in parsed]
    swept = [o.key_or_group for o, words in zip(parsed, ways, strict=True) if len(words) > 1]
    templates: dict[tuple[str, ...], Point] = {}
    found = []
    for words in itertools.product(*ways):
        chosen = {
            override.key_or_group: word
            for override, word in zip(parsed, words, strict=True)
            if override.key_or_group in swept
        }
        decisive = tuple(w for key, w in chosen.items() if _decides(composer, key, w, parsed))
        if decisive not in templates:
            composition = composer.compose(words)
            hydra = HydraConfig.instance().cfg
            templates[decisive] = Point("", composition, chosen, hydra)
        found.append(_of_template(composer, templates[decisive], chosen))
    _name_apart(found, swept)
    return found


def finish_all(found: Sequence[Point]) -> list[str]:
    """Complete and check every point, in place; returns what the user should know.

    Raises:
        Mistakes: those of all points, each once.
    """
    notices: list[str] = []
    mistakes: list[str] = []
    for point in found:
        point.activate()
        try:
            notices += finish(point.composition)
        except Mistakes as wrong:
            mistakes += wrong.lines
    if mistakes:
        raise Mistakes(list(dict.fromkeys(mistakes)))
    return list(dict.fromkeys(notices))


@contextmanager
def quick_interpolation() -> Iterator[None]:
    """Remember how each interpolation parses: forty points hold the same ones."""
    parse = omegaconf.base.parse  # pyright: ignore
    omegaconf.base.parse = lru_cache(maxsize=None)(parse)  # pyright: ignore
    try:
        yield
    finally:
        omegaconf.base.parse = parse  # pyright: ignore


def _parse(composer: Composer, typed: Sequence[str]) -> list[Override]:
    problems: list[str] = []
    parsed = overrides.read(typed, tuple(STAGES), collector(problems))
    for override in parsed:
        if override.is_sweep_override() and override.is_interval_sweep():
            problems.append(f"{override.input_line}: an interval has no points to run")
        if override.key_or_group in ("hydra/launcher", "hydra/sweeper"):
            problems.append(
                f"{override.input_line}: points are submitted by cluster_type, as docs/sweeps.md "
                "says, and no plug-in is used"
            )
        if override.key_or_group == "cluster_type" and override.is_sweep_override():
            problems.append(f"{override.input_line}: one sweep runs on one kind of cluster")
    swept = [o.key_or_group for o in parsed if o.is_sweep_override()]
    problems += [f"{key}: is swept twice" for key in sorted(set(swept)) if swept.count(key) > 1]
    if problems:
        raise Mistakes(problems)
    return parsed


def _ways(composer: Composer, override: Override) -> list[str]:
    """The words that an override stands for: one, or one for each value of a sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        options = options_of(composer.loader.repository, override.key_or_group)
        names = override.value().filter(options)  # type: ignore[union-attr]
        if not names:
            raise Mistakes([f"{override.input_line}: no option of {key} has such a name"])
        return [f"{key}={name}" for name in names]
    return list(dict.fromkeys(f"{key}={value}" for value in override.sweep_string_iterator()))


def _decides(composer: Composer, key: str, word: str, parsed: Sequence[Override]) -> bool:
    """Whether a swept word changes more than the value of its own key."""
    if "/" in key or composer.loader.repository.group_exists(key) or key.startswith("hydra"):
        return True
    paths = [f"{o.key_or_group}." for o in parsed]
    related = [p for p in paths if p.startswith(f"{key}.") or f"{key}.".startswith(p)]
    decisive = key.split(".")[-1] in DECISIVE or "${" in word or word.startswith("~")
    return decisive or len(related) > 1  # besides itself


def _of_template(composer: Composer, template: Point, chosen: dict[str, str]) -> Point:
    """The same composition with this point's values."""
    composition = template.composition
    copy = replace(
        composition,
        cfg=deepcopy(composition.cfg),
        stages=list(composition.stages),
        notices=list(composition.notices),
        problems=list(composition.problems),
    )
    for key, word in chosen.items():
        head = key.split(".")[0]
        if word == template.chosen[key] or (head in STAGES and head not in copy.cfg):
            continue
        (override,) = overrides.read([word], (), collector(copy.problems))
        forced = overrides.read([overrides.forced(override)], (), collector(copy.problems))
        with composer.mistakes():
            composer.loader._apply_overrides_to_config(forced, copy.cfg)
    return Point("", copy, chosen, template.hydra, template.heads)


# -- folders and names


def outline(cfg: DictConfig) -> DictConfig:
    """What `run.results_dir` of a composed configuration needs to be resolved, in place."""
    if OmegaConf.is_missing(cfg, "launcher_scripts_path"):
        del cfg["launcher_scripts_path"]
    fill(cfg, Root)
    return cfg


def _name_apart(found: list[Point], swept: list[str]) -> None:
    """Give each point its label, and its stages folders and names where points share them."""
    short = _short(swept)
    _label(found, swept, short)
    for name in STAGES:
        at = [point for point in found if name in point.composition.cfg]
        reach = [key for key in swept if any(_reaches(p, key, name) for p in at)]
        if not reach:
            continue
        groups: dict[tuple[str, ...], list[Point]] = {}
        for point in at:
            groups.setdefault(tuple(point.chosen[key] for key in reach), []).append(point)
        runs = {values: _run(group[0], name) for values, group in groups.items()}
        if len({folder for folder, _ in runs.values()}) == len(groups):
            continue  # the values are part of the folder's name already
        labels = _labels(list(groups), reach, short)
        for values, group in groups.items():
            folder, run_name = runs[values]
            for point in group:
                run = point.composition.cfg[name].run
                run.results_dir = plain_text(f"{folder}/{labels[values]}")
                run.name = f"{run_name}_{labels[values]}"


def _label(found: list[Point], swept: list[str], short: dict[str, str]) -> None:
    labels = _labels([tuple(point.chosen.values()) for point in found], swept, short)
    for point in found:
        point.label = labels[tuple(point.chosen.values())]


def _labels(
    combinations: list[tuple[str, ...]], keys: list[str], short: dict[str, str]
) -> dict[tuple[str, ...], str]:
    """A readable name for each combination of words: `lr_1e-3-seed_2`."""
    named: dict[tuple[str, ...], str] = {}
    for words in combinations:
        parts = [
            f"{short[key]}_{_plain(word.partition('=')[2])}"
            for key, word in zip(keys, words, strict=True)
        ]
        label = "-".join(parts)
        digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]
        if len(label) > LONGEST:
            label = f"{label[: LONGEST - 9]}_{digest}"
        named[words] = f"{label}_{digest}" if label in named.values() else label
    return named


def _plain(value: str) -> str:
    """A value as a part of a file's name: a path by its last part, a list joined by `+`."""
    parts = re.sub(r"['\"\[\]{}\s]", "", value).split(",")
    ends = [p.rstrip("/").rsplit("/", 1)[-1] if p.startswith(("/", "~", ".")) else p for p in parts]
    return re.sub(r"[^\w.+-]+", "-", "+".join(ends)).strip("-") or "none"


def _short(keys: list[str]) -> dict[str, str]:
    """Each key by as few of its last segments as tell it from the others."""
    ends = {key: key.replace("/", ".").split(".") for key in keys}
    found = {}
    for key, parts in ends.items():
        size = 1
        while sum(other[-size:] == parts[-size:] for other in ends.values()) > 1:
            size += 1
        found[key] = re.sub(r"[^\w.-]", "", ".".join(parts[-size:]))
    return found


def _reaches(point: Point, key: str, stage: str) -> bool:
    """Whether a swept key can change what a stage does, or what a stage before it leaves."""
    head = re.split(r"[./]", key)[0]
    if head not in STAGES:
        return True
    cfg, names = point.composition.cfg, list(STAGES)
    before = [name for name in names[: names.index(stage) + 1] if name in cfg]
    return any(head in _heads(point, name) for name in before)


def _heads(point: Point, stage: str) -> set[str]:
    """The top-level keys that a stage's values come from, itself included."""
    if stage not in point.heads:
        cfg, found, waiting = point.composition.cfg, set(), [stage]
        while waiting:
            head = waiting.pop()
            if head not in found:
                found.add(head)
                waiting += REFERENCE.findall(_text(cfg, head)) if head in cfg else []
        point.heads[stage] = found
    return point.heads[stage]


def _text(cfg: DictConfig, head: str) -> str:
    node = cfg._get_node(head)
    if isinstance(node, DictConfig | omegaconf.ListConfig):
        return str(OmegaConf.to_container(node))
    return str(node._value()) if node is not None else ""  # type: ignore[union-attr]


def _run(point: Point, stage: str) -> tuple[str, str]:
    point.activate()
    run = outline(point.composition.cfg)[stage].run
    folder = str(run.results_dir)
    return os.path.abspath(os.path.expanduser(folder)), str(run.name)


def common_folder(folders: Sequence[Path]) -> Path:
    """Where the folders of an array's points lie."""
    return Path(os.path.commonpath([folder.parent for folder in folders]))
