"""The `data_prep` stage: raw question answering data to the JSONL files that learning reads.

Keys of the stage's config (`conf/data_prep/*.yaml`), besides `run`:

```yaml
# all kinds
kind: squad              # squad | custom | synthetic
output_dir: ${data_dir}/prompt_data/v1.1      # custom: .../${.prefix}, synthetic: .../synthetic
tokenizer: null          # a checkpoint folder: the report also gives lengths in tokens
seed: 1234               # of the split, or of the generated rows

# squad and custom
prefix: squad            # files <prefix>_{train,val,test,test_ground_truth}.jsonl; the rows' taskname
source: null             # squad: null downloads the official v1.1 files; or one SQuAD JSON file, or a
                         #   folder with train*.json and dev*.json
                         # custom: a JSONL, CSV or Parquet file, a Hub data set's name,
                         #   or {train: FILE, val: FILE, test: FILE}; val and test may be absent
split: null              # {train: 180, val: 0, test: 60}: counts, or fractions that sum to at most 1;
                         #   null: 0.8, 0.1, 0.1. Only where the source comes in one piece
                         #   (squad: counts paragraphs; custom: counts rows)

# squad
unanswerable_answer: null    # v2.0: text to answer unanswerable questions with; null drops them

# custom
prompt_template: "context: {context} question: {question} answer: {answer}"   # its fields are the rows'
field_map: {}            # {template field: source column}; "answers.text" reaches into a nested column
answer_words: {}         # {source value: word}, e.g. {"0": "no", "1": "yes"}; empty: values as they are
subset: null             # the configuration of a Hub data set that has several

# synthetic (no prefix, source, split)
tasks: [lookup, translate]   # files <task>_{train,val,test,test_ground_truth}.jsonl
rows: {train: 8000, val: 200, test: 200}
```

Writes the JSONL files and `<prefix>_report.json` (how a second run recognises them) to
`output_dir`, and the report to `<run.results_dir>/results/report.json`.
"""
