"""Limits on the scores of a task: absolute, relative to a reference model, or by a statistical test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.config.fields import option, read_options
from prunetune.errors import ConfigError
from prunetune.utils.suggest import validate_name
from prunetune.utils.untrusted import short_repr

UNSET = float("-inf")  # no bound; YAML cannot express it, so no user can have asked for it
DEFAULT_SIGNIFICANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The limits on one metric, as a suite writes them."""

    min: float = option(UNSET, "Lowest allowed score.")
    max: float = option(UNSET, "Highest allowed score (perplexity, bits per byte).")
    relative: float = option(
        UNSET, "Lowest allowed share of the reference's score; inverted where lower is better.", gt=0
    )
    drop: float = option(UNSET, "Largest allowed loss against the reference, in the metric's own unit.", ge=0)
    statistical: float = option(
        UNSET, "Significance level of a paired test that the score is worse than the reference's.", gt=0, le=0.5
    )


@dataclass(frozen=True)
class SuiteLimit:
    """One limit on one metric of one task."""

    task: str
    metric: str
    kind: str  # min, max, relative, drop, statistical
    bound: float  # for statistical: the level


def parse_limits(value: Any, task: str, metrics: Sequence[str], level: float, where: str) -> tuple[SuiteLimit, ...]:
    """The limits in a task's `limits`: bounds of its first metric, or metric -> bounds; raises `ConfigError`.

    `metrics` are those that the task's scorers give; where none are known (lm-eval's), any name is accepted.
    """
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}: limits maps min, max, relative, drop or statistical to a bound, got {short_repr(value)}"
        )
    if any(isinstance(bounds, Mapping) for bounds in value.values()):
        by_metric = dict(value)
    elif metrics:
        by_metric = {metrics[0]: value}
    else:
        raise ConfigError(f"{where}: limits of an lm_eval task name their metric, such as acc: {{relative: 0.95}}")
    limits = []
    for name, bounds in by_metric.items():
        metric = validate_name(str(name), metrics, f"{where}: limits: metric") if metrics else str(name)
        of_metric = f"{where}: limits.{name}"
        if not isinstance(bounds, Mapping):
            raise ConfigError(
                f"{of_metric} maps min, max, relative, drop or statistical to a bound, got {short_repr(bounds)}"
            )
        given = dict(bounds)
        if given.get("statistical") is True:
            given["statistical"] = level
        elif given.get("statistical") is False:
            del given["statistical"]
        kinds = vars(read_options(Bounds, given, where=of_metric))
        limits += [SuiteLimit(task, metric, kind, bound) for kind, bound in kinds.items() if bound != UNSET]
    return tuple(limits)
