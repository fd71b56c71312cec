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
from prunetune.compare.grid import Cell, CellResult, cell_header
from prunetune.compare.methods import BUILT_IN, DENSE, apply_overrides
from prunetune.compare.scoring import finite_or_none, score_model
from prunetune.config.recipe import RunConfig
from prunetune.data.batches import BatchStream, collate, micro_batches, pad_token_id
from prunetune.evaluation.score_records import context_length
from prunetune.pipeline.prepare import RunContext, make_plan_constraints, with_distill_texts
from prunetune.pipeline.stages import TeacherFactory, make_job, plain_lora_config
from prunetune.plan import Plan
from prunetune.pruning.cut import add_biases, merge_adapters
from prunetune.pruning.shared_weights import unshare_weights
from prunetune.pruning.sites import dense_plan, kept_params
from prunetune.search.select import select
from prunetune.train.checkpoints import NullCheckpointStore
from prunetune.train.cuda_graphs import own_stream
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import Teacher
from prunetune.train.teacher import base_teacher, resolve_auto
from prunetune.utils import environment
from prunetune.utils.seeds import derive_seed

CALIBRATION_BATCHES = 16  # of calibration, where the recipe's search.init_batches is 0


class Interrupted(Exception):
    """The comparison was interrupted while this cell was running."""


