"""One cell of a comparison: a copy of the dense model is tuned, pruned or both, and scored."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunetune.baselines import BASELINES, Calibration
from prunetune.compare.grid import Cell, cell_header
from prunetune.compare.kept_models import KeptModels
from prunetune.compare.methods import DENSE, apply_overrides, built_in_methods
from prunetune.compare.scoring import score_model
from prunetune.config.recipe import DistillConfig, RunConfig
from prunetune.data.batches import BatchStream, collate, micro_batches
from prunetune.errors import ConfigError
from prunetune.evaluation.scoring_mode import context_length
from prunetune.export.gguf.tensors import rounded_as_stored
from prunetune.export.quantize import SCHEMES, rounded_as_quantized
from prunetune.model.loading import load_meta_model
from prunetune.pipeline.plan_constraints import make_plan_constraints
from prunetune.pipeline.prepare import RunContext, resolve_auto, with_distill_texts
from prunetune.pipeline.stages import TeacherFactory, make_job, plain_lora_config
from prunetune.plan import Plan
from prunetune.pruning.cut import merge_adapters
from prunetune.pruning.sites import find_sites
from prunetune.pruning.teacher_student_weights import unshare_weights
from prunetune.pruning.units import Site, dense_plan
from prunetune.search.plan_rules import budget_share
from prunetune.train.checkpoints import NullCheckpointStore, TrainingState
from prunetune.train.cuda_graphs import own_stream
from prunetune.train.forward import Teacher, base_teacher
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.passes import Passes, build_passes
from prunetune.train.step_guard import StepGuard
from prunetune.utils import environment
from prunetune.utils.determinism import derive_seed
from prunetune.utils.json_lines import JsonObject, finite_or_none


class Interrupted(Exception):
    """The comparison was interrupted while this cell was running."""


@dataclass
class TunedDenseModel:
    """The dense model tuned with one seed and learning rate; the first thread that needs it trains it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Any = None
    plan: Plan | None = None
    seconds: float = 0.0
    curve: list[JsonObject] = field(default_factory=list)


class NewestState:
    """The newest state saved, in CPU memory: a cell is not resumed."""

    state: TrainingState | None = None

    def save(self, state: TrainingState) -> None:
        """Keep a copy of the state."""
        tensors = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for group, named in state.tensors.items()
        }
        self.state = replace(state, tensors=tensors)

    def latest(self) -> TrainingState | None:
        """The state."""
        return self.state


@dataclass
class CellMonitor:
    """Records the validation curve, shows steps if one cell runs at a time, and stops an interrupted cell."""

    runner: CellRunner
    curve: list[JsonObject] = field(default_factory=list)

    def step(self, record: JsonObject) -> None:
        """Take the record of a tuning step."""
        self.runner.raise_if_interrupted()
        if not self.runner.concurrent:
            self.runner.context.console.step(record)

    def validation(self, record: JsonObject) -> None:
        """Take the record of a validation."""
        self.curve.append({"step": record["step"], "kept": record["kept"], "nll": finite_or_none(record["nll"])})
        if not self.runner.concurrent:
            self.runner.context.console.validation(record)


def sites_of_cell(context: RunContext, config: RunConfig, model: Any) -> tuple[Site, ...]:
    """The sites of the comparison, or those of other units that a variant prunes.

    Raises `ConfigError` if its budget is of another kind, whose prices are of the comparison's units.
    """
    if config.budget.units == context.config.budget.units:
        return context.sites
    if context.constraints.limits:
        raise ConfigError(
            "a variant prunes other budget.units, and the budget is no share of parameters: name budget.keep instead"
        )
    return find_sites(model, config.budget.units)


