"""The grid of a comparison: its cells (one method at one budget, seed and learning rate), and their files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunetune.compare.methods import Method, apply_overrides
from prunetune.config.fields import with_current_names
from prunetune.config.recipe import RunConfig
from prunetune.errors import RunFolderError
from prunetune.utils.files import write_text
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.untrusted import parse_json, read_text, shorten


@dataclass(frozen=True)
class Cell:
    """One model to train and to score."""

    method: Method
    keep: float  # 1: nothing is removed
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """The name of the cell's file."""
        return f"{self.method.name}-keep{self.keep:g}-seed{self.seed}-lr{self.learning_rate:g}"

    def config(self, recipe: RunConfig) -> RunConfig:
        """The recipe for this cell; `train.weights_rate` is scaled by the same factor as the learning rate."""
        config = apply_overrides(recipe, self.method.overrides)
        factor = self.learning_rate / config.train.learning_rate
        rates = {"learning_rate": self.learning_rate, "weights_rate": config.train.weights_rate * factor}
        return apply_overrides(config, {"seed": self.seed, "budget": {"keep": self.keep}, "train": rates})


@dataclass(frozen=True)
class Grid:
    """The budgets, seeds and learning rates that every method runs with."""

    keeps: tuple[float, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]

    def learning_rate_trials(self, method: Method) -> list[Cell]:
        """A cell for each learning rate to choose from, at the first seed and the first budget."""
        if method.own_learning_rate is not None:
            rates: tuple[float, ...] = (method.own_learning_rate,)
        else:
            rates = self.learning_rates[:1] if method.kind == "untuned" else self.learning_rates
        return [Cell(method, 1.0 if method.is_dense else self.keeps[0], self.seeds[0], rate) for rate in rates]

    def cells(self, method: Method, rate: float) -> list[Cell]:
        """A cell for each budget and seed, at one learning rate; an untuned model has one."""
        seeds = self.seeds[:1] if method.kind == "untuned" else self.seeds
        keeps = (1.0,) if method.is_dense else self.keeps
        return [Cell(method, keep, seed, rate) for seed in seeds for keep in keeps]


def grid_from_config(config: RunConfig) -> Grid:
    """The grid that the recipe asks for; a list that `compare` leaves empty has the recipe's one value."""
    compare = config.compare
    return Grid(
        tuple(dict.fromkeys(compare.keeps or (config.budget.keep,))),
        tuple(dict.fromkeys(compare.seeds or (config.seed,))),
        tuple(dict.fromkeys(compare.learning_rates or (config.train.learning_rate,))),
    )


@dataclass(frozen=True)
class CellStore:
    """The cells' files in a comparison's folder."""

    folder: Path

    def save(self, cell: Cell, result: JsonObject) -> None:
        """Write a cell's file at once, so that an interruption leaves no half of it."""
        write_text(self._file(cell), json.dumps(result, allow_nan=False) + "\n")

    def load(self, cell: Cell) -> JsonObject | None:
        """Read a cell's file; None if there is none. Raises `RunFolderError` if another variant wrote it."""
        file = self._file(cell)
        if not file.exists():
            return None
        try:
            result: JsonObject = parse_json(read_text(file))
            header = cell_header(cell)
            same = with_current_names(RunConfig, result["changes"], quiet=True) == header["changes"]
            numbers = {name: result[name] for name in ("keep", "seed", "learning_rate")}
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{file} cannot be read ({shorten(repr(error))}): remove it, then continue with --resume"
            raise RunFolderError(problem) from error
        if not same:
            raise RunFolderError(
                f"{file} was made by another variant of the same name: rename the variant, or name another --out"
            )
        if any(header[name] != value for name, value in numbers.items()):
            raise RunFolderError(f"{file} was made with {numbers}: name the same numbers, or another --out")
        return result

    def is_done(self, cell: Cell, *, needs_valid_nll: bool) -> bool:
        """Whether a cell has a result with the same help, and an NLL on valid if needed; a failed cell is not done."""
        result = self.load(cell)
        if result is None or "error" in result:
            return False
        without_help = cell.method.name == cell.method.baseline  # what version 0.1.0, which did not say, gave it
        equal_help = result.get("equal_help", cell.method.equal_help and not without_help)
        return equal_help == cell.method.equal_help and ("valid_nll" in result or not needs_valid_nll)

    def load_all(self, cells: Iterable[Cell]) -> list[JsonObject]:
        """The results of those cells that have a file."""
        return [result for cell in cells if (result := self.load(cell)) is not None]

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"


def cell_header(cell: Cell) -> JsonObject:
    """The first entries of a cell's file: which cell it is, and what its method changes of the recipe."""
    method = cell.method
    kind = {method.kind: method.baseline or True} if method.kind != "progressive" else {}
    return {
        "cell": cell.name,
        "method": method.name,
        "keep": cell.keep,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "changes": json.loads(json.dumps({**kind, **method.overrides})),
        "equal_help": method.equal_help,
    }


def best_learning_rate(trials: Sequence[JsonObject]) -> float | None:
    """The learning rate with the lowest NLL on valid, the first of equals; None if no trial has a finite NLL."""
    scored = [trial for trial in trials if isinstance(trial.get("valid_nll"), int | float)]
    return float(min(scored, key=lambda trial: trial["valid_nll"])["learning_rate"]) if scored else None
