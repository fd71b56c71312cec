"""Flags derived from dataclasses of options, and the recipe values that given flags override."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Optional

from cyclopts import Group, Parameter, Token, convert

from prunetune.config.fields import retired_options

NAMES = ("name", "tracker")  # entries that hold no comma
# What a run is mostly told: the first group of its help.
ESSENTIAL_OPTIONS = (
    "model", "out", "seed", "layout", "data.train", "data.test", "budget.keep", "train.steps", "train.learning_rate",
    "lora.rank",
)  # fmt: skip
ESSENTIAL = Group("Essential options", sort_key=1)
PARAMETERS = Group.create_default_parameters()  # that of options of a command which has no sections


def make_flags_class(cls: type[Any]) -> type[Any]:
    """A dataclass with the fields of `cls`, each None unless its flag is given, with help and default in its text.

    The name that an option had in the version before is a flag too, and so is a retired option, whose error then says
    what to do; `--help` lists neither, and groups the options of a recipe by their sections.
    """
    has_sections = any(dataclasses.is_dataclass(kind) for kind in typing.get_type_hints(cls).values())
    return _flags_class(cls, "", show=True, group=Group("Further options", sort_key=2) if has_sections else PARAMETERS)


def _flags_class(cls: type[Any], prefix: str, *, show: bool, group: Group) -> type[Any]:
    kinds = typing.get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = []
    for number, item in enumerate(dataclasses.fields(cls)):
        kind, path = item.metadata.get("flag_type") or kinds[item.name], prefix + item.name
        old = item.metadata.get("formerly")
        about = " ".join((kind.__doc__ or "").split())
        section = Group(path, help=about, sort_key=group.sort_key if prefix else 3 + number)
        for name in (item.name, old) if old else (item.name,):
            is_shown = show and name == item.name
            if dataclasses.is_dataclass(kind):
                inner = _flags_class(typing.cast(Any, kind), f"{path}.", show=is_shown, group=section)
                fields.append((name, Optional[inner], None))  # noqa: UP045 - built at run time
            else:
                flag = _flag(item, kind, ESSENTIAL if path in ESSENTIAL_OPTIONS else group, show=is_shown)
                fields.append((name, Annotated[kind | None, flag], None))
    hidden = Annotated[str | None, Parameter(show=False)]
    fields += [(name, hidden, None) for name, value, _ in retired_options(prefix) if not value]
    flags_class = dataclasses.make_dataclass(
        f"{cls.__name__}Flags", [(name, kind, dataclasses.field(default=default)) for name, kind, default in fields],
        frozen=True, kw_only=True,
    )  # fmt: skip
    flags_class.__module__ = __name__  # cyclopts looks only inside classes whose module is not built-in
    return flags_class


def _flag(item: Any, kind: Any, group: Group, *, show: bool) -> Parameter:
    value = ", ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
    default = "" if value in ("", dataclasses.MISSING) else f" [default: {value}]"
    is_list = typing.get_origin(kind) is tuple
    is_text = is_list and typing.get_args(kind)[0] is str
    return Parameter(
        # Numbers and names may stand in one flag, by commas; texts such as paths may hold commas.
        converter=_split_at_commas if is_list and (not is_text or item.metadata["entry_name"] in NAMES) else None,
        help=f"{item.metadata['help']}{default}",
        negative=() if is_list else None,  # no --no-NAME and --empty-NAME for lists
        alias=item.metadata.get("flag_alias") if show else None,
        group=group,
        show=show,
    )


def _split_at_commas(kind: Any, tokens: Sequence[Token]) -> Any:
    return convert(kind, [token.evolve(value=part) for token in tokens for part in token.value.split(",")])


def flags_to_overrides(flags: Any) -> dict[str, Any]:
    """The values of the flags that were given, nested as in a recipe."""
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
