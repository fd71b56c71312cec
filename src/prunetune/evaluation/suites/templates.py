"""Jinja2 templates and expressions over the fields of a row, sandboxed: a suite file must not run code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from prunetune.errors import ConfigError, DataError

RowRenderer = Callable[[Mapping[str, Any], str], Any]  # fields of a row, "file:line" -> the rendered value


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def compile_template(text: str, where: str) -> RowRenderer:
    """Compile a text with `{{ field }}`; raises `ConfigError` where it is no template."""
    from jinja2 import TemplateError

    try:
        compiled = _environment().from_string(text)
    except TemplateError as broken:
        raise ConfigError(f"{where} is not a Jinja2 template ({_line(broken)})") from broken
    return _with_row_errors(lambda fields: compiled.render(fields), where)


def compile_expression(text: str, where: str) -> RowRenderer:
    """Compile an expression over fields, such as `options.text`; its value keeps its type. Raises `ConfigError`."""
    from jinja2 import TemplateError

    try:
        compiled = _environment().compile_expression(text, undefined_to_none=False)
    except TemplateError as broken:
        raise ConfigError(f"{where} is not a Jinja2 expression ({_line(broken)})") from broken
    return _with_row_errors(lambda fields: _defined(compiled(**fields)), where)


def _with_row_errors(call: Callable[[Mapping[str, Any]], Any], where: str) -> RowRenderer:
    def render(fields: Mapping[str, Any], source: str) -> Any:
        try:
            return call(fields)
        # An expression can fail in any way on a row of the wrong shape: the error names the row.
        except Exception as broken:
            known = ", ".join(sorted(map(str, fields)))
            raise DataError(f"{source}: {where}: {_line(broken)}; the row has {known}") from broken

    return render


def _defined(value: Any) -> Any:
    str(value)  # raises where a field is undefined
    return value


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
