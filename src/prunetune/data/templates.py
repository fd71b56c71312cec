"""Jinja2 templates and expressions over the fields of a row, sandboxed and bounded: no template runs code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from prunetune.errors import ConfigError, DataError
from prunetune.utils.deadline import RENDER_SECONDS, call_within
from prunetune.utils.untrusted import short_repr

MAX_SIZE = 1_000_000  # of a product of texts, in characters, and of a power, in bits
RowRenderer = Callable[[Mapping[str, Any], str], Any]  # fields of a row, "file:line" -> the rendered value


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})  # which are then not computed while a template is compiled

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                size = left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 1
            else:  # a text or list, and how often it is repeated
                length, count = (len(value) if hasattr(value, "__len__") else value for value in (left, right))
                size = length * count if hasattr(left, "__len__") or hasattr(right, "__len__") else 1
            if size > MAX_SIZE:
                raise SecurityError(f"{operator} gives more than {MAX_SIZE:,} bits or characters")
            return super().call_binop(context, operator, left, right)

    return BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def compile_template(text: str, where: str) -> RowRenderer:
    """Compile a text with `{{ field }}`; raises `ConfigError` where it is no template."""
    from jinja2 import TemplateError

    try:
        compiled = _environment().from_string(text)
    except (TemplateError, RecursionError, ValueError) as broken:  # too deep, a number of too many digits
        raise ConfigError(f"{where} is not a Jinja2 template ({_line(broken)})") from broken
    return _with_row_errors(lambda fields: compiled.render(fields), where)


def compile_expression(text: str, where: str) -> RowRenderer:
    """Compile an expression over fields, such as `options.text`; its value keeps its type. Raises `ConfigError`."""
    from jinja2 import TemplateError

    try:
        compiled = _environment().compile_expression(text, undefined_to_none=False)
    except (TemplateError, RecursionError, ValueError) as broken:
        raise ConfigError(f"{where} is not a Jinja2 expression ({_line(broken)})") from broken
    return _with_row_errors(lambda fields: _defined(compiled(**fields)), where)


def template_names(text: str) -> frozenset[str]:
    """The fields that a template reads; raises `ConfigError` where it is none."""
    from jinja2 import TemplateError, meta

    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(text)))
    except (TemplateError, RecursionError, ValueError) as broken:
        raise ConfigError(f"{short_repr(text)} is not a Jinja2 template ({_line(broken)})") from broken


def _with_row_errors(call: Callable[[Mapping[str, Any]], Any], where: str) -> RowRenderer:
    def render(fields: Mapping[str, Any], source: str) -> Any:
        try:
            value = call_within(RENDER_SECONDS, lambda: call(fields))
            if isinstance(value, str) and len(value) > 10 * MAX_SIZE:
                raise ValueError(f"it gives {len(value):,} characters")
            return value
        except TimeoutError as slow:  # every other row would take as long
            raise ConfigError(f"{source}: {where}: {_line(slow)}; shorten its loops") from slow
        # An expression can fail in any way on a row of the wrong shape: the error names the row.
        except Exception as broken:
            known = ", ".join(sorted(map(str, fields)))
            reason = f"{_line(broken)}; the row has {known}"
            raise DataError(f"{source}: {where}: {reason}", quoted=reason) from broken

    return render


def _defined(value: Any) -> Any:
    str(value)  # raises where a field is undefined
    return value


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
