"""The methods that a comparison compares: built-in ones by name, and variants of the recipe from a YAML file."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prunetune.baselines import BASELINES
from prunetune.config.fields import fields_by_path, with_current_names
from prunetune.config.recipe import RunConfig, from_mapping, load_recipe, merge_options, to_mapping
from prunetune.config.yaml_file import read_yaml
from prunetune.errors import ConfigError
from prunetune.utils.files import expand_path
from prunetune.utils.suggest import did_you_mean
from prunetune.utils.untrusted import short_repr

log = logging.getLogger(__name__)

MethodKind = Literal["untuned", "dense", "two-stage", "progressive"]
NO_QUANTIZE = "models of a comparison share one dense model in memory, unquantised; leave lora.quantize out"
REFERENCE = "progressive"  # the recipe's own method, that others are compared with
OLD_REFERENCE = "one-stage"  # its name in version 0.1.0
DENSE = "dense"  # tuned by LoRA: also the teacher
DENSE_EQUAL_HELP = "dense-equal-help"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Options that a variant may change; the others are read once for all cells.
VARIANT_OPTIONS = (
    "search.", "train.", "lora.", "distill.", "budget.align", "budget.min_groups", "budget.units", "layout",
    "data.distill_texts",
)  # fmt: skip

# Of further recipes not read.
NOT_OF_A_METHOD = ("out", "device", "report_to", "trust_remote_code", "report", "compare")


@dataclass(frozen=True)
class Method:
    """A name in the table, and how its model is trained."""

    name: str
    kind: MethodKind
    baseline: str = ""  # two-stage: the baseline that gives the plan
    equal_help: bool = False  # the recipe's teacher, texts, rank and optimiser; else plain LoRA without a teacher
    overrides: Mapping[str, Any] = field(default_factory=dict)  # changes of the recipe, nested

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed, so that the budget does not matter."""
        return self.kind in ("untuned", "dense")

    @property
    def own_learning_rate(self) -> float | None:
        """The learning rate that a variant sets, if it sets one."""
        rate = self.overrides.get("train", {}).get("learning_rate")
        if rate in ("auto", 0):
            raise ConfigError(f"variant {self.name}: train.learning_rate auto is of one run: name a number")
        return None if rate is None else float(rate)


def built_in_methods(help: str = "equal") -> dict[str, Method]:
    """Name -> method of all that need no file of variants, every registered baseline among them.

    `help` is `compare.help`: whether baselines get what the recipe gives to its own method.
    """
    return {
        "untuned": Method("untuned", "untuned"),
        DENSE: Method(DENSE, "dense"),
        DENSE_EQUAL_HELP: Method(DENSE_EQUAL_HELP, "dense", equal_help=True),
        **{name: Method(name, "two-stage", baseline=name, equal_help=help == "equal") for name in BASELINES},
        REFERENCE: Method(REFERENCE, "progressive", equal_help=True),
    }


def resolve_methods(config: RunConfig) -> tuple[Method, ...]:
    """The methods that `compare.methods` names, and all variants unless it names some; raises `ConfigError`."""
    if config.lora.quantize != "off":
        raise ConfigError(f"compare: {NO_QUANTIZE}")
    variants = read_variants(expand_path(config.compare.variants), config) if config.compare.variants else {}
    variants |= read_recipes(config, taken=variants)
    known = {**built_in_methods(config.compare.help), **variants}
    names = dict.fromkeys(config.compare.methods)
    if OLD_REFERENCE in names and OLD_REFERENCE not in known:
        # Under its old name, so that cells of a comparison of version 0.1.0 are found again.
        log.warning(
            "compare.methods: %s is now %s: the next version will not read the old name", OLD_REFERENCE, REFERENCE
        )
        known[OLD_REFERENCE] = replace(known[REFERENCE], name=OLD_REFERENCE)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"known are {', '.join(known)}"
            raise ConfigError(f"compare.methods: unknown method {short_repr(name)}; {hint}")
    if not names:
        raise ConfigError(f"compare.methods is empty; known are {', '.join(known)}")
    if not any(name in variants for name in names):
        names |= dict.fromkeys(variants)
    return tuple(known[name] for name in names)