@dataclass
class TunedDenseModel:
    """The dense model tuned with one seed and learning rate, made by the first who asks."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Any = None
    plan: Plan | None = None
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class CellMonitor:
    """Keeps what validation saw, passes steps on where only one cell runs, and ends a cell that is to stop."""

    runner: CellRunner
    curve: list[dict[str, Any]] = field(default_factory=list)

    def step(self, record: dict[str, Any]) -> None:
        """A tuning step is done."""
        self.runner.raise_if_interrupted()
        if not self.runner.concurrent:
            self.runner.context.console.step(record)

    def validation(self, record: dict[str, Any]) -> None:
        """The decided sub-network was scored."""
        self.curve.append({"step": record["step"], "kept": record["kept"], "nll": finite_or_none(record["nll"])})
        if not self.runner.concurrent:
            self.runner.context.console.validation(record)


@dataclass
class CellRunner:
    """What all cells share: data, tokens, the dense model, and the dense tuned models that teach."""

    context: RunContext
    dense_learning_rate: float  # of the dense tuned model that teaches
    model: Any = None  # dense, as it came; only ever copied
    concurrent: bool = False  # several cells run at once
    stop_event: threading.Event = field(default_factory=threading.Event)
    teachers: dict[tuple[int, float], TunedDenseModel] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread_local: threading.local = field(default_factory=threading.local)  # each thread's stream

    def load_model(self, *, concurrent: bool) -> None:
        """Load the model once, before any thread starts: loading changes settings of the whole process."""
        if self.model is None:
            self.context.console.stage("loading the model", 0)
            self.model = self.context.load_dense().model
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        self.concurrent = concurrent

    def select_teachers(self, rate: float, *, wanted: bool) -> None:
        """Dense models of this learning rate are the teachers, where there are pupils; others are let go."""
        self.dense_learning_rate = rate
        self.teachers = {key: tuned for key, tuned in self.teachers.items() if wanted and key[1] == rate}

    def run_cell(self, cell: Cell, *, needs_valid_nll: bool) -> CellResult:
        """The cell's file, with the NLL on valid where it is one to choose from; raises what goes wrong."""
        with self._stream():
            return self._run_cell(cell, needs_valid_nll=needs_valid_nll)

    def raise_if_interrupted(self) -> None:
        """Raises `Stopped` where the comparison has been interrupted."""
        if self.stop_event.is_set():
            raise Interrupted

    def _stream(self) -> AbstractContextManager[Any]:
        device = self.context.device
        if device.type != "cuda" or not self.concurrent:
            return nullcontext()
        if not hasattr(self.thread_local, "held"):
            self.thread_local.held = own_stream(device)
        return torch.cuda.stream(self.thread_local.held.stream)

    def _run_cell(self, cell: Cell, *, needs_valid_nll: bool) -> CellResult:
        setting = self.cell_context(cell)
        if not self.concurrent:
            setting.console.stage(cell.name, 0 if cell.method.kind == "untuned" else setting.config.train.steps)
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(setting.device)
        model, plan, facts = self._model(cell, setting)
        peak = torch.cuda.max_memory_allocated(setting.device) / 1e6 if setting.device.type == "cuda" else None
        started = time.monotonic()
        scores = score_model(model, setting, self._on_progress, needs_valid_nll=needs_valid_nll)
        everything = sum(site.params for site in setting.sites)
        return {
            **cell_header(cell),
            **scores,
            "kept": kept_params(setting.sites, plan) / everything,
            "widths": plan.widths(),
            **facts,
            "eval_seconds": time.monotonic() - started,
            "peak_mb": None if self.concurrent else peak,  # the memory of several cells is nobody's
            "crowded": self.concurrent,
            "device": environment.device_name(setting.device),
            "dtype": str(setting.dtype).removeprefix("torch."),
            "versions": environment.describe_environment(setting.device, setting.dtype, "", cell.seed)["versions"],
        }

    def cell_context(self, cell: Cell) -> RunContext:
        """Data and tokens are read once: cells differ in what comes after, and in a teacher's texts."""
        config = cell.config(self.context.config)
        shape = make_plan_constraints(
            config, self.context.sites, self.model.config, self.context.constraints.allows_groups
        )
        setting = replace(
            self.context, config=config, constraints=replace(shape, limits=self.context.constraints.limits)
        )
        if config.data.distill_texts and config.data.distill_texts != self.context.config.data.distill_texts:
            setting = with_distill_texts(setting, context_length(self.model))
        if cell.method.uses_teacher:
            return setting
        plain = plain_lora_config(setting)  # but where a variant says otherwise
        return replace(plain, config=apply_overrides(plain.config, cell.method.overrides))

    # -- models ------------------------------------------------------------------------------------------------------

    def _model(self, cell: Cell, setting: RunContext) -> tuple[Any, Plan, CellResult]:
        """The cell's model to score, its plan, and seconds and curve of its training."""
        if cell.method.kind == "untuned":
            facts = {"train_seconds": 0.0, "teacher_seconds": 0.0, "curve": []}
            return copy.deepcopy(self.model), dense_plan(setting.sites), facts
        if cell.method.kind == "dense" and not cell.method.overrides:
            tuned = self.tuned_dense(cell.seed, cell.learning_rate)
            assert tuned.plan is not None
            # A copy: what teaches in other threads is not to be hooked by an evaluation.
            facts = {"train_seconds": tuned.seconds, "teacher_seconds": 0.0, "curve": tuned.curve}
            return copy.deepcopy(tuned.model), tuned.plan, facts
        teaching, cost = self._teacher_factory(cell, setting.config)
        model, watch, started = copy.deepcopy(self.model), CellMonitor(self), time.monotonic()
        teacher = teaching(model)
        plan = self._plan(cell, setting, model)
        plan = tune_and_prune(make_job(setting, model, NullCheckpointStore(), watch, plan=plan, teacher=teacher))
        unshare_weights(model)  # of its teacher's memory
        merge_adapters(model)
        model.requires_grad_(False).to(setting.dtype)  # as it would be written
        self._synchronize()
        facts = {"train_seconds": time.monotonic() - started, "teacher_seconds": cost, "curve": watch.curve}
        taught = teacher is not None and resolve_auto(setting.config, setting.sites).distill.teacher == "dense"
        return model, plan, facts | ({"teacher_rate": self.dense_learning_rate} if taught else {})

    def _plan(self, cell: Cell, setting: RunContext, model: Any) -> Plan | None:
        """The plan that is given beforehand; FLAP's also gives the model its biases."""
        if cell.method.kind == "dense":
            return dense_plan(setting.sites)
        if cell.method.kind != "two-stage":
            return None
        calibration = build_calibration(setting, model)
        scores = BASELINES[cell.method.baseline](calibration)
        plan = select(scores, setting.sites, setting.config.budget.keep, setting.constraints)
        if cell.method.baseline == "flap":
            add_biases(model, bias_compensation(calibration, plan))
        return plan

    def _teacher_factory(self, cell: Cell, config: RunConfig) -> tuple[TeacherFactory, float]:
        """The way to whoever teaches the cell's model, and the seconds that the teacher's own tuning took."""
        distill = resolve_auto(config, self.context.sites).distill
        if not cell.method.uses_teacher or distill.teacher == "none":
            return lambda _: None, 0.0
        if distill.teacher == "base":
            return lambda student: base_teacher(student, distill), 0.0
        tuned = self.tuned_dense(cell.seed, self.dense_learning_rate)
        # Padded passes hook the teacher's head: it is nobody else's.
        model = copy.deepcopy(tuned.model).requires_grad_(False).eval()
        teacher = Teacher(model, distill.logits, distill.hidden, share=distill.share)
        return lambda _: teacher, tuned.seconds

    def tuned_dense(self, seed: int, rate: float) -> TunedDenseModel:
        """The dense model tuned as the recipe says, once for each seed and learning rate; only ever copied."""
        with self.lock:
            place = self.teachers.setdefault((seed, rate), TunedDenseModel())
        with place.lock:
            if place.model is None:
                self._tune_dense(place, seed, rate)
        return place

    def _tune_dense(self, place: TunedDenseModel, seed: int, rate: float) -> None:
        setting = self.cell_context(Cell(BUILT_IN[DENSE], 1.0, seed, rate))
        model, watch, started = copy.deepcopy(self.model), CellMonitor(self), time.monotonic()
        place.plan = tune_and_prune(
            make_job(setting, model, NullCheckpointStore(), watch, plan=dense_plan(setting.sites))
        )
        merge_adapters(model)
        self._synchronize()
        place.seconds, place.curve = time.monotonic() - started, watch.curve
        place.model = model.requires_grad_(False).eval()

    def _on_progress(self, task: str, done: int, total: int) -> None:
        """An evaluation has come so far."""
        self.raise_if_interrupted()
        if not self.concurrent:
            self.context.console.evaluation_progress(task, done, total)

    def _synchronize(self) -> None:
        """What was launched on this stream is done: seconds count, and other streams may read."""
        if self.context.device.type == "cuda":
            torch.cuda.current_stream(self.context.device).synchronize()


def build_calibration(context: RunContext, model: Any) -> Calibration:
    """The batches of the search that a baseline may look at."""
    config, pad = context.config, pad_token_id(context.tokenizer)
    stream = BatchStream(
        context.encoded["search"].examples, config.search.batch_size, derive_seed(config.seed, "search")
    )
    batches = [
        collate(part, pad)
        for step in range(config.search.init_batches or CALIBRATION_BATCHES)
        for part in micro_batches(stream.batch_at(step), config.train.micro_tokens)
    ]
    return Calibration(model, context.sites, tuple(batches), config.seed, context.constraints.limits)
