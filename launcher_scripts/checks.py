"""A composed configuration made complete, resolved and checked: all mistakes, then one error."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launcher_scripts.compose import Composition
from launcher_scripts.notices import ABSENT_CLUSTERS, Mistakes, without_effect
from launcher_scripts.schema import CLUSTERS, PREP_KINDS, Root, stage_schema
from launcher_scripts.shapes import Shape, read_shape
from launcher_scripts.stages import STAGES, fill_auto
from launcher_scripts.validate import (
    UNKNOWN,
    FilePath,
    Report,
    check,
    default_of,
    fields_of,
    is_required,
    is_schema,
    members,
    nearest,
    shown,
)

LOCAL = ("bcp", "interactive")  # clusters whose stages run on this machine


def finish(composition: Composition) -> list[str]:
    """Complete and check `composition.cfg` in place; returns what the user should know.

    Raises:
        Mistakes: every mistake, one line each.
    """
    return _Check(composition).run()


class _Check:
    def __init__(self, composition: Composition) -> None:
        self.cfg = composition.cfg
        self.stages = composition.stages
        self.notices = list(composition.notices)
        self.problems: list[str] = []
        self.inert: list[str] = []

    def report(self, key: str, what: str) -> None:
        line = f"{key}: {what}"
        if line not in self.problems:
            self.problems.append(line)

    def run(self) -> list[str]:
        plain_root = self._root()
        self._prep_in_front()
        self.cfg.stages = self.stages
        present = [name for name in STAGES if self._present(name)]
        plain = {name: self._stage(name) for name in present if name != "eval"}
        if "eval" in present:
            plain["eval"] = self._eval()
        for name in self.stages:
            if name in plain:
                self._layout(name, plain[name])
        self._paths(plain, plain_root)
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
        fill(self.cfg.cluster, schema)
        check(resolved(self.cfg, "cluster", "cluster", self.report), schema, "cluster", self.report)

    # -- stages

    def _present(self, name: str) -> bool:
        part = self.cfg.get(name)
        if isinstance(part, DictConfig) and len(part):
            return True
        if name in self.stages:
            what = "null" if part is None else shown(part)
            self.report(
                name, f"is {what}, but stages names it; choose a configuration, such as "
                f"{name}={'squad' if name == 'data_prep' else 'gpt3/squad'}"
            )
        return False

    def _stage(self, name: str) -> Any:
        """Complete one stage, resolve it and check it against its schema."""
        report = self.report if name in self.stages else lambda key, what: None
        part = self.cfg[name]
        kind = part.get("kind") if not OmegaConf.is_missing(part, "kind") else None
        if name == "data_prep" and kind not in PREP_KINDS:
            report("data_prep.kind", f"must be one of {', '.join(PREP_KINDS)}, not {shown(kind)}")
            return None
        schema = stage_schema(name, kind)
        given = set(keys_of(part))
        fill(part, schema)
        if "exp_manager" in part and isinstance(part.exp_manager, DictConfig):
            manager = part.exp_manager
            if manager.get("explicit_log_dir") is None and not manager.get("exp_dir"):
                manager.explicit_log_dir = "${..run.results_dir}/results"
        plain = resolved(self.cfg, name, name, report)
        before = len(self.problems)
        check(plain, schema, name, report)
        if name in self.stages:
            self.inert += [key for key in inert_keys(schema, plain, name) if short(key) in given]
        if len(self.problems) == before:
            absolute(self.cfg, name, plain, schema)
            return resolved(self.cfg, name, name, report)
        return plain

    def _eval(self) -> Any:
        """`eval` after the stages that its `auto` values are taken from."""
        if self.problems:
            return None  # what is wrong there would be said twice
        self.notices += fill_auto(self.cfg)
        plain = self._stage("eval")
        model = plain.get("model") if isinstance(plain, dict) else None
        for key, value in (model or {}).items():
            if value == "auto":
                self.report(
                    f"eval.model.{key}",
                    "auto, but no learning stage says what it is; give a value",
                )
        return plain

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
                wanted += [files] if isinstance(files, str) else files or []
        made = {
            str(Path(str(folder)) / f"{prefix}_{split}.jsonl")
            for split in ("train", "val", "test", "test_ground_truth")
        }
        missing = [f for f in wanted if isinstance(f, str) and f in made and not Path(f).exists()]
        if missing:
            self.stages.insert(0, "data_prep")
            names = ", ".join(dict.fromkeys(Path(f).name for f in missing))
            self.notices.append(f"data_prep runs first: {folder} has no {names} yet")

    # -- sizes

    def _layout(self, name: str, plain: Any) -> None:
        """Devices by model parallelism, batches by devices, the model by both."""
        try:
            trainer, model = plain["trainer"], plain["model"]
            world = trainer["devices"] * trainer["num_nodes"]
            tensor = model["tensor_model_parallel_size"]
            pipeline = model["pipeline_model_parallel_size"]
            sizes = [world, tensor, pipeline]
        except (KeyError, TypeError):
            return
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return
        key = f"{name}.model"
        if world % (tensor * pipeline):
            self.report(
                f"{key}.tensor_model_parallel_size",
                f"{tensor} x pipeline_model_parallel_size {pipeline} must divide the "
                f"{world} devices (trainer.devices {trainer['devices']} x num_nodes "
                f"{trainer['num_nodes']})",
            )
        else:
            self._batches(key, model, world // (tensor * pipeline))
        shape = own_shape(model) if name == "training" else self._base_shape(model)
        if shape is not None:
            self._divides(key, shape, tensor, pipeline)
        if name == "training":
            self._architecture(key, model)

    def _batches(self, key: str, model: dict[str, Any], replicas: int) -> None:
        total, micro = model.get("global_batch_size"), model.get("micro_batch_size")
        if not (isinstance(total, int) and isinstance(micro, int)) or min(total, micro) < 1:
            return
        if total % (micro * replicas):
            self.report(
                f"{key}.global_batch_size",
                f"{total} must be a multiple of micro_batch_size {micro} x {replicas} "
                f"data-parallel copies of the model (devices by tensor and pipeline size), that "
                f"is of {micro * replicas}",
            )

    def _base_shape(self, model: dict[str, Any]) -> Shape | None:
        path = model.get("language_model_path")
        return read_shape(path) if isinstance(path, str) and path != "auto" else None

    def _divides(self, key: str, shape: Shape, tensor: int, pipeline: int) -> None:
        for field in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            size = getattr(shape, field)
            if size is not None and size % tensor:
                self.report(
                    f"{key}.tensor_model_parallel_size",
                    f"{tensor} must divide the model's {field} {size}",
                )
        if shape.num_layers is not None and shape.num_layers % pipeline:
            self.report(
                f"{key}.pipeline_model_parallel_size",
                f"{pipeline} must divide the model's num_layers {shape.num_layers}",
            )

    def _architecture(self, key: str, model: dict[str, Any]) -> None:
        hidden, heads = model.get("hidden_size"), model.get("num_attention_heads")
        groups, length = model.get("num_query_groups"), model.get("encoder_seq_length")
        positions = model.get("max_position_embeddings")
        if _whole(hidden, heads) and model.get("kv_channels") is None and hidden % heads:
            self.report(
                f"{key}.hidden_size",
                f"{hidden} must be a multiple of num_attention_heads {heads}, or set kv_channels",
            )
        if _whole(heads, groups) and heads % groups:
            self.report(f"{key}.num_query_groups", f"{groups} must divide num_attention_heads {heads}")
        learned = model.get("position_embedding_type") == "learned_absolute"
        if learned and _whole(length, positions) and length > positions:
            self.report(
                f"{key}.encoder_seq_length",
                f"{length} must be at most max_position_embeddings {positions}",
            )

    # -- paths

    def _paths(self, plain: dict[str, Any], root: dict[str, Any]) -> None:
        """What a stage reads must exist, or be written by a stage before it."""
        if self.problems:
            return  # a path may be wrong because of what is reported already
        kind = root["cluster_type"]
        local = kind in LOCAL
        if not local and root["container"] is not None:
            return  # paths inside of the container
        severe = local and not self.cfg.dry_run
        written: list[str] = []
        for name in self.stages:
            if STAGES[name].learns:
                self._other_place(name, written)
            for key, path in self._read_keys(name):
                if not os.path.exists(path) and not _covered(path, written):
                    self._missing_path(f"{name}.{key}", path, severe)
            written += STAGES[name].writes(self.cfg[name])
            written.append(str(self.cfg[name].run.results_dir))
        key_file = root.get("wandb_api_key_file")
        if key_file is not None and not os.path.exists(key_file):
            self._missing_path("wandb_api_key_file", key_file, severe)

    def _missing_path(self, key: str, path: str, severe: bool) -> None:
        what = f"{path} does not exist, and no stage before writes it"
        if severe:
            self.report(key, what)
        else:
            self.notices.append(f"warning: {key}: {path} does not exist on this machine")

    def _read_keys(self, name: str) -> list[tuple[str, str]]:
        """(key, path) of everything that `STAGES[name].reads` counts as a path."""
        part = self.cfg[name]
        reads = dict.fromkeys(STAGES[name].reads(part))
        resume = OmegaConf.select(part, "trainer.resume_from_checkpoint")
        truth = OmegaConf.select(part, "model.data.ground_truth_ds") or []
        paths = list(dict.fromkeys([*reads, *truth, *([resume] if resume else [])]))
        leaves = {value: key for key, value in _text_leaves(OmegaConf.to_container(part, resolve=True))}
        return [(leaves.get(path, ""), str(path)) for path in paths]

    def _other_place(self, name: str, written: Sequence[str]) -> None:
        """The checkpoint where the launcher's files have it, or where its documentation has it."""
        path = OmegaConf.select(self.cfg[name], "model.language_model_path")
        if not isinstance(path, str) or os.path.exists(path) or _covered(path, written):
            return
        given = Path(path)
        if given.parent.name == "results":
            other = given.parent.parent / given.name
        else:
            other = given.parent / "results" / given.name
        if other.exists():
            self.cfg[name].model.language_model_path = str(other)
            self.notices.append(
                f"{name}.model.language_model_path: {given} does not exist; taking {other}"
            )


