"""Limits on the scores of validations (`limits:` in a recipe), and the action if one is broken.

It is written as text, so that it is one flag or one entry of a recipe: `guard.perplexity <= 1.5x -> roll-back`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

from prunetune.config.quantities import NUMBER
from prunetune.errors import ConfigError
from prunetune.utils.untrusted import short_repr

LimitAction = Literal["stop", "back-off", "roll-back"]
ACTIONS = get_args(LimitAction)
LIMITABLE_METRICS = (
    "valid.nll", "valid.perplexity", "valid.accuracy", "guard.nll", "guard.perplexity", "guard.accuracy",
)  # fmt: skip
QUALITY = "valid.quality"  # of `budget.quality`: what is kept of the tuned dense model's scores
STAGE_SCORE = "quality."  # in front of the scores that `budget.quality_limits` names
LIMIT_PATTERN = re.compile(
    rf"(?P<metric>[\w.]+)\s*(?P<side><=|>=)\s*(?P<value>{NUMBER})(?P<relative>x?)\s*->\s*(?P<action>[\w-]+)"
)
EXAMPLE = "guard.perplexity <= 1.5x -> roll-back"


@dataclass(frozen=True)
class ScoreLimit:
    """A limit on one metric of the validations: on its value, or on its ratio to the dense model's (`is_relative`)."""

    metric: str
    comparison: Literal["<=", ">="]
    value: float
    is_relative: bool
    action: LimitAction

    @property
    def is_of_stages(self) -> bool:
        """Whether it holds for a stage that is tuned to its end, and not for every validation."""
        return self.metric == QUALITY or self.metric.startswith(STAGE_SCORE)

    @classmethod
    def of_stages(cls, text: str) -> Self:
        """The limit of an entry of `budget.quality_limits`, as `normalize_quality_limit` gives it."""
        name, _, value = text.rpartition("=")
        lower_is_better = name.rpartition(".")[2] == "nll"
        return cls(f"{STAGE_SCORE}{name}", "<=" if lower_is_better else ">=", float(value), False, "roll-back")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a limit from the text that `str` gives; raises `ConfigError`."""
        match = LIMIT_PATTERN.fullmatch(text.strip())
        if match is None or not math.isfinite(float(match["value"])):
            raise ConfigError(
                f"limits: {short_repr(text)} is no limit; write one such as '{EXAMPLE}' (1.5x: of the dense model)"
            )
        metric, action = match["metric"], match["action"]
        if metric not in LIMITABLE_METRICS:
            raise ConfigError(
                f"limits: unknown metric {short_repr(metric)} in {short_repr(text)}; "
                f"known are {', '.join(LIMITABLE_METRICS)}"
            )
        if action not in ACTIONS:
            raise ConfigError(
                f"limits: unknown action {short_repr(action)} in {short_repr(text)}; known are {', '.join(ACTIONS)}"
            )
        side = "<=" if match["side"] == "<=" else ">="
        if (side == ">=") != metric.endswith("accuracy"):
            better = "at least (>=)" if metric.endswith("accuracy") else "at most (<=)"
            raise ConfigError(
                f"limits: {short_repr(text)} would refuse what is good; {metric} has to be {better} a value"
            )
        return cls(metric, cast(Any, side), float(match["value"]), bool(match["relative"]), cast(LimitAction, action))

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.value:g}{'x' if self.is_relative else ''} -> {self.action}"

    def threshold(self, dense_scores: Mapping[str, float]) -> float:
        """The number that the metric is compared with; `dense_scores` are the dense model's at the start of the run."""
        return self.value * dense_scores[self.metric] if self.is_relative else self.value

    def is_met(self, scores: Mapping[str, float], dense_scores: Mapping[str, float]) -> bool:
        """Whether the metric is within its limit; NaN or a missing metric is not."""
        score, limit = scores.get(self.metric, math.nan), self.threshold(dense_scores)
        return score <= limit if self.comparison == "<=" else score >= limit

    def describe(self, scores: Mapping[str, float], dense_scores: Mapping[str, float]) -> str:
        """The metric and its limit in words."""
        side = {"<=": "at most", ">=": "at least"}[self.comparison]
        score, threshold = scores.get(self.metric, math.nan), self.threshold(dense_scores)
        return f"{self.metric} is {score:.4g} and has to be {side} {threshold:.4g}"


def normalize_limit(entry: Any, name: str = "limits") -> str:
    """A limit of a recipe as text, which may be written as {metric, max or min, action}; raises `ConfigError`."""
    if isinstance(entry, str):
        return str(ScoreLimit.parse(entry))
    if isinstance(entry, Mapping) and set(entry) in ({"metric", "max", "action"}, {"metric", "min", "action"}):
        side, value = ("<=", entry["max"]) if "max" in entry else (">=", entry["min"])
        return str(ScoreLimit.parse(f"{entry['metric']} {side} {value} -> {entry['action']}"))
    raise ConfigError(
        f"{name}: a limit is text such as '{EXAMPLE}', or metric, max or min, and action; this is {short_repr(entry)}: "
        "correct it"
    )


def normalize_quality_limit(entry: Any, name: str = "budget.quality_limits") -> str:
    """NAME=VALUE of a score and its limit; a task alone is its accuracy. Raises `ConfigError`."""
    score, equals, value = str(entry).rpartition("=")
    score = score.strip()
    if not (score and equals and re.fullmatch(NUMBER, value.strip()) and math.isfinite(float(value))):
        raise ConfigError(
            f"{name}: {short_repr(entry)} is no limit; write a score and its value such as triage=0.6 (accuracy), "
            "triage.nll=1.2, or accuracy=0.7 and nll=1.3 (means over tasks)"
        )
    is_metric = score.rpartition(".")[2] in ("accuracy", "nll")
    return f"{score if is_metric else f'{score}.accuracy'}={float(value):g}"
