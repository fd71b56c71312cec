"""The drift of a run's models from the untuned one, on general prompts: one model in memory at a time."""

from __future__ import annotations

import gc
import logging

from prunetune.errors import DataError
from prunetune.evaluation.drift import continuations, load_prompts, measure_drift, predict_next_tokens
from prunetune.evaluation.results import Evaluation
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.recording import record_timing
from prunetune.pipeline.stages import dense_model_names, load_model
from prunetune.utils.files import write_text
from prunetune.utils.untrusted import read_text

log = logging.getLogger(__name__)


def evaluate_drift(context: RunContext) -> None:
    """Write `evaluation/drift.json`; skipped where that can be read, and where `evaluate.drift` is off."""
    file, tokenizer, max_tokens = context.folder.drift_file, context.tokenizer, context.config.evaluate.max_tokens
    if not context.config.evaluate.drift:
        return
    if file.exists():
        try:
            Evaluation.from_json(read_text(file))
            return
        except (OSError, ValueError, DataError) as broken:
            log.warning("%s cannot be read (%s): it is measured again", file, broken)
    with record_timing(context.folder, "drift"):
        context.console.stage("measure drift", 0)
        model = load_model(context, "dense")
        try:
            reference = continuations(model, tokenizer, load_prompts(), max_tokens)
        except DataError as unusable:
            log.warning("drift is not measured: %s", unusable)
            return
        predictions = predict_next_tokens(model, tokenizer, reference, max_tokens)
        results = {}
        for name in (*dense_model_names(context.config)[1:], "pruned"):
            del model
            gc.collect()  # one model frees its memory before the next is loaded
            model = load_model(context, name)
            results[name] = measure_drift(name, model, tokenizer, reference, predictions, max_tokens)
        write_text(file, Evaluation(results).to_json())
