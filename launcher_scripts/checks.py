"""A composed configuration made complete, resolved and checked: all mistakes, then one error."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher_scripts.complete import (
    absolute,
    absolute_source,
    fill,
    inert_keys,
    keys_of,
    resolved,
    short,
)
from launcher_scripts.compose import Composition
from launcher_scripts.layouts import check_layout, own_shape
from launcher_scripts.notices import (
    ABSENT_CLUSTERS,
    ABSENT_KEYS,
    RENAMED_STAGES,
    Mistakes,
    one_line,
    without_effect,
)
from launcher_scripts.paths import check_paths
from launcher_scripts.schema import CLUSTERS, PREP_KINDS, Root, stage_schema
from launcher_scripts.shapes import Shape, read_shape
from launcher_scripts.stages import BASES, STAGES, files_of, fill_auto, fill_export
from launcher_scripts.sweep_points import check_kept
from launcher_scripts.tuning import check_scored, check_tuning
from launcher_scripts.validate import UNKNOWN, check, fields_of, nearest, shown

# An option of the groups that have no `gpt3/squad`.
EXAMPLES = {
    "data_prep": "squad",
    "training": "gpt3/126m",
    "conversion": "gpt3/hf_to_nemo",
    "export": "adapter",
}


# Stages that take values from the others, and how.
FOLLOWERS = {"eval": fill_auto, "export": fill_export}
FORMAT_OF_TAR, FOLDERS = "nemo", ("graftwerk", "adapterhub", "peft", "huggingface")


def finish(composition: Composition) -> list[str]:
    """Complete and check `composition.cfg` in place; returns what the user should know.

    Raises:
        Mistakes: every mistake, one line each.
    """
    try:
        return _Check(composition).run()
    except OmegaConfBaseException as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise Mistakes([*composition.problems, one_line(error)]) from None


class _Check:
    def __init__(self, composition: Composition) -> None:
        self.composition = composition
        self.cfg = composition.cfg
        self.stages = composition.stages
        self.notices = list(composition.notices)
        self.problems = list(composition.problems)
        self.inert: list[tuple[str, str]] = []  # (stage, key)

    def report(self, key: str, what: str) -> None:
        line = f"{key}: {what}"
        if line not in self.problems:
            self.problems.append(line)

    def run(self) -> list[str]:
        plain_root = self._root()
        self._prep_in_front()
        self.cfg.stages = self.stages
        self._idle_words()
        present = [name for name in STAGES if self._present(name)]
        plain = {name: self._stage(name) for name in present if name not in FOLLOWERS}
        for name in FOLLOWERS:
            if name in present:
                plain[name] = self._follower(name)
        for name in self.stages:
            if name in plain:
                self._base(name, plain[name])
                self._layout(name, plain[name])
                self._methods(name, plain[name])
                self._inference(name, plain[name])
        if not self.problems:  # a path may be wrong because of what is reported already
            self.notices += check_paths(self.cfg, self.stages, plain_root, self.report)
        if self.problems:
            raise Mistakes(self.problems)
        return [*self.notices, *without_effect(self.inert)]

    # -- the keys beside the stages

    def _root(self) -> dict[str, Any]:
        cfg = self.cfg
        if OmegaConf.is_missing(cfg, "launcher_scripts_path"):
            del cfg["launcher_scripts_path"]
        if os.environ.get("NEMO_LAUNCHER_DEBUG") == "1":
            cfg.dry_run = True
        cfg.stages = self.stages
        self.inert += [("", key) for key in ABSENT_KEYS if cfg.pop(key, None) is not None]
        fill(cfg, Root)
        known = {*fields_of(Root), *STAGES, "cluster"}
        plain: dict[str, Any] = {}
        for key in cfg:
            if key not in known:
                self.report(str(key), f"no such key{nearest(str(key), known)}")
        for key, (expected, _) in fields_of(Root).items():
            value = resolved(cfg, key, key, self.report)
            if key == "cluster_type" and value in ABSENT_CLUSTERS:
                names = ", ".join(CLUSTERS)
                self.report(key, f"{value} is not there yet; use one of {names}")
                continue
            before = len(self.problems)
            check(value, expected, key, self.report)
            plain[key] = value
            if len(self.problems) == before:
                absolute(cfg, key, value, expected)
        self._cluster(plain.get("cluster_type"))
        return plain

    def _cluster(self, kind: Any) -> None:
        schema = CLUSTERS.get(kind) if isinstance(kind, str) else None
        if schema is None:
            return
        if not isinstance(self.cfg.get("cluster"), DictConfig):
            self.cfg.cluster = {}
        others = {key for other in CLUSTERS.values() for key in fields_of(other)}
        idle = [str(k) for k in self.cfg.cluster if k in others and k not in fields_of(schema)]
        for key in idle:
            del self.cfg.cluster[key]
            self.notices.append(f"cluster.{key} has no effect with cluster_type={kind}")
        cluster: Any = self.cfg.cluster
        fill(cluster, schema)
        check(resolved(self.cfg, "cluster", "cluster", self.report), schema, "cluster", self.report)

    def _idle_words(self) -> None:
        idle = list(self.composition.idle)
        if "data_prep" not in self.stages:
            idle += [word for word in self.composition.for_data_prep if word not in idle]
        if idle:
            self.notices.append(f"without effect, since their stages do not run: {' '.join(idle)}")

    # -- stages

    def _present(self, name: str) -> bool:
        part = self.cfg.get(name)
        if isinstance(part, DictConfig) and len(part):
            return True
        said = any(
            line.startswith(f"{other}: ")
            for line in self.problems
            for other in (name, *_others(name))
        )
        if name in self.stages and not said:
            what = "null" if part is None else shown(part)
            self.report(
                name,
                f"is {what}, but stages names it; choose a configuration, such as "
                f"{name}={EXAMPLES.get(name, 'gpt3/squad')}",
            )
        return False

    def _stage(self, name: str, given: set[str] | None = None) -> Any:
        """Complete one stage, resolve it and check it; `given`: its keys before defaults."""
        report = self.report if name in self.stages else lambda key, what: None
        part = self.cfg[name]
        kind = part.get("kind") if not OmegaConf.is_missing(part, "kind") else None
        if name == "data_prep" and kind not in PREP_KINDS:
            report("data_prep.kind", f"must be one of {', '.join(PREP_KINDS)}, not {shown(kind)}")
            return None
        schema = stage_schema(name, kind)
        given = set(keys_of(part)) if given is None else given
        fill(part, schema)
        if "exp_manager" in part and isinstance(part.exp_manager, DictConfig):
            raw: Any = OmegaConf.to_container(part.exp_manager)
            if not raw.get("explicit_log_dir") and not raw.get("exp_dir"):
                part.exp_manager.explicit_log_dir = "${..run.results_dir}/results"
        plain = resolved(self.cfg, name, name, report)
        before = len(self.problems)
        check(plain, schema, name, report)
        if name in self.stages:
            found = [short(key) for key in inert_keys(schema, plain, name)]
            self.inert += [(name, key) for key in found if key in given]
        if len(self.problems) == before:
            if kind == "custom":
                absolute_source(part, plain)
            if absolute(self.cfg, name, plain, schema):
                plain = resolved(self.cfg, name, name, report)
        return plain

    def _follower(self, name: str) -> Any:
        """A stage after those that its `auto` values are taken from."""
        if self.problems:
            return None  # what is wrong there would be said twice
        given = set(keys_of(self.cfg[name]))
        self.notices += FOLLOWERS[name](self.cfg)
        plain = self._stage(name, given)
        model = plain.get("model") if isinstance(plain, dict) else None
        for key, value in (model or {}).items():
            if value == "auto" and name in self.stages:
                self.report(
                    f"{name}.model.{key}",
                    "auto, but no learning stage says what it is; give a value",
                )
        if name == "export" and name in self.stages:
            self._form(plain)
        return plain

    def _form(self, plain: Any) -> None:
        """A form of adapters holds no model, nor the other way round."""
        form, merge = plain.get("format"), plain.get("merge")
        if merge is True and form in ("adapterhub", "peft"):
            self.report(
                "export.format",
                f"{form} holds adapters and no model; with export.merge=True use graftwerk, nemo "
                f"or huggingface",
            )
        if merge is False and form == "huggingface":
            self.report(
                "export.format",
                "huggingface holds a whole model; set export.merge=True, or use peft",
            )
        path = str(plain.get("output_path"))
        if form in (FORMAT_OF_TAR, *FOLDERS) and path.endswith(".nemo") != (form == FORMAT_OF_TAR):
            must = "must end in .nemo" if form == FORMAT_OF_TAR else "must not end in .nemo"
            self.report("export.output_path", f"{path} {must} with export.format={form}")

    def _prep_in_front(self) -> None:
        """Put `data_prep` first where SQuAD's files are asked for and not there yet."""
        part = self.cfg.get("data_prep")
        if "data_prep" in self.stages or not isinstance(part, DictConfig):
            return
        if self.problems or part.get("kind") != "squad":
            return
        folder = resolved(self.cfg, "data_prep.output_dir", "", _silent)
        prefix = part.get("prefix", "squad")
        wanted = []
        for name in self.stages:
            for key in ("train_ds", "validation_ds", "test_ds", "ground_truth_ds"):
                files = resolved(self.cfg, f"{name}.model.data.{key}", "", _silent)
                wanted += files_of(files)
        made = {
            str(Path(str(folder)) / f"{prefix}_{split}.jsonl")
            for split in ("train", "val", "test", "test_ground_truth")
        }
        missing = [file for file in wanted if file in made and not Path(file).exists()]
        if missing:
            self.stages.insert(0, "data_prep")
            names = ", ".join(dict.fromkeys(Path(f).name for f in missing))
            self.notices.append(f"data_prep runs first: {folder} has no {names} yet")

    # -- the base

    def _base(self, name: str, plain: Any) -> None:
        """One checkpoint is named, by one key, and a revision only where it has some."""
        model = plain.get("model") if isinstance(plain, dict) else None
        if not isinstance(model, dict):
            return
        keys = (*BASES, "restore_path")
        if "language_model_path" in model and UNKNOWN not in [model.get(key) for key in keys]:
            named = {key: model[key] for key in BASES if model.get(key) is not None}
            key = f"{name}.model.language_model_path"
            if len(set(named.values())) > 1:
                other = model["restore_from_path"]
                self.report(
                    f"{name}.model.restore_from_path",
                    f"{other} is not {key}={model['language_model_path']}, and both name the "
                    "base; set one of them to null",
                )
            elif not named and not model.get("restore_path"):
                self.report(key, "is missing; it must be a path or a name of the Hub")
        base = _base_path(model)
        if model.get("revision") not in (None, "auto") and str(base).startswith("/"):
            self.report(
                f"{name}.model.revision",
                f"{model['revision']} goes with a name of the Hub, not with the path {base}",
            )

    def _methods(self, name: str, plain: Any) -> None:
        model = plain.get("model") if isinstance(plain, dict) else None
        if not isinstance(model, dict):
            return
        if STAGES[name].adapts:
            shape = self._base_shape(_base_path(model))
            check_tuning(name, model, shape, self.report, self.notices)
            check_kept(name, plain, self.report)
        elif name == "eval":
            check_scored(model, self._base_shape(_base_path(model)), self.report)

    def _inference(self, name: str, plain: Any) -> None:
        """An answer may be as long as it must be."""
        model = plain.get("model") if isinstance(plain, dict) else None
        inference = model.get("inference") if isinstance(model, dict) else None
        if not isinstance(inference, dict):
            return
        least, most = (_size(inference, f"{end}tokens_to_generate") for end in ("min_", ""))
        if least and most and least > most:
            self.report(
                f"{name}.model.inference.min_tokens_to_generate",
                f"{least} must be at most tokens_to_generate {most}",
            )

    # -- sizes

    def _layout(self, name: str, plain: Any) -> None:
        """Devices by model parallelism, batches by devices, the model by both."""
        model = plain.get("model") if isinstance(plain, dict) else None
        if not isinstance(model, dict):
            return
        shape = own_shape(model) if name == "training" else self._base_shape(_base_path(model))
        check_layout(name, plain, shape, self.report, self.notices)
        if name == "training":
            self._architecture(f"{name}.model", model)

    def _base_shape(self, path: Any) -> Shape | None:
        """The base's sizes, or those of the checkpoint that `conversion` makes it from."""
        if "conversion" in self.stages:
            source, made = (
                resolved(self.cfg, f"conversion.model.{key}", "", _silent)
                for key in ("checkpoint_folder", "output_path")
            )
            path = source if path == made else path
        return read_shape(path) if isinstance(path, str) and path != "auto" else None

    def _architecture(self, key: str, model: dict[str, Any]) -> None:
        names = ("hidden_size", "num_attention_heads", "num_query_groups")
        hidden, heads, groups = (_size(model, name) for name in names)
        length, positions = (
            _size(model, "encoder_seq_length"),
            _size(model, "max_position_embeddings"),
        )
        if hidden and heads and model.get("kv_channels") is None and hidden % heads:
            self.report(
                f"{key}.hidden_size",
                f"{hidden} must be a multiple of num_attention_heads {heads}, or set kv_channels",
            )
        if heads and groups and heads % groups:
            self.report(
                f"{key}.num_query_groups", f"{groups} must divide num_attention_heads {heads}"
            )
        learned = model.get("position_embedding_type") == "learned_absolute"
        if learned and length and positions and length > positions:
            self.report(
                f"{key}.encoder_seq_length",
                f"{length} must be at most max_position_embeddings {positions}",
            )


def _size(values: dict[str, Any], key: str) -> int | None:
    """A size where it is one; what is none is reported elsewhere."""
    size = values.get(key)
    return size if isinstance(size, int) and size > 0 else None


def _base_path(model: dict[str, Any]) -> Any:
    """What a stage's model starts from: the same keys as in `stages.base_of`, and conversion's."""
    keys = ("checkpoint_folder", *BASES, "restore_path")
    return next((model[key] for key in keys if model.get(key) is not None), None)


def _others(stage: str) -> list[str]:
    """The published launcher's names of a stage."""
    return [other for other, ours in RENAMED_STAGES.items() if ours == stage]


def _silent(key: str, what: str) -> None:
    """For values that are reported elsewhere."""
