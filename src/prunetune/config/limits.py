"""Limits on what a run may lose while it tunes and prunes, and what happens where one is crossed.

Written as text, so that a gate is one flag or one entry of a recipe: `guard.perplexity <= 1.5x -> roll-back`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from prunetune.errors import ConfigError

Action = Literal["stop", "back-off", "roll-back"]
METRICS = (
    "valid.nll", "valid.perplexity", "valid.accuracy", "guard.nll", "guard.perplexity", "guard.accuracy",
)  # fmt: skip
FORM = re.compile(
    r"(?P<metric>[\w.]+)\s*(?P<side><=|>=)\s*(?P<value>\d+\.?\d*(?:e[-+]?\d+)?)(?P<relative>x?)\s*->\s*(?P<action>[\w-]+)"
)
EXAMPLE = "guard.perplexity <= 1.5x -> roll-back"


@dataclass(frozen=True)
class Gate:
    """A limit on one metric of the validations: `value` itself, or that many times the dense model's (`relative`)."""

    metric: str
    side: Literal["<=", ">="]
    value: float
    relative: bool
    action: Action

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read what `str` wrote; raises `ConfigError`."""
        match = FORM.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"gates: {text!r} is no gate; write one such as '{EXAMPLE}' (1.5x: of the dense model)")
        metric, action = match["metric"], match["action"]
        if metric not in METRICS:
            raise ConfigError(f"gates: unknown metric {metric!r} in {text!r}; known are {', '.join(METRICS)}")
        if action not in get_args(Action):
            raise ConfigError(f"gates: unknown action {action!r} in {text!r}; known are {', '.join(get_args(Action))}")
        side = "<=" if match["side"] == "<=" else ">="
        if (side == ">=") != metric.endswith("accuracy"):
            better = "at least (>=)" if metric.endswith("accuracy") else "at most (<=)"
            raise ConfigError(f"gates: {text!r} would refuse what is good; {metric} has to be {better} a value")
        return cls(metric, cast(Any, side), float(match["value"]), bool(match["relative"]), cast(Action, action))

    def __str__(self) -> str:
        return f"{self.metric} {self.side} {self.value:g}{'x' if self.relative else ''} -> {self.action}"

    def limit(self, dense: Mapping[str, float]) -> float:
        """The number that the metric is held against; `dense` is what the dense model scored as the run began."""
        return self.value * dense[self.metric] if self.relative else self.value

    def holds(self, scores: Mapping[str, float], dense: Mapping[str, float]) -> bool:
        """Whether the metric is within its limit; NaN is not."""
        found, limit = scores.get(self.metric, math.nan), self.limit(dense)
        return found <= limit if self.side == "<=" else found >= limit

    def words(self, scores: Mapping[str, float], dense: Mapping[str, float]) -> str:
        """The metric beside its limit, for people."""
        side = {"<=": "at most", ">=": "at least"}[self.side]
        return f"{self.metric} is {scores.get(self.metric, math.nan):.4g} and has to be {side} {self.limit(dense):.4g}"


def gate_text(entry: Any) -> str:
    """A gate of a recipe as its text: written so, or as {metric, max or min, action}; raises `ConfigError`."""
    if isinstance(entry, str):
        return str(Gate.parse(entry))
    if isinstance(entry, Mapping) and set(entry) in ({"metric", "max", "action"}, {"metric", "min", "action"}):
        side, value = ("<=", entry["max"]) if "max" in entry else (">=", entry["min"])
        return str(Gate.parse(f"{entry['metric']} {side} {value} -> {entry['action']}"))
    raise ConfigError(
        f"gates: a gate is text such as '{EXAMPLE}', or metric, max or min, and action; this is {entry!r}: correct it"
    )
