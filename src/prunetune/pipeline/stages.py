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

from prunetune.bench.latency.verify import proved
from prunetune.bench.speed import measure
from prunetune.config.recipe import DistillConfig, RunConfig
from prunetune.data.batches import Stream, padding_id, unlabelled
from prunetune.data.records import Record
from prunetune.data.sources import SplitName
from prunetune.data.templates import Example
from prunetune.errors import ConfigError, RunFolderError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import evaluate
from prunetune.export.integrity import verify
from prunetune.model.loading import DTYPES, load, pick_device
from prunetune.pipeline.finish import finish
from prunetune.pipeline.model_card import rewrite_card
from prunetune.pipeline.monitor import Watcher, outcome, watcher_of
from prunetune.pipeline.prepare import Console, Setting, facts_of, prepare
from prunetune.pipeline.recording import Recorder, outside, told
from prunetune.pipeline.speed_limit import gained
from prunetune.plan import Plan
from prunetune.pruning.cut import settle_adapters
from prunetune.pruning.sites import dense_plan
from prunetune.runs.folder import TUNING, RunFolder, open_folder
from prunetune.runs.trackers import Trackers, require, tracking
from prunetune.train.checkpoints import Checkpoints, Keeper
from prunetune.train.job import Job, Observer, Watch
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import Teacher
from prunetune.train.parallel.distributed_passes import shared
from prunetune.train.parallel.ranks import ALONE, join
from prunetune.train.parallel.sharding import spread
from prunetune.train.schedule import given_plan, schedule_of
from prunetune.train.teacher import by_size, untuned
from prunetune.train.validation import WentBack
from prunetune.utils import environment
from prunetune.utils.console import Quiet, console_for
from prunetune.utils.determinism import deterministic
from prunetune.utils.files import write_text
from prunetune.utils.seeds import derive

Teaching = Callable[[Any], Teacher | None]  # from a dense student, without adapters yet, to its teacher


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Tune, prune, cut, check, evaluate and report; returns the run folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known.
    """
    if config.budget.sizes:
        raise ConfigError("budget.keep names several sizes: call prunetune.run, which makes each of them")
    require(config.track)
    ranks = join(pick_device(config.device))
    device = pick_device(config.device) if ranks.world == 1 else ranks.device
    console = console or (console_for(config.train.log_every) if ranks.is_main else Quiet())
    with closing(console), deterministic(config.deterministic, device):
        with ranks.main_first():
            setting = prepare(config, resume=resume, console=console, ranks=ranks)
        if "size" in setting.folder.manifest():
            raise RunFolderError(f"{setting.folder.path} is one size of a run: go on with the run around it")
        watcher = watcher_of(setting)
        ranks.wait()  # until all have looked at the folder as it was
        if not ranks.is_main:
            with ranks.stopped():
                _beside(setting, watcher)
            return setting.folder.path
        open_folder(setting.folder, config)
        with ranks.stopped(), told(setting.folder, setting.config, command):
            _stages(setting, watcher, command)
            outside(setting)
    return setting.folder.path


def _stages(setting: Setting, watcher: Watcher, command: str) -> None:
    config, folder = setting.config, setting.folder
    folder.note(**environment.facts(setting.device, setting.dtype, command, config.seed), **facts_of(setting))
    if setting.ranks.agree(not folder.model.exists()):
        with timed(folder, TUNING), tracking(config, folder, cpu=setting.device.type == "cpu") as trackers:
            train(setting, watcher, trackers)
    sharded = setting.ranks.shards
    conclude(_alone(setting), streamed=sharded)
    if config.gain.is_asked and "gain" not in folder.manifest():
        with timed(folder, "bench"):
            gained(folder, [folder], setting)


def conclude(setting: Setting, *, streamed: bool = False) -> None:
    """Cut, write, check and evaluate what is tuned, as far as it is not done; `streamed`: cut layer by layer."""
    folder = setting.folder
    if not folder.model.exists():
        folder.note(**outcome(setting))
        with timed(folder, "cut and check"):
            finish(setting, streamed=streamed)
    with timed(folder, "evaluate"):
        evaluate_all(setting)
    prove_budgets(setting)
    folder.note(peak_memory_mb=environment.peak_memory_mb(setting.device))


def _beside(setting: Setting, watcher: Watcher) -> None:
    """What the other ranks do: they tune. What comes after is rank 0's."""
    if setting.ranks.agree(False):
        train(setting, watcher)
    _alone(setting)


