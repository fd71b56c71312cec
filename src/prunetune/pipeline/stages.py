"""A whole run: model and data in; plan, checkpoint, scores and report out.

Each stage leaves one thing on disk (checkpoints, model/, evaluation/*.json, report.html) and is skipped where that is
whole already: so a run that was stopped anywhere goes on from there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunetune.bench.latency.verify import verify_budgets
from prunetune.bench.speed import measure_speed
from prunetune.config.recipe import DistillConfig, RunConfig
from prunetune.data.batches import BatchStream, pad_token_id, unlabelled_examples
from prunetune.data.encoding import Example
from prunetune.data.records import Record
from prunetune.data.sources import SplitName
from prunetune.errors import ConfigError, RunFolderError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import evaluate
from prunetune.export.checksums import verify_checksums
from prunetune.manifest import BudgetFacts, ModelSpeeds
from prunetune.model.loading import DTYPES, load_model_and_tokenizer, pick_device
from prunetune.pipeline.finish import finish
from prunetune.pipeline.model_card import rewrite_card
from prunetune.pipeline.monitor import ValidationMonitor, make_monitor, tuning_facts
from prunetune.pipeline.prepare import Console, RunContext, data_and_model_facts, prepare
from prunetune.pipeline.recording import RunRecorder, raise_if_limits_broken, run_lifecycle
from prunetune.pipeline.requirements import measure_gain
from prunetune.plan import Plan
from prunetune.pruning.cut import finalize_adapters
from prunetune.pruning.sites import dense_plan
from prunetune.runs.folder import TUNING_STAGE, RunFolder, create_run_folder
from prunetune.runs.trackers import Trackers, require_trackers, start_trackers
from prunetune.train.checkpoints import Checkpoints, CheckpointStore
from prunetune.train.job import Monitor, Observer, TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import Teacher
from prunetune.train.parallel.distributed_passes import distribute_checkpoints
from prunetune.train.parallel.ranks import SINGLE_PROCESS, init_distributed
from prunetune.train.parallel.sharding import shard_layers
from prunetune.train.schedule import build_schedule, tune_only_schedule
from prunetune.train.teacher import base_teacher, resolve_auto
from prunetune.train.validation import RolledBack
from prunetune.utils import environment
from prunetune.utils.console import SilentConsole, make_console
from prunetune.utils.determinism import deterministic
from prunetune.utils.files import write_text
from prunetune.utils.seeds import derive_seed

TeacherFactory = Callable[[Any], Teacher | None]  # from a dense student, without adapters yet, to its teacher


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Tune, prune, cut, check, evaluate and report; returns the run folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known.
    """
    if config.budget.sizes:
        raise ConfigError("budget.keep names several sizes: call prunetune.run, which makes each of them")
    require_trackers(config.report_to)
    ranks = init_distributed(pick_device(config.device))
    device = pick_device(config.device) if ranks.world_size == 1 else ranks.device
    console = console or (make_console(config.train.log_every) if ranks.is_main else SilentConsole())
    with closing(console), deterministic(config.deterministic, device):
        with ranks.main_process_first():
            setting = prepare(config, resume=resume, console=console, ranks=ranks)
        if setting.folder.read_manifest().size:
            raise RunFolderError(f"{setting.folder.path} is one size of a run: go on with the run around it")
        watcher = make_monitor(setting)
        ranks.barrier()  # until all have looked at the folder as it was
        if not ranks.is_main:
            with ranks.barrier_before_failing():
                _run_other_ranks(setting, watcher)
            return setting.folder.path
        create_run_folder(setting.folder, config)
        with ranks.barrier_before_failing(), run_lifecycle(setting.folder, setting.config, command):
            _run_stages(setting, watcher, command)
            raise_if_limits_broken(setting)
    return setting.folder.path


def _run_stages(context: RunContext, monitor: ValidationMonitor, command: str) -> None:
    config, folder = context.config, context.folder
    folder.update_manifest(
        **environment.describe_environment(context.device, context.dtype, command, config.seed),
        **data_and_model_facts(context),
    )
    if context.ranks.broadcast_from_main(not folder.model_folder.exists()):
        with (
            record_timing(folder, TUNING_STAGE),
            start_trackers(config, folder, cpu=context.device.type == "cpu") as trackers,
        ):
            train(context, monitor, trackers)
    sharded = context.ranks.uses_fsdp
    finish_and_evaluate(_release_other_ranks(context), streamed=sharded)
    if config.require.has_requirements and not folder.read_manifest().gain:
        with record_timing(folder, "bench"):
            measure_gain(folder, [folder], context)


def finish_and_evaluate(context: RunContext, *, streamed: bool = False) -> None:
    """Cut, write, check and evaluate what is tuned, as far as it is not done; `streamed`: cut layer by layer."""
    folder = context.folder
    if not folder.model_folder.exists():
        folder.update_manifest(**tuning_facts(context))
        with record_timing(folder, "cut and check"):
            finish(context, streamed=streamed)
    with record_timing(folder, "evaluate"):
        evaluate_all(context)
    measure_budgets(context)
    folder.update_manifest(peak_memory_mb=environment.peak_memory_mb(context.device))


