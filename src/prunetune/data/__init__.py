"""Data: sources to records, records to splits, splits to examples, examples to batches."""
