"""What `prunetune run` prints of a finished run: sizes, limits, speed and scores beside the dense model's."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.drift_results import drift_verdict
from prunetune.evaluation.results import Evaluation, headline_metric
from prunetune.manifest import BudgetFacts, LimitFacts, LimitsFacts, Manifest, ValidationFacts
from prunetune.report.run_folder import read_run
from prunetune.report.scores import headline_table
from prunetune.report.speed import speedup, speedup_text
from prunetune.report.summary import share_saved
from prunetune.utils.tables import table_lines


def render_run(folder: Path) -> str:
    """Sizes, limits, speed and scores of a run, and the folders to look into."""
    manifest = Manifest.from_json((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest.sizes:
        return _render_sizes(folder, manifest)
    dense, pruned, check = manifest.model, manifest.pruned, manifest.selfcheck
    gone = [share_saved(dense.params, pruned.params), share_saved(dense.decoder_params, pruned.decoder_params)]
    of_all, of_decoder = ("" if share is None else f"  ({100 * share:.1f}% removed)" for share in gone)
    largest = math.nan if check.max_relative is None else check.max_relative  # of a manifest that lost its facts
    lines = [
        f"all parameters      {_millions(dense.params, pruned.params)}{of_all}",
        f"decoder parameters  {_millions(dense.decoder_params, pruned.decoder_params)}{of_decoder}",
        f"self-check          {largest:.1e} relative (limit {check.limit or math.nan:.0e})",
        *_measured_budget_lines(manifest.budgets),
        *_validation_limit_lines(manifest.limits, manifest.validation),
        *_limits(manifest.gain.limits),
        *_speed_lines(manifest),
        *_drift_lines(folder / "evaluation" / "drift.json"),
    ]
    paths = (f"checkpoint {folder / 'model'}", f"report     {folder / 'report.html'}")
    headings, rows = headline_table(read_run(folder).evaluations)
    return "\n".join([*lines, "", *table_lines(headings, rows), "", *paths])


def _speed_lines(manifest: Manifest) -> list[str]:
    """Speed-up over the dense model, both measured in turns."""
    texts = {kind: speedup_text(speedup(manifest, kind)) for kind in ("throughput", "prefill", "decode")}
    return [f"{f'{kind} in turns':<19} {text}" for kind, text in texts.items() if text]


def _drift_lines(file: Path) -> list[str]:
    words = drift_verdict(Evaluation.from_json(file.read_text(encoding="utf-8"))) if file.exists() else ""
    return textwrap.wrap(f"outside the domain  {words}", 80, subsequent_indent=" " * 20) if words else []


def _measured_budget_lines(budgets: Sequence[BudgetFacts]) -> list[str]:
    errors = ["" if budget.error is None else f"; measured {100 * budget.error:+.1f}% off that" for budget in budgets]
    return [f"{budget.budget:<19} {budget.words}{error}" for budget, error in zip(budgets, errors, strict=True)]


def _validation_limit_lines(limits: LimitsFacts, validation: ValidationFacts) -> list[str]:
    """What limits did, the budget that they left, and the cost of validations."""
    lines = [
        f"limit               step {action.step}: {action.action} ({action.conditions[0]})" for action in limits.actions
    ]
    lines += _limits(limits.limits)
    kept, requested = limits.kept, limits.requested_keep
    if kept is not None and requested is not None and kept > requested:
        lines.append(f"budget              {kept:.1%} remains, {requested:.0%} was asked for: a limit kept it")
    if validation.share is not None:
        lines.append(f"validation          every {validation.every} steps, {validation.share:.1%} of the tuning time")
    return lines


def _limits(limits: Sequence[LimitFacts]) -> list[str]:
    return [
        f"limit               {limit.condition}: {limit.measured:.4g}, limit {limit.limit:.4g}"
        f"{'' if limit.is_met else ', OUTSIDE'}"
        for limit in limits
        if limit.measured is not None
    ]


def _render_sizes(folder: Path, manifest: Manifest) -> str:
    """One row per size: share kept, parameters, speed beside the dense model's, mean scores, checkpoint."""
    rows: list[tuple[str, ...]] = []
    for size in manifest.sizes:
        file = folder / size / "manifest.json"
        own = Manifest.from_json(file.read_text(encoding="utf-8")) if file.exists() else Manifest.empty()
        if own.pruned.params is None:
            rows.append((Path(size).name, "not made"))
            continue
        speed = speedup_text(speedup(own, "throughput")) or "–"
        params = f"{own.pruned.params / 1e6:,.1f} M"
        scores = _format_mean_scores(folder / size / "evaluation" / "pruned.json")
        rows.append((Path(size).name, params, speed, scores, str(folder / size / "model")))
    headings = (">keep", ">parameters", ">speed", "scores (means over tasks)", "checkpoint")
    return "\n".join([*table_lines(headings, rows), "", f"report     {folder / 'report.html'}"])


def _format_mean_scores(file: Path) -> str:
    evaluation = Evaluation.from_json(file.read_text(encoding="utf-8"))
    metrics = dict.fromkeys(headline_metric(result) for result in evaluation.tasks.values() if not result.general)
    scores = {metric: evaluation.mean(metric) for metric in metrics}
    return ", ".join(f"{metric} {score.value:.3f} ±{score.se:.3f}" for metric, score in scores.items())


def _millions(dense: int | None, pruned: int | None) -> str:
    return f"{dense / 1e6:,.1f} M -> {pruned / 1e6:,.1f} M" if dense and pruned else "not known"
