"""llama.cpp's importance matrix, from the run's own data: the mean squared input of every column of every linear."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from prunetune.config.recipe import load_saved_recipe
from prunetune.data.batches import collate, micro_batches, pad_token_id
from prunetune.data.encoding import Example, encode
from prunetune.data.splits import load_splits
from prunetune.errors import PrunetuneError
from prunetune.evaluation.scoring_mode import context_length
from prunetune.export.quantize import linears_but_head
from prunetune.export.source import ExportSource
from prunetune.manifest import Manifest
from prunetune.model.activations import input_mean_squares
from prunetune.utils.untrusted import read_text

log = logging.getLogger(__name__)
MAX_ROW_TOKENS = 512  # of one row, as llama.cpp's own tool reads texts in windows of 512
PASS_TOKENS = 4096
ROWS_AT_ONCE = 32  # are tokenised
FLOOR = 1e-6  # of a linear's mean: a column that was 0 on these rows need not be 0 on others


@dataclass(frozen=True)
class ImportanceMatrix:
    """Weights of squared errors in quantisation, and what they are from."""

    note: str  # "importance matrix from 8,192 tokens of 45 rows of the run", or why there is none
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # linear -> [C], above 0
    rows: int = 0


NO_IMPORTANCE = ImportanceMatrix("no importance matrix")


def measure_importance(source: ExportSource, max_tokens: int) -> ImportanceMatrix:
    """The model's importance matrix on at most `max_tokens` tokens of the rows that the run was tuned on.

    Rows of train and of distill_texts, in the run's shares, drawn by its seed. As in llama.cpp's tool, embedding and
    head have none. Without data, or if an input is not finite, the matrix is empty and its note says why.
    """
    if not max_tokens:
        return NO_IMPORTANCE
    if source.run is None:
        return _none(f"{source.folder} is no run folder, which would know its data")
    try:
        config = load_saved_recipe(source.run / "config.yaml")
    except PrunetuneError as broken:
        return _none(str(broken))
    examples: list[Example] = []
    try:
        splits = load_splits(config.data, config.seed, config.report.redaction)
        manifest = source.run / "manifest.json"
        before = Manifest.from_json(read_text(manifest)).data.hashes if manifest.exists() else {}
        for name, digest in splits.hashes.items():
            if name in ("train", "texts") and before.get(name, digest) != digest:
                return _none(f"the rows of {name} changed since the run")
        text_tokens = round(max_tokens * config.data.distill_texts_share) if splits.texts else 0
        for records, left in ((splits.train, max_tokens - text_tokens), (splits.texts, text_tokens)):
            order = torch.randperm(len(records), generator=torch.Generator().manual_seed(config.seed)).tolist()
            while order and left > 0:
                drawn, order = [records[index] for index in order[:ROWS_AT_ONCE]], order[ROWS_AT_ONCE:]
                for example in encode(drawn, source.tokenizer, config.data, context_length(source)).examples:
                    if ids := example.token_ids[: max(0, min(MAX_ROW_TOKENS, left))]:
                        examples.append(Example(ids, len(ids), example.id))
                        left -= len(ids)
    except (PrunetuneError, OSError, ValueError) as missing:
        return _none(f"the run's data cannot be read: {config.report.redaction.message(missing)}")
    if not examples:
        return _none("no row of the run fits data.max_length")
    tokens = sum(len(example.token_ids) for example in examples)
    log.info("importance matrix: reading %s tokens of %d rows", f"{tokens:,}", len(examples))
    batches = [collate(group, pad_token_id(source.tokenizer)) for group in micro_batches(examples, PASS_TOKENS)]
    on_gpu = torch.cuda.is_available()
    try:
        model = source.load_model(source.dtype if on_gpu else torch.float32).to("cuda" if on_gpu else "cpu")
        squares = input_mean_squares(model, linears_but_head(model), batches)
    except torch.OutOfMemoryError:
        return _none("the model does not fit into the GPU's memory beside what is there; free it, or hide the GPU")
    if odd := [name for name, means in squares.items() if not means.isfinite().all()]:
        return _none(f"inputs of {odd[0]} are not finite on the run's data: look at the run")
    columns = {
        name: means.clamp(min=FLOOR * means.mean()).float().numpy() for name, means in squares.items() if means.any()
    }
    note = f"importance matrix from {tokens:,} tokens of {len(examples)} rows of the run"
    return ImportanceMatrix(note, columns, len(examples))


def _none(reason: str) -> ImportanceMatrix:
    log.warning("no importance matrix: %s", reason)
    return ImportanceMatrix(f"no importance matrix: {reason}")
