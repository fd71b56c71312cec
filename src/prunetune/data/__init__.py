"""Data: sources to records, records to splits, splits to examples, examples to batches."""

from prunetune.data.batches import Batch, BatchStream, collate, micro_batches
from prunetune.data.encoding import EncodedExamples, Example, encode, encode_answer, encode_prompt
from prunetune.data.records import Record
from prunetune.data.sources import read_records
from prunetune.data.splits import Splits, load_splits

__all__ = [
    "Batch",
    "BatchStream",
    "EncodedExamples",
    "Example",
    "Record",
    "Splits",
    "collate",
    "encode",
    "encode_answer",
    "encode_prompt",
    "load_splits",
    "micro_batches",
    "read_records",
]