# ---- filling and resolving


def fill(node: DictConfig, schema: type) -> None:
    """Give every key that is left out its default, in lists of mappings too."""
    for name, (expected, field) in fields_of(schema).items():
        inner = next((option for option in members(expected) if is_schema(option)), None)
        items = next((o for o in members(expected) if get_origin(o) is list), None)
        if name not in node:
            if not is_required(field):
                node[name] = default_of(field)
            continue
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        value = node[name]
        if inner is not None and isinstance(value, DictConfig):
            fill(value, inner)
        elif items is not None and is_schema(get_args(items)[0]) and isinstance(value, ListConfig):
            for item in value:
                if isinstance(item, DictConfig):
                    fill(item, get_args(items)[0])


def resolved(cfg: Any, key: str, shown_key: str, report: Report) -> Any:
    """The plain value at a dotted key, each leaf resolved apart so that all faults are reported."""
    node: Any = cfg
    *parents, last = key.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or last not in node:
        return None
    return _resolve(node, last, shown_key, report)


def _resolve(node: Any, key: Any, name: str, report: Report) -> Any:
    try:
        value = node[key]
    except MissingMandatoryValue:
        report(name, "is ???: it must be given")
        return UNKNOWN
    except OmegaConfBaseException as error:
        reason = " ".join(str(error.msg or error).split())
        raw = OmegaConf.to_container(node, resolve=False)
        text = raw[key] if isinstance(raw, dict | list) else key
        report(name, f"{shown(text)} cannot be resolved: {reason}")
        return UNKNOWN
    if isinstance(value, DictConfig):
        return {k: _resolve(value, k, f"{name}.{k}", report) for k in value}
    if isinstance(value, ListConfig):
        return [_resolve(value, i, f"{name}.{i}", report) for i in range(len(value))]
    return value