def _run_other_ranks(context: RunContext, monitor: ValidationMonitor) -> None:
    """What the other ranks do: they tune. What comes after is rank 0's."""
    if context.ranks.broadcast_from_main(False):
        train(context, monitor)
    _release_other_ranks(context)


def _release_other_ranks(context: RunContext) -> RunContext:
    """The other ranks may leave; the setting of what rank 0 does without them."""
    context.ranks.destroy_process_group()
    return replace(context, ranks=SINGLE_PROCESS)


@contextmanager
def record_timing(folder: RunFolder, stage: str) -> Iterator[None]:
    """The manifest says how long the block took, with what earlier processes took for it."""
    started = time.monotonic()
    try:
        yield
    finally:
        timings = folder.read_manifest().timings
        seconds = (timings.get(stage) or 0) + time.monotonic() - started
        folder.update_manifest(timings={**timings, stage: seconds})


# -- stages ----------------------------------------------------------------------------------------------------------


def train(context: RunContext, monitor: ValidationMonitor | None = None, trackers: Trackers | None = None) -> None:
    """Search, settle and tune; the last checkpoint holds the result. Where a gate goes back, a new model goes on."""
    teaching = make_teacher_factory(context, lambda: load_model(context, "tuned"))
    context.console.stage(TUNING_STAGE, context.config.train.steps)
    tune(context, teaching, monitor, trackers)
    teacher = resolve_auto(context.config, context.sites).distill.teacher
    if context.ranks.world_size > 1 and context.config.evaluate.dense_tuned and teacher != "dense":
        load_model(context, "tuned")  # while all ranks are here


def tune(
    context: RunContext,
    teacher_factory: TeacherFactory,
    monitor: ValidationMonitor | None = None,
    trackers: Trackers | None = None,
    transform_job: Callable[[TrainingJob], TrainingJob] = lambda job: job,
) -> None:
    """`train` with a way to a teacher; `shaped` gives the job another form."""
    observer = RunRecorder(context, trackers or Trackers()) if context.ranks.is_main else context.console
    while not _tune_once(context, teacher_factory, monitor, observer, transform_job):
        gc.collect()  # the model that went back lets go of its memory before another is loaded


def _tune_once(
    context: RunContext,
    teacher_factory: TeacherFactory,
    monitor: ValidationMonitor | None,
    observer: Observer,
    transform_job: Callable[[TrainingJob], TrainingJob],
) -> bool:
    """Go on from the newest checkpoint; false where a gate went back on the way."""
    checkpoints = distribute_checkpoints(Checkpoints(context.folder.checkpoints), context.ranks)
    state = checkpoints.latest()
    if context.ranks.is_main:
        context.folder.drop_records_after(state.step if state else -1)
    try:
        model = context.load_for_training()
        job = make_job(context, model, checkpoints, observer, teacher=teacher_factory(model), monitor=monitor)
        tune_and_prune(transform_job(job))
    except RolledBack:
        return False
    return True


def make_job(
    context: RunContext,
    model: Any,
    checkpoints: CheckpointStore,
    observer: Observer,
    plan: Plan | None = None,
    teacher: Teacher | None = None,
    monitor: Monitor | None = None,
) -> TrainingJob:
    """What the loop needs; with a plan given, it only tunes."""
    from accelerate import Accelerator

    config = resolve_auto(context.config, context.sites)
    return TrainingJob(
        model=model,
        sites=context.sites,
        constraints=context.constraints,
        train_stream=BatchStream(
            _with_distill_texts(context, "train", teacher), config.train.batch_size, derive_seed(config.seed, "train")
        ),
        search_stream=BatchStream(
            _with_distill_texts(context, "search", teacher),
            config.search.batch_size,
            derive_seed(config.seed, "search"),
        ),
        valid_examples=validation_subset(context.encoded["valid"].examples, config.validate.limit),
        pad_id=pad_token_id(context.tokenizer),
        config=config,
        schedule=tune_only_schedule(config) if plan else build_schedule(config),
        checkpoints=checkpoints,
        observer=observer,
        accelerator=Accelerator(cpu=context.device.type == "cpu", mixed_precision="no"),  # passes see to it
        teacher=teacher,
        monitor=monitor,
        ranks=context.ranks,
        given_plan=plan,
    )


def plain_lora_config(context: RunContext) -> RunContext:
    """The setting of plain LoRA tuning: adapters of a rank of their own at the same scale, moved by AdamW."""
    lora = context.config.lora
    lora = replace(lora, rank=lora.dense_rank, alpha=lora.alpha * lora.dense_rank / lora.rank)
    train = replace(context.config.train, weights="adapters", optimizer="adamw")
    return replace(context, config=replace(context.config, lora=lora, train=train))


def dense_config(context: RunContext) -> RunContext:
    """The setting in which the dense model is tuned: the same, at a learning rate of its own."""
    plain = plain_lora_config(context)
    train = replace(plain.config.train, learning_rate=plain.config.lora.dense_learning_rate)
    return replace(plain, config=replace(plain.config, train=train))


