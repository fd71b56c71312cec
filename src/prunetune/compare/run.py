"""A whole comparison: every cell run once and saved as a file, then one table and one page of all of them."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import sdpa_kernel

from prunetune.compare.cell import CellRunner, Interrupted
from prunetune.compare.grid import Cell, CellStore, Grid, best_learning_rate, cell_header, grid_from_config
from prunetune.compare.markdown import render_markdown
from prunetune.compare.methods import DENSE, Method, apply_overrides, resolve_methods
from prunetune.compare.page import write_page
from prunetune.compare.rivals import prepare_rivals, with_comparable_losses
from prunetune.compare.table import aggregate
from prunetune.config.recipe import RunConfig
from prunetune.errors import ConfigError, LimitBroken, PrunetuneError
from prunetune.evaluation.scoring_mode import SDPA_BACKENDS
from prunetune.model.loading import load_config, pick_device
from prunetune.pipeline.plan_constraints import make_plan_constraints
from prunetune.pipeline.prepare import Console, RunContext, prepare, resolve_auto
from prunetune.pipeline.recording import record_origin
from prunetune.runs.folder import CHANGEABLE_ON_RESUME, run_lock, write_recipe
from prunetune.search.select import select
from prunetune.utils import environment
from prunetune.utils.console import make_console
from prunetune.utils.determinism import deterministic
from prunetune.utils.failures import is_gpu_fault
from prunetune.utils.files import write_text
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.redaction import SHOW_ALL
from prunetune.utils.threads import CAPTURE_LOCK

log = logging.getLogger(__name__)

# With --resume a comparison may get more cells: a cell's file holds everything that defines it.
EXTENDABLE_OPTIONS = CHANGEABLE_ON_RESUME | {
    f"compare.{name}"
    for name in ("methods", "help", "keeps", "seeds", "learning_rates", "variants", "recipes", "rivals", "jobs")
}


def compare(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Run every cell that has no file yet, then write the table and the page; returns the folder.

    Raises a `PrunetuneError` for a mistake of the user, before anything is written if it can be known so early. A cell
    that fails is saved with its error, and the others still run; raises `LimitBroken` if every cell failed.
    """
    if config.budget.sizes:
        raise ConfigError("budget.keep names several sizes of one run: name budgets to compare in compare.keeps")
    if not config.train.learning_rate:
        raise ConfigError(
            "train.learning_rate auto is of one run: name rates to choose from in compare.learning_rates, such as "
            "5e-4, 1e-3, 2e-3, and a number in train.learning_rate"
        )
    methods = resolve_methods(config)
    if config.budget.quality:
        raise ConfigError("budget.quality is found by a run, and a comparison fixes sizes: name them in compare.keeps")
    if config.compare.keeps and config.budget.amounts():
        raise ConfigError(
            "compare.keeps are shares of parameters, and budget names another amount: leave one of the two out"
        )
    console = console or make_console(config.train.log_every)
    with closing(console), deterministic(config.deterministic, pick_device(config.device)):
        context = prepare(config, resume=resume, console=console, changeable=EXTENDABLE_OPTIONS)
        context = replace(context, config=context.reported_config)  # cells change it, and each resolves its own `auto`
        grid = grid_from_config(context.config)  # a budget of another kind has become a share of the parameters
        _validate_before_start(context, methods, grid)
        rivals = prepare_rivals(config, console)
        context.folder.path.mkdir(parents=True, exist_ok=True)
        with run_lock(context.folder):
            # First: with it, the folder can be resumed.
            write_recipe(context.folder, context.recipe)
            (context.folder.path / "cells").mkdir(exist_ok=True)
            record_origin(context, command)
            store = CellStore(context.folder.path)
            cells, rates = _Comparison(context, methods, grid, store).run()
            for method, rival in rivals:
                more_cells, more_rates = _Comparison(rival, [method], grid, store).run()
                cells, rates = cells + more_cells, rates | more_rates
    return _write_results(context, cells, rates)


def _validate_before_start(context: RunContext, methods: Sequence[Method], grid: Grid) -> None:
    """Raises `PlanError` for a budget that no plan of a method meets, and `ConfigError` for options that clash."""
    model_config = load_config(context.config.model, trust_remote_code=context.config.trust_remote_code)
    scores = {site.name: torch.zeros(site.units) for site in context.sites}
    jobs = concurrent_jobs(context)
    for method in methods:
        for cell in grid.cells(method, grid.learning_rate_trials(method)[0].learning_rate):
            config = cell.config(context.config)
            if jobs > 1 and (config.lora.dropout or context.config.lora.dropout):  # its own, or its teacher's
                raise ConfigError(
                    f"compare.jobs {jobs} with lora.dropout ({method.name}): concurrent cells draw from one random "
                    "generator, so results would not repeat; set compare.jobs 1 or lora.dropout 0"
                )
            constraints = make_plan_constraints(config, context.sites, model_config, context.constraints.allows_groups)
            select(scores, context.sites, cell.keep, replace(constraints, limits=context.constraints.limits))


