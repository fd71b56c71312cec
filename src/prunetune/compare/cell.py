"""One cell: a copy of the dense model is tuned, pruned or both, and scored."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prunetune.baselines.scores import BASELINES, Calibration, bias_compensation
from prunetune.compare.grid import Cell, Result, about
from prunetune.compare.methods import BUILT_IN, DENSE, changed
from prunetune.compare.scoring import finite, scored
from prunetune.config.recipe import RunConfig
from prunetune.data.batches import Stream, collate, micro_batches, padding_id
from prunetune.evaluation.score_records import context_of
from prunetune.pipeline.prepare import Setting, shape_of, with_texts
from prunetune.pipeline.stages import Teaching, job_of, plainly
from prunetune.plan import Plan
from prunetune.pruning.cut import add_biases, merge_adapters
from prunetune.pruning.shared_weights import let_go
from prunetune.pruning.sites import dense_plan, kept_params
from prunetune.search.select import select
from prunetune.train.checkpoints import Forgetful
from prunetune.train.cuda_graphs import own_stream
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import Teacher
from prunetune.train.teacher import by_size, untuned
from prunetune.utils import environment
from prunetune.utils.seeds import derive

BATCHES = 16  # of calibration, where the recipe's search.evidence is 0


class Stopped(Exception):
    """The comparison was interrupted while this cell was running."""


@dataclass
class Tuned:
    """The dense model tuned with one seed and learning rate, made by the first who asks."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Any = None
    plan: Plan | None = None
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Watch:
    """Keeps what validation saw, passes steps on where only one cell runs, and ends a cell that is to stop."""

    workshop: Workshop
    curve: list[dict[str, Any]] = field(default_factory=list)

    def step(self, record: dict[str, Any]) -> None:
        """A tuning step is done."""
        self.workshop.go_on()
        if not self.workshop.crowded:
            self.workshop.setting.console.step(record)

    def validation(self, record: dict[str, Any]) -> None:
        """The decided sub-network was scored."""
        self.curve.append({"step": record["step"], "kept": record["kept"], "nll": finite(record["nll"])})
        if not self.workshop.crowded:
            self.workshop.setting.console.validation(record)


