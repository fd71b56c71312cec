"""A whole comparison: every cell made once, its file kept, and all of them told in one table and one page."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import sdpa_kernel

from prunetune.compare.cell import CellRunner, Interrupted
from prunetune.compare.grid import Cell, CellResult, CellStore, Grid, best_learning_rate, cell_header, grid_from_config
from prunetune.compare.markdown import render_markdown
from prunetune.compare.methods import DENSE, Method, apply_overrides, resolve_methods
from prunetune.compare.page import write_page
from prunetune.compare.table import aggregate
from prunetune.config.recipe import RunConfig, to_mapping
from prunetune.errors import ConfigError, LimitBroken, PrunetuneError, gpu_fault_message
from prunetune.evaluation.score_records import SDPA_BACKENDS
from prunetune.model.loading import load_config, pick_device
from prunetune.pipeline.prepare import Console, RunContext, data_and_model_facts, make_plan_constraints, prepare
from prunetune.runs.folder import CHANGEABLE_ON_RESUME, run_lock
from prunetune.search.select import select
from prunetune.train.cuda_graphs import CAPTURE_LOCK
from prunetune.train.teacher import resolve_auto
from prunetune.utils import environment
from prunetune.utils.console import make_console
from prunetune.utils.determinism import deterministic
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)

# A comparison may grow: a cell's file says all of what it is.
EXTENDABLE_OPTIONS = CHANGEABLE_ON_RESUME | {
    f"compare.{name}" for name in ("methods", "keeps", "seeds", "learning_rates", "variants", "jobs")
}


def compare(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Make every cell that is not there yet, then the table and the page; returns the folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known; what goes
    wrong in one cell stands in its file. `GateFailed` where every cell went wrong.
    """
    if config.budget.sizes:
        raise ConfigError("budget.keep names several sizes of one run: name budgets to compare in compare.keeps")
    methods = resolve_methods(config)
    if config.compare.keeps and config.budget.amounts():
        raise ConfigError(
            "compare.keeps are shares of parameters, and budget names another amount: leave one of the two out"
        )
    console = console or make_console(config.train.log_every)
    with closing(console), deterministic(config.deterministic, pick_device(config.device)):
        setting = prepare(config, resume=resume, console=console, changeable=EXTENDABLE_OPTIONS)
        grid = grid_from_config(setting.config)  # a budget of another kind has become a share of the parameters
        _validate_before_start(setting, methods, grid)
        setting.folder.path.mkdir(parents=True, exist_ok=True)
        with run_lock(setting.folder):
            _create_folder(setting, config, command)
            cells, rates = _Comparison(setting, methods, grid, CellStore(setting.folder.path)).run()
    return _finish(setting, cells, rates)


def _validate_before_start(setting: RunContext, methods: Sequence[Method], grid: Grid) -> None:
    """Raises `PlanError` for a budget that no plan of a method meets, and `ConfigError` for options that clash."""
    model_config = load_config(setting.config.model, trust_remote_code=setting.config.trust_remote_code)
    scores = {site.name: torch.zeros(site.units) for site in setting.sites}
    for method in methods:
        for cell in grid.cells(method, grid.learning_rate_trials(method)[0].learning_rate):
            config = cell.config(setting.config)
            if concurrent_jobs(setting) > 1 and (
                config.lora.dropout or setting.config.lora.dropout
            ):  # or its teacher's
                raise ConfigError(
                    f"compare.jobs {concurrent_jobs(setting)} with lora.dropout ({method.name}): cells at once draw from one "
                    "generator, and would not come out the same again; set compare.jobs 1 or lora.dropout 0"
                )
            shape = make_plan_constraints(config, setting.sites, model_config, setting.constraints.allows_groups)
            select(scores, setting.sites, cell.keep, replace(shape, limits=setting.constraints.limits))


