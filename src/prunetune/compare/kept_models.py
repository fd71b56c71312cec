"""The models behind a comparison's table: kept on disk while it runs, timed in turns at its end; the winner stays.

While cells run, `models/` gets the weights of every row's first seed. At the end the winner becomes the run folder
`best/`. To be timed, each other model becomes one in `models/`, which is removed when all is done. In a row, "cell"
names the model: "progressive-keep0.6-seed0-lr0.001+q4_k_m" is a cell in a format.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from prunetune.bench.measure_models import measure_models
from prunetune.bench.models import resolve_models
from prunetune.bench.result import BenchedModel
from prunetune.compare.methods import DENSE
from prunetune.compare.table import smallest_file
from prunetune.config.recipe import CompareConfig
from prunetune.errors import ModelError, PrunetuneError
from prunetune.export.formats import export_run
from prunetune.export.quantize import SCHEMES
from prunetune.export.result import ExportOptions
from prunetune.export.selfcheck import compute_logits
from prunetune.pipeline.finish import ExpectedModel, check_tokens, write_and_check
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.recording import record_origin
from prunetune.pipeline.requirements import gain_bench_options
from prunetune.pipeline.stages import evaluate_models
from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears, remove_layers
from prunetune.pruning.units import dense_plan
from prunetune.runs.folder import RunFolder, create_run_folder
from prunetune.utils.files import PARTIAL, write_text
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.untrusted import parse_json, read_text

ContextOf = Callable[[str], RunContext]  # of a cell, by its name


@dataclass(frozen=True)
class KeptModels:
    """Weights, run folders and times of cells, in a comparison's folder."""

    path: Path

    def save(self, cell: str, model: Any, plan: Plan) -> None:
        """Write a cell's tuned and cut model to `models/`, before the cell's own file says that it is done."""
        file = self._weights(cell)
        file.parent.mkdir(exist_ok=True)
        shutil.rmtree(self.path / "models" / cell, ignore_errors=True)  # of the same cell, trained before
        partial = file.with_name(file.name + PARTIAL)
        save_model(model, str(partial), {"plan": plan.to_json()})
        os.replace(partial, file)

    def has(self, cell: str) -> bool:
        """Whether the cell's model is on disk."""
        return self._weights(cell).exists() or self.is_best(cell)

    def is_best(self, cell: str) -> bool:
        """Whether `best/` is whole and holds this cell as it was scored: it has a copy of the cell's file."""
        copied, original = self.path / "best" / "cell.json", self.path / "cells" / f"{cell}.json"
        return copied.exists() and original.exists() and read_text(copied) == read_text(original)

    def keep(self, winner: JsonObject, context_of: ContextOf) -> None:
        """Make `best/` of a row's model unless it is, score what was written, and export it if it is in a format.

        Raises a `PrunetuneError` where the format cannot be exported; the run folder is there all the same.
        """
        cell, _, format = winner["cell"].partition("+")
        if not self.is_best(cell):
            evaluate_models(self._write_run(cell, context_of(cell), self.path / "best"), ("pruned",))
            shutil.copyfile(self.path / "cells" / f"{cell}.json", self.path / "best" / "cell.json")
        write_export(self.path / "best", format)

    def measure(self, rows: Sequence[JsonObject], context_of: ContextOf) -> None:
        """Write `speeds.json`: of each row, the dense one first, its times in turns with all others, or why not."""
        contexts = {cell: context_of(cell) for cell in dict.fromkeys(row["cell"].partition("+")[0] for row in rows)}
        options = [gain_bench_options(context.config) for context in contexts.values()]
        shortest = replace(min(options, key=lambda own: own.prompt + own.generate), batch="1", dense=False)
        speeds: dict[str, JsonObject] = {}
        files: dict[str, str] = {}
        for row in rows:
            cell, _, format = row["cell"].partition("+")
            run = self.path / ("best" if self.is_best(cell) else f"models/{cell}")
            try:
                if not (run / "model").exists():
                    self._write_run(cell, contexts[cell], run)
                files[row["cell"]] = str(write_export(run, format))
                resolve_models([files[row["cell"]]], shortest)  # raises for what could not be opened
            except PrunetuneError as error:
                files.pop(row["cell"], None)
                speeds[row["cell"]] = {"note": str(error)}
        if files:
            models = measure_models(list(files.values()), shortest).models
            dense = models[0] if rows[0]["method"] == DENSE and rows[0]["cell"] in files else None
            speeds |= {name: _times(model, dense) for name, model in zip(files, models, strict=True)}
        write_text(self.path / "speeds.json", json.dumps(speeds, indent=1) + "\n")

    def speeds(self) -> dict[str, JsonObject]:
        """What `measure` wrote; empty before that."""
        file = self.path / "speeds.json"
        return parse_json(read_text(file)) if file.exists() else {}

    def add_to(self, table: JsonObject) -> JsonObject:
        """The table with the times of each row as "speed", and where the winner is kept as "best"."""
        speeds, winner, best = self.speeds(), smallest_file(table), {}
        if winner and self.is_best(winner["cell"].partition("+")[0]):
            file = export_path(self.path / "best", winner["cell"].partition("+")[2])
            kept = file.relative_to(self.path) if file.exists() else "best"
            best = {"method": winner["method"], "seed": winner["seeds"][0], "path": str(kept)}
        return {**table, "rows": [{**row, "speed": speeds.get(row["cell"])} for row in table["rows"]], "best": best}

    def _write_run(self, cell: str, context: RunContext, path: Path) -> RunContext:
        """Write a cell's model as a run's, opened again and checked; returns the context of that run.

        Raises `ModelError` for a model that its architecture has no place for, such as one with FLAP's biases.
        """
        shutil.rmtree(path, ignore_errors=True)
        with safe_open(self._weights(cell), framework="pt") as stored:
            plan = Plan.from_json(stored.metadata()["plan"])
        is_dense = plan.kept == dense_plan(context.sites).kept  # then any class opens it, however others are laid out
        layout = "uniform" if is_dense else context.config.layout
        config = replace(context.config, out=str(path), layout=layout, compare=CompareConfig())
        context = replace(context, folder=RunFolder(path), config=config, recipe=config)
        model = context.load_dense(device=torch.device("cpu")).model
        cut_linears(model, plan, sites=context.sites)
        missing, unexpected = load_model(model, self._weights(cell), strict=False)
        if missing or unexpected:
            raise ModelError(f"{cell}: its architecture has no place for {[*unexpected, *missing][0]}: not written")
        remove_layers(model, plan, context.sites)
        tokens = check_tokens(context)
        expected = compute_logits(model.float(), tokens)
        create_run_folder(context.folder, config)
        record_origin(context, "")
        write_and_check(context, ExpectedModel(model.to(context.dtype), context.dtype, expected), plan, tokens)
        return context

    def _weights(self, cell: str) -> Path:
        return self.path / "models" / f"{cell}.safetensors"


