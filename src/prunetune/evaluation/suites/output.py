"""Evaluations and checks as text for a terminal."""

import math
from collections.abc import Sequence

from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites.check import CheckResult
from prunetune.utils.tables import table_lines

LISTED = 20  # most new failures shown; --json has all
MAX_TEXT_CHARS = 100


def render_evaluation(evaluation: Evaluation) -> str:
    """Every task's scores with their standard errors, and why a task has none."""
    rows = [
        (name, metric, f"{score.value:.4f}", _format_error(score.se), str(score.n))
        for name, result in evaluation.tasks.items()
        for metric, score in result.scores.items()
    ]
    lines = table_lines(("task", "metric", ">score", ">± SE", ">items"), rows)
    unscored = [f"{name}: not scored: {result.error}" for name, result in evaluation.tasks.items() if result.error]
    return _joined([*lines, *unscored])


def _format_error(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def render_check(check: CheckResult) -> str:
    """Scores side by side, limits, new failures with both answers, and what could not be judged."""
    rows = []
    for task, metrics in check.scores.items():
        for metric, (score, reference) in metrics.items():
            value, error = check.differences.get(task, {}).get(metric, (math.nan, math.nan))
            difference = f"{value:+.4f} ± {_format_error(error)}" if math.isfinite(value) else "–"
            rows.append((task, metric, f"{score:.4f}", f"{reference:.4f}", difference))
    lines = [f"reference: {check.reference}", ""] if check.reference else []
    lines += table_lines(("task", "metric", ">model", ">reference", ">difference ± SE"), rows)
    lines += ["", *(f"{'BROKEN' if verdict.broken else 'holds '}  {verdict.says}" for verdict in check.verdicts)]
    lines += [f"ERROR   {task}: {error}" for task, error in check.errors.items()]
    if check.failures:
        lines += ["", f"new failures: {len(check.failures)}"]
        for failure in check.failures[:LISTED]:
            lines.append(f"  {failure.task} / {failure.id}")
            texts = {"asked": failure.prompt, "expected": failure.expected, "before": failure.before}
            texts |= {"after": failure.after, "scored": failure.score_change}
            for name, line in ((name, " ".join(text.split())) for name, text in texts.items() if text):
                if len(line) > MAX_TEXT_CHARS:  # of a long prompt its end, where the question is
                    line = f"...{line[-MAX_TEXT_CHARS:]}" if name == "asked" else f"{line[:MAX_TEXT_CHARS]}..."
                lines.append(f"    {name:<9} {line}")
        if len(check.failures) > LISTED:
            lines.append(f"and {len(check.failures) - LISTED} more: --json or --junit lists all")
    return _joined(lines)


def _joined(lines: Sequence[str]) -> str:
    """The lines as text; a name with a line feed does not pass for a line of its own."""
    return "\n".join(line.replace("\n", " ") for line in lines)
