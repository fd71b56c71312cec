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
    count, errors = len(check.verdicts), len(check.errors)
    holds = f"All {count} limits hold" if count > 1 else "The limit holds" if count else "No limit"
    verdict = f"{len(check.broken)} of {count} limits broken" if check.broken else holds
    verdict += f"; {errors} task{'s' * (errors != 1)} could not be judged" if errors else ""
    shown = [failure for failure in check.failures if not is_hidden(failure.prompt)][:LISTED]
    template = template_environment().get_template("check.html.j2")
    return printable(
        template.render(check=check, model=model, suite=suite, verdict=verdict, scores=scores, shown=shown)
    )
