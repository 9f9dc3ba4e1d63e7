"""The `data_prep` stage: raw question answering data to the JSONL files that learning reads.

Keys of the stage's config (`conf/data_prep/*.yaml`), besides `run`:

```yaml
# all kinds
kind: squad              # squad | custom | synthetic
output_dir: ${data_dir}/prompt_data/v1.1      # custom: .../${.prefix}, synthetic: .../synthetic
tokenizer: null          # a checkpoint folder: the report also gives lengths in tokens
seed: 1234               # of the split, or of the generated rows

# squad and custom
prefix: squad            # names the files, <prefix>_train.jsonl, and is the rows' taskname
source: null             # squad: null downloads the official v1.1 files; or one SQuAD JSON file,
                         #   or a folder with train*.json and dev*.json
                         # custom: a JSONL, CSV or Parquet file, a Hub data set's name,
                         #   or {train: FILE, val: FILE, test: FILE}; val and test may be absent
split: null              # {train: 180, val: 0, test: 60}: counts, or fractions of at most 1 in all;
                         #   null: 0.8, 0.1, 0.1. Only where the source comes in one piece
                         #   (squad: counts paragraphs; custom: counts rows)

# squad
unanswerable_answer: null    # v2.0: text to answer unanswerable questions with; null drops them

# custom
prompt_template: "context: {context} question: {question} answer: {answer}"
                         # its fields are the rows'; the last must be {answer}
field_map: {}            # {template field: source column}; "answers.text" reaches into a column
answer_words: {}         # {source value: word}, e.g. {"0": "no", "1": "yes"}; empty: as they are
subset: null             # the configuration of a Hub data set that has several

# synthetic (no prefix, source, split)
tasks: [lookup, translate]   # files <task>_{train,val,test,test_ground_truth}.jsonl
rows: {train: 8000, val: 200, test: 200}
```

Writes the JSONL files and `<prefix>_report.json` (how a second run recognises them) to
`output_dir`, and the report to `<run.results_dir>/results/report.json`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.data import custom, squad, synthetic
from graftwerk.data.jsonl import write_json
from graftwerk.data.prepared import Plan, finished_report, prepare
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> None:
    """Prepare what a resolved stage config asks for; leaves what is there already and right."""
    plans = _plans(cfg)
    tokenizer = None
    if cfg.get("tokenizer"):
        from graftwerk.checkpoints import load_tokenizer

        tokenizer = load_tokenizer(cfg.tokenizer)
    output_dir = Path(cfg.output_dir)
    reports = []
    for plan in plans:
        plan.inputs["tokenizer"] = cfg.get("tokenizer")
        report = finished_report(plan, output_dir)
        if report is not None:
            print(f"{output_dir}: {plan.prefix} is prepared already, from the same source")
        else:
            report = prepare(plan, output_dir, tokenizer)
        print_report(report, output_dir)
        reports.append(report)
    results = Path(cfg.run.results_dir) / "results"
    write_json(results / "report.json", {"output_dir": str(output_dir), "outputs": reports})


def _plans(cfg: "DictConfig") -> list[Plan]:
    if cfg.kind == "squad":
        return [squad.plan(cfg)]
    if cfg.kind == "custom":
        return [custom.plan(cfg)]
    if cfg.kind == "synthetic":
        return synthetic.plans(cfg)
    raise UserError(f"data_prep.kind: {cfg.kind!r} is not known; allowed: squad, custom, synthetic")


def print_report(report: dict[str, Any], output_dir: Path) -> None:
    """The report as two tables: rows, and lengths."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    rows = Table(title=f"{report['prefix']} -> {output_dir}", title_justify="left")
    rows.add_column("rows")
    rows.add_column("", justify="right")
    rows.add_row("read", str(report["rows_in"]))
    for split, count in report["rows_out"].items():
        rows.add_row(f"written to {split}", str(count))
    for reason, count in report["dropped"].items():
        rows.add_row(f"dropped: {reason}", str(count))
    console.print(rows)

    lengths = Table(title="lengths", title_justify="left")
    for column in ("split", "field", "unit"):
        lengths.add_column(column)
    for column in ("median", "p95", "max"):
        lengths.add_column(column, justify="right")
    for split, fields in report["lengths"].items():
        for name, units in fields.items():
            for unit, values in units.items():
                lengths.add_row(split, name, unit, *(str(value) for value in values.values()))
    console.print(lengths)
