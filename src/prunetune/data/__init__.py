"""Data: sources to records, records to splits, splits to examples, examples to batches."""

from prunetune.data.batches import Batch, Stream, collate, micro_batches
from prunetune.data.records import Record
from prunetune.data.sources import read
from prunetune.data.splits import Splits, load_splits
from prunetune.data.templates import Encoded, Example, encode, encode_answer, encode_prompt

__all__ = [
    "Batch",
    "Encoded",
    "Example",
    "Record",
    "Splits",
    "Stream",
    "collate",
    "encode",
    "encode_answer",
    "encode_prompt",
    "load_splits",
    "micro_batches",
    "read",
]
