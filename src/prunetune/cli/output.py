"""What `prunetune run` prints of a finished run: sizes, limits, speed and scores beside the dense model's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from prunetune.evaluation.results import Evaluation, headline_metric, recovery
from prunetune.report.speed import interleaved_ratio, separate_ratio
from prunetune.utils.tables import table_lines


def render_run(folder: Path) -> str:
    """Sizes, scores beside the dense model, and where to look."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if "sizes" in manifest:
        return _render_sizes(folder, manifest)
    dense, pruned, check = manifest["model"], manifest["pruned"], manifest["selfcheck"]
    removed = 1 - pruned["decoder_params"] / dense["decoder_params"]
    lines = [
        f"decoder parameters  {_millions(dense, pruned, 'decoder_params')}  ({100 * removed:.1f}% removed)",
        f"all parameters      {_millions(dense, pruned, 'params')}",
        f"self-check          {check['max_relative']:.1e} relative (limit {check['limit']:.0e})",
        *_measured_budget_lines(manifest.get("budgets", [])),
        *_validation_limit_lines(manifest.get("gates", {}), manifest.get("validation", {})),
        *_limits(manifest.get("gain", {})),
        *_speed_lines(manifest),
    ]
    return "\n".join(
        [
            *lines,
            "",
            *_score_table_lines(folder),
            "",
            f"checkpoint {folder / 'model'}",
            f"report     {folder / 'report.html'}",
        ]
    )


def _speed_lines(manifest: dict[str, Any]) -> list[str]:
    """Beside the dense model: measured in turns where the run did that, and one by one."""
    turns = {kind: interleaved_ratio(manifest, kind) for kind in ("throughput", "prefill", "decode")}
    lines = [f"{f'{kind} in turns':<19} {times}" for kind, times in turns.items() if times]
    for kind in ("prefill", "decode"):
        if times := separate_ratio(manifest, kind):
            before, after = (manifest["speed"][name][f"{kind}_tokens_per_s"] for name in ("dense", "pruned"))
            lines.append(f"{kind:<8} tokens/s   {before:,.0f} -> {after:,.0f}  {times}")
    return lines


def _measured_budget_lines(budgets: list[dict[str, Any]]) -> list[str]:
    return [
        f"{budget['budget']:<19} {budget['words']}"
        + (f"; measured {100 * budget['error']:+.1f}% off that" if "error" in budget else "")
        for budget in budgets
    ]


def _validation_limit_lines(limits: dict[str, Any], validation: dict[str, Any]) -> list[str]:
    """What gates did, what the budget became, and what watching cost."""
    lines = [
        f"gate                step {event['step']}: {event['did']} ({event['gates'][0]})"
        for event in limits.get("events", [])
    ]
    lines += _limits(limits)
    if limits and (limits["kept"] or 0) > limits["keep_asked"]:
        lines.append(
            f"budget              {limits['kept']:.1%} remains, {limits['keep_asked']:.0%} was asked for: a gate held it"
        )
    if validation.get("share") is not None:
        lines.append(
            f"validation          every {validation['every']} steps, {validation['share']:.1%} of the tuning time"
        )
    return lines


def _limits(gates: dict[str, Any]) -> list[str]:
    return [
        f"gate                {limit['gate']}: {limit['found']:.4g}, limit {limit['limit']:.4g}"
        f"{'' if limit['held'] else ', OUTSIDE'}"
        for limit in gates.get("limits", [])
        if limit["found"] is not None
    ]


def _render_sizes(folder: Path, manifest: dict[str, Any]) -> str:
    """One row per size: share kept, parameters, speed beside the dense model's, mean scores, checkpoint."""
    rows: list[tuple[str, ...]] = []
    for size in manifest["sizes"]:
        file = folder / size / "manifest.json"
        own = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if "pruned" not in own:
            rows.append((Path(size).name, "not made"))
            continue
        speed = str(interleaved_ratio(own, "throughput") or "–")
        params = f"{own['pruned']['params'] / 1e6:,.1f} M"
        scores = _format_mean_scores(folder / size / "evaluation" / "pruned.json")
        rows.append((Path(size).name, params, speed, scores, str(folder / size / "model")))
    headings = (">keep", ">parameters", ">speed", "scores (means over tasks)", "checkpoint")
    return "\n".join([*table_lines(headings, rows), "", f"report     {folder / 'report.html'}"])


def _format_mean_scores(file: Path) -> str:
    evaluation = Evaluation.from_json(file.read_text(encoding="utf-8"))
    metrics = dict.fromkeys(headline_metric(result) for result in evaluation.tasks.values())
    scores = {metric: evaluation.mean(metric) for metric in metrics}
    return ", ".join(f"{metric} {score.value:.3f} ±{score.se:.3f}" for metric, score in scores.items())


def _millions(dense: dict[str, Any], pruned: dict[str, Any], key: str) -> str:
    return f"{dense[key] / 1e6:,.1f} M -> {pruned[key] / 1e6:,.1f} M"


def _score_table_lines(folder: Path) -> list[str]:
    """Each task's headline score of every model evaluated, and the share that the pruned one keeps of the reference.

    The reference is the dense tuned model, or the dense model where none was tuned.
    """
    files = {name: folder / "evaluation" / f"{name}.json" for name in ("dense", "tuned", "pruned")}
    evaluations = {
        name: Evaluation.from_json(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()
    }
    reference = evaluations.get("tuned", evaluations.get("dense"))
    rows = []
    for task, result in evaluations["pruned"].tasks.items():
        metric = headline_metric(result)
        scores = [evaluation.tasks[task].scores[metric] for evaluation in evaluations.values()]
        share = recovery(result.scores[metric], reference.tasks[task].scores[metric], metric) if reference else 0.0
        shown = f"{100 * share:.0f}%" if math.isfinite(share) else "–"  # of a reference of 0
        rows.append((task, metric, *(f"{score.value:.3f} ±{score.se:.3f}" for score in scores), shown))
    titles = {"dense": ">dense", "tuned": ">dense tuned", "pruned": ">pruned"}
    recovered = ">recovery" if "tuned" in evaluations else ">of dense"
    return table_lines(("task", "metric", *(titles[name] for name in evaluations), recovered), rows)
