"""Laws of templates in suites: they see a row's fields, run no code, and come to an end."""

from __future__ import annotations

import pytest

from prunetune.data.templates import compile_expression, compile_template
from prunetune.errors import ConfigError, DataError


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
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer"),
        ("{% set r = 'x' * 99999 %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", "takes longer"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "recursion"),
        ("{{ 9 ** (9 ** 9) }}", "gives more than"),
        ("{{ 'x' * 10 ** 12 }}", "gives more than"),
        ("{{ 10 ** 12 * ['x'] }}", "gives more than"),
    ],
)
def test_template_without_an_end_is_refused_by_row(template: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.data.templates.RENDER_SECONDS", 0.3)
    with pytest.raises(DataError, match=rf"^f:1: prompt: .*{reason}.*; the row has a"):
        compile_template(template, "prompt")({"a": 1}, "f:1")


@pytest.mark.parametrize("text", ["{{ a", "{{" + "(" * 3000, "{{ " + "1" * 5000 + " }}", "{% for a in b %}" * 500])
def test_text_that_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^prompt is not a Jinja2 template"):
        compile_template(text, "prompt")
