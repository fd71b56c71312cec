"""Options as dataclass fields: each holds type, default, help and bounds, by which values are read and checked."""

import dataclasses
import logging
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

from prunetune.errors import ConfigError
from prunetune.utils.suggest import did_you_mean, similar_names
from prunetune.utils.untrusted import short_repr, shorten

log = logging.getLogger(__name__)
# Options, and values of options, of earlier versions that are gone: what there is now, and what to do. A recipe that
# names one is an error; the recipe that a run folder keeps loses it.
RETIRED = {
    "search.gates": "the generator's gates are always draws, as in ATP's code: leave it out",
    "search.step": "the generator always learns on its own batches: leave it out",
    "search.anneal": "the generator's budget is a loss and needs no annealing: leave it out",
    "search.hard": "the generator always learns with soft gates, as in ATP's code: leave it out",
    "search.straight_through": "the generator always learns with soft gates, as in ATP's code: leave it out",
    "search.generator": "the generator is always ATP's transformer: leave it out",
    "search.lora_aware": "adapters always learn with y = gate * (W x) + B A x, as in ATP: leave it out",
    "search.lasso": "the group lasso has the weights of ATP's code: leave it out, or set search.sparsity off",
    "search.sparsity=proximal": "removed units' adapters shrink by a group lasso: set search.sparsity lasso or off",
}
# Turns one entry as written, and the option's name for errors, into its value; raises `ConfigError`.
Parse = Callable[[Any, str], Any]


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    parse: Parse | None = None,
    entry_name: str = "text",
    accepts_number: bool = False,
    flag_type: type[Any] | None = None,
    flag_alias: str | None = None,
    formerly: str = "",
    is_path: bool = False,
) -> Any:
    """A field with its help text and bounds: at least `ge`, at most `le`, above `gt`.

    Bounds of a tuple are those of its entries. Further arguments, all optional:

    - `parse` reads the value, or each entry of a tuple, where a type and bounds do not say enough.
    - `entry_name` is the noun for one entry of a tuple of texts, in errors and in the docs.
    - `accepts_number` lets a text be written as a number.
    - `flag_type` is the type of the flag, where it accepts more than the field.
    - `flag_alias` is a second name of the flag.
    - `formerly` is the option's name in the version before, under which it is still read.
    - `is_path`: in a recipe, a relative path starts from the recipe's folder.
    """
    metadata: dict[str, Any] = {"help": help, "parse": parse, "entry_name": entry_name, "formerly": formerly}
    metadata["is_path"] = is_path
    metadata |= {"accepts_number": accepts_number, "flag_type": flag_type, "flag_alias": flag_alias}
    return field(default=default, metadata=metadata | {"ge": ge, "le": le, "gt": gt})


def sources(help: str, *, formerly: str = "") -> Any:
    """A field for data sources: none by default; each is text, or {source: ..., weight: ...}."""
    return option((), help, parse=parse_source, entry_name="source", formerly=formerly, is_path=True)


def section(cls: type[Any], *, formerly: str = "") -> Any:
    """A field that holds a dataclass of options."""
    return field(default_factory=cls, metadata={"formerly": formerly})


OptionsT = typing.TypeVar("OptionsT")


def read_options(cls: type[OptionsT], values: Any, *, where: str) -> OptionsT:
    """Build a dataclass of options from a mapping; raises `ConfigError` that begins with `where`."""
    options = _section(cls, with_current_names(cls, values), prefix="", where=where, root=cls)
    assert isinstance(options, cls)
    return options


def with_current_names(cls: type[Any], values: Any, *, prefix: str = "", quiet: bool = False) -> Any:
    """The mapping with old names of options replaced by current ones; a warning for each, unless `quiet`.

    `RETIRED` options are left out if `quiet`. Raises `ConfigError` for one otherwise, and for an option that is given
    under both names.
    """
    if not isinstance(values, Mapping):
        return values
    kinds = typing.get_type_hints(cls)
    current = dict(values)
    for name, value, advice in retired_options(prefix):
        if name in current and value in ("", current[name]):
            if not quiet:
                raise ConfigError(f"{prefix}{name} {short_repr(current[name])} is of an earlier version: {advice}")
            del current[name]
    for item in dataclasses.fields(cls):
        old = item.metadata.get("formerly")
        if old and old in current:
            if item.name in current:
                raise ConfigError(
                    f"{prefix}{item.name} and {prefix}{old} are one option, under its new and its old name: "
                    f"leave {prefix}{old} out"
                )
            current[item.name] = current.pop(old)
            if not quiet:
                log.warning(
                    "%s%s is now %s%s: the next version will not read the old name", prefix, old, prefix, item.name
                )
        if item.name in current and dataclasses.is_dataclass(kinds[item.name]):
            inner, kind = f"{prefix}{item.name}.", typing.cast(Any, kinds[item.name])
            current[item.name] = with_current_names(kind, current[item.name], prefix=inner, quiet=quiet)
    return current


