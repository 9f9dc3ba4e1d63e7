"""Data: raw sources to JSONL rows, rows to examples, examples to the batches of a training step."""
