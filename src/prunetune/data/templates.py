"""Jinja2 templates and expressions over the fields of a row, sandboxed and bounded; `data.columns` is made of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Self

from prunetune.config.recipe import ColumnsConfig
from prunetune.errors import ConfigError, DataError
from prunetune.utils.deadline import RENDER_SECONDS, call_within
from prunetune.utils.untrusted import short_repr, shorten

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


@contextmanager
def _template_errors(subject: str) -> Iterator[None]:
    """Raise what Jinja2 refuses in the block as a `ConfigError`."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, RecursionError, ValueError) as broken:  # too deep, a number of too many digits
        raise ConfigError(f"{subject} ({_line(broken)})") from broken


def compile_template(text: str, where: str) -> RowRenderer:
    """Compile a text with `{{ field }}`; raises `ConfigError` where it is no template."""
    with _template_errors(f"{where} is not a Jinja2 template"):
        compiled = _environment().from_string(text)
    return _with_row_errors(lambda fields: compiled.render(fields), where)


def compile_expression(text: str, where: str) -> RowRenderer:
    """Compile an expression over fields, such as `options.text`; its value keeps its type. Raises `ConfigError`."""
    with _template_errors(f"{where} is not a Jinja2 expression"):
        compiled = _environment().compile_expression(text, undefined_to_none=False)

    def evaluate(fields: Mapping[str, Any]) -> Any:
        value = compiled(**fields)
        str(value)  # raises where a field is undefined
        return value

    return _with_row_errors(evaluate, where)


def template_names(text: str) -> frozenset[str]:
    """The fields that a template reads; raises `ConfigError` where it is none."""
    from jinja2 import meta

    with _template_errors(f"{short_repr(text)} is not a Jinja2 template"):
        return frozenset(meta.find_undeclared_variables(_environment().parse(text)))


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


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__


@dataclass(frozen=True)
class ColumnMapping:
    """What `data.columns` says of a row: for each field, a column by its name, or a compiled template."""

    texts: Mapping[str, str]
    renderers: Mapping[str, RowRenderer]
    names: Mapping[str, frozenset[str]]  # the columns that each field is from

    @classmethod
    def compile(cls, config: ColumnsConfig) -> Self | None:
        """The mapping, or None if no column is named; raises `ConfigError` for a template that is none."""
        texts = {key: text for key, text in asdict(config).items() if text}
        renderers: dict[str, RowRenderer] = {}
        names: dict[str, frozenset[str]] = {}
        for key, text in texts.items():
            where, names[key] = f"data.columns.{key}", frozenset({text})
            if "{{" in text or "{%" in text:
                renderers[key], names[key] = compile_template(text, where), template_names(text)
            elif key in ("choices", "answer", "messages", "tools") and not text.isidentifier():
                try:
                    renderers[key], names[key] = compile_expression(text, where), template_names(f"{{{{ {text} }}}}")
                except ConfigError:
                    continue  # the name of a column with spaces
        return cls(texts, renderers, names) if texts else None

    @property
    def columns(self) -> frozenset[str]:
        """All columns that it reads."""
        return frozenset().union(*self.names.values())

    def render(self, row: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The fields that it gives; raises `DataError` for a row that lacks a column."""
        fields = {}
        for key, text in self.texts.items():
            if text in row:
                fields[key] = row[text]
            elif key in self.renderers:
                fields[key] = self.renderers[key](row, source)
            elif key not in ("system", "tools"):  # which not every row has
                has = shorten(", ".join(sorted(row)))
                raise DataError(f"row has no {shorten(text)}, which data.columns.{key} names; it has {has}")
        return fields
