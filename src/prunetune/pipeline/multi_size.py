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
from prunetune.data.batches import Stream
from prunetune.errors import ConfigError, GateFailed, RunFolderError, SelfCheckFailed
from prunetune.model.loading import pick_device
from prunetune.pipeline import stages
from prunetune.pipeline.monitor import Watcher, watcher_of
from prunetune.pipeline.prepare import Console, Setting, facts_of, prepare
from prunetune.pipeline.recording import outside, told
from prunetune.pipeline.speed_limit import gained
from prunetune.runs.folder import TUNING, RunFolder, open_folder
from prunetune.runs.trackers import require, tracking
from prunetune.search.searcher import Searcher, moved_to
from prunetune.search.select import Scores, select
from prunetune.train.checkpoints import Checkpoints, State
from prunetune.train.job import Job
from prunetune.train.schedule import given_plan, schedule_of
from prunetune.utils import environment
from prunetune.utils.console import console_for
from prunetune.utils.determinism import deterministic
from prunetune.utils.launch import launched
from prunetune.utils.seeds import derive


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Tune, prune, cut, check, evaluate and report, one size or several; returns the run folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known.
    """
    if not config.budget.sizes:
        return stages.run(config, resume=resume, console=console, command=command)
    if launched()[1] > 1:
        raise ConfigError(
            "budget.keep names several sizes, which one process makes: start it without accelerate launch"
        )
    require(config.track)
    console = console or console_for(config.train.log_every)
    with closing(console), deterministic(config.deterministic, pick_device(config.device)):
        setting = prepare(config, resume=resume, console=console)
        sizes = sizes_of(setting)
        open_folder(setting.folder, config)
        with told(setting.folder, config, command):
            _stages(setting, sizes, command)
    return setting.folder.path


@dataclass(frozen=True)
class Size:
    """One of several: a setting whose recipe and folder are its own."""

    setting: Setting
    watcher: Watcher
    number: int  # from the largest on

    @property
    def folder(self) -> RunFolder:
        """Where its checkpoints, model and scores lie."""
        return self.setting.folder

    @property
    def config(self) -> RunConfig:
        """The run's recipe with the budget and the steps of this size."""
        return self.setting.config

    @property
    def state(self) -> State | None:
        """How far it has come."""
        return Checkpoints(self.folder.checkpoints).latest()

    @property
    def is_tuned(self) -> bool:
        """Whether nothing is left but to write it."""
        if self.folder.model.exists():
            return True
        state = self.state
        return state is not None and state.is_cut and state.step >= self.config.train.steps


def sizes_of(setting: Setting) -> tuple[Size, ...]:
    """The sizes of a run, the largest first; raises where a gate could never act."""
    sizes = []
    for number, keep in enumerate(setting.config.budget.keeps):
        folder = setting.folder.size(keep)
        own = replace(setting, config=config_of(setting.config, number, folder.path), folder=folder)
        sizes.append(Size(own, watcher_of(own), number))
    return tuple(sizes)


def config_of(config: RunConfig, number: int, out: Path) -> RunConfig:
    """The recipe of one size: for the first that of a plain run, for the others of tuning alone."""
    shares, steps = config.train.size_share, config.train.steps
    if number:
        steps = max(1, round(steps * shares[min(number, len(shares)) - 1]))
    budget = replace(config.budget, keep=config.budget.keeps[number], sizes=())
    return replace(config, out=str(out), budget=budget, train=replace(config.train, steps=steps))


# -- the chain -------------------------------------------------------------------------------------------------------


def _stages(setting: Setting, sizes: Sequence[Size], command: str) -> None:
    folder = setting.folder
    facts = environment.facts(setting.device, setting.dtype, command, setting.config.seed)
    folder.note(**facts, **facts_of(setting), sizes=[str(size.folder.path.relative_to(folder.path)) for size in sizes])
    failed = _Chain(setting, sizes, command).run()
    made = [size for size in sizes if size.is_tuned]
    if made:
        with stages.timed(folder, "evaluate"):
            stages.evaluate_these(setting, stages.dense_models(setting.config))
    for size in made:
        _share_dense(setting, size)
        with told(size.folder, size.config, command):
            stages.conclude(size.setting)
    if any("gain" not in size.folder.manifest() for size in made):
        with stages.timed(folder, "bench"):
            gained(folder, [size.folder for size in made], setting)
    failures = [*_verdicts(made, command), *([failed] if failed else [])]
    if failures:
        raise GateFailed("; ".join(failures))


