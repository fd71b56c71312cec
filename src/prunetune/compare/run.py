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

from prunetune.compare.cell import Stopped, Workshop
from prunetune.compare.grid import Cell, Grid, Result, Shelf, about, best_rate, grid_of
from prunetune.compare.markdown import markdown
from prunetune.compare.methods import DENSE, Method, changed, methods_of
from prunetune.compare.page import write_page
from prunetune.compare.table import aggregate
from prunetune.config.recipe import RunConfig, to_mapping
from prunetune.errors import ConfigError, GateFailed, PrunetuneError, device_fault
from prunetune.evaluation.score_records import KERNELS
from prunetune.model.loading import load_config, pick_device
from prunetune.pipeline.prepare import Console, Setting, facts_of, prepare, shape_of
from prunetune.runs.folder import FREE, held
from prunetune.search.select import select
from prunetune.train.cuda_graphs import RECORDING
from prunetune.train.teacher import by_size
from prunetune.utils import environment
from prunetune.utils.console import console_for
from prunetune.utils.determinism import deterministic
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)

# A comparison may grow: a cell's file says all of what it is.
GROWS = FREE | {f"compare.{name}" for name in ("methods", "keeps", "seeds", "learning_rates", "variants", "jobs")}


def compare(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Make every cell that is not there yet, then the table and the page; returns the folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known; what goes
    wrong in one cell stands in its file. `GateFailed` where every cell went wrong.
    """
    if config.budget.sizes:
        raise ConfigError("budget.keep names several sizes of one run: name budgets to compare in compare.keeps")
    methods = methods_of(config)
    if config.compare.keeps and config.budget.amounts():
        raise ConfigError(
            "compare.keeps are shares of parameters, and budget names another amount: leave one of the two out"
        )
    console = console or console_for(config.train.log_every)
    with closing(console), deterministic(config.deterministic, pick_device(config.device)):
        setting = prepare(config, resume=resume, console=console, free=GROWS)
        grid = grid_of(setting.config)  # a budget of another kind has become a share of the parameters
        _refuse_in_time(setting, methods, grid)
        setting.folder.path.mkdir(parents=True, exist_ok=True)
        with held(setting.folder):
            _open(setting, config, command)
            cells, rates = _Comparison(setting, methods, grid, Shelf(setting.folder.path)).run()
    return _finish(setting, cells, rates)


def _refuse_in_time(setting: Setting, methods: Sequence[Method], grid: Grid) -> None:
    """Raises `PlanError` for a budget that no plan of a method meets, and `ConfigError` for options that clash."""
    model_config = load_config(setting.config.model, trust_remote_code=setting.config.trust_remote_code)
    scores = {site.name: torch.zeros(site.units) for site in setting.sites}
    for method in methods:
        for cell in grid.cells(method, grid.trials(method)[0].rate):
            config = cell.config(setting.config)
            if jobs_of(setting) > 1 and (config.lora.dropout or setting.config.lora.dropout):  # or its teacher's
                raise ConfigError(
                    f"compare.jobs {jobs_of(setting)} with lora.dropout ({method.name}): cells at once draw from one "
                    "generator, and would not come out the same again; set compare.jobs 1 or lora.dropout 0"
                )
            shape = shape_of(config, setting.sites, model_config, setting.shape.legal_groups)
            select(scores, setting.sites, cell.keep, replace(shape, limits=setting.shape.limits))


def _open(setting: Setting, config: RunConfig, command: str) -> None:
    """Make the folder and write the recipe."""
    path = setting.folder.path
    (path / "cells").mkdir(parents=True, exist_ok=True)
    write_text(path / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
    facts = environment.facts(setting.device, setting.dtype, command, setting.config.seed)
    setting.folder.note(**facts, **facts_of(setting))


def _finish(setting: Setting, cells: Sequence[Cell], rates: Mapping[str, float]) -> Path:
    """Table, page and aggregate, from the files alone."""
    path, shelf = setting.folder.path, Shelf(setting.folder.path)
    found = aggregate(shelf.all(cells), rates, setting.config)
    write_text(path / "comparison.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text(path / "table.md", markdown(found))
    write_page(path)
    if not any(row["seeds"] for row in found["rows"]):
        raise GateFailed(f"every cell of {path} failed, the first so: {found['errors'][0]['error']}")
    return path


@dataclass
class _Comparison:
    """The order of work: dense models first, for they teach; then the learning rates; then all other cells."""

    setting: Setting
    methods: Sequence[Method]
    grid: Grid
    shelf: Shelf

    def run(self) -> tuple[list[Cell], dict[str, float]]:
        """All cells are there, or their errors; returns those the table is about, and each method's learning rate."""
        dense = [method for method in self.methods if method.is_dense]
        others = [method for method in self.methods if not method.is_dense]
        rate = self.setting.config.train.learning_rate
        shop = Workshop(self.setting, rate if rate in self.grid.rates else self.grid.rates[0])
        jobs = jobs_of(self.setting)
        with one_kernel_choice():
            self._make(shop, self._trials(dense), jobs=jobs, choose=True)
            self._make(shop, self._cells(dense), jobs=jobs)
            rate = next((self._rate(method) for method in dense if method.name == DENSE), shop.dense_rate)
            shop.teach(rate, wanted=any(self._is_taught_by_dense(method) for method in others))
            self._make(shop, self._trials(others), jobs=jobs, choose=True)
            self._make(shop, by_seed(self._cells(others)), jobs=jobs)
        cells = {cell.name: cell for cell in (*self._trials(self.methods), *self._cells(self.methods))}
        return list(cells.values()), {method.name: self._rate(method) for method in self.methods}

    def _is_taught_by_dense(self, method: Method) -> bool:
        config = by_size(changed(self.setting.config, method.changes), self.setting.sites)
        return method.taught and config.distill.teacher == "dense"

    def _trials(self, methods: Sequence[Method]) -> list[Cell]:
        """The cells that learning rates are chosen by, of methods that have several."""
        trials = [self.grid.trials(method) for method in methods]
        return [cell for cells in trials if len(cells) > 1 for cell in cells]

    def _cells(self, methods: Sequence[Method]) -> list[Cell]:
        return [cell for method in methods for cell in self.grid.cells(method, self._rate(method))]

    def _rate(self, method: Method) -> float:
        trials = self.grid.trials(method)
        if len(trials) == 1:
            return trials[0].rate
        return best_rate(self.shelf.all(trials)) or trials[0].rate

    def _make(self, shop: Workshop, cells: Sequence[Cell], *, jobs: int, choose: bool = False) -> None:
        """Make those that are not there, `jobs` at once, and alone where memory ran out beside others.

        Ctrl-C ends those that run.
        """
        left = [cell for cell in cells if not self._is_done(shop, cell, choose)]
        if not left:
            return
        shop.open(crowded=jobs > 1)
        if jobs == 1:
            for cell in left:
                self._one(shop, cell, choose)
            return
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {cell.name: pool.submit(self._one, shop, cell, choose) for cell in left}
                again = [cell for cell in left if futures[cell.name].result()]
            except BaseException:
                shop.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for cell in again:
            log.warning("%s: out of memory beside others, so it is made once more, alone", cell.name)
            self._one(shop, cell, choose)

    def _is_done(self, shop: Workshop, cell: Cell, choose: bool) -> bool:
        """Whether a cell is there, taught by this teacher: with more learning rates, dense may be another."""
        result = self.shelf.get(cell) or {}
        return self.shelf.done(cell, choose=choose) and result.get("teacher_rate") in (None, shop.dense_rate)

    def _one(self, shop: Workshop, cell: Cell, choose: bool) -> bool:
        """Make a cell and keep it, or what went wrong; whether that was a lack of memory.

        Raises the error of a GPU that gave up.
        """
        lacks = False
        try:
            result = shop.make(cell, choose=choose)
        except Stopped:
            return False
        except PrunetuneError as failed:
            result = {**about(cell), "error": str(failed)}
        except Exception as failed:
            if device_fault(failed):  # of all cells that run: none of them is to blame
                raise
            lacks = isinstance(failed, torch.OutOfMemoryError)
            log.exception("%s failed", cell.name)
            result = {**about(cell), "error": f"{type(failed).__name__}: {' '.join(str(failed).split())[:500]}"}
        with RECORDING:  # graphs are let go while none is made
            gc.collect()
        self.shelf.put(cell, result)
        log.info("%s", line_of(result))
        return lacks


def jobs_of(setting: Setting) -> int:
    """Cells at once: a GPU waits for small models' launches, a CPU has no core to spare."""
    return setting.config.compare.jobs if setting.device.type == "cuda" else 1


def by_seed(cells: Iterable[Cell]) -> list[Cell]:
    """Seed by seed, so that a comparison that is stopped has whole seeds."""
    listed = list(cells)
    seeds = list(dict.fromkeys(cell.seed for cell in listed))
    return sorted(listed, key=lambda cell: seeds.index(cell.seed))


@contextmanager
def one_kernel_choice() -> Iterator[None]:
    """Every evaluation sets and resets the process's choice of attention kernels: here, to what it is already."""
    with sdpa_kernel(KERNELS):
        yield


def line_of(result: Result) -> str:
    """A cell in a line of the log."""
    if "error" in result:
        return f"{result['cell']}: failed: {result['error']}"
    named: dict[str, Any] = {**result["headline"], "valid nll": result.get("valid_nll")}
    scores = ", ".join(f"{name} {value:.3f}" for name, value in named.items() if value is not None)
    return f"{result['cell']}: kept {100 * result['kept']:.1f}%, {scores}, {result['train_seconds']:.0f} s"
