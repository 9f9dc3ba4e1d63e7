"""The stages in canonical order: what each reads and writes, and what `eval` takes from them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from launcher_scripts.sweep_points import point_path, swept
from launcher_scripts.tuning import left_under_composition, schemes_of

Paths = Callable[[DictConfig], list[str]]
# The keys that name a stage's base: ours, and that of NeMo's PEFT scripts.
BASES = ("language_model_path", "restore_from_path")
SPLITS = ("train", "val", "test", "test_ground_truth")


@dataclass(frozen=True)
class Stage:
    """One kind of work. `reads` and `writes` map the stage's config to paths (files or folders)."""

    name: str
    learns: bool  # fits parameters: it has `model.data.train_ds` and leaves `model.nemo_path`
    adapts: bool  # ... on a base that is there: adapters, or all of it
    per_device: bool  # one process for each of `trainer.devices`; otherwise one process alone
    reads: Paths
    writes: Paths

    def command(self, python: str, config: Path) -> list[str]:
        """The argument vector of one process of the stage on a node."""
        return [python, "-u", *self.module(config)]

    def module(self, config: Path) -> list[str]:
        """What follows the interpreter, or a launcher of several processes, on the command line."""
        return ["-m", "graftwerk", self.name, str(config)]


def _prep_reads(cfg: DictConfig) -> list[str]:
    source = OmegaConf.select(cfg, "source")
    sources = list(source.values()) if isinstance(source, DictConfig) else [source]
    # "org/name" may be a data set of a Hub: only what can be nothing but a path counts as one.
    suffixes = (".json", ".jsonl", ".csv", ".parquet")
    paths = [s for s in sources if s and (s[0] in "/.~" or str(s).endswith(suffixes))]
    return [*paths, *_each(cfg, "tokenizer")]


def _prep_writes(cfg: DictConfig) -> list[str]:
    folder = Path(str(cfg.output_dir))
    prefixes = _each(cfg, "tasks") if cfg.get("kind") == "synthetic" else _each(cfg, "prefix")
    return [str(folder / f"{prefix}_{split}.jsonl") for prefix in prefixes for split in SPLITS]


def _conversion_reads(cfg: DictConfig) -> list[str]:
    return _each(cfg.model, "checkpoint_folder", "tokenizer")


def _converted(cfg: DictConfig) -> list[str]:
    return _each(cfg.model, "output_path")


def _learning_reads(cfg: DictConfig) -> list[str]:
    starts = (*BASES, "restore_path", "peft.restore_from_path", "tokenizer.path")
    data = [path for key in ("train_ds", "validation_ds") for path in _data_files(cfg, key)]
    data += [str(each["path"]) for each in OmegaConf.select(cfg, "model.peft.adapters") or []]
    return data + _each(cfg.model, *starts) + _each(cfg, "trainer.resume_from_checkpoint")


def _data_files(cfg: DictConfig, key: str) -> list[str]:
    value = OmegaConf.select(cfg, f"model.data.{key}")
    holds = OmegaConf.is_config(value)
    return files_of(OmegaConf.to_container(value, resolve=True) if holds else value)


def files_of(value: Any) -> list[str]:
    """The paths in a value of `model.data.train_ds` or its like, in any of its forms."""
    if isinstance(value, list):
        return [path for item in value for path in files_of(item)]
    if isinstance(value, dict):
        return files_of(value.get("path")) + files_of(value.get("file_names"))
    return [value] if isinstance(value, str) else []


def _model(cfg: DictConfig) -> list[str]:
    return _each(cfg.model, "nemo_path")


def _tuned(cfg: DictConfig) -> list[str]:
    """What stage peft writes: of a sweep each point besides the best one."""
    peft: Any = OmegaConf.to_container(cfg.model.peft, resolve=True)
    names = swept(peft, schemes_of(peft.get("peft_scheme")))
    paths = _model(cfg)
    return [*paths, *(point_path(path, name) for path in paths for name in names)]


def _eval_reads(cfg: DictConfig) -> list[str]:
    lists = [OmegaConf.select(cfg, f"model.{key}") for key in ("adapters", "models")]
    paths = [str(each["path"]) for found in lists if found not in (None, "auto") for each in found]
    keys = (*BASES, "data.test_ds", "data.ground_truth_ds")
    return [*_each(cfg.model, *keys), *paths]


def _export_reads(cfg: DictConfig) -> list[str]:
    found = OmegaConf.select(cfg, "model.adapters")
    paths = [str(each["path"]) for each in found] if found not in (None, "auto") else []
    return [*_each(cfg.model, *BASES), *paths]


