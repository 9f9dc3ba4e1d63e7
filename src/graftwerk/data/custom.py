"""Any JSONL, CSV or Parquet file, or data set of the Hub, by a prompt template and a field map."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.data.prepared import Plan, Question, Sieve, file_identity
from graftwerk.data.splits import SPLITS, assign_splits, split_sizes
from graftwerk.data.templates import TaskTemplate
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from omegaconf import DictConfig

BUILDERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
# What data sets call the splits that we call val and test.
SPLIT_NAMES = {"train": "train", "validation": "val", "val": "val", "dev": "val", "test": "test"}


def plan(cfg: "DictConfig") -> Plan:
    """What to prepare under a `data_prep` config of kind `custom`."""
    source = cfg.get("source")
    if not source:
        raise UserError(
            "data_prep.source is not set; give a JSONL, CSV or Parquet file, "
            "{train: FILE, val: FILE, test: FILE}, or the name of a Hub data set"
        )
    # Checks the template before anything is read: its fields, the answer last.
    template = TaskTemplate(taskname=cfg.prefix, prompt_template=cfg.prompt_template)
    field_map = {str(k): str(v) for k, v in (cfg.get("field_map") or {}).items()}
    for name in field_map:
        if name not in (*template.fields, "id"):
            raise UserError(
                f"data_prep.field_map: {name!r} is no field of data_prep.prompt_template; it has "
                f"{', '.join(template.fields)} (and every row has an id)"
            )
    words = {str(k): str(v) for k, v in (cfg.get("answer_words") or {}).items()}
    columns = _Columns(template.fields, field_map, words)
    files = local_files(source)
    split = dict(cfg.split) if cfg.get("split") is not None else None
    if split is not None and len(files) > 1:
        raise UserError(
            "data_prep.split is for a source in one piece; data_prep.source names a file for each "
            "split: set data_prep.split: null"
        )
    inputs = {
        "kind": "custom",
        "prefix": cfg.prefix,
        "prompt_template": cfg.prompt_template,
        "field_map": field_map,
        "answer_words": words,
        "split": split,
        "seed": cfg.seed,
        "source": {k: file_identity(v) for k, v in files.items()} or [source, cfg.get("subset")],
    }

    def rows(sieve: Sieve) -> Iterator[Question]:
        with _loaded(source, files, cfg.get("subset")) as parts:
            for name, part in parts.items():
                columns.check(part.column_names, str(files.get(name, source)))
            if len(parts) == 1:
                (part,) = parts.values()
                yield from _cut(part, columns, split, cfg, sieve)
            else:
                if split is not None:
                    raise UserError(
                        f"data_prep.split is for a source in one piece; {source} comes in "
                        f"{', '.join(parts)}: set data_prep.split: null"
                    )
                yield from _as_split(parts, columns, cfg.prefix, sieve)

    empty = split is not None and not split.get("train")
    return Plan(cfg.prefix, inputs, rows, may_be_empty=empty)


def local_files(source: Any) -> dict[str, Path]:
    """{split: file} of a `data_prep.source` on this machine; empty for a Hub data set."""
    if isinstance(source, Mapping):
        for name in source:
            if name not in SPLITS:
                raise UserError(
                    f"data_prep.source: unknown split {name!r}; allowed: {', '.join(SPLITS)}"
                )
        if not source.get("train"):
            raise UserError("data_prep.source names no file for train")
        files = {str(name): Path(path) for name, path in source.items() if path}
    elif Path(source).exists() or Path(source).suffix in BUILDERS or Path(source).is_absolute():
        files = {"train": Path(source)}
    else:
        return {}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"data_prep.source: {path} is no file; give a file or a Hub data set")
        if path.suffix not in BUILDERS:
            raise UserError(
                f"data_prep.source: {path} is of no known format; allowed: {', '.join(BUILDERS)}"
            )
        if not path.stat().st_size:
            raise UserError(f"data_prep.source: {path} is empty")
    return files


@contextmanager
def _loaded(
    source: Any, files: Mapping[str, Path], subset: str | None
) -> Iterator[dict[str, "Dataset"]]:
    """The source's parts by the names of our splits; copies of local files are gone afterwards."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as cache:
        try:
            if files:
                parts = {}
                for name, path in files.items():
                    builder, options = BUILDERS[path.suffix]
                    parts[name] = datasets.load_dataset(
                        builder, data_files=str(path), split="train", cache_dir=cache, **options
                    )
            else:
                loaded = datasets.load_dataset(source, subset)
                by_name = {str(name): part for name, part in loaded.items()}
                parts = {SPLIT_NAMES[k]: v for k, v in by_name.items() if k in SPLIT_NAMES}
                parts = parts or by_name
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            cause = error.__cause__ or error
            # The loader's messages run over many lines; the first says what is wrong.
            reason = (str(cause) or type(cause).__name__).splitlines()[0]
            name = ", ".join(map(str, files.values())) or source
            raise UserError(f"data_prep.source: cannot load {name}: {reason}") from None
        yield parts


