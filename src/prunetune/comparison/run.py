"""A whole comparison: every cell made once, its file kept, and all of them told in one table and one page."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch.nn.attention import sdpa_kernel

from prunetune import environment
from prunetune.comparison.cells import Cell, Grid, Result, Shelf, about, best_rate, grid_of
from prunetune.comparison.markdown import markdown
from prunetune.comparison.methods import DENSE, Method, methods_of
from prunetune.comparison.page import write_page
from prunetune.comparison.table import aggregate
from prunetune.comparison.work import Stopped, Workshop
from prunetune.config import RunConfig, to_mapping
from prunetune.console import console_for
from prunetune.errors import GateFailed, PrunetuneError
from prunetune.evaluation.suite import KERNELS
from prunetune.files import write_text
from prunetune.folder import FREE
from prunetune.pipeline import same_data
from prunetune.setting import Console, Setting, facts_of, prepare

log = logging.getLogger(__name__)

# A comparison may grow: a cell's file says all of what it is.
GROWS = FREE | {f"compare.{name}" for name in ("methods", "keeps", "seeds", "learning_rates", "variants", "jobs")}


def compare(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Make every cell that is not there yet, then the table and the page; returns the folder.

    Raises a `PrunetuneError` for what the user can mend, before anything is written where that can be known; what goes
    wrong in one cell stands in its file. `GateFailed` where every cell went wrong.
    """
    methods, grid = methods_of(config), grid_of(config)
    console = console or console_for(config.train.log_every)
    try:
        setting = prepare(config, resume=resume, console=console, free=GROWS)
        if resume:
            same_data(setting)
        _open(setting, command)
        cells, rates = _Comparison(setting, methods, grid, Shelf(setting.folder.path)).run()
    finally:
        console.close()
    return _finish(setting, cells, rates)


def _open(setting: Setting, command: str) -> None:
    """Make the folder and write the recipe."""
    path = setting.folder.path
    (path / "cells").mkdir(parents=True, exist_ok=True)
    write_text(path / "config.yaml", yaml.safe_dump(to_mapping(setting.config), sort_keys=False))
    facts = environment.facts(setting.device, setting.dtype, command, setting.config.seed)
    setting.folder.note(**facts, **facts_of(setting))


def _finish(setting: Setting, cells: Sequence[Cell], rates: Mapping[str, float]) -> Path:
    """Table, page and aggregate, from the files alone."""
    path, shelf = setting.folder.path, Shelf(setting.folder.path)
    found = aggregate(shelf.all(cells), rates, setting.config)
    write_text(path / "comparison.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text(path / "table.md", markdown(found))
    write_page(path)
    if not found["rows"]:
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
        console = self.setting.console
        console.stage("loading the model", 0)
        loaded = self.setting.load().model
        shop = Workshop(
            self.setting, loaded, loaded.config, self.setting.config.train.learning_rate, len(self.grid.rates) > 1
        )
        dense = [method for method in self.methods if method.is_dense]
        others = [method for method in self.methods if not method.is_dense]
        with one_kernel_choice():
            self._make(shop, [cell for method in dense for cell in self.grid.trials(method)], jobs=1)
            self._make(shop, [cell for method in dense for cell in self._cells(method)], jobs=1)
            shop.dense_rate = next(
                (rate for method in dense if method.name == DENSE for rate in [self._rate(method)]), shop.dense_rate
            )
            for seed, rate in list(shop.teachers):
                if rate != shop.dense_rate:
                    shop.forget(seed, rate)
            jobs = self.setting.config.compare.jobs if self.setting.device.type == "cuda" else 1
            self._make(shop, [cell for method in others for cell in self.grid.trials(method)], jobs=jobs)
            self._make(shop, by_seed(cell for method in others for cell in self._cells(method)), jobs=jobs)
        tried = [cell for method in self.methods for cell in self.grid.trials(method)]
        every = [*tried, *(cell for method in self.methods for cell in self._cells(method))]
        cells = list({cell.name: cell for cell in every}.values())
        return cells, {method.name: self._rate(method) for method in self.methods}

    def _rate(self, method: Method) -> float:
        trials = self.grid.trials(method)
        if len(trials) == 1:
            return trials[0].rate
        return best_rate(self.shelf.all(trials)) or trials[0].rate

    def _cells(self, method: Method) -> list[Cell]:
        return self.grid.cells(method, self._rate(method))

    def _make(self, shop: Workshop, cells: Iterable[Cell], *, jobs: int) -> None:
        """Make those that are not there, `jobs` at once; Ctrl-C ends those that run."""
        left = [cell for cell in cells if not self.shelf.done(cell)]
        shop.crowded = jobs > 1
        pool = ThreadPoolExecutor(jobs)
        try:
            if jobs == 1:
                for cell in left:
                    self._one(shop, cell)
            else:
                for future in [pool.submit(self._one, shop, cell) for cell in left]:
                    future.result()
        except BaseException:
            shop.stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, shop: Workshop, cell: Cell) -> None:
        try:
            result = shop.make(cell)
        except Stopped:
            return
        except PrunetuneError as failed:
            result = {**about(cell), "error": str(failed)}
        except Exception as failed:
            log.exception("%s failed", cell.name)
            result = {**about(cell), "error": f"{type(failed).__name__}: {' '.join(str(failed).split())[:500]}"}
        self.shelf.put(cell, result)
        log.info("%s", line_of(result))


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
    named: dict[str, Any] = {**result["headline"], "valid nll": result["valid_nll"]}
    scores = ", ".join(f"{name} {value:.3f}" for name, value in named.items() if value is not None)
    return f"{result['cell']}: kept {100 * result['kept']:.1f}%, {scores}, {result['train_seconds']:.0f} s"