def _write_results(context: RunContext, cells: Sequence[Cell], rates: Mapping[str, float]) -> Path:
    """Write comparison.json, table.md and comparison.html from the cells' files; returns the folder."""
    path = context.folder.path
    comparison = aggregate(with_comparable_losses(CellStore(path).load_all(cells)), rates, context.config)
    write_text(path / "comparison.json", json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    write_text(path / "table.md", render_markdown(comparison))
    write_page(path)
    if not any(row["seeds"] for row in comparison["rows"]):
        raise LimitBroken(f"every cell of {path} failed, the first with: {comparison['errors'][0]['error']}")
    return path


@dataclass
class _Comparison:
    """The order of work: dense models first, as they are teachers; then trials of learning rates; then all others."""

    context: RunContext
    methods: Sequence[Method]
    grid: Grid
    store: CellStore
    commit: str = field(default_factory=environment.installed_commit)

    def run(self) -> tuple[list[Cell], dict[str, float]]:
        """Run all cells; returns those that belong in the table, and each method's learning rate."""
        dense = [method for method in self.methods if method.is_dense and not method.equal_help]
        others = [method for method in self.methods if method not in dense]
        rate = self.context.config.train.learning_rate
        runner = CellRunner(self.context, rate if rate in self.grid.learning_rates else self.grid.learning_rates[0])
        jobs = concurrent_jobs(self.context)
        # Every evaluation sets and resets the process's choice of attention kernels: here, to what it is already.
        with sdpa_kernel(SDPA_BACKENDS):
            self._run_missing_cells(runner, self._trials(dense), jobs=jobs, needs_valid_nll=True)
            self._run_missing_cells(runner, self._cells(dense), jobs=jobs)
            rate = next((self._rate(method) for method in dense if method.name == DENSE), runner.dense_learning_rate)
            runner.select_teachers(rate, is_needed=any(self._has_dense_teacher(method) for method in others))
            self._run_missing_cells(runner, self._trials(others), jobs=jobs, needs_valid_nll=True)
            by_seed = sorted(self._cells(others), key=lambda cell: self.grid.seeds.index(cell.seed))
            self._run_missing_cells(runner, by_seed, jobs=jobs)  # an interrupted comparison has whole seeds
        cells = {cell.name: cell for cell in (*self._trials(self.methods), *self._cells(self.methods))}
        return list(cells.values()), {method.name: self._rate(method) for method in self.methods}

    def _has_dense_teacher(self, method: Method) -> bool:
        config = resolve_auto(apply_overrides(self.context.config, method.overrides), self.context.sites)
        return method.equal_help and config.distill.teacher == "dense"

    def _trials(self, methods: Sequence[Method]) -> list[Cell]:
        """The cells that choose a learning rate, of methods that have several to choose from."""
        trials_by_method = [self.grid.learning_rate_trials(method) for method in methods]
        return [cell for trials in trials_by_method if len(trials) > 1 for cell in trials]

    def _cells(self, methods: Sequence[Method]) -> list[Cell]:
        return [cell for method in methods for cell in self.grid.cells(method, self._rate(method))]

    def _rate(self, method: Method) -> float:
        trials = self.grid.learning_rate_trials(method)
        if len(trials) == 1:
            return trials[0].learning_rate
        return best_learning_rate(self.store.load_all(trials)) or trials[0].learning_rate

    def _run_missing_cells(
        self, runner: CellRunner, cells: Sequence[Cell], *, jobs: int, needs_valid_nll: bool = False
    ) -> None:
        """Run the cells that are not done, `jobs` at once; one that ran out of memory among others is retried alone.

        Ctrl-C ends the cells that are running.
        """
        missing = [cell for cell in cells if not self._is_done(runner, cell, needs_valid_nll)]
        if not missing:
            return
        runner.load_model(concurrent=jobs > 1)
        if jobs == 1:
            for cell in missing:
                self._run_cell(runner, cell, needs_valid_nll)
            return
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {cell.name: pool.submit(self._run_cell, runner, cell, needs_valid_nll) for cell in missing}
                out_of_memory = [cell for cell in missing if futures[cell.name].result()]
            except BaseException:
                runner.stop_event.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if out_of_memory:
            runner.load_model(concurrent=False)
        for cell in out_of_memory:
            log.warning("%s: out of memory among concurrent cells; running it again, alone", cell.name)
            self._run_cell(runner, cell, needs_valid_nll)

    def _is_done(self, runner: CellRunner, cell: Cell, needs_valid_nll: bool) -> bool:
        """Whether a cell's file is there and used this teacher: more learning rates may have chosen another one."""
        teacher_rate = (self.store.load(cell) or {}).get("teacher_rate", runner.dense_learning_rate)
        return self.store.is_done(cell, needs_valid_nll=needs_valid_nll) and teacher_rate == runner.dense_learning_rate

    def _run_cell(self, runner: CellRunner, cell: Cell, needs_valid_nll: bool) -> bool:
        """Run a cell and save its result or its error; returns whether it ran out of memory.

        Raises the error of a broken GPU: no cell is to blame for it.
        """
        out_of_memory, redaction = False, self.context.config.report.redaction
        try:
            result = runner.run_cell(cell, needs_valid_nll=needs_valid_nll)
        except Interrupted:
            return False
        except Exception as error:
            if is_gpu_fault(error):
                raise
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if not isinstance(error, PrunetuneError):
                log.error("%s failed", cell.name, exc_info=redaction == SHOW_ALL)
            result = {**cell_header(cell), "error": redaction.message(error)}
        result["made"] = {"date": date.today().isoformat(), "commit": self.commit}
        with CAPTURE_LOCK:  # CUDA graphs are freed while no thread captures one
            gc.collect()
        self.store.save(cell, result)
        log.info("%s", summary_line(result))
        return out_of_memory


def concurrent_jobs(context: RunContext) -> int:
    """How many cells run at once: a GPU waits for small models' launches, a CPU has no core to spare."""
    return context.config.compare.jobs if context.device.type == "cuda" else 1


def summary_line(result: JsonObject) -> str:
    """One line for the log: a cell's scores, or why it failed."""
    if "error" in result:
        return f"{result['cell']}: failed: {result['error']}"
    values: JsonObject = {**result["headline"], "valid nll": result.get("valid_nll")}
    scores = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)
    return f"{result['cell']}: kept {100 * result['kept']:.1f}%, {scores}, {result['train_seconds']:.0f} s"