def read_variants(path: Path, config: RunConfig) -> dict[str, Method]:
    """Read a YAML file of variants, and check each; name -> method. Raises `ConfigError`."""
    values = read_yaml(path, "what compare.variants names", "name a YAML file")
    if not values:
        raise ConfigError(f"{path}: holds no variant; write one as 'small-rank: {{lora: {{rank: 8}}}}'")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: variants map names to changes of the recipe, this is a {type(values).__name__}")
    return {str(name): _variant(str(name), changes, f"{path}: {name}", config) for name, changes in values.items()}


def read_recipes(config: RunConfig, taken: Collection[str] = ()) -> dict[str, Method]:
    """Each of `compare.recipes` as a variant: what it says otherwise than `config`, but for options `NOT_OF_A_METHOD`.

    Raises `ConfigError`.
    """
    methods: dict[str, Method] = {}
    own = {name: to_mapping(config)[name] for name in NOT_OF_A_METHOD}
    for path in map(expand_path, config.compare.recipes):
        if path.stem in {*taken, *methods}:
            raise ConfigError(f"compare.recipes: two methods would be called {path.stem}: rename {path}")
        changes = _differences(to_mapping(config), to_mapping(load_recipe(path)) | own)
        methods[path.stem] = _variant(path.stem, changes, str(path), config)
    return methods


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _differences(before[name], value) if isinstance(value, Mapping) else value
        for name, value in after.items()
        if value != before[name]
    }


def _variant(name: str, changes: Any, where: str, config: RunConfig) -> Method:
    built_in = built_in_methods()
    if name in built_in or not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"{where}: a variant's name is letters, digits, dots and dashes, and none of {', '.join(built_in)}"
        )
    if not isinstance(changes or {}, Mapping):
        raise ConfigError(f"{where}: a variant is a mapping of changes, got {short_repr(changes)}")
    overrides = with_current_names(RunConfig, changes or {})
    flags = {key: overrides.pop(key) for key in ("dense", "untuned", "two-stage") if key in overrides}
    kinds: list[MethodKind] = [kind for kind in ("dense", "untuned", "two-stage") if flags.get(kind)]
    if len(kinds) > 1:
        raise ConfigError(f"{where}: {' and '.join(kinds)} exclude each other")
    kind: MethodKind = kinds[0] if kinds else "progressive"
    baseline = flags["two-stage"] if kind == "two-stage" else ""
    if baseline and baseline not in BASELINES:
        raise ConfigError(f"{where}: two-stage must be one of {', '.join(BASELINES)}, got {short_repr(baseline)}")
    method = Method(name, kind, baseline, equal_help=kind in ("progressive", "two-stage"), overrides=overrides)
    apply_overrides(config, overrides, where=where)  # checks them
    for key in _changed_options(overrides):
        if not key.startswith(VARIANT_OPTIONS):
            raise ConfigError(
                f"{where}: {key} is the same for all methods; a variant may change {', '.join(VARIANT_OPTIONS)}"
            )
        if key == "train.epochs":
            raise ConfigError(f"{where}: train.epochs becomes steps once, for all methods: name train.steps")
        if key == "lora.quantize":
            raise ConfigError(f"{where}: {NO_QUANTIZE}")
    return method


def _changed_options(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of the options that a nested mapping changes."""
    options = fields_by_path(RunConfig)
    for key, value in values.items():
        if prefix + key in options or not value:
            yield prefix + key
        else:
            yield from _changed_options(value, f"{prefix}{key}.")


def apply_overrides(config: RunConfig, overrides: Mapping[str, Any], *, where: str = "variant") -> RunConfig:
    """The recipe with changes; if these turn the teacher off, the texts for distillation go too."""
    values = merge_options(to_mapping(config), overrides)
    if isinstance(values["distill"], Mapping) and values["distill"].get("teacher") == "none":
        values["data"] = {**values["data"], "distill_texts": []}
    return from_mapping(values, where=where)