def export_path(run: Path, format: str) -> Path:
    """Where a run's model in a format of `compare.formats` is; "": the run."""
    name = format if format in SCHEMES else f"gguf-{format}.gguf"
    return run / "exports" / name if format else run


def write_export(run: Path, format: str) -> Path:
    """Export a run's model to a format of `compare.formats` unless that is there; raises a `PrunetuneError`."""
    path = export_path(run, format)
    if format in SCHEMES and not path.exists():
        export_run(run, out=path, options=ExportOptions(quantize=format))
    elif not path.exists():
        # Without an importance matrix, as the cell was scored.
        export_run(run, "gguf", out=path, options=ExportOptions(dtype=format, imatrix_tokens=0))
    return path


def _times(model: BenchedModel, dense: BenchedModel | None) -> JsonObject:
    """Medians of a model's times; and how many times faster than dense, measured first, it is in the same place."""
    cell, facts = model.cells[0], model.facts
    if cell.failed:
        return {"note": cell.failed}
    is_alike = dense and (facts.runtime, facts.device) == (dense.facts.runtime, dense.facts.device)
    ratio = cell.ratios.get("decode") if is_alike else None
    names: Mapping[str, str] = {"first_token_s": "prefill", "token_s": "decode", "peak_bytes": "peak_memory"}
    times = {key: cell.figures[name].median for key, name in names.items() if name in cell.figures}
    place = {"runtime": facts.runtime, "device": facts.device}
    return place | times | ({"times_faster": [ratio.median, ratio.min, ratio.max]} if ratio else {})
