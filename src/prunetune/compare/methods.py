"""What is held side by side: the methods of a comparison, by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prunetune.baselines.scores import BASELINES
from prunetune.config.fields import fields_by_path, merge_mappings, with_current_names
from prunetune.config.recipe import RunConfig, from_mapping, to_mapping
from prunetune.config.yaml_file import read_yaml
from prunetune.errors import ConfigError

MethodKind = Literal["untuned", "dense", "two-stage", "one-stage"]
NO_QUANTIZE = "models of a comparison share one dense model in memory, unquantised; leave lora.quantize out"
REFERENCE = "one-stage"  # what the others are held against
DENSE = "dense"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What a variant may change; the rest is read once, or is the same for all.
VARIANT_OPTIONS = (
    "search.",
    "train.",
    "lora.",
    "distill.",
    "budget.align",
    "budget.min_groups",
    "layout",
    "data.distill_texts",
)


@dataclass(frozen=True)
class Method:
    """A name in the table, and how its model comes about."""

    name: str
    kind: MethodKind
    baseline: str = ""  # whose plan a two-stage method takes
    uses_teacher: bool = False  # hears the recipe's teacher
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, nested

    @property
    def is_dense(self) -> bool:
        """Nothing is removed, so that the budget does not matter."""
        return self.kind in ("untuned", "dense")

    @property
    def own_learning_rate(self) -> float | None:
        """The learning rate that a variant brings along."""
        rate = self.overrides.get("train", {}).get("learning_rate")
        return None if rate is None else float(rate)


BUILT_IN = {
    "untuned": Method("untuned", "untuned"),
    DENSE: Method(DENSE, "dense"),
    **{name: Method(name, "two-stage", baseline=name) for name in BASELINES},
    REFERENCE: Method(REFERENCE, "one-stage", uses_teacher=True),
}


def resolve_methods(config: RunConfig) -> tuple[Method, ...]:
    """The methods that the recipe names, and its variants; raises `ConfigError`."""
    if config.lora.quantize != "off":
        raise ConfigError(f"compare: {NO_QUANTIZE}")
    variants = read_variants(Path(config.compare.variants), config) if config.compare.variants else {}
    known = {**BUILT_IN, **variants}
    names = dict.fromkeys(config.compare.methods)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"compare.methods: unknown method {name!r}; {hint}")
    if not names:
        raise ConfigError(f"compare.methods is empty; known are {', '.join(known)}")
    if not any(name in variants for name in names):
        names |= dict.fromkeys(variants)
    return tuple(known[name] for name in names)


def read_variants(path: Path, config: RunConfig) -> dict[str, Method]:
    """Name -> method of a YAML file of variants, each checked; raises `ConfigError`."""
    values = read_yaml(path, "what compare.variants names", "name a YAML file")
    if not values:
        raise ConfigError(f"{path}: holds no variant; a line such as 'small-rank: {{lora: {{rank: 8}}}}' is one")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: variants map names to changes of the recipe, this is a {type(values).__name__}")
    return {str(name): _variant(str(name), changes, f"{path}: {name}", config) for name, changes in values.items()}


def _variant(name: str, changes: Any, where: str, config: RunConfig) -> Method:
    if name in BUILT_IN or not NAME.fullmatch(name):
        raise ConfigError(f"{where}: a variant's name is letters, digits, dots and dashes, and none of {_built_in()}")
    if not isinstance(changes or {}, Mapping):
        raise ConfigError(f"{where}: a variant is a mapping of changes, got {changes!r}")
    rest = with_current_names(RunConfig, changes or {})
    flags = {key: rest.pop(key) for key in ("dense", "untuned", "two-stage") if key in rest}
    kinds: list[MethodKind] = [kind for kind in ("dense", "untuned", "two-stage") if flags.get(kind)]
    if len(kinds) > 1:
        raise ConfigError(f"{where}: {' and '.join(kinds)} exclude each other")
    kind: MethodKind = kinds[0] if kinds else "one-stage"
    baseline = flags["two-stage"] if kind == "two-stage" else ""
    if baseline and baseline not in BASELINES:
        raise ConfigError(f"{where}: two-stage must be one of {', '.join(BASELINES)}, got {baseline!r}")
    method = Method(name, kind, baseline, uses_teacher=kind in ("one-stage", "two-stage"), overrides=rest)
    apply_overrides(config, rest, where=where)
    for key in _leaves(rest):
        if not key.startswith(VARIANT_OPTIONS):
            raise ConfigError(
                f"{where}: {key} is the same for all methods; a variant may change {', '.join(VARIANT_OPTIONS)}"
            )
        if key == "lora.quantize":
            raise ConfigError(f"{where}: {NO_QUANTIZE}")
    return method


def _built_in() -> str:
    return ", ".join(BUILT_IN)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    options = fields_by_path(RunConfig)
    return [
        leaf
        for key, value in values.items()
        for leaf in ([prefix + key] if prefix + key in options or not value else _leaves(value, f"{prefix}{key}."))
    ]


def apply_overrides(config: RunConfig, overrides: Mapping[str, Any], *, where: str = "variant") -> RunConfig:
    """The recipe with changes; without a teacher there are no texts for it."""
    values = merge_mappings(to_mapping(config), overrides)
    if isinstance(values["distill"], Mapping) and values["distill"].get("teacher") == "none":
        values["data"] = {**values["data"], "distill_texts": []}
    return from_mapping(values, where=where)
