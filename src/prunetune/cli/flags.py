"""Options as flags: an all-optional twin of a config, derived, so that each option is still written once."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any, Optional

from cyclopts import Parameter


def make_flags_class(cls: type[Any]) -> type[Any]:
    """A dataclass with the same fields, each None unless given, with help and default in its flag's text.

    An option's name of the version before is a flag, too, which no help shows.
    """
    return _flags_class(cls, show=True)


def _flags_class(cls: type[Any], *, show: bool) -> type[Any]:
    kinds = typing.get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(cls):
        kind = item.metadata.get("flag_type") or kinds[item.name]
        old = item.metadata.get("formerly")
        for name in (item.name, old) if old else (item.name,):
            visible = show and name == item.name
            if dataclasses.is_dataclass(kind):
                below = _flags_class(typing.cast(Any, kind), show=visible)
                fields.append((name, Optional[below], None))  # noqa: UP045 - built at run time
            else:
                fields.append((name, Annotated[kind | None, _flag(item, kind, show=visible)], None))
    twin = dataclasses.make_dataclass(
        f"{cls.__name__}Flags", [(name, kind, dataclasses.field(default=default)) for name, kind, default in fields],
        frozen=True, kw_only=True,
    )  # fmt: skip
    twin.__module__ = __name__  # cyclopts looks inside classes of modules it does not take for built-in
    return twin


def _flag(item: Any, kind: Any, *, show: bool) -> Parameter:
    alias = item.metadata.get("flag_alias") if show else None
    return Parameter(help=_help(item), negative=_negative(kind), alias=alias, show=show)


def _negative(kind: Any) -> tuple[str, ...] | None:
    return () if typing.get_origin(kind) is tuple else None


def _help(item: dataclasses.Field[Any]) -> str:
    default = item.default
    shown = "" if default in ((), "", dataclasses.MISSING) else f" [default: {default}]"
    return f"{item.metadata['help']}{shown}"


def flags_to_overrides(flags: Any) -> dict[str, Any]:
    """The flags that were given, nested as a recipe."""
    if flags is None:
        return {}
    values = {item.name: getattr(flags, item.name) for item in dataclasses.fields(flags)}
    nested = {
        name: flags_to_overrides(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()
    }
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in nested.items()
        if value not in (None, {})
    }