def _alone(setting: Setting) -> Setting:
    """The other ranks may leave; the setting of what rank 0 does without them."""
    setting.ranks.leave()
    return replace(setting, ranks=ALONE)


@contextmanager
def timed(folder: RunFolder, stage: str) -> Iterator[None]:
    """The manifest says how long the block took, with what earlier processes took for it."""
    started = time.monotonic()
    try:
        yield
    finally:
        timings = folder.manifest().get("timings", {})
        folder.note(timings=timings | {stage: timings.get(stage, 0) + time.monotonic() - started})


# -- stages ----------------------------------------------------------------------------------------------------------


def train(setting: Setting, watcher: Watcher | None = None, trackers: Trackers | None = None) -> None:
    """Search, settle and tune; the last checkpoint holds the result. Where a gate goes back, a new model goes on."""
    teaching = teaching_of(setting, lambda: model_of(setting, "tuned"))
    setting.console.stage(TUNING, setting.config.train.steps)
    tune(setting, teaching, watcher, trackers)
    teacher = by_size(setting.config, setting.sites).distill.teacher
    if setting.ranks.world > 1 and setting.config.evaluate.dense_tuned and teacher != "dense":
        model_of(setting, "tuned")  # while all ranks are here


def tune(
    setting: Setting,
    teaching: Teaching,
    watcher: Watcher | None = None,
    trackers: Trackers | None = None,
    shaped: Callable[[Job], Job] = lambda job: job,
) -> None:
    """`train` with a way to a teacher; `shaped` gives the job another form."""
    observer = Recorder(setting, trackers or Trackers()) if setting.ranks.is_main else setting.console
    while not _tuned(setting, teaching, watcher, observer, shaped):
        gc.collect()  # the model that went back lets go of its memory before another is loaded


def _tuned(
    setting: Setting,
    teaching: Teaching,
    watcher: Watcher | None,
    observer: Observer,
    shaped: Callable[[Job], Job],
) -> bool:
    """Go on from the newest checkpoint; false where a gate went back on the way."""
    checkpoints = shared(Checkpoints(setting.folder.checkpoints), setting.ranks)
    state = checkpoints.latest()
    if setting.ranks.is_main:
        setting.folder.forget_after(state.step if state else -1)
    try:
        model = setting.to_train()
        job = job_of(setting, model, checkpoints, observer, teacher=teaching(model), watch=watcher)
        tune_and_prune(shaped(job))
    except WentBack:
        return False
    return True


def job_of(
    setting: Setting,
    model: Any,
    checkpoints: Keeper,
    observer: Observer,
    plan: Plan | None = None,
    teacher: Teacher | None = None,
    watch: Watch | None = None,
) -> Job:
    """What the loop needs; with a plan given, it only tunes."""
    from accelerate import Accelerator

    config = by_size(setting.config, setting.sites)
    return Job(
        model=model,
        sites=setting.sites,
        shape=setting.shape,
        train=Stream(_mixed(setting, "train", teacher), config.train.batch_size, derive(config.seed, "train")),
        search=Stream(_mixed(setting, "search", teacher), config.search.batch_size, derive(config.seed, "search")),
        valid=watched(setting.encoded["valid"].examples, config.validate.limit),
        pad_id=padding_id(setting.tokenizer),
        config=config,
        schedule=given_plan(config) if plan else schedule_of(config),
        checkpoints=checkpoints,
        observer=observer,
        accelerator=Accelerator(cpu=setting.device.type == "cpu", mixed_precision="no"),  # passes see to it
        teacher=teacher,
        watch=watch,
        ranks=setting.ranks,
        plan=plan,
    )


def plainly(setting: Setting) -> Setting:
    """The setting of plain LoRA tuning: adapters of a rank of their own at the same scale, moved by AdamW."""
    lora = setting.config.lora
    lora = replace(lora, rank=lora.dense_rank, alpha=lora.alpha * lora.dense_rank / lora.rank)
    train = replace(setting.config.train, weights="adapters", optimizer="adamw")
    return replace(setting, config=replace(setting.config, lora=lora, train=train))


def densely(setting: Setting) -> Setting:
    """The setting in which the dense model is tuned: the same, at a learning rate of its own."""
    plain = plainly(setting)
    train = replace(plain.config.train, learning_rate=plain.config.lora.dense_learning_rate)
    return replace(plain, config=replace(plain.config, train=train))