def _create_folder(setting: RunContext, config: RunConfig, command: str) -> None:
    """Make the folder and write the recipe."""
    path = setting.folder.path
    (path / "cells").mkdir(parents=True, exist_ok=True)
    write_text(path / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
    facts = environment.describe_environment(setting.device, setting.dtype, command, setting.config.seed)
    setting.folder.update_manifest(**facts, **data_and_model_facts(setting))


def _finish(setting: RunContext, cells: Sequence[Cell], rates: Mapping[str, float]) -> Path:
    """Table, page and aggregate, from the files alone."""
    path, shelf = setting.folder.path, CellStore(setting.folder.path)
    found = aggregate(shelf.load_all(cells), rates, setting.config)
    write_text(path / "comparison.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text(path / "table.md", render_markdown(found))
    write_page(path)
    if not any(row["seeds"] for row in found["rows"]):
        raise LimitBroken(f"every cell of {path} failed, the first so: {found['errors'][0]['error']}")
    return path


@dataclass
class _Comparison:
    """The order of work: dense models first, for they teach; then the learning rates; then all other cells."""

    context: RunContext
    methods: Sequence[Method]
    grid: Grid
    store: CellStore

    def run(self) -> tuple[list[Cell], dict[str, float]]:
        """All cells are there, or their errors; returns those the table is about, and each method's learning rate."""
        dense = [method for method in self.methods if method.is_dense]
        others = [method for method in self.methods if not method.is_dense]
        rate = self.context.config.train.learning_rate
        shop = CellRunner(self.context, rate if rate in self.grid.learning_rates else self.grid.learning_rates[0])
        jobs = concurrent_jobs(self.context)
        with fixed_attention_kernels():
            self._run_missing_cells(shop, self._trials(dense), jobs=jobs, needs_valid_nll=True)
            self._run_missing_cells(shop, self._cells(dense), jobs=jobs)
            rate = next((self._rate(method) for method in dense if method.name == DENSE), shop.dense_learning_rate)
            shop.select_teachers(rate, wanted=any(self._has_dense_teacher(method) for method in others))
            self._run_missing_cells(shop, self._trials(others), jobs=jobs, needs_valid_nll=True)
            self._run_missing_cells(shop, sort_by_seed(self._cells(others)), jobs=jobs)
        cells = {cell.name: cell for cell in (*self._trials(self.methods), *self._cells(self.methods))}
        return list(cells.values()), {method.name: self._rate(method) for method in self.methods}

    def _has_dense_teacher(self, method: Method) -> bool:
        config = resolve_auto(apply_overrides(self.context.config, method.overrides), self.context.sites)
        return method.uses_teacher and config.distill.teacher == "dense"

    def _trials(self, methods: Sequence[Method]) -> list[Cell]:
        """The cells that learning rates are chosen by, of methods that have several."""
        trials = [self.grid.learning_rate_trials(method) for method in methods]
        return [cell for cells in trials if len(cells) > 1 for cell in cells]

    def _cells(self, methods: Sequence[Method]) -> list[Cell]:
        return [cell for method in methods for cell in self.grid.cells(method, self._rate(method))]

    def _rate(self, method: Method) -> float:
        trials = self.grid.learning_rate_trials(method)
        if len(trials) == 1:
            return trials[0].learning_rate
        return best_learning_rate(self.store.load_all(trials)) or trials[0].learning_rate

    def _run_missing_cells(
        self, shop: CellRunner, cells: Sequence[Cell], *, jobs: int, needs_valid_nll: bool = False
    ) -> None:
        """Make those that are not there, `jobs` at once, and alone where memory ran out beside others.

        Ctrl-C ends those that run.
        """
        left = [cell for cell in cells if not self._is_done(shop, cell, needs_valid_nll)]
        if not left:
            return
        shop.load_model(concurrent=jobs > 1)
        if jobs == 1:
            for cell in left:
                self._run_cell(shop, cell, needs_valid_nll)
            return
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {cell.name: pool.submit(self._run_cell, shop, cell, needs_valid_nll) for cell in left}
                again = [cell for cell in left if futures[cell.name].result()]
            except BaseException:
                shop.stop_event.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for cell in again:
            log.warning("%s: out of memory beside others, so it is made once more, alone", cell.name)
            self._run_cell(shop, cell, needs_valid_nll)

    def _is_done(self, shop: CellRunner, cell: Cell, needs_valid_nll: bool) -> bool:
        """Whether a cell is there, taught by this teacher: with more learning rates, dense may be another."""
        result = self.store.load(cell) or {}
        return self.store.is_done(cell, needs_valid_nll=needs_valid_nll) and result.get("teacher_rate") in (
            None,
            shop.dense_learning_rate,
        )

    def _run_cell(self, shop: CellRunner, cell: Cell, needs_valid_nll: bool) -> bool:
        """Make a cell and keep it, or what went wrong; whether that was a lack of memory.

        Raises the error of a GPU that gave up.
        """
        lacks = False
        try:
            result = shop.run_cell(cell, needs_valid_nll=needs_valid_nll)
        except Interrupted:
            return False
        except PrunetuneError as failed:
            result = {**cell_header(cell), "error": str(failed)}
        except Exception as failed:
            if gpu_fault_message(failed):  # of all cells that run: none of them is to blame
                raise
            lacks = isinstance(failed, torch.OutOfMemoryError)
            log.exception("%s failed", cell.name)
            result = {**cell_header(cell), "error": f"{type(failed).__name__}: {' '.join(str(failed).split())[:500]}"}
        with CAPTURE_LOCK:  # graphs are let go while none is made
            gc.collect()
        self.store.save(cell, result)
        log.info("%s", summary_line(result))
        return lacks


def concurrent_jobs(context: RunContext) -> int:
    """Cells at once: a GPU waits for small models' launches, a CPU has no core to spare."""
    return context.config.compare.jobs if context.device.type == "cuda" else 1


def sort_by_seed(cells: Iterable[Cell]) -> list[Cell]:
    """Seed by seed, so that a comparison that is stopped has whole seeds."""
    listed = list(cells)
    seeds = list(dict.fromkeys(cell.seed for cell in listed))
    return sorted(listed, key=lambda cell: seeds.index(cell.seed))


@contextmanager
def fixed_attention_kernels() -> Iterator[None]:
    """Every evaluation sets and resets the process's choice of attention kernels: here, to what it is already."""
    with sdpa_kernel(SDPA_BACKENDS):
        yield


def summary_line(result: CellResult) -> str:
    """A cell in a line of the log."""
    if "error" in result:
        return f"{result['cell']}: failed: {result['error']}"
    named: dict[str, Any] = {**result["headline"], "valid nll": result.get("valid_nll")}
    scores = ", ".join(f"{name} {value:.3f}" for name, value in named.items() if value is not None)
    return f"{result['cell']}: kept {100 * result['kept']:.1f}%, {scores}, {result['train_seconds']:.0f} s"
