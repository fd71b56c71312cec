"""The stages of a run that `run` calls: training with its job and teacher, evaluation, and measurement.

Each stage leaves one thing on disk and is skipped where that is complete. Cutting and writing is in `finish`.
"""

import gc
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from prunetune.bench.latency.verify import verify_budgets
from prunetune.config.recipe import RunConfig
from prunetune.data.batches import BatchStream, pad_token_id, unlabelled_examples
from prunetune.data.sources import SplitName
from prunetune.errors import DataError, ModelError, RunFolderError
from prunetune.evaluation.drift import continuations, load_prompts, measure_drift, predict_next_tokens
from prunetune.evaluation.results import Evaluation, TaskResult
from prunetune.evaluation.score_records import evaluate
from prunetune.manifest import BudgetFacts, LearningRateFacts, RateTrialFacts
from prunetune.model.adapter_folder import write_adapter_folder
from prunetune.model.loading import DTYPES, load_model_and_tokenizer
from prunetune.pipeline.finish import rewrite_card
from prunetune.pipeline.monitor import ValidationMonitor
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.recording import record_timing, record_training
from prunetune.pipeline.requirements import measure_gain
from prunetune.plan import Plan
from prunetune.pruning.cut import finalize_adapters
from prunetune.pruning.units import dense_plan
from prunetune.runs.folder import TUNING_STAGE, RunFolder
from prunetune.search.plan_rules import budget_share
from prunetune.train.checkpoints import Checkpoints, CheckpointStore
from prunetune.train.forward import Teacher, base_teacher
from prunetune.train.job import Monitor, Observer, TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.parallel.distributed import distribute_checkpoints, shard_layers
from prunetune.train.parallel.ranks import SINGLE_PROCESS
from prunetune.train.schedule import build_schedule, one_cut_schedule
from prunetune.train.validation import RolledBack
from prunetune.utils import environment
from prunetune.utils.determinism import derive_seed
from prunetune.utils.files import expand_path, json_digest, write_text
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.untrusted import parse_json, read_text

TeacherFactory = Callable[[Any], Teacher | None]  # from a dense student, without adapters yet, to its teacher

TRIED_RATES = (5e-4, 1e-3, 2e-3)  # of `train.learning_rate: auto`
TRIAL_SHARE = 0.1  # of the steps, for each

log = logging.getLogger(__name__)


# -- training --------------------------------------------------------------------------------------------------------


def train(context: RunContext, monitor: ValidationMonitor | None = None) -> None:
    """Prune and tune, on every rank; the last checkpoint holds the result. Skipped where model/ is written."""
    if not context.ranks.broadcast_from_main(not context.folder.model_folder.exists()):
        return
    with record_training(context) as observer:
        if monitor is not None:
            monitor = monitor.with_reference(lambda: load_model(context, "tuned"))
        teacher_factory = make_teacher_factory(context, lambda: load_model(context, "tuned"))
        context = choose_learning_rate(context, teacher_factory)
        context.console.stage(TUNING_STAGE, context.config.train.steps)
        while not resume_training(context, teacher_factory, observer, monitor):
            gc.collect()  # the model that was rolled back frees its memory before another is loaded
        config = context.config
        if context.ranks.world_size > 1 and config.evaluate.dense_tuned and config.distill.teacher != "dense":
            load_model(context, "tuned")  # tuned now, on all ranks; evaluated later, by rank 0


