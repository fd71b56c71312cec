"""The page of a check (`prunetune check --html`): limits, scores beside the reference's, and what newly fails."""

import math

from prunetune.evaluation.results import Score, is_hidden
from prunetune.evaluation.suites.check import CheckResult
from prunetune.report.page import template_environment
from prunetune.utils.untrusted import printable

LISTED = 50  # most new failures on the page; --json and --junit have more


def render_check_page(check: CheckResult, model: str, suite: str) -> str:
    """One HTML file that needs nothing else; texts of rows are as the check shows them."""
    scores = [
        (task, metric, value, reference, Score(*check.differences.get(task, {}).get(metric, (math.nan, math.nan)), 0))
        for task, metrics in check.scores.items()
        for metric, (value, reference) in metrics.items()
    ]
    page = (
        template_environment()
        .get_template("check.html.j2")
        .render(
            check=check,
            model=model,
            suite=suite,
            verdict=_verdict(check),
            scores=scores,
            shown=[failure for failure in check.failures if not is_hidden(failure.prompt)][:LISTED],
        )
    )
    return printable(page)


def _verdict(check: CheckResult) -> str:
    """The outcome in a sentence."""
    count = len(check.verdicts)
    unjudged = f"{len(check.errors)} task{'s' * (len(check.errors) != 1)} could not be judged" if check.errors else ""
    if check.broken:
        words = f"{len(check.broken)} of {count} limits broken"
    else:
        words = f"{f'All {count} limits hold' if count > 1 else 'The limit holds' if count else 'No limit'}"
    return "; ".join(filter(None, (words, unjudged)))
