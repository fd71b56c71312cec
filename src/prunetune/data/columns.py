"""What `data.columns` says of rows: a column by its name, or a Jinja2 template or expression over columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prunetune.config.recipe import ColumnsConfig
from prunetune.data.templates import RowRenderer, compile_expression, compile_template, template_names
from prunetune.errors import ConfigError, DataError
from prunetune.utils.untrusted import shorten


@dataclass(frozen=True)
class ColumnMapping:
    """What `data.columns` says of a row: for each field, a column by its name, or a compiled template."""

    texts: Mapping[str, str]
    renderers: Mapping[str, RowRenderer]
    names: Mapping[str, frozenset[str]]  # the columns that each field is from

    @classmethod
    def compile(cls, config: ColumnsConfig) -> ColumnMapping | None:
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