def retired_options(prefix: str) -> list[tuple[str, str, str]]:
    """(name, value that is gone or "" for all, advice) of the `RETIRED` options of a section, "search." or ""."""
    split = [(*path.partition("="), advice) for path, advice in RETIRED.items()]
    return [
        (path.removeprefix(prefix), value, advice)
        for path, _, value, advice in split
        if path.rpartition(".")[0] == prefix.rstrip(".")
    ]


def _section(cls: type[Any], values: Any, *, prefix: str, where: str, root: type[Any]) -> Any:
    """Build the dataclass of one section; `prefix` is its path with a dot, `root` the class of the whole recipe."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.')} is a section with keys of its own, got {short_repr(values)}")
    kinds = typing.get_type_hints(cls)
    for key in values:
        if key not in kinds:
            # The option probably meant, the section it belongs to, or all keys there.
            text, known = shorten(str(key)), list(fields_by_path(root))
            close = [path for path in known if path.rpartition(".")[2] == text]
            close = close or similar_names(prefix + text, known, at_most=1)
            paths = dict.fromkeys(path.removeprefix(prefix).split(".")[0] for path in known if path.startswith(prefix))
            hint = f"known are {', '.join(prefix + name for name in paths)}"
            if close and close[0] == text:
                hint = f"write {text.rpartition('.')[2]} under {text.rpartition('.')[0]}:"
            elif close:
                hint = f"did you mean {close[0]}?"
            raise ConfigError(f"{where}: unknown key {prefix}{text}; {hint}")
    given = {}
    for item in dataclasses.fields(cls):
        name = item.name
        if name not in values:
            continue
        if dataclasses.is_dataclass(kinds[name]):
            given[name] = _section(kinds[name], values[name], prefix=f"{prefix}{name}.", where=where, root=root)
        else:
            given[name] = _value(item, kinds[name], values[name], f"{where}: {prefix}{name}")
    return cls(**given)


def fields_by_path(cls: type[Any], prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every option's dotted path with its field."""
    kinds = typing.get_type_hints(cls)
    fields: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kinds[item.name]):
            fields |= fields_by_path(typing.cast(Any, kinds[item.name]), f"{prefix}{item.name}.")
        else:
            fields[prefix + item.name] = item
    return fields


def _value(item: dataclasses.Field[Any], kind: Any, value: Any, name: str) -> Any:
    """The value of an option as its type, checked; `name` begins every error."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{name} must be a number of at most 18 digits, got {short_repr(value)}")
    if typing.get_origin(kind) is tuple:
        return _entries(item, typing.get_args(kind)[0], value, name)
    if item.metadata["parse"] is not None:
        return item.metadata["parse"](value, name)
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        value = ("on" if value else "off") if isinstance(value, bool) else value  # how YAML reads a bare on or off
        if value in allowed:
            return str(value)
        hint = did_you_mean(shorten(str(value)), allowed)
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {short_repr(value)}{hint and f'; {hint}'}")
    if item.metadata["accepts_number"] and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if kind is float:
        value = parse_number(value, name)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = {int: "a whole number", str: "text", bool: "true or false"}.get(kind, str(kind))
        raise ConfigError(f"{name} must be {expected}, got {short_repr(value)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high, above = (item.metadata[bound] for bound in ("ge", "le", "gt"))
        if not ((low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)):
            left = f"[{low:g}" if low is not None else f"({above:g}" if above is not None else "(-inf"
            right = f"{high:g}]" if high is not None else "inf)"
            raise ConfigError(f"{name} must lie in {left}, {right}, got {value:g}")
    return value


def parse_number(value: Any, name: str) -> float:
    """A finite number, also if it is written as text; raises `ConfigError` that begins with `name`."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan  # text, too: YAML reads 1e-3 as text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be a finite number, got {short_repr(value)}")
    return number


def _entries(item: dataclasses.Field[Any], kind: Any, value: Any, name: str) -> tuple[Any, ...]:
    """A list of values of `kind`, or its only entry."""
    is_text = kind is str or typing.get_origin(kind) is Literal
    is_single = isinstance(value, str | Mapping if is_text else int | float | str)
    entries = [value] if is_single else value
    if not isinstance(entries, Sequence):
        noun = item.metadata["entry_name"] if is_text else "number"
        raise ConfigError(f"{name} must be a {noun} or a list of {noun}s, got {short_repr(value)}")
    return tuple(_value(item, kind, entry, name) for entry in entries)


def parse_source(entry: Any, name: str) -> str:
    """A data source as text, its weight behind it: "a.jsonl*2"; raises `ConfigError`."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping) and set(entry) <= {"source", "weight"} and isinstance(entry.get("source"), str):
        weight = parse_number(entry.get("weight", 1), f"{name}: weight")
        return entry["source"] if weight == 1 else f"{entry['source']}*{weight:g}"
    raise ConfigError(f"{name}: a source is text, or {{source: ..., weight: ...}}, got {short_repr(entry)}")


def merge_mappings(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which `overrides` replaces values, section by section."""
    result = dict(base)
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge_mappings(old, value)
        result[key] = value
    return result