def _export_writes(cfg: DictConfig) -> list[str]:
    return _each(cfg, "output_path")


def _eval_writes(cfg: DictConfig) -> list[str]:
    return [str(Path(str(cfg.run.results_dir)) / "results" / "metrics.json")]


def _each(cfg: DictConfig, *keys: str) -> list[str]:
    """The values under `keys`, lists laid flat; absent, null and `auto` ones are left out."""
    values: list[Any] = []
    for key in keys:
        value = OmegaConf.select(cfg, key)
        values += [value] if isinstance(value, str) or value is None else list(value)
    return [str(value) for value in values if value not in (None, "auto")]


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data_prep", False, False, False, _prep_reads, _prep_writes),
        Stage("training", True, False, True, _learning_reads, _model),
        Stage("conversion", False, False, False, _conversion_reads, _converted),
        Stage("fine_tuning", True, True, True, _learning_reads, _model),
        Stage("peft", True, True, True, _learning_reads, _tuned),
        Stage("adapter_learning", True, True, True, _learning_reads, _model),
        Stage("ia3_learning", True, True, True, _learning_reads, _model),
        Stage("eval", False, False, True, _eval_reads, _eval_writes),
        Stage("export", False, False, False, _export_reads, _export_writes),
    )
}


def fill_auto(cfg: DictConfig) -> list[str]:
    """Replace the `auto` values of `cfg.eval.model` in place; returns lines that tell the user.

    The base, its length and the templates are those of the learning stages in `cfg.stages` (of
    the configured ones where the list has none); adapters and models are what these stages leave.
    Where nothing says what an `auto` value is, it stays for the check to name.
    """
    if "eval" not in cfg.stages or not cfg.get("eval"):
        return []
    model = cfg.eval.model
    learners, lines = _learners(cfg, "eval")
    with open_dict(cfg):
        composition, own = model.get("composition", "auto"), model.get("adapters", "auto")
        model.composition = None if composition == "auto" else composition
        if model.get("restore_from_path") and model.get("language_model_path") == "auto":
            model.language_model_path = None
        _fill_base(model, [cfg[name] for name in learners])
        if not learners:
            return lines
        _fill_rows(model, cfg[learners[0]].model)
        if model.get("task_templates") == "auto":
            model.task_templates = _templates(cfg[name] for name in learners)
        results, more = _results(cfg, learners, base_of(model), "eval")
        for key in ("adapters", "models"):
            if model.get(key, "auto") == "auto":
                model[key] = [each for each, whole in results if whole == (key == "models")]
                lines += [line for line in more if line not in lines]
        if own == "auto" and composition is not None:
            _fill_composition(cfg, composition == "auto")
    return lines


def _fill_composition(cfg: DictConfig, auto: bool) -> None:
    """Adapters and compositions of `eval` where one of its adapters was trained under one."""
    adapters: list[Any] = []
    compositions: list[str] = []
    composed = False
    for each in cfg.eval.model.adapters:
        peft: Any = OmegaConf.select(cfg[each.name], "model.peft")
        plain: Any = None if peft is None else OmegaConf.to_container(peft, resolve=True)
        left = left_under_composition(each.name, plain, each.path) if plain is not None else None
        composed = composed or left is not None
        adapters += [each] if left is None else left[0]
        compositions.append(each.name if left is None else left[1])
    if composed or not auto:
        cfg.eval.model.adapters = adapters
    if composed and auto:
        cfg.eval.model.composition = compositions[0] if len(compositions) == 1 else compositions


def fill_export(cfg: DictConfig) -> list[str]:
    """Replace the `auto` values of `cfg.export` in place; as `fill_auto` does for `eval`."""
    if "export" not in cfg.stages or not cfg.get("export"):
        return []
    model = cfg.export.model
    learners, lines = _learners(cfg, "export")
    with open_dict(cfg):
        if model.get("restore_from_path") and model.get("language_model_path", "auto") == "auto":
            model.language_model_path = None
        _fill_base(model, [cfg[name] for name in learners])
        if learners and model.get("adapters", "auto") == "auto":
            results, more = _results(cfg, learners, base_of(model), "export")
            model.adapters = [each for each, whole in results if not whole] or "auto"
            lines += [line for line in more if line not in lines]
        if cfg.export.get("output_path", "auto") == "auto" and cfg.export.get("format"):
            kind = "model" if cfg.export.get("merge") else "adapter"
            last = f"{kind}.nemo" if cfg.export.format == "nemo" else cfg.export.format
            cfg.export.output_path = f"{cfg.export.run.results_dir}/results/{last}"
    return lines