def _mixed(setting: Setting, split: SplitName, teacher: Teacher | None) -> tuple[Example, ...]:
    """The examples of a split and, where there is a teacher, the share of texts on which only it counts."""
    examples = setting.encoded[split].examples
    if teacher is None or "texts" not in setting.encoded:
        return examples
    return examples + unlabelled(setting.encoded["texts"].examples, examples, setting.config.data.texts_share)


def teaching_of(setting: Setting, dense_tuned: Callable[[], Any]) -> Teaching:
    """The way to the recipe's teacher; `dense_tuned` gives the dense model tuned with the same data and steps.

    The untuned model teaches a student in the student's own memory, so each student has a teacher of its own; but not
    where weights are sharded: those are one model's only. Any other teacher is made here, once.
    """
    distill = by_size(setting.config, setting.sites).distill
    if distill.teacher == "base" and not setting.ranks.shards:
        return lambda student: untuned(student, distill)
    teacher = _teacher_apart(setting, distill, dense_tuned)
    return lambda _: teacher


def _teacher_apart(setting: Setting, distill: DistillConfig, dense_tuned: Callable[[], Any]) -> Teacher | None:
    if distill.teacher == "none":
        return None
    if distill.teacher == "base":
        model = setting.to_train()
        spread(model, setting.ranks)
    else:
        model = dense_tuned()
    model, tuned = model.requires_grad_(False).eval(), distill.teacher != "base"
    return Teacher(model, distill.logits, distill.hidden, tuned=tuned, share=distill.share)


def watched(examples: tuple[Example, ...], most: int) -> tuple[Example, ...]:
    """The validation examples scored during the run: spread evenly over the split."""
    return examples[:: max(1, -(-len(examples) // most))]


def evaluate_all(setting: Setting) -> None:
    """Scores and speed of the dense, the dense tuned and the pruned model."""
    evaluate_these(setting, ("pruned", *dense_models(setting.config)))
    rewrite_card(setting.folder, setting.config, setting.sites)


def dense_models(config: RunConfig) -> tuple[str, ...]:
    """What a pruned model is scored beside."""
    return ("dense", "tuned") if config.evaluate.dense_tuned else ("dense",)


def evaluate_these(setting: Setting, names: Sequence[str]) -> None:
    """Scores, and speed of all but the dense tuned model; what has scores is left as it is."""
    speeds: dict[str, Any] = setting.folder.manifest().get("speed", {})
    for name in names:
        if setting.folder.evaluation(name).exists():
            continue
        model = model_of(setting, name)
        setting.console.stage(f"evaluate {name}", 1)
        result = score(setting, model, setting.splits.test)
        if name != "tuned":
            speeds |= {name: measure(model).to_dict()}
            setting.folder.note(speed=speeds)
        write_text(setting.folder.evaluation(name), result.to_json())


def prove_budgets(setting: Setting) -> None:
    """What the finished model takes of budgets beside `budget.keep`, timed where they are times."""
    limits, workload, folder = setting.shape.limits, setting.config.workload, setting.folder
    if limits is None or "budgets" in folder.manifest():
        return

    def opened() -> Any:
        own = setting.config.layout == "per-layer"
        dtype = DTYPES[workload.dtype]
        return load(str(folder.model), device=setting.device, dtype=dtype, trust_remote_code=own).model

    folder.note(budgets=proved(limits, Plan.load(folder.plan), workload, opened))


def score(setting: Setting, model: Any, records: tuple[Record, ...]) -> Evaluation:
    """The suite of the run on one model."""
    return evaluate(
        model, setting.tokenizer, records, setting.config.data, setting.config.evaluate, setting.console.passed
    )


def model_of(setting: Setting, name: str) -> Any:
    """The "pruned" model as it is opened again, the "dense" one, or the "tuned" dense one."""
    if name == "pruned":
        # What runs here is code that this run generated and checked.
        own = setting.config.layout == "per-layer"
        verify(setting.folder.model)
        return load(str(setting.folder.model), device=setting.device, dtype=setting.dtype, trust_remote_code=own).model
    if name == "tuned":
        model = setting.to_train()
        # As a teacher and for comparison: tuned once, and gone on with.
        setting.console.stage("tune the dense model (once: what is done is kept)", setting.config.train.steps)
        kept = shared(Checkpoints(setting.folder.tuned), setting.ranks)
        tune_and_prune(job_of(densely(setting), model, kept, setting.console, dense_plan(setting.sites)))
        if not setting.ranks.shards:  # sharded weights stay as they are, adapters beside them
            settle_adapters(model)
        return model
    return setting.load().model
