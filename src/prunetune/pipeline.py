"""A whole run: model and data in; plan, checkpoint, scores and report out.

Each stage leaves one thing on disk (checkpoints, model/, evaluation/*.json, report.html) and is skipped where that is
whole already: so a run that was stopped anywhere goes on from there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune import environment
from prunetune.bench.speed import measure
from prunetune.config import RunConfig
from prunetune.console import console_for
from prunetune.data.batches import Stream, unlabelled
from prunetune.data.records import Record
from prunetune.data.sources import SplitName
from prunetune.data.templates import Example
from prunetune.errors import ConfigError, RunFolderError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suite import evaluate
from prunetune.export.integrity import verify
from prunetune.export.selfcheck import check, logits_of
from prunetune.export.write import write
from prunetune.files import write_text
from prunetune.folder import RunFolder, open_folder
from prunetune.gain import gained
from prunetune.model.loading import load
from prunetune.model.masking import masked
from prunetune.model.sites import dense_plan, kept_params
from prunetune.model.surgery import cut, merge_adapters
from prunetune.plan import Plan
from prunetune.provenance import card, rewrite_card
from prunetune.seeds import derive
from prunetune.setting import Console, Setting, facts_of, prepare
from prunetune.telling import Recorder, outside, told
from prunetune.trackers import Trackers, require, tracking
from prunetune.train.adapters import add_adapters, put_back, tunes_all
from prunetune.train.job import Job, Observer, Watch
from prunetune.train.loop import tune_and_prune
from prunetune.train.objectives import Teacher
from prunetune.train.schedule import given_plan, schedule_of
from prunetune.train.state import Checkpoints, Keeper, State
from prunetune.train.validation import WentBack
from prunetune.watching import Watcher, outcome, watcher_of


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Tune, prune, cut, check, evaluate and report; returns the run folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known.
    """
    if config.budget.sizes:
        raise ConfigError("budget.keep names several sizes: call prunetune.run, which makes each of them")
    require(config.track)
    console = console or console_for(config.train.log_every)
    try:
        setting = prepare(config, resume=resume, console=console)
        if "size" in setting.folder.manifest():
            raise RunFolderError(f"{setting.folder.path} is one size of a run: go on with the run around it")
        watcher = watcher_of(setting)
        if resume:
            same_data(setting)
        open_folder(setting.folder, config)
        with told(setting.folder, config, command):
            _stages(setting, watcher, command)
            outside(setting)
    finally:
        console.close()
    return setting.folder.path


def _stages(setting: Setting, watcher: Watcher, command: str) -> None:
    config, folder = setting.config, setting.folder
    folder.note(**environment.facts(setting.device, setting.dtype, command, config.seed), **facts_of(setting))
    if not folder.model.exists():
        with timed(folder, "tune and prune"), tracking(config, folder, cpu=setting.device.type == "cpu") as trackers:
            train(setting, watcher, trackers)
    conclude(setting)
    if config.gain.is_asked and "gain" not in folder.manifest():
        with timed(folder, "bench"):
            gained(setting.folder, [setting.folder], setting)


def conclude(setting: Setting) -> None:
    """Cut, write, check and evaluate what is tuned, as far as it is not done."""
    folder = setting.folder
    if not folder.model.exists():
        folder.note(**outcome(setting, folder.manifest().get("timings", {}).get("tune and prune", 0.0)))
        with timed(folder, "cut and check"):
            finish(setting)
    with timed(folder, "evaluate"):
        evaluate_all(setting)
    folder.note(peak_memory_mb=environment.peak_memory_mb(setting.device))


def same_data(setting: Setting) -> None:
    """A run goes on only with the rows it began with; raises `RunFolderError`."""
    before = setting.folder.manifest().get("data", {}).get("hashes", {})
    changed = [name for name, digest in setting.splits.hashes.items() if before.get(name, digest) != digest]
    if changed:
        raise RunFolderError(
            f"{setting.folder.path}: the data of {', '.join(changed)} changed since the run began: "
            "put the old rows back, or start anew with another --out"
        )


@contextmanager
def timed(folder: RunFolder, stage: str) -> Iterator[None]:
    """The manifest says how long the block took, with what earlier processes took for it."""
    started = time.monotonic()
    yield
    timings = folder.manifest().get("timings", {})
    folder.note(timings=timings | {stage: timings.get(stage, 0) + time.monotonic() - started})


# -- stages ----------------------------------------------------------------------------------------------------------


def train(setting: Setting, watcher: Watcher | None = None, trackers: Trackers | None = None) -> None:
    """Search, settle and tune; the last checkpoint holds the result. Where a gate goes back, a new model goes on."""
    teacher = teacher_of(setting, lambda: model_of(setting, "tuned"))
    setting.console.stage("tune and prune", setting.config.train.steps)
    tune(setting, teacher, watcher, trackers)


def tune(
    setting: Setting,
    teacher: Teacher | None,
    watcher: Watcher | None = None,
    trackers: Trackers | None = None,
    shaped: Callable[[Job], Job] = lambda job: job,
) -> None:
    """`train` with a teacher that is there; `shaped` gives the job another form."""
    recorder = Recorder(setting, trackers or Trackers())
    while not _tuned(setting, teacher, watcher, recorder, shaped):
        gc.collect()  # the model that went back lets go of its memory before another is loaded


