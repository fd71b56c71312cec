"""Imports point down through the twelve lines of the package; type names are unique; tests mirror the source."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "prunetune"
TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / PACKAGE

# From bottom to top. A module imports what stands on a lower line and, in a package, its own package; no neighbour.
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
LINES: list[list[str]] = PROJECT["tool"]["prunetune"]["lines"]
HEIGHT = {name: height for height, line in enumerate(LINES) for name in line}
ENTRANCES = {PACKAGE, f"{PACKAGE}.__main__"}  # what users start from: they may import everything
MOST_AT_THE_TOP = 8  # modules directly in the package


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; packages by their own."""
    named = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


MODULES = modules()
HOMES = {name: name.split(".")[1] for name in MODULES if name not in ENTRANCES}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a syntax tree imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import; name the module in full"
            base = node.module or ""
            if base.split(".")[0] == PACKAGE:
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in MODULES else base


def at_import(tree: ast.Module) -> ast.Module:
    """The code that runs when the module is imported: without functions and `TYPE_CHECKING` blocks."""

    class Skip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Skip().visit(tree)


def faults(module: str, tree: ast.AST) -> list[str]:
    """The imports of a module that break the rules, one message for each."""
    home = module.split(".")[1]
    wrong = []
    for name in imported(tree):
        other = name.split(".")[1] if "." in name else PACKAGE
        if other == home:
            continue
        if other == PACKAGE:
            wrong.append(f"{module} imports the package itself; name the module")
        elif HEIGHT[other] >= HEIGHT[home]:
            wrong.append(f"{module} imports {name}, which does not stand below it")
    return wrong


def public_types(tree: ast.Module) -> Iterator[str]:
    """Classes and type aliases at the top of a module, but for private ones and constants."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if name[0].isupper() and not name.isupper())


def test_every_package_is_on_exactly_one_line() -> None:
    """A new package needs an entry in pyproject.toml before it is used."""
    assert set(HOMES.values()) == set(HEIGHT)
    assert len(HEIGHT) == sum(map(len, LINES))


def test_layers_are_at_most_twelve() -> None:
    assert len(LINES) <= 12


def test_modules_outside_packages_are_few() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("module", HOMES)
def test_imports_point_down(module: str) -> None:
    """Imports within functions count, too."""
    assert faults(module, ast.parse(MODULES[module].read_text(encoding="utf-8"))) == []


def test_import_cycles_do_not_exist() -> None:
    """This holds within packages, too."""
    needs = {
        name: set(imported(at_import(ast.parse(path.read_text(encoding="utf-8"))))) - {name}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    tuple(TopologicalSorter(needs).static_order())  # raises CycleError


def test_public_type_names_are_unique() -> None:
    """A search for a type name finds one definition."""
    homes = defaultdict(set)
    for module, path in MODULES.items():
        for name in public_types(ast.parse(path.read_text(encoding="utf-8"))):
            homes[name].add(module)
    assert {name: sorted(places) for name, places in homes.items() if len(places) > 1} == {}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_a_test(path: Path) -> None:
    """Helpers that tests share are in tests/support."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if any(part.startswith("test_") for part in name.split("."))]


# tests/hostile opens what others wrote as commands do, whichever packages read it.
MIRRORING = [path for path in sorted(TESTS.glob("*/**/test_*.py")) if path.parent != TESTS / "hostile"]


@pytest.mark.parametrize("path", MIRRORING, ids=lambda path: str(path.relative_to(TESTS)))
def test_test_folders_mirror_source_folders(path: Path) -> None:
    assert (SOURCE / path.relative_to(TESTS).parent).is_dir()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("prunetune.errors", "import prunetune.plan"),
        ("prunetune.plan", "from prunetune.data.records import Record"),
        ("prunetune.train.loop", "from prunetune.baselines import scores"),
        ("prunetune.train.loop", "def late():\n    from prunetune.pipeline.run import run"),
        ("prunetune.export.checkpoint", "from prunetune.search.select import select"),
        ("prunetune.export.checkpoint", "from prunetune.train import loop"),
        ("prunetune.data.splits", "from prunetune.model.loading import load"),
        ("prunetune.report.page", "from prunetune.bench.result import BenchResult"),
        ("prunetune.pipeline.stages", "from prunetune.cli import app"),
        ("prunetune.report.page", "from prunetune import Plan"),
    ],
)
def test_faults_names_an_upward_or_sideways_import(module: str, line: str) -> None:
    """The rules find each of these imports, so that the tests above can fail."""
    assert len(faults(module, ast.parse(line))) == 1


def test_faults_accepts_imports_from_below_and_within_a_package() -> None:
    """Imports from lower lines and from the module's own package are allowed."""
    fine = "import torch\nfrom prunetune.errors import PlanError\nfrom prunetune.train import trainers, checkpoints"
    assert faults("prunetune.train.loop", ast.parse(fine)) == []
