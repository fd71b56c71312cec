"""What `prunetune.run` returns: the run folder with its scores, plan, models, files and report."""

from __future__ import annotations

import html
import os
import re
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any, Literal

from prunetune.errors import ModelError, RunFolderError
from prunetune.plan import Plan
from prunetune.utils.optional import import_optional
from prunetune.utils.untrusted import printable, read_text

if TYPE_CHECKING:
    import pandas as pd

    from prunetune.manifest import Manifest
    from prunetune.model.loading import LoadedModel

ModelName = Literal["pruned", "tuned", "dense"]
FILES = {
    "config": "config.yaml", "manifest": "manifest.json", "plan": "plan.json", "model": "model",
    "adapter": "tuned/adapter", "metrics": "metrics.jsonl", "validation": "validation.jsonl",
    "evaluation": "evaluation", "bench": "bench.json", "report": "report.html",
}  # fmt: skip


class RunResult(PosixPath):
    """A run folder, which is also a `Path`: `RunResult("runs/support")` opens one that exists.

    Everything is read from its files when it is asked for. Raises `RunFolderError` for what the folder does not hold.
    """

    __slots__ = ()

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:  # type: ignore[override]  # its children are no runs
        return Path(self, name)

    def with_segments(self, *segments: str | os.PathLike[str]) -> Path:  # from Python 3.12 on
        """A path that is derived from this one is a plain `Path`."""
        return Path(*segments)

    @property
    def paths(self) -> dict[str, Path]:
        """The files and folders that the run has so far, by name: "model", "report", "plan", "adapter" and others."""
        return {name: self / file for name, file in FILES.items() if (self / file).exists()}

    @property
    def plan(self) -> Plan:
        """The units kept at each site."""
        return Plan.from_json(self._read("plan.json", "it is written with the model: continue the run with resume"))

    @property
    def manifest(self) -> Manifest:
        """Sizes, speed, timings, versions, hashes of data."""
        from prunetune.manifest import Manifest

        return Manifest.from_json(self._read("manifest.json", "name the folder that `run` made"))

    @property
    def sizes(self) -> dict[float, RunResult]:
        """With several sizes, the run of each by its `budget.keep`, largest first; else empty."""
        folders = [recipe.parent for recipe in (self / "sizes").glob("[0-9]*/config.yaml")]
        keeps = {float(folder.name): folder for folder in folders if re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", folder.name)}
        return {keep: RunResult(keeps[keep]) for keep in sorted(keeps, reverse=True)}

    @property
    def scores(self) -> pd.DataFrame:
        """The scores on the run's test rows, one a row: task, metric, model, value, standard error `se`, items.

        `general` marks tasks of data.general. With several sizes, `keep` says which. Raises `MissingPackage` without
        pandas.
        """
        from prunetune.report.run_folder import read_run

        pandas = import_optional("pandas", extra="notebook", use="RunResult.scores")
        rows = []
        sizes = self.sizes
        for keep, run in sizes.items() or ((None, self),):
            for model, evaluation in read_run(run).evaluations.items():
                for task, result in evaluation.tasks.items():
                    for metric, score in result.scores.items():
                        row = {"task": task, "metric": metric, "model": model, "value": score.value, "se": score.se}
                        row |= {"items": score.n, "general": result.general} | ({"keep": keep} if sizes else {})
                        rows.append(row)
        columns = ["task", "metric", "model", "value", "se", "items", "general", *(["keep"] if sizes else [])]
        frame: pd.DataFrame = pandas.DataFrame(rows, columns=columns)
        return frame

    def model(self, name: ModelName = "pruned", *, device: str = "auto", dtype: str = "auto") -> Any:
        """The pruned model, the dense model tuned on the same rows ("tuned"), or the one it began with ("dense").

        It is loaded at each call, in eval mode and frozen. `dtype`: "auto", "float32", "bfloat16" or "float16". Raises
        `ModelError` where the run has no such model.
        """
        return self._load(name, device, dtype).model

    def tokenizer(self) -> Any:
        """The tokenizer of the pruned model."""
        from prunetune.evaluation.suites.open_model import resolve_checkpoint
        from prunetune.model.loading import load_tokenizer

        return load_tokenizer(resolve_checkpoint(str(self)))

    @property
    def report(self) -> ReportPage:
        """The run's report; a notebook shows it inline."""
        return ReportPage(self / "report.html")

    def _load(self, name: ModelName, device: str, dtype: str) -> LoadedModel:
        from prunetune.evaluation.suites.open_model import dense_model_of_run, resolve_checkpoint
        from prunetune.model.loading import DTYPES, load_model_and_tokenizer, pick_device, pick_dtype

        if name not in ("pruned", "tuned", "dense") or dtype not in ("auto", *DTYPES):
            raise ModelError(
                f"model({name!r}, dtype={dtype!r}): name is pruned, tuned or dense; dtype auto, {', '.join(DTYPES)}"
            )
        if name == "tuned" and "adapter" not in self.paths:
            raise ModelError(
                f"{self}: the run has no dense tuned model as an adapter (evaluate.dense_tuned, lora.quantize); "
                "use pruned or dense"
            )
        resolve = {"pruned": resolve_checkpoint, "dense": dense_model_of_run}
        model = resolve[name](str(self)) if name in resolve else str(self.paths["adapter"])
        target = pick_device(device)
        return load_model_and_tokenizer(model, device=target, dtype=pick_dtype(dtype, target))

    def _read(self, name: str, advice: str) -> str:
        try:
            return read_text(self / name)
        except (OSError, ValueError) as missing:
            raise RunFolderError(f"{self}: {name} is missing or cannot be read: {advice}") from missing

    def _repr_html_(self) -> str:
        from prunetune.report.run_folder import read_run
        from prunetune.report.scores import headline_score, headline_table
        from prunetune.report.summary import summary_line

        if not (self / "config.yaml").is_file():
            return f"<code>{html.escape(repr(self))}</code>"
        parts = []
        for keep, run in self.sizes.items() or (("", self),):
            files = read_run(run)
            headings, rows = headline_table(files.evaluations)
            line = summary_line(files, headline_score(files.evaluations))
            parts.append(f"<p>{f'keep {keep:g}: ' if keep else ''}{html.escape(line)}</p><table>")
            for row in ([heading.lstrip(">") for heading in headings], *rows) if rows else ():
                parts.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>")
            parts.append("</table>")
        return printable("".join([*parts, f"<p><code>{html.escape(str(self))}</code></p>"]))


@dataclass(frozen=True)
class ReportPage:
    """A report that notebooks show inline, in a frame that runs no script and reaches nothing around it."""

    path: Path
    height: int = 640  # pixels

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        try:
            page = read_text(self.path)
        except (OSError, ValueError) as missing:
            raise RunFolderError(
                f"{self.path} is missing or cannot be read: a finished run has it; write it again by write_report(run)"
            ) from missing
        style = f"width: 100%; height: {self.height}px; border: 1px solid #8884"
        return f'<iframe sandbox srcdoc="{html.escape(page)}" style="{style}" title="report"></iframe>'