class _Columns:
    """Which columns of the source make which fields of a row."""

    def __init__(
        self, fields: list[str], field_map: Mapping[str, str], words: Mapping[str, str]
    ) -> None:
        self.columns = {name: field_map.get(name, name) for name in fields}
        self.id_column = field_map.get("id", "id")
        self.words = words

    def check(self, present: list[str], source: str) -> None:
        """Refuse a source that lacks a column, naming those that it has."""
        for name, column in self.columns.items():
            if column in present or column.split(".")[0] in present:
                continue
            near = get_close_matches(column, present, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{source}: no column {column!r} for {{{name}}} of data_prep.prompt_template; the "
                f"columns are {', '.join(present)}{hint} Name it in data_prep.field_map: "
                f"{{{name}: COLUMN}}"
            )

    def read(self, part: "Dataset") -> Iterator[tuple[dict[str, Any], Any, Any]]:
        """(fields, answers, id) of each row."""
        from datasets import ClassLabel

        classes = {k: v for k, v in part.features.items() if isinstance(v, ClassLabel)}
        for row in part:
            assert isinstance(row, dict)
            for name, labels in classes.items():
                # -1 stands for a label that is held back.
                row[name] = labels.int2str(row[name]) if (row[name] or 0) >= 0 else None
            values = {name: _reach(row, column) for name, column in self.columns.items()}
            answers = values.pop("answer")
            answers = answers if isinstance(answers, list) else [answers]
            fields = {name: _text(value) for name, value in values.items()}
            yield fields, [self._answer(value) for value in answers], row.get(self.id_column)

    def _answer(self, value: Any) -> Any:
        text = _text(value)
        return self.words.get(text, text) if isinstance(text, str) else text


def _reach(row: Mapping[str, Any], column: str) -> Any:
    """`answers.text` is row["answers"]["text"], unless a column is called that."""
    value: Any = row
    if column in row:
        return row[column]
    for key in column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> Any:
    """Numbers and truth values as text; what is no text otherwise stays, for the sieve to drop."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _cut(
    part: "Dataset",
    columns: _Columns,
    split: Mapping[str, int | float] | None,
    cfg: "DictConfig",
    sieve: Sieve,
) -> Iterator[Question]:
    """A source in one piece, cut by rows. Two passes, so that of a row a byte stays in memory."""
    sound = bytearray(
        sieve.passes("source", fields, answers) for fields, answers, _ in columns.read(part)
    )
    total = sum(sound)
    names = iter(assign_splits(split_sizes(split, total, "rows"), total, cfg.seed))
    for number, (fields, answers, given) in enumerate(columns.read(part)):
        if not sound[number]:
            continue
        name = next(names)
        if name is None:
            sieve.withdraw("in no split")
            continue
        own_id = sieve.own_id(given, f"{cfg.prefix}-{number}") if name == "test" else ""
        yield Question((name,), fields, answers, own_id)


def _as_split(
    parts: Mapping[str, "Dataset"], columns: _Columns, prefix: str, sieve: Sieve
) -> Iterator[Question]:
    """A source that has splits. Where val or test is absent, the other serves as both."""
    # Test first, so that a row in both is left out of training, not of the test.
    for name in ("test", "val", "train"):
        if name not in parts:
            continue
        held_out = "test" in parts, "val" in parts
        both = name != "train" and held_out != (True, True)
        splits = ("val", "test") if both else (name,)
        for number, (fields, answers, given) in enumerate(columns.read(parts[name])):
            if sieve.passes(name, fields, answers):
                own_id = sieve.own_id(given, f"{prefix}-{number}") if "test" in splits else ""
                yield Question(splits, fields, answers, own_id)