def _tuned(
    setting: Setting,
    teacher: Teacher | None,
    watcher: Watcher | None,
    recorder: Recorder,
    shaped: Callable[[Job], Job],
) -> bool:
    """Go on from the newest checkpoint; false where a gate went back on the way."""
    checkpoints = Checkpoints(setting.folder.checkpoints)
    state = checkpoints.latest()
    setting.folder.forget_after(state.step if state else -1)
    try:
        job = job_of(setting, setting.load().model, checkpoints, recorder, teacher=teacher, watch=watcher)
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

    config = setting.config
    return Job(
        model=model,
        sites=setting.sites,
        shape=setting.shape,
        train=Stream(_mixed(setting, "train", teacher), config.train.batch_size, derive(config.seed, "train")),
        search=Stream(_mixed(setting, "search", teacher), config.search.batch_size, derive(config.seed, "search")),
        valid=watched(setting.encoded["valid"].examples, config.validate.limit),
        pad_id=setting.tokenizer.pad_token_id,
        config=config,
        schedule=given_plan(config) if plan else schedule_of(config),
        checkpoints=checkpoints,
        observer=observer,
        accelerator=Accelerator(cpu=setting.device.type == "cpu"),
        teacher=teacher,
        watch=watch,
        plan=plan,
    )


def plainly(setting: Setting) -> Setting:
    """The setting of plain LoRA tuning: adapters of a rank of their own, moved by AdamW."""
    lora = replace(setting.config.lora, rank=setting.config.lora.dense_rank)
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


def teacher_of(setting: Setting, dense_tuned: Callable[[], Any]) -> Teacher | None:
    """The teacher that the recipe names; `dense_tuned` gives the dense model tuned with the same data and steps."""
    distill = setting.config.distill
    if distill.teacher == "none":
        return None
    model = setting.load().model if distill.teacher == "base" else dense_tuned()
    return Teacher(model.requires_grad_(False).eval(), distill.logits, distill.hidden)


def watched(examples: tuple[Example, ...], most: int) -> tuple[Example, ...]:
    """The validation examples scored during the run: spread evenly over the split."""
    return examples[:: max(1, -(-len(examples) // most))]


def finish(setting: Setting) -> None:
    """Merge and cut in one operation, from the dense weights as they are stored; write; open again and compare."""
    setting.console.stage("cut, write and check", 0)
    state = Checkpoints(setting.folder.checkpoints).latest()
    assert state is not None
    assert state.plan is not None
    loaded = setting.load(torch.float32, torch.device("cpu"))
    gated = loaded.model
    put_adapters(gated, setting, state)
    merge_adapters(gated)
    for parameter in gated.parameters():
        # Rounded to what the file will hold, computed in float32: the comparison is about the cut, not the rounding.
        parameter.data = parameter.data.to(loaded.storage).float()
    tokens = _check_tokens(setting)
    with masked(gated, state.plan, sites=setting.sites):
        expected = logits_of(gated, tokens)
    small = cut(gated, state.plan, sites=setting.sites).to(loaded.storage)
    write_text(setting.folder.plan, state.plan.to_json())
    unchecked = setting.folder.path / "model.unchecked"
    text = card(setting.folder, setting.config, state.plan, setting.sites)
    written = write(
        small, setting.tokenizer, state.plan, setting.sites, unchecked, layout=setting.config.layout, card=text
    )
    found = check(written, tokens, expected)
    setting.folder.note(
        model=setting.folder.manifest()["model"] | {"bytes": setting.params * loaded.storage.itemsize},
        pruned=asdict(written)
        | {
            "folder": "model",
            "class": written.architecture,
            "decoder_params": kept_params(setting.sites, state.plan) + setting.whole,
            "dtype": str(loaded.storage).removeprefix("torch."),
        },
        selfcheck=found.to_dict(),
    )
    unchecked.rename(setting.folder.model)  # from here on model/ exists, is whole, and has passed its check


def put_adapters(model: Any, setting: Setting, state: State) -> None:
    """A checkpoint's adapters, or the weights they were merged into, on a dense model: zero for removed units."""
    if not (state.is_cut and tunes_all(setting.config.train, setting.sites)):
        add_adapters(model, setting.sites, setting.config.lora, seed=0)
    put_back(model, state, setting.sites, setting.config.train)


def _check_tokens(setting: Setting) -> Tensor:
    """[B, T] ids of real examples, at most 4 of 64 tokens, cut to equal length."""
    examples = setting.encoded["test"].examples[:4]
    length = min(64, *(len(example.ids) for example in examples)) if examples else 1
    return torch.tensor([example.ids[:length] for example in examples])


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
    model = setting.load().model
    if name == "tuned":
        setting.console.stage("tune the dense model", setting.config.train.steps)
        kept = Checkpoints(setting.folder.tuned)  # as a teacher and for comparison: tuned once, and gone on with
        tune_and_prune(job_of(densely(setting), model, kept, setting.console, dense_plan(setting.sites)))
        merge_adapters(model)
    return model
