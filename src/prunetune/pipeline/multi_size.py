"""A run of several sizes: the largest is a plain run; each smaller one goes on from where the larger has been cut.

So the plans are nested, and a size shares the steps in which the larger ones were cut. Every size has a run folder of
its own, `sizes/0.6`, with checkpoints, model, scores and report. The run's own folder holds what they share: the
teacher, the dense models' scores, the speed of all relative to the dense model, and a report that compares the sizes.
A run that was stopped continues in the size it was in.
"""

import gc
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from prunetune.config.recipe import RunConfig
from prunetune.data.batches import BatchStream
from prunetune.errors import ConfigError, LimitBroken, RunFolderError, SelfCheckFailed
from prunetune.manifest import SizeFacts
from prunetune.model.loading import pick_device
from prunetune.pipeline.finish import finish
from prunetune.pipeline.monitor import ValidationMonitor, make_monitor
from prunetune.pipeline.prepare import Console, RunContext, prepare
from prunetune.pipeline.recording import (
    raise_if_limits_broken,
    record_origin,
    record_timing,
    record_training,
    run_lifecycle,
)
from prunetune.pipeline.requirements import measure_gain
from prunetune.pipeline.stages import (
    TeacherFactory,
    choose_learning_rate,
    dense_model_names,
    evaluate_all,
    evaluate_drift,
    evaluate_models,
    load_model,
    make_teacher_factory,
    measure_budgets,
    resume_training,
    with_learning_rate,
)
from prunetune.runs.folder import RunFolder, create_run_folder
from prunetune.runs.trackers import require_trackers
from prunetune.train.checkpoints import Checkpoints
from prunetune.train.job import TrainingJob
from prunetune.train.schedule import build_schedule
from prunetune.utils.console import make_console
from prunetune.utils.determinism import derive_seed, deterministic
from prunetune.utils.launch import rank_and_world_size


