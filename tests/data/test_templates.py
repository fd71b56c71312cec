"""Laws of templates in suites: they see a row's fields, run no code, and come to an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunetune.config.recipe import ColumnsConfig, DataConfig
from prunetune.data.sources import read_records
from prunetune.data.templates import compile_expression, compile_template
from prunetune.errors import ConfigError, DataError
from support.data import write_lines


def test_templates_and_expressions_see_the_fields_of_a_row() -> None:
    assert (
        compile_template("{{ a * 3 }} {{ 2 ** n }} {{ [n] * 2 }}", "prompt")({"a": "x", "n": 5}, "f:1")
        == "xxx 32 [5, 5]"
    )
    assert compile_expression("n * 1.5 + 4 ** 0.5", "answer")({"n": 4}, "f:1") == 8.0


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "recursion"),
        ("{{ 9 ** (9 ** 9) }}", "gives more than"),
        ("{{ 'x' * 10 ** 12 }}", "gives more than"),
        ("{{ '%99999999d' | format(1) }}", "gives 99,999,999 characters"),
        ("{{ 10 ** 12 * ['x'] }}", "gives more than"),
    ],
)
def test_template_beyond_bounds_is_refused_by_row(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^f:1: prompt: .*{reason}.*; the row has a"):
        compile_template(template, "prompt")({"a": 1}, "f:1")


@pytest.mark.parametrize("loops", ["{% for a in range(99999) %}", "{% for a in 'x' * 99999 %}"])
def test_template_without_an_end_is_refused_at_the_first_row(
    loops: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where bad rows are dropped: each of a thousand would take as long."""
    monkeypatch.setattr("prunetune.data.templates.RENDER_SECONDS", 0.3)
    columns = ColumnsConfig(prompt=f"{loops}{loops}{{% endfor %}}{{% endfor %}}", completion="a")
    write_lines(tmp_path / "f.jsonl", *[{"a": "b"}] * 1000)
    config = DataConfig(root=str(tmp_path), columns=columns, bad_rows="drop")
    with pytest.raises(ConfigError, match=r"f\.jsonl:1: data\.columns\.prompt: it takes longer"):
        read_records(["f.jsonl"], config, "train")


@pytest.mark.parametrize("text", ["{{ a", "{{" + "(" * 3000, "{{ " + "1" * 5000 + " }}", "{% for a in b %}" * 500])
def test_text_that_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^prompt is not a Jinja2 template"):
        compile_template(text, "prompt")
