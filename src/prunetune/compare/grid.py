"""Cells of a comparison: one method at one budget, seed and learning rate, each a file of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.compare.methods import Method, apply_overrides
from prunetune.config.fields import with_current_names
from prunetune.config.recipe import RunConfig
from prunetune.errors import RunFolderError
from prunetune.utils.files import write_text

CellResult = dict[str, Any]  # a cell's file


@dataclass(frozen=True)
class Cell:
    """One model to make and to score."""

    method: Method
    keep: float  # 1 where nothing is removed
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.method.name}-keep{self.keep:g}-seed{self.seed}-lr{self.learning_rate:g}"

    def config(self, recipe: RunConfig) -> RunConfig:
        """The recipe as this cell follows it; another learning rate takes that of the cut model's weights along."""
        config = apply_overrides(recipe, self.method.overrides)
        factor = self.learning_rate / config.train.learning_rate
        rates = {"learning_rate": self.learning_rate, "weights_rate": config.train.weights_rate * factor}
        return apply_overrides(config, {"seed": self.seed, "budget": {"keep": self.keep}, "train": rates})


@dataclass(frozen=True)
class Grid:
    """Which budgets, seeds and learning rates there are."""

    keeps: tuple[float, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]

    def learning_rate_trials(self, method: Method) -> list[Cell]:
        """The learning rates to choose from, at the first seed and the first budget."""
        return [self._cell(method, self.keeps[0], self.seeds[0], rate) for rate in self._rates(method)]

    def cells(self, method: Method, rate: float) -> list[Cell]:
        """All budgets and seeds at one learning rate."""
        if method.kind == "untuned":
            return [self._cell(method, 1.0, self.seeds[0], rate)]
        keeps = (1.0,) if method.is_dense else self.keeps
        return [self._cell(method, keep, seed, rate) for seed in self.seeds for keep in keeps]

    def _rates(self, method: Method) -> tuple[float, ...]:
        if method.own_learning_rate is not None:
            return (float(method.own_learning_rate),)
        return self.learning_rates[:1] if method.kind == "untuned" else self.learning_rates

    def _cell(self, method: Method, keep: float, seed: int, rate: float) -> Cell:
        return Cell(method, 1.0 if method.is_dense else keep, seed, rate)


def grid_from_config(config: RunConfig) -> Grid:
    """The recipe's grid; what it does not name is one value."""
    compare = config.compare
    return Grid(
        _unique(compare.keeps) or (config.budget.keep,),
        _unique(compare.seeds) or (config.seed,),
        _unique(compare.learning_rates) or (config.train.learning_rate,),
    )


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class CellStore:
    """The files of cells in a comparison's folder."""

    folder: Path

    def save(self, cell: Cell, result: CellResult) -> None:
        """Write a cell's file whole."""
        write_text(self._file(cell), json.dumps(result, allow_nan=False) + "\n")

    def load(self, cell: Cell) -> CellResult | None:
        """A cell's file, if there is one; raises `RunFolderError` where it is of another method."""
        file = self._file(cell)
        if not file.exists():
            return None
        try:
            result: CellResult = json.loads(file.read_text(encoding="utf-8"))
            same = with_current_names(RunConfig, result["changes"], quiet=True) == cell_header(cell)["changes"]
        except (ValueError, KeyError, TypeError) as broken:
            raise RunFolderError(f"{file} cannot be read ({broken!r}): remove it, then go on with --resume") from broken
        if not same:
            raise RunFolderError(
                f"{file} was made by another variant of the same name: rename the variant, or name another --out"
            )
        return result

    def is_done(self, cell: Cell, *, needs_valid_nll: bool) -> bool:
        """Whether a cell has been made, scored on valid too where it is one to choose from; a failed one is not."""
        result = self.load(cell)
        return result is not None and "error" not in result and ("valid_nll" in result or not needs_valid_nll)

    def load_all(self, cells: Iterable[Cell]) -> list[CellResult]:
        """The files that are there."""
        return [result for cell in cells if (result := self.load(cell)) is not None]

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"


def cell_header(cell: Cell) -> CellResult:
    """What a cell's file begins with."""
    method = cell.method
    special = {method.kind: method.baseline or True} if method.kind != "one-stage" else {}
    return {
        "cell": cell.name,
        "method": method.name,
        "keep": cell.keep,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "changes": json.loads(json.dumps({**special, **method.overrides})),
    }


def best_learning_rate(trials: Sequence[CellResult]) -> float | None:
    """The learning rate of the lowest NLL on valid, the first of equals; None where no trial has one."""
    known = [trial for trial in trials if _valid(trial) is not None]
    return float(min(known, key=lambda trial: trial["valid_nll"])["learning_rate"]) if known else None


def _valid(trial: Mapping[str, Any]) -> float | None:
    value = trial.get("valid_nll")
    return float(value) if isinstance(value, int | float) else None
