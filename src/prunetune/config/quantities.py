"""Amounts in budgets: a share of the dense model's, or FLOPs, bytes, seconds or tokens a second with a unit.

An amount is written as text, so that a budget is one flag or one entry of a recipe: `0.6`, `60%`, `1.5GB`, `25ms`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from prunetune.errors import ConfigError
from prunetune.utils.untrusted import short_repr

# No text is matched in more than a few ways, so that a long one is refused at once.
NUMBER = r"\d+(?:\.\d*)?(?:e[-+]?\d+)?"
AMOUNT_PATTERN = re.compile(rf"(?P<number>{NUMBER}|\.\d+)\s*(?P<unit>(?!\d)[\w/%]*)", re.IGNORECASE)
BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
FLOPS = {"M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "MFLOPs": 1e6, "GFLOPs": 1e9, "TFLOPs": 1e12, "PFLOPs": 1e15}
UNITS: Mapping[str, Mapping[str, float]] = {
    "flops": FLOPS,
    "memory": BYTES,
    "file": BYTES,
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "throughput": {"tokens/s": 1.0, "/s": 1.0},
}
EXAMPLES = {"flops": "1.2T", "memory": "1.5GB", "file": "800MB", "latency": "25ms", "throughput": "300/s"}
MAX_PLAUSIBLE_SPEEDUP = 20.0  # times the dense model's: a number alone that is larger was meant as tokens a second
DISPLAY_UNITS = {"flops": ("P", "T", "G", "M"), "memory": ("GB", "MB", "kB", "B"), "latency": ("s", "ms", "us")}


@dataclass(frozen=True)
class Amount:
    """`value` in FLOPs, bytes, seconds or tokens a second; or, if `is_share`, as a multiple of the dense model's."""

    value: float
    is_share: bool

    @classmethod
    def parse(cls, text: str, kind: str) -> Self:
        """Read an amount; a number without a unit is a share. Raises `ConfigError`."""
        match = AMOUNT_PATTERN.fullmatch(text.strip())
        value, unit = (float(match["number"]), match["unit"]) if match else (math.nan, "")
        is_share = unit in ("", "x", "%")
        factor = {name.lower(): scale for name, scale in UNITS[kind].items()}.get(unit.lower(), math.nan)
        amount = value * ((0.01 if unit == "%" else 1.0) if is_share else factor)
        share = "1.5x, of the dense model's" if kind == "throughput" else "0.6 or 60%, of the dense model's"
        if not math.isfinite(amount) or value <= 0:
            raise ConfigError(
                f"budget.{kind}: {short_repr(text)} is no amount above 0; write {EXAMPLES[kind]}, or {share}"
            )
        if is_share and (amount > 1) != (kind == "throughput") and amount != 1:
            raise ConfigError(
                f"budget.{kind}: {short_repr(text)} is no share of the dense model's that makes it smaller or faster: "
                f"write {share}, or give a unit, as in {EXAMPLES[kind]}"
            )
        if not unit and value > MAX_PLAUSIBLE_SPEEDUP:
            raise ConfigError(
                f"budget.{kind}: {short_repr(text)} alone would be {value:g} times the dense model's: "
                f"write {value:g}/s for tokens a second, or {value:g}x"
            )
        return cls(amount, is_share)

    def resolve(self, dense: float) -> float:
        """The amount in its own unit, for a dense model that costs `dense`."""
        return self.value * dense if self.is_share else self.value


def parse_vocab_size(value: Any, name: str) -> str:
    """Read `budget.vocab`: off, auto, a number of tokens (32000), or a share of them (0.25); raises `ConfigError`."""
    text = "off" if value is False else str(value).strip().lower()  # YAML reads a bare off as false
    if text in ("off", "auto"):
        return text
    match = re.fullmatch(rf"({NUMBER}|\.\d+)(%?)", text)
    size = float(match[1]) * (0.01 if match[2] else 1.0) if match else math.nan
    if not 0 < size < 1e9 or (size > 1 and size != int(size)):
        raise ConfigError(
            f"{name} must be off, auto, a number of tokens such as 32000, or a share of them such as 0.25 or 25%, got "
            f"{short_repr(value)}"
        )
    return f"{size:.10g}"


def format_amount(value: float, kind: str, digits: int = 4) -> str:
    """An amount as text, in the largest unit that fits and that `Amount.parse` reads."""
    name, scale = _display_unit(value, kind)
    return f"{value / scale:.{digits}g}{name}"


def format_amount_rounded_to_limit(value: float, kind: str) -> str:
    """The same with five digits, rounded so that a limit on it is still met: down for a rate, up for all else."""
    name, scale = _display_unit(value, kind)
    number = value / scale
    step = 10.0 ** (math.floor(math.log10(number)) - 4) if number > 0 else 1.0
    whole = math.floor(number / step * (1 - 1e-9)) if kind == "throughput" else math.ceil(number / step * (1 + 1e-9))
    return f"{whole * step:.10g}{name}"


def _display_unit(value: float, kind: str) -> tuple[str, float]:
    names = ("/s",) if kind == "throughput" else DISPLAY_UNITS.get(kind, DISPLAY_UNITS["memory"])
    name = next((name for name in names if value >= UNITS[kind][name]), names[-1])
    return name, UNITS[kind][name]