def resume_training(
    context: RunContext,
    teacher_factory: TeacherFactory,
    observer: Observer,
    monitor: ValidationMonitor | None = None,
    transform_job: Callable[[TrainingJob], TrainingJob] = lambda job: job,
) -> bool:
    """Train from the newest checkpoint to the last step; False where a limit rolled back: call again to continue."""
    checkpoints = distribute_checkpoints(Checkpoints(context.folder.checkpoints, context.base), context.ranks)
    state = checkpoints.latest()
    if context.ranks.is_main:
        context.folder.drop_records_after(state.step if state else -1)
    try:
        model = context.load_for_training()
        good = distribute_checkpoints(Checkpoints(context.folder.good_checkpoints, context.base), context.ranks)
        teacher = teacher_factory(model)
        job = make_job(context, model, checkpoints, observer, teacher=teacher, monitor=monitor, good_checkpoints=good)
        if context.config.budget.has_quality:  # what a stage loses is seen only in a model that has learnt all
            tuned = Checkpoints(context.folder.dense_tuned_checkpoints, context.base).latest()
            job = replace(job, start_adapters=tuned.tensors["adapters"] if tuned else None)
        tune_and_prune(transform_job(job))
    except RolledBack:
        return False
    return True


def choose_learning_rate(context: RunContext, teacher_factory: TeacherFactory) -> RunContext:
    """The context with a learning rate: as it is, or with `auto` decided and recorded in the manifest.

    Each of `TRIED_RATES` gets a run of its own on the same data, a tenth as long and with all its cuts; the lowest loss
    on valid wins, the first of equals. Finished trials are kept in `rates/`, and a stopped one goes on.
    """
    if context.config.train.learning_rate:
        return context
    steps = max(1, round(context.config.train.steps * TRIAL_SHARE))
    trials = [_try_learning_rate(context, rate, steps, teacher_factory) for rate in TRIED_RATES]
    facts = tuple(RateTrialFacts(rate=trial["rate"], valid_nll=trial["valid_nll"]) for trial in trials)
    rate = min(trials, key=lambda trial: math.inf if trial["valid_nll"] is None else trial["valid_nll"])["rate"]
    chosen = LearningRateFacts(
        rate=rate, trials=facts, steps=steps, seconds=math.fsum(trial["seconds"] for trial in trials)
    )
    log.info("learning rate %s", chosen.description)
    if context.ranks.is_main:
        context.folder.update_manifest(learning_rate=chosen)
    return replace(context, config=with_learning_rate(context.config, rate))


def with_learning_rate(config: RunConfig, rate: float) -> RunConfig:
    """The config with `train.learning_rate: auto` decided; one that names a rate is unchanged."""
    if config.train.learning_rate:
        return config
    return replace(config, train=replace(config.train, learning_rate=rate, weights_rate=0.0))


def _try_learning_rate(context: RunContext, rate: float, steps: int, teacher_factory: TeacherFactory) -> JsonObject:
    """{rate, valid_nll, seconds} of a short run; `valid_nll` is None where it is not finite."""
    folder = RunFolder(context.folder.path / "rates" / f"{rate:g}")
    file = folder.path / "trial.json"
    finished: JsonObject = {}
    if file.exists():
        with suppress(OSError, ValueError, TypeError, AttributeError):
            found = parse_json(file.read_bytes())
            finished = found if found.pop("sha256", None) == json_digest(found) else {}
        if not finished:
            log.warning("%s is not what was written: this learning rate is tried again", file)
    if finished := context.ranks.broadcast_from_main(finished):
        return finished
    if context.ranks.is_main:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
    config = with_learning_rate(context.config, rate)
    train = replace(config.train, steps=steps, validate_every=steps, keep_best=False, patience=0)
    config = replace(config, train=train, validate=replace(config.validate, share=1.0))
    context = replace(context, folder=folder, config=config)
    context.console.stage(f"try learning rate {rate:g}", steps)
    try:
        resume_training(context, teacher_factory, context.console)
    except ModelError as diverged:  # more losses than train.max_skipped were not finite
        log.warning("learning rate %g: %s", rate, diverged)
    state = distribute_checkpoints(Checkpoints(folder.checkpoints), context.ranks).latest()
    nll = state.validation_history["last"]["valid.nll"] if state and state.step == steps else math.nan
    seconds = state.seconds if state else 0.0
    trial = {"rate": rate, "valid_nll": nll if math.isfinite(nll) else None, "seconds": seconds}
    if context.ranks.is_main:
        write_text(file, json.dumps(trial | {"sha256": json_digest(trial)}) + "\n")
        shutil.rmtree(folder.checkpoints)
    context.ranks.barrier()
    gc.collect()  # the trial's model frees its memory before the next is loaded
    return trial