def _share_dense(setting: Setting, size: Size) -> None:
    """The dense models are scored once, for all sizes."""
    for name in stages.dense_models(setting.config):
        if not size.folder.evaluation(name).exists():
            shutil.copyfile(setting.folder.evaluation(name), size.folder.evaluation(name))
    speed = size.folder.manifest().get("speed", {})
    size.folder.note(speed=setting.folder.manifest().get("speed", {}) | speed)


def _verdicts(sizes: Sequence[Size], command: str) -> list[str]:
    """What is outside a gate, in words; each size's report and history say so, too."""
    failures = []
    for size in sizes:
        try:
            with told(size.folder, size.config, command):
                outside(size.setting)
        except SelfCheckFailed:
            raise
        except GateFailed as failed:
            failures.append(str(failed))
    return failures


@dataclass(frozen=True)
class _Chain:
    """The tuning of all sizes, in turn."""

    setting: Setting
    sizes: Sequence[Size]
    command: str

    def run(self) -> str:
        """Tune every size that is not; what a gate said that stopped the chain, or nothing."""
        for size in self.sizes:
            if size.is_tuned:
                continue
            try:
                self._tune(size)
            except GateFailed as stopped:
                return f"size {size.config.budget.keep:g}: {stopped}"
            gc.collect()  # one model leaves before the next is loaded
        return ""

    def _tune(self, size: Size) -> None:
        setting, folder = size.setting, size.folder
        open_folder(folder, size.config)
        teaching = self._teaching
        facts = environment.facts(setting.device, setting.dtype, self.command, setting.config.seed)
        larger = self.sizes[size.number - 1].config.budget.keep if size.number else None
        folder.note(**facts, **facts_of(setting), size={"keep": size.config.budget.keep, "larger": larger})
        setting.console.stage(f"tune and prune, size {size.config.budget.keep:g}", size.config.train.steps)
        with (
            stages.timed(folder, TUNING),
            tracking(setting.config, folder, cpu=setting.device.type == "cpu") as trackers,
        ):
            stages.tune(setting, teaching, size.watcher, trackers, lambda job: self._shaped(job, size))

    @cached_property
    def _teaching(self) -> stages.Teaching:
        """One for all sizes, tuned by the run's own recipe; or the untuned model, which each has in its own memory."""
        with stages.timed(self.setting.folder, "teacher"):
            return stages.teaching_of(self.setting, lambda: stages.model_of(self.setting, "tuned"))

    def _shaped(self, job: Job, size: Size) -> Job:
        """The first size's job as it is; a smaller one's goes on where the larger one ended, with other examples."""
        if not size.number:
            return job
        larger = self.sizes[size.number - 1]
        start = larger.state
        if start is None or start.step < larger.config.train.steps:
            raise RunFolderError(
                f"{larger.folder.checkpoints}: the last state of this size cannot be read, and the next one goes on "
                "from it: put it back, or start anew with another --out"
            )
        seed = derive(size.config.seed, "train", size.number)
        return replace(
            job,
            schedule=given_plan(size.config),
            train=Stream(job.train.examples, size.config.train.batch_size, seed),
            plan=select(self._scores(job), job.sites, size.config.budget.keep, job.shape, within=start.plan),
            start=start,
        )

    def _scores(self, job: Job) -> Scores:
        """What the one search ended with."""
        first = self.sizes[0]
        state = first.state
        assert state is not None
        device = self.setting.device
        searcher = Searcher(job.sites, job.shape, first.config, schedule_of(first.config).keep_at, device)
        searcher.load(state.tensors["generator"])
        return moved_to(searcher.logits(), "cpu")
