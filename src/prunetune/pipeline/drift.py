"""The drift of a run's models from the untuned one, on general prompts: one model in memory at a time."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace

from prunetune.errors import DataError
from prunetune.evaluation.drift import continuations, load_prompts, measure_drift, predict_next_tokens
from prunetune.evaluation.results import Evaluation, TaskResult
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.recording import record_timing
from prunetune.pipeline.stages import dense_model_names, load_model
from prunetune.utils.files import write_text
from prunetune.utils.untrusted import read_text

log = logging.getLogger(__name__)


def evaluate_drift(context: RunContext, sizes: Sequence[RunContext] | None = None) -> None:
    """Write `evaluation/drift.json`, of a run of several sizes into each one's folder.

    Skipped where that can be read, and where `evaluate.drift` is off.
    """
    tokenizer, max_tokens = context.tokenizer, context.config.evaluate.max_tokens
    runs = []
    for run in (context,) if sizes is None else sizes:
        file = run.folder.drift_file
        try:
            if file.exists():
                Evaluation.from_json(read_text(file))
                continue
        except (OSError, ValueError, DataError) as broken:
            log.warning("%s cannot be read (%s): it is measured again", file, broken)
        runs.append(run)
    if not context.config.evaluate.drift or not runs:
        return
    with record_timing(context.folder, "drift"):
        context.console.stage("measure drift", 0)
        model = load_model(context, "dense")
        try:
            reference = continuations(model, tokenizer, load_prompts(), max_tokens)
        except DataError as unusable:
            log.warning("drift is not measured: %s", unusable)
            return
        predictions = predict_next_tokens(model, tokenizer, reference, max_tokens)
        del model

        def measure(run: RunContext, name: str) -> TaskResult:
            gc.collect()  # one model frees its memory before the next is loaded
            found = measure_drift(name, load_model(run, name), tokenizer, reference, predictions, max_tokens)
            redaction = run.config.report.redaction  # a tuned model may answer with what it learnt from a row
            return replace(found, items=tuple(replace(item, got=redaction.text(item.got)) for item in found.items))

        tuned = {name: measure(context, name) for name in dense_model_names(context.config)[1:]}
        for run in runs:
            write_text(run.folder.drift_file, Evaluation(tuned | {"pruned": measure(run, "pruned")}).to_json())
