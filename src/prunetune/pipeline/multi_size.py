"""Runs of several sizes: the largest is a plain run; each smaller one is cut out of the tuned one before it, and tuned.

The plans are nested and come from the scores that the one search ended with. Every size has a run folder of its own,
`sizes/0.6`, with checkpoints, model, scores and report; the run's own folder holds what they share: the teacher, the
dense models' scores, the speed of all beside the dense model, and a report of the front. A run that was stopped goes on
in the size it was in.
"""

from __future__ import annotations

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
from prunetune.manifest import ModelSpeeds, SizeFacts
from prunetune.model.loading import pick_device
from prunetune.pipeline import stages
from prunetune.pipeline.monitor import ValidationMonitor, make_monitor
from prunetune.pipeline.prepare import Console, RunContext, data_and_model_facts, prepare
from prunetune.pipeline.recording import raise_if_limits_broken, run_lifecycle
from prunetune.pipeline.requirements import measure_gain
from prunetune.runs.folder import TUNING_STAGE, RunFolder, create_run_folder
from prunetune.runs.trackers import require_trackers, start_trackers
from prunetune.search.searcher import Searcher, detach_to
from prunetune.search.select import Scores, select
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.train.job import TrainingJob
from prunetune.train.schedule import build_schedule, tune_only_schedule
from prunetune.utils import environment
from prunetune.utils.console import make_console
from prunetune.utils.determinism import deterministic
from prunetune.utils.launch import rank_and_world_size
from prunetune.utils.seeds import derive_seed


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Tune, prune, cut, check, evaluate and report, one size or several; returns the run folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known.
    """
    if not config.budget.sizes:
        return stages.run(config, resume=resume, console=console, command=command)
    if rank_and_world_size()[1] > 1:
        raise ConfigError(
            "budget.keep names several sizes, which one process makes: start it without accelerate launch"
        )
    require_trackers(config.report_to)
    console = console or make_console(config.train.log_every)
    with closing(console), deterministic(config.deterministic, pick_device(config.device)):
        setting = prepare(config, resume=resume, console=console)
        sizes = make_size_runs(setting)
        create_run_folder(setting.folder, config)
        with run_lifecycle(setting.folder, config, command):
            _run_stages(setting, sizes, command)
    return setting.folder.path


@dataclass(frozen=True)
class SizeRun:
    """One of several: a setting whose recipe and folder are its own."""

    context: RunContext
    monitor: ValidationMonitor
    index: int  # from the largest on

    @property
    def folder(self) -> RunFolder:
        """Where its checkpoints, model and scores lie."""
        return self.context.folder

    @property
    def config(self) -> RunConfig:
        """The run's recipe with the budget and the steps of this size."""
        return self.context.config

    @property
    def latest_state(self) -> TrainingState | None:
        """How far it has come."""
        return Checkpoints(self.folder.checkpoints).latest()

    @property
    def is_tuned(self) -> bool:
        """Whether nothing is left but to write it."""
        if self.folder.model_folder.exists():
            return True
        state = self.latest_state
        return state is not None and state.is_cut and state.step >= self.config.train.steps


def make_size_runs(context: RunContext) -> tuple[SizeRun, ...]:
    """The sizes of a run, the largest first; raises where a gate could never act."""
    sizes = []
    for number, keep in enumerate(context.config.budget.keeps):
        folder = context.folder.size_folder(keep)
        own = replace(context, config=size_config(context.config, number, folder.path), folder=folder)
        sizes.append(SizeRun(own, make_monitor(own), number))
    return tuple(sizes)


def size_config(config: RunConfig, index: int, out: Path) -> RunConfig:
    """The recipe of one size: for the first that of a plain run, for the others of tuning alone."""
    shares, steps = config.train.size_share, config.train.steps
    if index:
        steps = max(1, round(steps * shares[min(index, len(shares)) - 1]))
    budget = replace(config.budget, keep=config.budget.keeps[index], sizes=())
    return replace(config, out=str(out), budget=budget, train=replace(config.train, steps=steps))


# -- the chain -------------------------------------------------------------------------------------------------------


def _run_stages(context: RunContext, sizes: Sequence[SizeRun], command: str) -> None:
    folder = context.folder
    facts = environment.describe_environment(context.device, context.dtype, command, context.config.seed)
    folder.update_manifest(
        **facts,
        **data_and_model_facts(context),
        sizes=tuple(str(size.folder.path.relative_to(folder.path)) for size in sizes),
    )
    failed = _SizeChain(context, sizes, command).run()
    made = [size for size in sizes if size.is_tuned]
    if made:
        with stages.record_timing(folder, "evaluate"):
            stages.evaluate_models(context, stages.dense_model_names(context.config))
    for size in made:
        _copy_dense_scores(context, size)
        with run_lifecycle(size.folder, size.config, command):
            stages.finish_and_evaluate(size.context)
    if any(not size.folder.read_manifest().gain for size in made):
        with stages.record_timing(folder, "bench"):
            measure_gain(folder, [size.folder for size in made], context)
    failures = [*_check_limits(made, command), *([failed] if failed else [])]
    if failures:
        raise LimitBroken("; ".join(failures))


