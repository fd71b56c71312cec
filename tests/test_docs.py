"""Documents agree with the code: commands, recipes, rows, names, links, generated pages and versions."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prunetune
from prunetune.cli.app import app
from prunetune.compare.methods import read_variants
from prunetune.config.recipe import from_mapping, load_recipe
from prunetune.data.records import record_from_row
from prunetune.evaluation.suites import parse_suite
from prunetune.pruning.families import FAMILIES, architecture_info
from support.models import tiny

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("examples/*/*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in a language; tests of their own run the examples of docs/extend."""
    return [
        (page.name, text)
        for page in PAGES
        if page.parent.name != "extend"
        for fence_language, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if fence_language == language
    ]


def first_line(text: str) -> str:
    """The id of a parametrised test: the first line of its block."""
    return text.split("\n")[0]


def commands() -> list[str]:
    """Every command in a bash block, without comments."""
    lines = [line.partition("  #")[0] for _, text in blocks("bash") for line in text.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def test_page_of_options_is_up_to_date() -> None:
    """If this fails, run `python docs/make_recipes.py`."""
    page = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))["page"]()
    assert (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8") == page


def test_page_of_data_is_up_to_date() -> None:
    """If this fails, run `python docs/make_data.py`."""
    page = runpy.run_path(str(ROOT / "docs" / "make_data.py"))["page"]()
    assert (ROOT / "docs" / "guides" / "data.md").read_text(encoding="utf-8") == page


def test_pages_of_commands_and_metrics_are_up_to_date() -> None:
    """If this fails, run `python docs/make_reference.py`."""
    for name, page in runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["pages"]().items():
        assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == page


def test_page_of_modules_is_up_to_date() -> None:
    """If this fails, run `python docs/make_modules.py`."""
    page = runpy.run_path(str(ROOT / "docs" / "make_modules.py"))["page"]()
    assert (ROOT / "docs" / "reference" / "modules.md").read_text(encoding="utf-8") == page


def test_module_docstring_begins_with_one_line() -> None:
    for path in (ROOT / "src" / "prunetune").rglob("*.py"):
        line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        assert 10 < len(line) <= 120, path


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("prunetune ")])
def test_commands_in_the_docs_are_parsed(command: str) -> None:
    app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=first_line)
def test_recipes_and_suites_in_the_docs_are_valid(page: str, text: str) -> None:
    values = yaml.safe_load(text)
    if "tasks" in values:  # a suite
        assert not [task.error for task in parse_suite(values, where=page).tasks if task.error]
    else:
        assert from_mapping(values, where=page).data.train


def test_variants_of_the_benchmarks_are_valid() -> None:
    """A variants file that names a retired option would fail only when its comparison runs."""
    quality = ROOT / "benchmarks" / "quality"
    for variants, recipe in (("equal-help", "legal"), ("equal-help", "healthcare"), ("paper", "paper")):
        config = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", {})
        assert read_variants(quality / f"{variants}.yaml", config)


@pytest.mark.parametrize(("page", "text"), blocks("json"), ids=first_line)
def test_rows_in_the_docs_are_valid_records(page: str, text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        assert record_from_row(json.loads(line), source=f"{page}:{number}").completion


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=first_line)
def test_names_in_the_docs_are_public(page: str, text: str) -> None:
    imports = [node for node in ast.walk(ast.parse(text, page)) if isinstance(node, ast.ImportFrom)]
    named = {alias.name for node in imports if node.module == "prunetune" for alias in node.names}
    assert named <= set(prunetune.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_docs_have_targets(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        file, _, heading = target.partition("#")
        if "://" in file:
            continue
        target_page = page.parent / file if file else page
        assert target_page.exists(), target
        if heading and target_page.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", target_page.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_messages_of_the_troubleshooting_page_are_raised_by_the_code() -> None:
    """In the page, … stands for what the code fills in; parts of a message follow each other in one string there."""
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    strings = {
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else re.sub(r"\{\w+\}", "…", str(node.value))
        for path in (ROOT / "src" / "prunetune").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    }
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 20
    assert [message for message in messages if not any(message.rstrip("…") in text for text in strings)] == []


def test_figure_for_dark_pages_differs_from_the_light_one_in_colours_only() -> None:
    light, dark = (
        (ROOT / "docs" / "assets" / f"method-{page}.svg").read_text(encoding="utf-8") for page in ("light", "dark")
    )
    assert light != dark
    assert re.sub(r"#[0-9a-f]{6}", "", light) == re.sub(r"#[0-9a-f]{6}", "", dark)


def test_readme_and_ci_use_the_same_set_up_and_test_commands() -> None:
    first, second = (text for page, text in blocks("bash") if page == "README.md" and "venv" in text)
    assert first in (ROOT / "docs" / "guides" / "quickstart.md").read_text(encoding="utf-8")
    *set_up, demo = map(str.strip, first.split("&&"))
    *again, test = map(str.strip, second.split("&&"))
    assert set_up == [step.replace("[dev,demo]", "[demo]") for step in again]  # the demo needs no tools of a developer
    assert (demo, test) == ("prunetune demo", "python -m pytest")
    steps = re.findall(r"^step (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    as_told, after = steps[: steps.index(test)], steps[steps.index(test) + 1 :]
    assert [step.rpartition(" ")[2] for step in after if step.startswith("pip ")] == ["'.[docs]'", "'.[quant]'"]
    assert [step for step in as_told if step.startswith("pip ")] == [step for step in again if step.startswith("pip ")]


def test_family_page_lists_every_supported_architecture() -> None:
    text = (ROOT / "docs" / "extend" / "family.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (attention and MLP|MLP|attention and experts) \| (.*) \|$", text, re.MULTILINE))
    listed = {
        kinds: re.findall(r"\w+", row.partition(";")[0].replace("(per-layer only)", "")) for kinds, row in rows.items()
    }
    supported: dict[str, list[str]] = {kinds: [] for kinds in listed}
    for family in sorted(FAMILIES):
        whole = set(architecture_info(tiny(family)).unprunable) & {"attention", "mlp"}
        supported["attention and experts" if whole == {"mlp"} else "MLP" if whole else "attention and MLP"].append(
            family
        )
    assert listed == supported
    assert f"Models: {len(FAMILIES)}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["dev"], *extras["demo"], *extras["docs"], *extras["onnx"]]
    for requirement in map(Requirement, named):
        if requirement.name == "prunetune":  # extras of its own that dev takes in
            assert requirement.extras <= set(extras)
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement.name


def test_fallback_version_is_a_dev_version_of_the_newest_changelog_entry() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    newest = re.search(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert hatch["version"]["fallback-version"] == f"{newest[1]}.dev0"