def release_other_ranks(context: RunContext) -> RunContext:
    """Let the other ranks end; returns the context in which rank 0 works alone."""
    context.ranks.destroy_process_group()
    return replace(context, ranks=SINGLE_PROCESS)


def make_job(
    context: RunContext,
    model: Any,
    checkpoints: CheckpointStore,
    observer: Observer,
    plan: Plan | None = None,
    teacher: Teacher | None = None,
    monitor: Monitor | None = None,
    good_checkpoints: CheckpointStore | None = None,
) -> TrainingJob:
    """What the loop needs; with a plan given, it only tunes. Of the context's resolved config."""
    config, valid = context.config, context.encoded["valid"].examples
    schedule = one_cut_schedule(config) if plan else build_schedule(config)
    if context.constraints.original_params:  # tokens are gone already
        share = budget_share(context.sites, dense_plan(context.sites).widths(), context.constraints)
        schedule = replace(schedule, start_keep=max(share, schedule.allowed_keep))
    batch_sizes: dict[SplitName, int] = {"train": config.train.batch_size, "search": config.search.batch_size}
    streams = {}
    for split, size in batch_sizes.items():
        examples = context.encoded[split].examples
        if teacher is not None and "texts" in context.encoded:  # a share of texts on which only distillation counts
            texts = context.encoded["texts"].examples
            examples += unlabelled_examples(texts, examples, config.data.distill_texts_share)
        streams[split] = BatchStream(examples, size, derive_seed(config.seed, split))
    return TrainingJob(
        model=model,
        sites=context.sites,
        constraints=context.constraints,
        train_stream=streams["train"],
        search_stream=streams["search"],
        valid_examples=valid[:: max(1, -(-len(valid) // config.validate.limit))],  # spread evenly over the split
        pad_id=pad_token_id(context.tokenizer),
        config=config,
        schedule=schedule,
        checkpoints=checkpoints,
        observer=observer,
        teacher=teacher,
        monitor=monitor,
        good_checkpoints=good_checkpoints,
        ranks=context.ranks,
        given_plan=plan,
    )


def plain_lora_config(context: RunContext) -> RunContext:
    """The context of plain LoRA tuning: adapters of rank `lora.dense_rank` at the same scale, updated by AdamW."""
    lora = context.config.lora
    lora = replace(lora, rank=lora.dense_rank, alpha=lora.alpha * lora.dense_rank / lora.rank)
    train = replace(context.config.train, weights="adapters", optimizer="adamw")
    return replace(context, config=replace(context.config, lora=lora, train=train))


def make_teacher_factory(context: RunContext, load_dense_tuned: Callable[[], Any]) -> TeacherFactory:
    """From a student to its teacher; `load_dense_tuned` gives the dense model tuned with the same data and steps.

    An untuned teacher shares its student's weights, so each student has a teacher of its own; except where weights are
    sharded: those belong to one model only. Any other teacher is made here, once.
    """
    distill = context.config.distill
    if distill.teacher == "base" and not context.ranks.uses_fsdp:
        return lambda student: base_teacher(student, distill)
    if distill.teacher == "none":
        return lambda _: None
    model = context.load_for_training() if distill.teacher == "base" else load_dense_tuned()
    if distill.teacher == "base":
        shard_layers(model, context.ranks)
    model, is_tuned = model.requires_grad_(False).eval(), distill.teacher == "dense"
    teacher = Teacher(model, is_tuned=is_tuned, share=distill.share)
    return lambda _: teacher


# -- evaluation and measurement ----------------------------------------------------------------------------------------


def evaluate_all(context: RunContext) -> None:
    """Score the pruned, the dense and the dense tuned model, and put the scores into the model card."""
    with record_timing(context.folder, "evaluate"):
        evaluate_models(context, ("pruned", *dense_model_names(context.config)))
        rewrite_card(context.folder, context.reported_config, context.sites)


def dense_model_names(config: RunConfig) -> tuple[str, ...]:
    """The models that a pruned model is compared with."""
    return ("dense", "tuned") if config.evaluate.dense_tuned else ("dense",)


def evaluate_models(context: RunContext, names: Sequence[str]) -> None:
    """Score models on the test split; skips those that have scores."""
    for name in names:
        file = context.folder.evaluation_file(name)
        if file.exists():
            try:
                if Evaluation.from_json(read_text(file)).counts_ends():
                    told = "whose NLL counts the end of an answer: remove it to score anew"
                    log.warning("%s is of version 0.1.0, %s", file, told)
            except (OSError, ValueError, DataError) as broken:
                raise RunFolderError(f"{file} cannot be read ({broken}): remove it to score anew") from broken
            continue
        model = load_model(context, name)
        context.console.stage(f"evaluate {name}", 0)
        result = score_model(context, model)
        write_text(file, result.redacted(context.config.report.redaction).to_json())


def measure(context: RunContext) -> None:
    """Measure what the finished model uses, and its gain over the dense model."""
    measure_budgets(context)
    if not context.folder.read_manifest().gain:
        with record_timing(context.folder, "bench"):
            measure_gain(context.folder, [context.folder], context)


def measure_budgets(context: RunContext) -> None:
    """Write to the manifest what the model uses of its budgets, timed if need be, and the run's peak memory."""
    limits, workload, folder = context.constraints.limits, context.config.workload, context.folder
    if limits is not None and not folder.read_manifest().budgets:
        open_model = partial(_load_pruned, context, DTYPES[workload.dtype])
        rows = verify_budgets(limits, Plan.load(folder.plan_file), workload, open_model)
        folder.update_manifest(budgets=tuple(BudgetFacts(**row) for row in rows))
    folder.update_manifest(peak_memory_mb=environment.peak_memory_mb(context.device))


def score_model(context: RunContext, model: Any) -> Evaluation:
    """Score one model on test and general rows, as the recipe's `evaluate` says."""
    config, splits, progress = context.config, context.splits, context.console.evaluation_progress
    return evaluate(
        model, context.tokenizer, splits.test, config.data, config.evaluate, progress, general=splits.general
    )


def load_model(context: RunContext, name: str) -> Any:
    """The "pruned" model as it was written, the "dense" one, or the "tuned" dense one, tuned here if it is not yet."""
    if name == "pruned":
        return _load_pruned(context, context.dtype)
    if name == "tuned":
        model = context.load_for_training()
        # As a teacher and for comparison: tuned once, continued from its checkpoints.
        context.console.stage("tune the dense model (once: what is done is kept)", context.config.train.steps)
        folder = context.folder.dense_tuned_checkpoints
        stores = (Checkpoints(path, context.base) for path in (folder, folder / "good"))
        checkpoints, good = (distribute_checkpoints(store, context.ranks) for store in stores)
        plain = plain_lora_config(context)
        train_config = replace(plain.config.train, learning_rate=plain.config.lora.dense_learning_rate)
        plain = replace(plain, config=replace(plain.config, train=train_config))
        plan = dense_plan(context.sites)
        tune_and_prune(make_job(plain, model, checkpoints, context.console, plan, good_checkpoints=good))
        if not context.ranks.uses_fsdp:  # adapters are not merged into sharded weights
            adapter = context.folder.dense_tuned_adapter
            if context.ranks.is_main and plain.config.lora.quantize == "off" and not adapter.exists():
                path = expand_path(context.config.model)
                write_adapter_folder(model, adapter, str(path.resolve()) if path.exists() else context.config.model)
            finalize_adapters(model)
        return model
    return context.load_dense().model


def _load_pruned(context: RunContext, dtype: torch.dtype) -> Any:
    return load_model_and_tokenizer(str(context.folder.model_folder), device=context.device, dtype=dtype).model


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