@dataclass
class CellRunner:
    """Runs cells, which share data, tokens, the dense model, and the dense tuned models that are teachers."""

    context: RunContext
    dense_learning_rate: float  # of the dense tuned model that is the teacher
    model: Any = None  # dense, as loaded; only ever copied
    concurrent: bool = False  # several cells run at once
    stop_event: threading.Event = field(default_factory=threading.Event)
    teachers: dict[tuple[int, float], TunedDenseModel] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread_local: threading.local = field(default_factory=threading.local)  # each thread's CUDA stream

    def load_model(self, *, concurrent: bool) -> None:
        """Load the dense model once, before any thread starts: loading changes settings of the whole process."""
        if self.model is None:
            self.context.console.stage("loading the model", 0)
            self.model = self.context.load_dense().model
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        self.concurrent = concurrent

    def select_teachers(self, rate: float, *, is_needed: bool) -> None:
        """Keep the dense models of this learning rate as teachers if that `is_needed`; free all others."""
        self.dense_learning_rate = rate
        self.teachers = {key: tuned for key, tuned in self.teachers.items() if is_needed and key[1] == rate}

    def run_cell(self, cell: Cell, *, needs_valid_nll: bool, keep_in: KeptModels | None = None) -> JsonObject:
        """Train and score a cell, and write its model if asked; returns its file's content. Raises what goes wrong."""
        with self._stream():
            context = self.cell_context(cell)
            if not self.concurrent:
                context.console.stage(cell.name, 0 if cell.method.kind == "untuned" else context.config.train.steps)
                if context.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(context.device)
            model, plan, facts = self._model(cell, context)
            if keep_in is not None:
                keep_in.save(cell.name, model, plan)
            peak = torch.cuda.max_memory_allocated(context.device) / 1e6 if context.device.type == "cuda" else None
            started = time.monotonic()
            scores = score_model(model, context, self._on_progress, needs_valid_nll=needs_valid_nll)
            formats = () if cell.method.kind == "two-stage" else context.config.compare.formats
            return {
                **cell_header(cell),
                **scores,
                "bytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
                "formats": {name: self._score_as_stored(model, context, name) for name in formats},
                "kept": budget_share(context.sites, plan.widths(), context.constraints),
                "widths": plan.widths(),
                **facts,
                "eval_seconds": time.monotonic() - started,
                "peak_mb": None if self.concurrent else peak,  # concurrent cells share the peak
                "crowded": self.concurrent,
                "device": environment.device_name(context.device),
                "dtype": str(context.dtype).removeprefix("torch."),
                "versions": environment.describe_environment(context.device, context.dtype, "", cell.seed)["versions"],
            }

    def _score_as_stored(self, model: Any, context: RunContext, format: str) -> JsonObject:
        """Scores of the model with the weights of an export in that format, and the bytes of these."""
        rounded, size = (rounded_as_quantized if format in SCHEMES else rounded_as_stored)(model, format)
        return {**score_model(rounded, context, self._on_progress, needs_valid_nll=False), "bytes": size}

    def raise_if_interrupted(self) -> None:
        """Raises `Interrupted` if the comparison has been interrupted."""
        if self.stop_event.is_set():
            raise Interrupted

    def _stream(self) -> AbstractContextManager[Any]:
        device = self.context.device
        if device.type != "cuda" or not self.concurrent:
            return nullcontext()
        if not hasattr(self.thread_local, "own_stream"):
            self.thread_local.own_stream = own_stream(device)
        own = self.thread_local.own_stream
        return nullcontext() if own is None else torch.cuda.stream(own.stream)

    def cell_context(self, cell: Cell) -> RunContext:
        """The context of one cell: data and tokens are shared, unless the cell names other texts for distillation."""
        config = cell.config(self.context.config)
        model = self.model or load_meta_model(config.model, trust_remote_code=config.trust_remote_code)
        sites = sites_of_cell(self.context, config, model)
        constraints = make_plan_constraints(config, sites, model.config, self.context.constraints)
        context = replace(self.context, config=config, sites=sites, constraints=constraints)
        if config.data.distill_texts and config.data.distill_texts != self.context.config.data.distill_texts:
            context = with_distill_texts(context, context_length(model))
        if not cell.method.equal_help:
            plain = plain_lora_config(context)  # a variant's own options win
            context = replace(plain, config=apply_overrides(plain.config, cell.method.overrides))
        return replace(context, config=resolve_auto(context.config, context.sites))

    # -- models ------------------------------------------------------------------------------------------------------

    def _model(self, cell: Cell, context: RunContext) -> tuple[Any, Plan, JsonObject]:
        """Train the cell's model; returns it with its plan, and the seconds and validation curve of the training."""
        facts: JsonObject
        if cell.method.kind == "untuned":
            facts = {"help": None, "train_seconds": 0.0, "teacher_seconds": 0.0, "curve": []}
            return copy.deepcopy(self.model), dense_plan(context.sites), facts
        if cell.method.kind == "dense" and not cell.method.overrides and not cell.method.equal_help:
            tuned = self.tuned_dense(cell.seed, cell.learning_rate)
            assert tuned.plan is not None
            # A copy: an evaluation must not hook a model that is a teacher in other threads.
            facts = {"help": describe_help(context, None), "train_seconds": tuned.seconds, "teacher_seconds": 0.0}
            return copy.deepcopy(tuned.model), tuned.plan, facts | {"curve": tuned.curve}
        make_teacher, teacher_seconds = self._teacher_factory(cell, context.config.distill)
        model, monitor, started = copy.deepcopy(self.model), CellMonitor(self), time.monotonic()
        teacher = make_teacher(model)
        make = partial(
            make_job, context, model, NullCheckpointStore(), monitor, teacher=teacher, good_checkpoints=NewestState()
        )
        plan = tune_and_prune(make(plan=self._plan(cell, context, make)))
        unshare_weights(model)  # a base teacher shares its memory
        merge_adapters(model)
        model.requires_grad_(False).to(context.dtype)  # as a checkpoint would hold it
        self._synchronize()
        train_seconds = time.monotonic() - started
        facts = {"help": describe_help(context, teacher), "train_seconds": train_seconds, "curve": monitor.curve}
        facts["teacher_seconds"] = teacher_seconds
        has_dense_teacher = teacher is not None and context.config.distill.teacher == "dense"
        return model, plan, facts | ({"teacher_rate": self.dense_learning_rate} if has_dense_teacher else {})

    def _plan(self, cell: Cell, context: RunContext, make: Callable[[], TrainingJob]) -> Plan | None:
        """The plan fixed before training, None if a search finds it; a baseline's compensation changes the model."""
        if cell.method.kind == "dense":
            return dense_plan(context.sites)
        if cell.method.kind != "two-stage":
            return None
        baseline, job = BASELINES[cell.method.baseline], make()
        passes = build_passes(job.model, job.sites, job.pad_id, job.config, job.teacher)
        calibration = build_calibration(context, job, passes)
        result = baseline(calibration)
        plan = result if isinstance(result, Plan) else calibration.select(result)
        if baseline.compensate is not None:
            baseline.compensate(calibration, plan)
        passes.reset_recordings()
        return plan

    def _teacher_factory(self, cell: Cell, distill: DistillConfig) -> tuple[TeacherFactory, float]:
        """What makes the cell's teacher from its model, and the seconds that the teacher's own tuning took."""
        if not cell.method.equal_help or distill.teacher == "none":
            return lambda _: None, 0.0
        if distill.teacher == "base":
            return lambda student: base_teacher(student, distill), 0.0
        tuned = self.tuned_dense(cell.seed, self.dense_learning_rate)
        # A copy: padded passes hook the teacher's head.
        model = copy.deepcopy(tuned.model).requires_grad_(False).eval()
        teacher = Teacher(model, share=distill.share)
        return lambda _: teacher, tuned.seconds

    def tuned_dense(self, seed: int, rate: float) -> TunedDenseModel:
        """The dense model tuned by the recipe, trained once for each seed and learning rate; only ever copied."""
        with self.lock:
            tuned = self.teachers.setdefault((seed, rate), TunedDenseModel())
        with tuned.lock:
            if tuned.model is None:
                self._tune_dense(tuned, seed, rate)
        return tuned

    def _tune_dense(self, tuned: TunedDenseModel, seed: int, rate: float) -> None:
        context = self.cell_context(Cell(built_in_methods()[DENSE], 1.0, seed, rate))
        model, monitor, started = copy.deepcopy(self.model), CellMonitor(self), time.monotonic()
        make = partial(make_job, context, model, NullCheckpointStore(), monitor, plan=dense_plan(context.sites))
        tuned.plan = tune_and_prune(make(good_checkpoints=NewestState()))
        merge_adapters(model)
        self._synchronize()
        tuned.seconds, tuned.curve = time.monotonic() - started, monitor.curve
        tuned.model = model.requires_grad_(False).eval()

    def _on_progress(self, task: str, done: int, total: int) -> None:
        """Show the progress of an evaluation."""
        self.raise_if_interrupted()
        if not self.concurrent:
            self.context.console.evaluation_progress(task, done, total)

    def _synchronize(self) -> None:
        """Wait for this CUDA stream: seconds are measured then, and other streams may read the weights."""
        if self.context.device.type == "cuda":
            torch.cuda.current_stream(self.context.device).synchronize()