def _with_distill_texts(context: RunContext, split: SplitName, teacher: Teacher | None) -> tuple[Example, ...]:
    """The examples of a split and, where there is a teacher, the share of texts on which only it counts."""
    examples = context.encoded[split].examples
    if teacher is None or "texts" not in context.encoded:
        return examples
    return examples + unlabelled_examples(
        context.encoded["texts"].examples, examples, context.config.data.distill_texts_share
    )


def make_teacher_factory(context: RunContext, load_dense_tuned: Callable[[], Any]) -> TeacherFactory:
    """The way to the recipe's teacher; `dense_tuned` gives the dense model tuned with the same data and steps.

    The untuned model teaches a student in the student's own memory, so each student has a teacher of its own; but not
    where weights are sharded: those are one model's only. Any other teacher is made here, once.
    """
    distill = resolve_auto(context.config, context.sites).distill
    if distill.teacher == "base" and not context.ranks.uses_fsdp:
        return lambda student: base_teacher(student, distill)
    teacher = _separate_teacher(context, distill, load_dense_tuned)
    return lambda _: teacher


def _separate_teacher(
    context: RunContext, distill: DistillConfig, load_dense_tuned: Callable[[], Any]
) -> Teacher | None:
    if distill.teacher == "none":
        return None
    if distill.teacher == "base":
        model = context.load_for_training()
        shard_layers(model, context.ranks)
    else:
        model = load_dense_tuned()
    model, tuned = model.requires_grad_(False).eval(), distill.teacher != "base"
    return Teacher(model, distill.logits, distill.hidden, is_tuned=tuned, share=distill.share)


def validation_subset(examples: tuple[Example, ...], limit: int) -> tuple[Example, ...]:
    """The validation examples scored during the run: spread evenly over the split."""
    return examples[:: max(1, -(-len(examples) // limit))]


def evaluate_all(context: RunContext) -> None:
    """Scores and speed of the dense, the dense tuned and the pruned model."""
    evaluate_models(context, ("pruned", *dense_model_names(context.config)))
    rewrite_card(context.folder, context.config, context.sites)


def dense_model_names(config: RunConfig) -> tuple[str, ...]:
    """What a pruned model is scored beside."""
    return ("dense", "tuned") if config.evaluate.dense_tuned else ("dense",)


def evaluate_models(context: RunContext, names: Sequence[str]) -> None:
    """Scores, and speed of all but the dense tuned model; what has scores is left as it is."""
    speeds = context.folder.read_manifest().speed
    for name in names:
        if context.folder.evaluation_file(name).exists():
            continue
        model = load_model(context, name)
        context.console.stage(f"evaluate {name}", 1)
        result = score_model(context, model, context.splits.test)
        if name != "tuned":
            speeds = ModelSpeeds.from_dict(speeds.to_dict() | {name: measure_speed(model).to_dict()})
            context.folder.update_manifest(speed=speeds)
        write_text(context.folder.evaluation_file(name), result.to_json())


def measure_budgets(context: RunContext) -> None:
    """What the finished model takes of budgets beside `budget.keep`, timed where they are times."""
    limits, workload, folder = context.constraints.limits, context.config.workload, context.folder
    if limits is None or folder.read_manifest().budgets:
        return

    def opened() -> Any:
        own = context.config.layout == "per-layer"
        dtype = DTYPES[workload.dtype]
        return load_model_and_tokenizer(
            str(folder.model_folder), device=context.device, dtype=dtype, trust_remote_code=own
        ).model

    rows = verify_budgets(limits, Plan.load(folder.plan_file), workload, opened)
    folder.update_manifest(budgets=tuple(BudgetFacts(**row) for row in rows))


def score_model(context: RunContext, model: Any, records: tuple[Record, ...]) -> Evaluation:
    """The suite of the run on one model."""
    return evaluate(
        model,
        context.tokenizer,
        records,
        context.config.data,
        context.config.evaluate,
        context.console.evaluation_progress,
    )


def load_model(context: RunContext, name: str) -> Any:
    """The "pruned" model as it is opened again, the "dense" one, or the "tuned" dense one."""
    if name == "pruned":
        # What runs here is code that this run generated and checked.
        own = context.config.layout == "per-layer"
        verify_checksums(context.folder.model_folder)
        return load_model_and_tokenizer(
            str(context.folder.model_folder), device=context.device, dtype=context.dtype, trust_remote_code=own
        ).model
    if name == "tuned":
        model = context.load_for_training()
        # As a teacher and for comparison: tuned once, and gone on with.
        context.console.stage("tune the dense model (once: what is done is kept)", context.config.train.steps)
        kept = distribute_checkpoints(Checkpoints(context.folder.dense_tuned_checkpoints), context.ranks)
        tune_and_prune(make_job(dense_config(context), model, kept, context.console, dense_plan(context.sites)))
        if not context.ranks.uses_fsdp:  # sharded weights stay as they are, adapters beside them
            finalize_adapters(model)
        return model
    return context.load_dense().model