def _copy_dense_scores(context: RunContext, size: SizeRun) -> None:
    """The dense models are scored once, for all sizes."""
    for name in stages.dense_model_names(context.config):
        if not size.folder.evaluation_file(name).exists():
            shutil.copyfile(context.folder.evaluation_file(name), size.folder.evaluation_file(name))
    speeds = [folder.read_manifest().speed.to_dict() for folder in (context.folder, size.folder)]
    size.folder.update_manifest(speed=ModelSpeeds.from_dict({**speeds[0], **speeds[1]}))


def _check_limits(sizes: Sequence[SizeRun], command: str) -> list[str]:
    """What is outside a gate, in words; each size's report and history say so, too."""
    failures = []
    for size in sizes:
        try:
            with run_lifecycle(size.folder, size.config, command):
                raise_if_limits_broken(size.context)
        except SelfCheckFailed:
            raise
        except LimitBroken as failed:
            failures.append(str(failed))
    return failures


@dataclass(frozen=True)
class _SizeChain:
    """The tuning of all sizes, in turn."""

    context: RunContext
    sizes: Sequence[SizeRun]
    command: str

    def run(self) -> str:
        """Tune every size that is not; what a gate said that stopped the chain, or nothing."""
        for size in self.sizes:
            if size.is_tuned:
                continue
            try:
                self._tune(size)
            except LimitBroken as stopped:
                return f"size {size.config.budget.keep:g}: {stopped}"
            gc.collect()  # one model leaves before the next is loaded
        return ""

    def _tune(self, size: SizeRun) -> None:
        setting, folder = size.context, size.folder
        create_run_folder(folder, size.config)
        teaching = self._teacher_factory
        facts = environment.describe_environment(setting.device, setting.dtype, self.command, setting.config.seed)
        larger = self.sizes[size.index - 1].config.budget.keep if size.index else None
        folder.update_manifest(
            **facts, **data_and_model_facts(setting), size=SizeFacts(keep=size.config.budget.keep, larger=larger)
        )
        setting.console.stage(f"tune and prune, size {size.config.budget.keep:g}", size.config.train.steps)
        with (
            stages.record_timing(folder, TUNING_STAGE),
            start_trackers(setting.config, folder, cpu=setting.device.type == "cpu") as trackers,
        ):
            stages.tune(setting, teaching, size.monitor, trackers, lambda job: self._job_for_size(job, size))

    @cached_property
    def _teacher_factory(self) -> stages.TeacherFactory:
        """One for all sizes, tuned by the run's own recipe; or the untuned model, which each has in its own memory."""
        with stages.record_timing(self.context.folder, "teacher"):
            return stages.make_teacher_factory(self.context, lambda: stages.load_model(self.context, "tuned"))

    def _job_for_size(self, job: TrainingJob, size: SizeRun) -> TrainingJob:
        """The first size's job as it is; a smaller one's goes on where the larger one ended, with other examples."""
        if not size.index:
            return job
        larger = self.sizes[size.index - 1]
        start = larger.latest_state
        if start is None or start.step < larger.config.train.steps:
            raise RunFolderError(
                f"{larger.folder.checkpoints}: the last state of this size cannot be read, and the next one goes on "
                "from it: put it back, or start anew with another --out"
            )
        seed = derive_seed(size.config.seed, "train", size.index)
        return replace(
            job,
            schedule=tune_only_schedule(size.config),
            train_stream=BatchStream(job.train_stream.examples, size.config.train.batch_size, seed),
            given_plan=select(
                self._final_search_scores(job),
                job.sites,
                size.config.budget.keep,
                job.constraints,
                larger_plan=start.plan,
            ),
            start_state=start,
        )

    def _final_search_scores(self, job: TrainingJob) -> Scores:
        """What the one search ended with."""
        first = self.sizes[0]
        state = first.latest_state
        assert state is not None
        device = self.context.device
        searcher = Searcher(job.sites, job.constraints, first.config, build_schedule(first.config).keep_at, device)
        searcher.load_state_tensors(state.tensors["generator"])
        return detach_to(searcher.logits(), "cpu")