def keys_of(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all mappings below; items of lists share the key of the list."""
    if isinstance(node, ListConfig):
        items = node._iter_ex(resolve=False)
        return [key for item in items for key in keys_of(item, prefix)]
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return []
    found = []
    for key, value in node.items_ex(resolve=False):
        name = f"{prefix}.{key}" if prefix else str(key)
        found += [name, *keys_of(value, name)]
    return found


def absolute(cfg: Any, key: str, value: Any, expected: Any) -> None:
    """Make relative paths absolute, in place: a job does not run where its user typed."""
    for option in members(expected):
        if get_origin(option) is Literal and value in get_args(option):
            return
    for option in members(expected):
        base = option
        if get_origin(option) is Annotated:
            rules = get_args(option)[1:]
            if isinstance(value, str) and any(isinstance(rule, FilePath) for rule in rules):
                path = os.path.abspath(os.path.expanduser(value))
                if path != value:
                    OmegaConf.update(cfg, key, path.replace("${", "\\${"))
                return
            continue
        if is_schema(base) and isinstance(value, dict):
            for name, item in value.items():
                if name in fields_of(base):
                    absolute(cfg, f"{key}.{name}", item, fields_of(base)[name][0])
            return
        if get_origin(base) is list and isinstance(value, list):
            for index, item in enumerate(value):
                absolute(cfg, f"{key}.{index}", item, get_args(base)[0])
            return


def inert_keys(schema: Any, value: Any, key: str) -> list[str]:
    """Keys of `value` that are accepted and change nothing."""
    found = []
    for name, (expected, field) in fields_of(schema).items():
        child = f"{key}.{name}"
        if not isinstance(value, dict) or name not in value:
            continue
        if field.metadata.get("inert"):
            found.append(child)
        for option in members(expected):
            items = value[name] if isinstance(value[name], list) else [value[name]]
            inner = get_args(option)[0] if get_origin(option) is list else option
            if is_schema(inner):
                found += [k for item in items for k in inert_keys(inner, item, child)]
    return list(dict.fromkeys(found))


def short(key: str) -> str:
    """A dotted key without its stage."""
    return key.split(".", 1)[1]


def own_shape(model: dict[str, Any]) -> Shape:
    """The shape that a `training` configuration describes itself."""
    heads, hidden = model.get("num_attention_heads"), model.get("hidden_size")
    ffn = model.get("ffn_hidden_size") or (4 * hidden if _whole(hidden) else None)
    groups = model.get("num_query_groups") or heads
    sizes = [model.get("num_layers"), heads, groups, ffn]
    return Shape(*[size if _whole(size) else None for size in sizes])


def _whole(*values: Any) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


def _silent(key: str, what: str) -> None:
    """For values that are reported elsewhere."""


def _covered(path: str, written: Sequence[str]) -> bool:
    return any(path == made or path.startswith(made.rstrip("/") + "/") for made in written)


def _text_leaves(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        items = [(f"{key}.{k}" if key else str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(key, v) for v in value]
    else:
        return [(key, value)] if isinstance(value, str) else []
    return [leaf for name, item in items for leaf in _text_leaves(item, name)]
