"""The page of a comparison: one self-contained HTML file, made from the files of the comparison's folder."""

from collections.abc import Sequence
from pathlib import Path

from prunetune.compare import charts, markdown
from prunetune.compare.methods import DENSE
from prunetune.manifest import Manifest
from prunetune.report import formatting
from prunetune.report.page import template_environment
from prunetune.utils.files import write_text
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.untrusted import parse_json, printable, read_text

LABELS = {"acc": "Mean accuracy", "nll": "Mean NLL per answer token", "rouge_l": "Mean ROUGE-L"}
TASK_LABELS = {"acc": "Accuracy", "rouge_l": "ROUGE-L", "ppl": "Perplexity"}


def write_page(folder: Path) -> Path:
    """Write `comparison.html` from `comparison.json`, `manifest.json` and `config.yaml`; the same files, same bytes."""
    comparison = parse_json(read_text(folder / "comparison.json"))
    files = {name: folder / name for name in ("manifest.json", "config.yaml")}
    texts = {name: file.read_text(encoding="utf-8") if file.exists() else "" for name, file in files.items()}
    manifest, page = Manifest.from_json(texts["manifest.json"] or "{}"), folder / "comparison.html"
    write_text(page, render_page(comparison, manifest, texts["config.yaml"], folder.name))
    return page


def render_page(comparison: JsonObject, manifest: Manifest, recipe: str, name: str) -> str:
    """The page as HTML text."""
    environment = template_environment(Path(__file__).parent)
    environment.filters |= {
        "signed": markdown.format_signed, "difference": markdown.format_difference,
        "seconds": markdown.format_seconds, "learning_rate": markdown.format_learning_rate,
        "seeds": markdown.format_seeds, "significance": significance_class,
        "number": markdown.format_number, "megabytes": markdown.format_megabytes, "times": markdown.format_times,
    }  # fmt: skip
    rows, reference = comparison["rows"], comparison["reference"]
    styles = charts.method_styles(list(dict.fromkeys(row["method"] for row in rows)), reference)
    labels, forgetting, tasks = (
        {name: metric_label(name) for name in comparison[key]} for key in ("metrics", "forgetting", "tasks")
    )
    as_tuned = [row for row in rows if "+" not in row["method"]]  # weights rounded for a file have a chart of their own
    metric_charts = [
        charts.draw_metric_chart(number, metric, label, as_tuned, styles)
        for number, (metric, label) in enumerate((labels | forgetting).items())
    ]
    if sentences := markdown.verdict_sentences(comparison):
        metric_charts[:0] = charts.draw_cost_charts(rows, styles)
    environment_facts = {
        "Model": manifest.model.name,
        "Device": manifest.device,
        "Arithmetic": manifest.dtype,
        **manifest.versions,
        "Rows": ", ".join(f"{split} {count}" for split, count in manifest.data.counts.items()),
    }
    page = environment.get_template("comparison.html.j2").render(
        name=name,
        comparison=comparison,
        verdict=verdict(comparison),
        sentences=[sentence for sentence in sentences if sentence != verdict(comparison)],
        labels=labels,
        forgetting=forgetting,
        tasks=tasks,
        floor_names=markdown.FLOORS if comparison["floors"] else (),
        made=markdown.format_made(comparison),
        reference=reference,
        rows_by_keep={keep: [row for row in rows if row["keep"] == keep] for keep in comparison["keeps"]},
        charts=[chart for chart in metric_charts if chart is not None],
        legend=charts.legend(styles),
        cost_rows=cost_rows(rows),
        times=markdown.TIMES if any(row.get("speed") for row in rows) else (),
        timing_notes=dict.fromkeys(markdown.timing_notes(rows)),
        rates=[
            (rate["method"], f"{rate['learning_rate']:g}", formatting.decimal(rate["valid_nll"]), chosen)
            for rate in comparison["rates"]
            for chosen in ["chosen" if rate["chosen"] else "–"]
        ],
        any_concurrent=any(row["crowded"] for row in rows),
        command=manifest.command or "",
        environment=[(name, value) for name, value in environment_facts.items() if value],
        recipe=recipe,
    )
    return printable(page)


def metric_label(name: str) -> str:
    """The heading of a column: "acc" is a mean over tasks, "acc casehold" one task's."""
    metric, _, task = name.partition(" ")
    return LABELS.get(name) or f"{TASK_LABELS[metric]}, {task}"


def verdict(comparison: JsonObject) -> str:
    """The result in a sentence: the gap to dense of the reference and the best two-stage method at the smallest size.

    A size that lacks one of these is skipped. Without any, the smallest weights that are as good as dense.
    """
    for keep in sorted(comparison["keeps"]):
        rows = {row["method"]: row for row in comparison["rows"] if row["keep"] == keep and row["gap"] is not None}
        two_stage = [row for row in rows.values() if row["kind"] == "two-stage"]
        if comparison["reference"] in rows and DENSE in rows and two_stage:
            best = min(two_stage, key=lambda row: float(row["gap"]))
            ours = rows[comparison["reference"]]
            removed = formatting.share(1 - ours["kept"])
            gap, best_gap = (formatting.signed_decimal(row["gap"]) for row in (ours, best))
            return (
                f"{removed} removed: NLL {gap} over dense with {comparison['reference']}, "
                f"{best_gap} with {best['method']}, the best two-stage"
            )
    if sentences := markdown.verdict_sentences(comparison):
        return sentences[0]
    methods = len({row["method"] for row in comparison["rows"]})
    return f"{methods} method{'s' if methods != 1 else ''} on {comparison['model']}"


def significance_class(score: JsonObject, metric: str) -> str:
    """The CSS class of a score: `better` or `worse` than the reference by more than two standard errors, else ""."""
    if not markdown.is_significant(score):
        return ""
    return "better" if (score["difference"] > 0) == metric.startswith(("acc", "rouge_l")) else "worse"


def cost_rows(rows: Sequence[JsonObject]) -> list[JsonObject]:
    """The rows of each method and size that has scores, once."""
    unique = {(row["method"], row["kept"]): row for row in reversed(rows) if row["cost_seconds"] is not None}
    return list(reversed(unique.values()))
