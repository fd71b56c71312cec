"""A whole comparison: every cell run once and saved as a file, then one table and one page of all of them."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import sdpa_kernel

from prunetune.compare.cell import CellRunner, Interrupted, sites_of_cell
from prunetune.compare.grid import Cell, CellStore, Grid, best_learning_rate, cell_header, grid_from_config
from prunetune.compare.kept_models import KeptModels
from prunetune.compare.markdown import render_markdown
from prunetune.compare.methods import DENSE, Method, apply_overrides, resolve_methods
from prunetune.compare.page import write_page
from prunetune.compare.rivals import prepare_rivals, with_comparable_losses
from prunetune.compare.table import aggregate, smallest_file
from prunetune.config.recipe import RunConfig
from prunetune.errors import ConfigError, LimitBroken, PrunetuneError
from prunetune.evaluation.scoring_mode import SDPA_BACKENDS
from prunetune.export.gguf.tensors import MIXES, require_library
from prunetune.export.quantize import SCHEMES, require_scheme
from prunetune.model.loading import load_meta_model, pick_device
from prunetune.pipeline.plan_constraints import make_plan_constraints
from prunetune.pipeline.prepare import Console, RunContext, prepare, resolve_auto
from prunetune.pipeline.recording import record_origin
from prunetune.runs.folder import CHANGEABLE_ON_RESUME, run_lock, write_recipe
from prunetune.search.select import select
from prunetune.utils import environment
from prunetune.utils.console import make_console
from prunetune.utils.determinism import deterministic
from prunetune.utils.failures import is_gpu_fault
from prunetune.utils.files import require_disk_space, write_text
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.redaction import SHOW_ALL
from prunetune.utils.threads import CAPTURE_LOCK

log = logging.getLogger(__name__)

# With --resume a comparison may get more cells: a cell's file holds everything that defines it.
EXTENDABLE_OPTIONS = CHANGEABLE_ON_RESUME | {
    f"compare.{name}"
    for name in (
        "methods", "help", "keeps", "seeds", "learning_rates", "variants", "recipes", "rivals", "jobs", "keep_best",
        "within", "measure",
    )
}  # fmt: skip


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
    if config.budget.has_quality:
        raise ConfigError("budget.quality is found by a run, and a comparison fixes sizes: name them in compare.keeps")
    if config.budget.vocab != "off":
        raise ConfigError(
            "budget.vocab: all methods of a comparison prune one model with one vocabulary: leave it out, or name the "
            "base/ folder of a run with budget.vocab as model"
        )
    if config.compare.keeps and config.budget.amounts():
        raise ConfigError(
            "compare.keeps are shares of parameters, and budget names another amount: leave one of the two out"
        )
    if config.compare.keep_best and not any(method.name == DENSE for method in methods):
        raise ConfigError("compare.keep_best needs a dense tuned model to be as good as: add dense to compare.methods")
    for format in config.compare.formats:
        if format in SCHEMES:
            require_scheme(format)
        elif format in MIXES:
            require_library(format)
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
            comparisons = [_Comparison(context, methods, grid, store)]
            comparisons += [_Comparison(rival, [method], grid, store) for method, rival in rivals]
            _check_disk_space(comparisons)
            for comparison in comparisons:
                comparison.run()
            _write_results(comparisons)
            if config.compare.keep_best or config.compare.measure:
                _finish_models(comparisons)
    return _write_results(comparisons)


def _validate_before_start(context: RunContext, methods: Sequence[Method], grid: Grid) -> None:
    """Raises `PlanError` for a budget that no plan of a method meets, and `ConfigError` for options that clash."""
    meta_model = load_meta_model(context.config.model, trust_remote_code=context.config.trust_remote_code)
    jobs = concurrent_jobs(context)
    for method in methods:
        for cell in grid.cells(method, grid.learning_rate_trials(method)[0].learning_rate):
            config = cell.config(context.config)
            if jobs > 1 and (config.lora.dropout or context.config.lora.dropout):  # its own, or its teacher's
                raise ConfigError(
                    f"compare.jobs {jobs} with lora.dropout ({method.name}): concurrent cells draw from one random "
                    "generator, so results would not repeat; set compare.jobs 1 or lora.dropout 0"
                )
            sites = sites_of_cell(context, config, meta_model)
            constraints = make_plan_constraints(config, sites, meta_model.config, context.constraints)
            select({site.name: torch.zeros(site.units) for site in sites}, sites, cell.keep, constraints)


def _check_disk_space(comparisons: Sequence[_Comparison]) -> None:
    """Say what `models/` will hold until the end, if anything; raises `RunFolderError` where the disk cannot."""
    compare, path = comparisons[0].context.config.compare, comparisons[0].context.folder.path
    if not (compare.keep_best or compare.measure):
        return
    copies = 2 + len(compare.formats) if compare.measure else 1  # weights; their run folder and exports, to be timed
    grid, needed, count = comparisons[0].grid, 0, 0
    for comparison in comparisons:
        models = len(comparison.methods) * (len(grid.keeps) + len(grid.learning_rates) - 1)
        count += models
        needed += models * copies * comparison.context.dense_params * comparison.context.dtype.itemsize
    require_disk_space(path, needed)
    log.info("models/ holds up to %d models, %.1f GB, until the comparison ends", count, needed / 1e9)


def _finish_models(comparisons: Sequence[_Comparison]) -> None:
    """Keep the winner and time all models, as the recipe asks, unless that is done; then free the disk.

    Cells whose weights are gone, as a finished comparison was resumed with more to do, are trained again.
    """
    context = comparisons[0].context
    models, compare = KeptModels(context.folder.path), context.config.compare
    of_cell = {cell.name: (comparison, cell) for comparison in comparisons for cell in comparison.cells()}
    while True:
        table = _make_table(comparisons)
        rows = sorted((row for row in table["rows"] if row["cell"]), key=lambda row: bool(row["method"] != DENSE))
        winner = smallest_file(table) if compare.keep_best else None
        is_timed = not compare.measure or {row["cell"] for row in rows} <= models.speeds().keys()
        needed = ([] if is_timed else rows) + ([winner] if winner else [])
        gone = [cell for cell in {row["cell"].partition("+")[0]: None for row in needed} if not models.has(cell)]
        if not gone:
            break
        log.info("trained again, as their weights are not kept: %s", ", ".join(gone))
        for name in gone:
            comparison, cell = of_cell[name]
            comparison.run_again(cell)

    def context_of(name: str) -> RunContext:
        comparison, cell = of_cell[name]
        return comparison.new_runner().cell_context(cell)

    if winner:
        try:
            models.keep(winner, context_of)
        except PrunetuneError as error:
            log.warning("best/: %s", error)
    if not is_timed:
        models.measure(list({row["cell"]: row for row in rows}.values()), context_of)
    shutil.rmtree(models.path / "models", ignore_errors=True)


def _make_table(comparisons: Sequence[_Comparison]) -> JsonObject:
    """The table of all cells that have a file."""
    cells = [cell for comparison in comparisons for cell in comparison.cells()]
    rates = {name: rate for comparison in comparisons for name, rate in comparison.rates().items()}
    store, config = comparisons[0].store, comparisons[0].context.config
    return aggregate(with_comparable_losses(store.load_all(cells)), rates, config)


def _write_results(comparisons: Sequence[_Comparison]) -> Path:
    """Write comparison.json, table.md and comparison.html from the cells' files; returns the folder."""
    path = comparisons[0].context.folder.path
    comparison = KeptModels(path).add_to(_make_table(comparisons))
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

    def run(self) -> None:
        """Run all cells that are not done."""
        dense = [method for method in self.methods if method.is_dense and not method.equal_help]
        others = [method for method in self.methods if method not in dense]
        runner = self.new_runner()
        jobs = concurrent_jobs(self.context)
        # Every evaluation sets and resets the process's choice of attention kernels: here, to what it is already.
        with sdpa_kernel(SDPA_BACKENDS):
            self._run_missing_cells(runner, self._trials(dense), jobs=jobs, needs_valid_nll=True)
            self._run_missing_cells(runner, self._cells(dense), jobs=jobs)
            rate = self.new_runner().dense_learning_rate
            runner.select_teachers(rate, is_needed=any(self._has_dense_teacher(method) for method in others))
            self._run_missing_cells(runner, self._trials(others), jobs=jobs, needs_valid_nll=True)
            by_seed = sorted(self._cells(others), key=lambda cell: self.grid.seeds.index(cell.seed))
            self._run_missing_cells(runner, by_seed, jobs=jobs)  # an interrupted comparison has whole seeds

    def cells(self) -> list[Cell]:
        """The cells that belong in the table, once all trials of learning rates are done."""
        return list({cell.name: cell for cell in (*self._trials(self.methods), *self._cells(self.methods))}.values())

    def rates(self) -> dict[str, float]:
        """Each method's learning rate."""
        return {method.name: self._rate(method) for method in self.methods}

    def new_runner(self) -> CellRunner:
        """A runner whose teacher is tuned with the rate of the dense method, as far as that is chosen."""
        rate = self.context.config.train.learning_rate
        rate = rate if rate in self.grid.learning_rates else self.grid.learning_rates[0]
        rate = next((self._rate(method) for method in self.methods if method.name == DENSE), rate)
        return CellRunner(self.context, rate)

    def run_again(self, cell: Cell) -> None:
        """Train and score a cell once more, alone, and keep its model."""
        runner, trials = self.new_runner(), {trial.name for trial in self._trials([cell.method])}
        runner.load_model(concurrent=False)
        self._run_cell(runner, cell, needs_valid_nll=cell.name in trials, keeps_model=True)

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

    def _run_cell(self, runner: CellRunner, cell: Cell, needs_valid_nll: bool, *, keeps_model: bool = False) -> bool:
        """Run a cell and save its result or its error; returns whether it ran out of memory.

        Raises the error of a broken GPU: no cell is to blame for it.
        """
        out_of_memory, config = False, self.context.config
        redaction, compare = config.report.redaction, config.compare
        keeps_model |= (compare.keep_best or compare.measure) and cell.seed == self.grid.seeds[0]
        try:
            keep_in = KeptModels(self.store.folder) if keeps_model else None
            result = runner.run_cell(cell, needs_valid_nll=needs_valid_nll, keep_in=keep_in)
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