@dataclass
class Workshop:
    """What all cells share: data, tokens, the dense model, and the dense tuned models that teach."""

    setting: Setting
    dense_rate: float  # of the dense tuned model that teaches
    model: Any = None  # dense, as it came; only ever copied
    crowded: bool = False  # several cells run at once
    stop: threading.Event = field(default_factory=threading.Event)
    teachers: dict[tuple[int, float], Tuned] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    own: threading.local = field(default_factory=threading.local)  # each thread's stream

    def open(self, *, crowded: bool) -> None:
        """Load the model once, before any thread starts: loading changes settings of the whole process."""
        if self.model is None:
            self.setting.console.stage("loading the model", 0)
            self.model = self.setting.load().model
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)
        self.crowded = crowded

    def teach(self, rate: float, *, wanted: bool) -> None:
        """Dense models of this learning rate are the teachers, where there are pupils; others are let go."""
        self.dense_rate = rate
        self.teachers = {key: tuned for key, tuned in self.teachers.items() if wanted and key[1] == rate}

    def make(self, cell: Cell, *, choose: bool) -> Result:
        """The cell's file, with the NLL on valid where it is one to choose from; raises what goes wrong."""
        with self._stream():
            return self._make(cell, choose=choose)

    def go_on(self) -> None:
        """Raises `Stopped` where the comparison has been interrupted."""
        if self.stop.is_set():
            raise Stopped

    def _stream(self) -> AbstractContextManager[Any]:
        device = self.setting.device
        if device.type != "cuda" or not self.crowded:
            return nullcontext()
        if not hasattr(self.own, "held"):
            self.own.held = own_stream(device)
        return torch.cuda.stream(self.own.held.stream)

    def _make(self, cell: Cell, *, choose: bool) -> Result:
        setting = self.setting_of(cell)
        if not self.crowded:
            setting.console.stage(cell.name, 0 if cell.method.kind == "untuned" else setting.config.train.steps)
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(setting.device)
        model, plan, facts = self._model(cell, setting)
        peak = torch.cuda.max_memory_allocated(setting.device) / 1e6 if setting.device.type == "cuda" else None
        started = time.monotonic()
        scores = scored(model, setting, self._passed, choose=choose)
        everything = sum(site.params for site in setting.sites)
        return {
            **about(cell),
            **scores,
            "kept": kept_params(setting.sites, plan) / everything,
            "widths": plan.widths(),
            **facts,
            "eval_seconds": time.monotonic() - started,
            "peak_mb": None if self.crowded else peak,  # the memory of several cells is nobody's
            "crowded": self.crowded,
            "device": environment.describe(setting.device),
            "dtype": str(setting.dtype).removeprefix("torch."),
            "versions": environment.facts(setting.device, setting.dtype, "", cell.seed)["versions"],
        }

    def setting_of(self, cell: Cell) -> Setting:
        """Data and tokens are read once: cells differ in what comes after, and in a teacher's texts."""
        config = cell.config(self.setting.config)
        shape = shape_of(config, self.setting.sites, self.model.config, self.setting.shape.legal_groups)
        setting = replace(self.setting, config=config, shape=replace(shape, limits=self.setting.shape.limits))
        if config.data.texts and config.data.texts != self.setting.config.data.texts:
            setting = with_texts(setting, context_of(self.model))
        if cell.method.taught:
            return setting
        plain = plainly(setting)  # but where a variant says otherwise
        return replace(plain, config=changed(plain.config, cell.method.changes))

    # -- models ------------------------------------------------------------------------------------------------------

    def _model(self, cell: Cell, setting: Setting) -> tuple[Any, Plan, Result]:
        """The cell's model to score, its plan, and seconds and curve of its training."""
        if cell.method.kind == "untuned":
            facts = {"train_seconds": 0.0, "teacher_seconds": 0.0, "curve": []}
            return copy.deepcopy(self.model), dense_plan(setting.sites), facts
        if cell.method.kind == "dense" and not cell.method.changes:
            tuned = self.tuned(cell.seed, cell.rate)
            assert tuned.plan is not None
            # A copy: what teaches in other threads is not to be hooked by an evaluation.
            facts = {"train_seconds": tuned.seconds, "teacher_seconds": 0.0, "curve": tuned.curve}
            return copy.deepcopy(tuned.model), tuned.plan, facts
        teaching, cost = self._teaching(cell, setting.config)
        model, watch, started = copy.deepcopy(self.model), Watch(self), time.monotonic()
        teacher = teaching(model)
        plan = self._plan(cell, setting, model)
        plan = tune_and_prune(job_of(setting, model, Forgetful(), watch, plan=plan, teacher=teacher))
        let_go(model)  # of its teacher's memory
        merge_adapters(model)
        model.requires_grad_(False).to(setting.dtype)  # as it would be written
        self._settle()
        facts = {"train_seconds": time.monotonic() - started, "teacher_seconds": cost, "curve": watch.curve}
        taught = teacher is not None and by_size(setting.config, setting.sites).distill.teacher == "dense"
        return model, plan, facts | ({"teacher_rate": self.dense_rate} if taught else {})

    def _plan(self, cell: Cell, setting: Setting, model: Any) -> Plan | None:
        """The plan that is given beforehand; FLAP's also gives the model its biases."""
        if cell.method.kind == "dense":
            return dense_plan(setting.sites)
        if cell.method.kind != "two-stage":
            return None
        calibration = calibration_of(setting, model)
        scores = BASELINES[cell.method.baseline](calibration)
        plan = select(scores, setting.sites, setting.config.budget.keep, setting.shape)
        if cell.method.baseline == "flap":
            add_biases(model, bias_compensation(calibration, plan))
        return plan

    def _teaching(self, cell: Cell, config: RunConfig) -> tuple[Teaching, float]:
        """The way to whoever teaches the cell's model, and the seconds that the teacher's own tuning took."""
        distill = by_size(config, self.setting.sites).distill
        if not cell.method.taught or distill.teacher == "none":
            return lambda _: None, 0.0
        if distill.teacher == "base":
            return lambda student: untuned(student, distill), 0.0
        tuned = self.tuned(cell.seed, self.dense_rate)
        # Padded passes hook the teacher's head: it is nobody else's.
        model = copy.deepcopy(tuned.model).requires_grad_(False).eval()
        teacher = Teacher(model, distill.logits, distill.hidden, share=distill.share)
        return lambda _: teacher, tuned.seconds

    def tuned(self, seed: int, rate: float) -> Tuned:
        """The dense model tuned as the recipe says, once for each seed and learning rate; only ever copied."""
        with self.lock:
            place = self.teachers.setdefault((seed, rate), Tuned())
        with place.lock:
            if place.model is None:
                self._tune_dense(place, seed, rate)
        return place

    def _tune_dense(self, place: Tuned, seed: int, rate: float) -> None:
        setting = self.setting_of(Cell(BUILT_IN[DENSE], 1.0, seed, rate))
        model, watch, started = copy.deepcopy(self.model), Watch(self), time.monotonic()
        place.plan = tune_and_prune(job_of(setting, model, Forgetful(), watch, plan=dense_plan(setting.sites)))
        merge_adapters(model)
        self._settle()
        place.seconds, place.curve = time.monotonic() - started, watch.curve
        place.model = model.requires_grad_(False).eval()

    def _passed(self, task: str, done: int, total: int) -> None:
        """An evaluation has come so far."""
        self.go_on()
        if not self.crowded:
            self.setting.console.passed(task, done, total)

    def _settle(self) -> None:
        """What was launched on this stream is done: seconds count, and other streams may read."""
        if self.setting.device.type == "cuda":
            torch.cuda.current_stream(self.setting.device).synchronize()


def calibration_of(setting: Setting, model: Any) -> Calibration:
    """The batches of the search that a baseline may look at."""
    config, pad = setting.config, padding_id(setting.tokenizer)
    stream = Stream(setting.encoded["search"].examples, config.search.batch_size, derive(config.seed, "search"))
    batches = [
        collate(part, pad)
        for step in range(config.search.evidence or BATCHES)
        for part in micro_batches(stream.batch(step), config.train.micro_tokens)
    ]
    return Calibration(model, setting.sites, tuple(batches), config.seed, setting.shape.limits)