def base_of(model: DictConfig) -> Any:
    """The base that a model section names, `auto`, or None; as the job reads its keys."""
    keys = [key for key in (*BASES, "restore_path") if not OmegaConf.is_missing(model, key)]
    return next((model[key] for key in keys if model.get(key)), None)


def _fill_base(model: DictConfig, learners: list[DictConfig]) -> None:
    """What `eval` takes from the first stage that names a base, and the length of any stage."""
    base = next((cfg for cfg in learners if _learned(cfg) is not None), None)
    if model.get("language_model_path") != "auto":
        base_revision = None
    else:
        base_revision = base.model.get("revision") if base is not None else None
        model.language_model_path = "auto" if base is None else _learned(base)
    if model.get("revision") == "auto":
        model.revision = base_revision
    if model.get("head") == "auto":
        model.head = base.model.get("head") if base is not None else None
    lengths = (cfg.model.get("encoder_seq_length") for cfg in learners)
    if model.get("encoder_seq_length") == "auto":
        model.encoder_seq_length = next((length for length in lengths if length), None)


ROW_FORMAT = (
    "chat",
    "prompt_template",
    "label_key",
    "truncation_field",
    "truncation_method",
    "over_long",
    "tokens_to_generate",
    "add_sep",
)


def _fill_rows(model: DictConfig, learned: DictConfig) -> None:
    """How rows are read, where `eval` leaves it open."""
    data = learned.get("data") or OmegaConf.create()
    own = data.get("train_ds")
    given = [own, data] if isinstance(own, DictConfig) else [data]
    for key in ROW_FORMAT:
        values = [part[key] for part in given if part.get(key) is not None]
        if key not in model.data and values:
            model.data[key] = values[0]


def _learners(cfg: DictConfig, stage: str) -> tuple[list[str], list[str]]:
    """Names of the stages that `stage` follows, adapters before bases, and why it took them."""
    configured = [s.name for s in STAGES.values() if s.learns and cfg.get(s.name)]
    listed = [name for name in configured if name in cfg.stages]
    by_adapters = sorted(listed, key=lambda name: not STAGES[name].adapts)
    if listed:
        return by_adapters, []
    adapted = [name for name in configured if STAGES[name].adapts]
    # Which stage is meant, nobody says: one whose base is there comes first.
    adapted.sort(key=lambda name: not Path(str(base_of(cfg[name].model))).exists())
    found = [name for name in adapted if Path(str(cfg[name].model.nemo_path)).exists()]
    if found:
        return found, [f"{stage}: takes the results that exist already: {', '.join(found)}"]
    expected = " or ".join(str(cfg[name].model.nemo_path) for name in adapted)
    does = "scores the base alone" if stage == "eval" else "finds nothing to write"
    line = f"{stage}: {does}: no adapter at {expected}"
    return adapted or configured, [line] if adapted else []


def _learned(cfg: DictConfig) -> Any:
    """The base after a learning stage: what `training` leaves, what others read."""
    trains_whole = "language_model_path" not in cfg.model
    return cfg.model.nemo_path if trains_whole else base_of(cfg.model)


def _templates(cfgs: Iterable[DictConfig]) -> list[Any]:
    """The templates of all learning stages, one for each task name."""
    templates: dict[str, Any] = {}
    for cfg in cfgs:
        for template in cfg.model.get("task_templates") or []:
            templates.setdefault(template.taskname, OmegaConf.to_container(template, resolve=True))
    return list(templates.values())


def trains_whole(name: str, model: Any) -> bool:
    """Whether a learning stage leaves a model, not adapters."""
    scheme = OmegaConf.select(model, "peft.peft_scheme", default="adapter")
    none = scheme is None or list(scheme) == ["none"] or scheme == "none"
    return name in ("training", "fine_tuning") or (name == "peft" and none)


def _results(
    cfg: DictConfig, learners: list[str], base: Any, stage: str
) -> tuple[list[tuple[dict[str, str], bool]], list[str]]:
    """What the stages with a base leave: (name and path, whether it is a whole model)."""
    results, lines = [], []
    for name in (n for n in learners if STAGES[n].adapts):
        model = cfg[name].model
        if name not in cfg.stages and not Path(str(model.nemo_path)).exists():
            continue
        own = base_of(model)
        if own != base:
            lines.append(f"{stage}: leaves out {name}: its base is {own}, not {base}")
            continue
        result = {"name": name, "path": str(model.nemo_path)}
        results.append((result, trains_whole(name, model)))
    return results, lines