def run_sizes(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """`run` for a recipe whose budget names several sizes; returns the folder of the whole run.

    A limit that stops one size leaves the larger ones: they are finished before `LimitBroken` is raised.
    """
    if rank_and_world_size()[1] > 1:
        problem = "budget.keep names several sizes, which one process makes: start it without accelerate launch"
        raise ConfigError(problem)
    require_trackers(config.report_to)
    console = console or make_console(config.train.log_every)
    with closing(console), deterministic(config.deterministic, pick_device(config.device)):
        context = prepare(config, resume=resume, console=console)
        sizes = make_size_runs(context)
        create_run_folder(context.folder, context.recipe)
        with run_lifecycle(context, command):
            folders = tuple(str(size.folder.path.relative_to(context.folder.path)) for size in sizes)
            record_origin(context, command, sizes=folders)
            context.write_reduced_model()
            stopped = SizeTraining(context, sizes, command).train()
            tuned = [size for size in sizes if size.is_tuned]
            _finish_and_evaluate(context, tuned, command)
            evaluate_drift(context, [size.context for size in tuned])
            if any(not size.folder.read_manifest().gain for size in tuned):
                with record_timing(context.folder, "bench"):
                    measure_gain(context.folder, [size.folder for size in tuned], context)
            failures = []  # what is outside a limit, in words; each size's own report and history show it, too
            for size in tuned:
                try:
                    with run_lifecycle(size.context, command):
                        raise_if_limits_broken(size.context)
                except SelfCheckFailed:
                    raise
                except LimitBroken as failed:
                    failures.append(str(failed))
            if failures := [*failures, *filter(None, [stopped])]:
                raise LimitBroken("; ".join(failures))
    return context.folder.path


@dataclass(frozen=True)
class SizeRun:
    """One of several sizes: a context whose recipe and folder are its own."""

    context: RunContext
    monitor: ValidationMonitor
    index: int  # 0 for the largest

    @property
    def folder(self) -> RunFolder:
        """The run folder of this size."""
        return self.context.folder

    @property
    def config(self) -> RunConfig:
        """The run's config with the budget and the steps of this size."""
        return self.context.config

    @property
    def is_tuned(self) -> bool:
        """Whether its training is complete."""
        if self.folder.model_folder.exists():
            return True
        state = Checkpoints(self.folder.checkpoints).latest()
        if state is None or not state.is_cut:
            return False
        return state.step >= self.config.train.steps or state.step == state.validation_history["schedule"]["steps"]


def make_size_runs(context: RunContext) -> tuple[SizeRun, ...]:
    """The sizes of a run, the largest first; raises a `ConfigError` or `DataError` for a limit that cannot act."""
    sizes = []
    for index, keep in enumerate(context.config.budget.keeps):
        folder = context.folder.size_folder(keep)
        size_context = replace(
            context,
            recipe=size_config(context.recipe, index, folder.path),
            config=size_config(context.config, index, folder.path),
            folder=folder,
        )
        sizes.append(SizeRun(size_context, make_monitor(size_context), index))
    return tuple(sizes)


def size_config(config: RunConfig, index: int, out: Path) -> RunConfig:
    """The recipe of one size: for the first that of a plain run, for the others one of fewer steps."""
    shares, steps = config.train.size_share, config.train.steps
    if index:
        steps = max(1, round(steps * shares[min(index, len(shares)) - 1]))
    budget = replace(config.budget, keep=config.budget.keeps[index], sizes=())
    search = replace(config.search, method="progressive") if index else config.search
    return replace(config, out=str(out), budget=budget, search=search, train=replace(config.train, steps=steps))


# -- training of all sizes, one after the other ------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeTraining:
    """Trains the sizes in turn, the largest first, with one teacher."""

    context: RunContext
    sizes: Sequence[SizeRun]
    command: str

    def train(self) -> str:
        """Train every size that is not tuned yet; returns why a limit stopped this, or an empty text."""
        for size in self.sizes:
            if size.is_tuned:
                continue
            try:
                self.train_size(size)
            except LimitBroken as stopped:
                return f"size {size.config.budget.keep:g}: {stopped}"
            gc.collect()  # one model frees its memory before the next is loaded
        return ""

    def train_size(self, size: SizeRun) -> None:
        """Train one size to its last step."""
        create_run_folder(size.folder, size.context.recipe)
        teacher_factory, learning_rate = self._teacher_factory, self._learning_rate
        keep = size.config.budget.keep
        larger = self.sizes[size.index - 1].config.budget.keep if size.index else None
        record_origin(
            size.context, self.command, size=SizeFacts(keep=keep, larger=larger),
            learning_rate=self.context.folder.read_manifest().learning_rate,
        )  # fmt: skip
        context = replace(size.context, config=with_learning_rate(size.config, learning_rate))
        size.context.console.stage(f"tune and prune, size {keep:g}", size.config.train.steps)
        with record_training(size.context) as observer:
            while not resume_training(
                context, teacher_factory, observer, size.monitor, lambda job: self._job_for_size(job, size)
            ):
                gc.collect()  # the model that was rolled back frees its memory before another is loaded

    @cached_property
    def _teacher_factory(self) -> TeacherFactory:
        """One for all sizes, tuned by the run's own recipe; or the untuned model, which each has in its own memory."""
        with record_timing(self.context.folder, "teacher"):
            return make_teacher_factory(self.context, lambda: load_model(self.context, "tuned"))

    @cached_property
    def _learning_rate(self) -> float:
        """Of all sizes; chosen once, by trials of the largest, if the recipe says auto."""
        largest = replace(self.sizes[0].context, folder=self.context.folder)
        return choose_learning_rate(largest, self._teacher_factory).config.train.learning_rate

    def _job_for_size(self, job: TrainingJob, size: SizeRun) -> TrainingJob:
        """The job of one size: it keeps the state from which a smaller size goes on, and goes on from a larger one."""
        if size.index + 1 < len(self.sizes):
            job = replace(job, branch_checkpoints=Checkpoints(size.folder.branch, self.context.base))
        if not size.index:
            return job
        larger = self.sizes[size.index - 1]
        start = Checkpoints(larger.folder.branch, self.context.base).latest()
        if start is None:
            raise RunFolderError(
                f"{larger.folder.branch}: the state that the next size goes on from cannot be read: put it back, or "
                "start anew with another --out"
            )
        assert start.plan is not None
        seed = derive_seed(size.config.seed, "train", size.index)
        schedule = replace(build_schedule(size.config), start_keep=larger.config.budget.keep)
        stream = BatchStream(job.train_stream.examples, size.config.train.batch_size, seed)
        return replace(job, schedule=schedule, train_stream=stream, start_state=start)


# -- after training ----------------------------------------------------------------------------------------------------


def _finish_and_evaluate(context: RunContext, sizes: Sequence[SizeRun], command: str) -> None:
    """Finish, evaluate and measure every size that is tuned; the dense models are evaluated once, for all."""
    names = dense_model_names(context.config)
    if sizes:
        with record_timing(context.folder, "evaluate"):
            evaluate_models(context, names)
    for size in sizes:
        for name in names:
            if not size.folder.evaluation_file(name).exists():
                shutil.copyfile(context.folder.evaluation_file(name), size.folder.evaluation_file(name))
        with run_lifecycle(size.context, command, is_final=False):
            finish(size.context)
            evaluate_all(size.context)
            measure_budgets(size.context)