def describe_help(context: RunContext, teacher: Teacher | None) -> str:
    """What a cell was tuned with: "dense teacher, texts, all weights, muon", or "no teacher, rank 32, adamw"."""
    config = context.config
    teacher_name = "no teacher" if teacher is None else f"{config.distill.teacher} teacher"
    texts = ["texts"] if teacher is not None and "texts" in context.encoded else []
    if config.train.weights == "all":
        return ", ".join([teacher_name, *texts, "all weights", "muon"])
    return ", ".join([teacher_name, *texts, f"rank {config.lora.rank}", config.train.optimizer])


def build_calibration(context: RunContext, job: TrainingJob, passes: Passes) -> Calibration:
    """What a baseline is given: the first batches of the search, without texts, and the training loss on all of it."""
    config, examples = job.config, context.encoded["search"].examples
    stream = BatchStream(examples, config.search.batch_size, derive_seed(config.seed, "search"))
    guard = StepGuard(passes, config.train.max_skipped, config.train.checkpointing != "off")

    def gate_gradients(step: int, gates: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        batch = job.search_stream.batch_at(step)
        with torch.enable_grad():
            return guard.retry_smaller(batch, lambda: passes.gate_gradients(batch, gates)[1], lambda: None)

    calibration = Calibration(job.model, job.sites, (), config, job.constraints, gate_gradients)
    batches = [
        collate(micro_batch, job.pad_id)
        for step in range(calibration.num_batches)
        for micro_batch in micro_batches(stream.batch_at(step), config.train.micro_tokens)
    ]
    return replace(calibration, batches=tuple(batches))
