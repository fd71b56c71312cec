"""The page of a comparison: one HTML file that needs nothing else, made from the folder's files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from prunetune import report
from prunetune.compare import charts, markdown
from prunetune.compare.methods import DENSE
from prunetune.manifest import Manifest
from prunetune.report import formatting
from prunetune.utils.files import write_text

LABELS = {"acc": "Mean accuracy", "nll": "Mean NLL per answer token", "rouge_l": "Mean ROUGE-L"}
ComparisonData = Mapping[str, Any]  # comparison.json


def write_page(folder: Path) -> Path:
    """Write `comparison.html` from `comparison.json`, `manifest.json` and `config.yaml`.

    The same files give the same bytes.
    """
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    manifest = Manifest.from_json(_text(folder / "manifest.json") or "{}")
    target = folder / "comparison.html"
    write_text(target, render_page(found, manifest, _text(folder / "config.yaml"), folder.name))
    return target


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def render_page(comparison: ComparisonData, manifest: Manifest, recipe: str, name: str) -> str:
    """The page as HTML text."""
    places = [Path(__file__).parent, *(Path(place) for place in report.__path__)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(places),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "count": formatting.count, "decimal": formatting.decimal, "share": formatting.share, "change": markdown.format_signed,
        "difference": markdown.format_difference, "seconds": markdown.format_seconds, "rate": markdown.format_learning_rate, "seeds": markdown.format_seeds,
        "tone": significance_class,
    }  # fmt: skip
    return environment.get_template("comparison.html.j2").render(_content(comparison, manifest, recipe, name))


def _content(found: ComparisonData, manifest: Manifest, recipe: str, name: str) -> dict[str, Any]:
    rows = found["rows"]
    looks = charts.method_styles(list(dict.fromkeys(row["method"] for row in rows)), found["reference"])
    labels = {metric: metric_label(metric) for metric in found["metrics"]}
    drawn = [
        charts.draw_metric_chart(number, metric, label, rows, looks)
        for number, (metric, label) in enumerate(labels.items())
    ]
    return {
        "name": name,
        "found": found,
        "verdict": verdict(found),
        "labels": labels,
        "reference": found["reference"],
        "budgets": {keep: [row for row in rows if row["keep"] == keep] for keep in found["keeps"]},
        "pictures": [one for one in drawn if one is not None],
        "legend": charts.legend(looks),
        "costs": cost_rows(rows),
        "crowded": any(row["crowded"] for row in rows),
        "command": manifest.command or "",
        "environment": _environment(manifest),
        "recipe": recipe,
    }


def metric_label(metric: str) -> str:
    """A metric's name for readers."""
    return LABELS.get(metric) or f"Perplexity, {metric.removeprefix('ppl ')}"


def verdict(comparison: ComparisonData) -> str:
    """The smallest budget's finding in a sentence: one stage and the best two-stage method over the dense model."""
    for keep in sorted(comparison["keeps"]):
        rows = {row["method"]: row for row in comparison["rows"] if row["keep"] == keep and row["gap"] is not None}
        rest = [row for row in rows.values() if row["kind"] == "two-stage"]
        if comparison["reference"] in rows and DENSE in rows and rest:
            best = min(rest, key=lambda row: float(row["gap"]))
            ours = rows[comparison["reference"]]
            return (
                f"{formatting.share(1 - ours['kept'])} removed: NLL {formatting.signed_decimal(ours['gap'])} over dense with one stage, "
                f"{formatting.signed_decimal(best['gap'])} with {best['method']}, the best two-stage"
            )
    methods = len({row["method"] for row in comparison["rows"]})
    return f"{methods} method{'s' if methods != 1 else ''} on {comparison['model']}"


def significance_class(score: Mapping[str, Any], metric: str) -> str:
    """Better or worse than the reference by more than two standard errors; "" else."""
    change, error = score.get("difference"), score.get("difference_se")
    if change is None or error is None or abs(change) <= 2 * error:
        return ""
    return "better" if (change > 0) == (metric in ("acc", "rouge_l")) else "worse"


def cost_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What every row cost, in all: its own training and its teacher's."""
    seen: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        known = [row[key] for key in ("train_seconds", "teacher_seconds") if row[key] is not None]
        if known:
            seen.setdefault((row["method"], row["kept"]), {**row, "total": sum(known)})
    return list(seen.values())


def _environment(manifest: Manifest) -> list[tuple[str, str]]:
    facts = {
        "Model": manifest.model.name,
        "Device": manifest.device,
        "Arithmetic": manifest.dtype,
        **manifest.versions,
        "Rows": ", ".join(f"{split} {count}" for split, count in manifest.data.counts.items()),
    }
    return [(name, value) for name, value in facts.items() if value]
