"""Imports point down: the storeys of the package, read off its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "prunetune"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# From bottom to top. A module imports what stands below it and, in a package, its own package; never a neighbour.
STOREYS: tuple[tuple[str, ...], ...] = (
    ("errors", "launch", "cores"),
    ("yamls",),
    ("gates", "amounts"),
    ("options",),
    ("config_training",),
    ("seeds", "files", "plan", "config", "flags", "environment", "determinism"),
    ("model",),
    ("data",),
    ("budget",),
    ("decide",),
    ("train",),
    ("evaluation",),
    ("suites",),
    ("export",),
    ("bench",),
    ("report",),
    ("folder", "console", "hub", "timing"),
    ("history", "watch", "trackers"),
    ("outlook",),
    ("setting", "provenance"),
    ("watching", "telling", "quantised", "gain"),
    ("finishing",),
    ("pipeline", "summary", "eval_flags"),
    ("sizes",),
    ("comparison",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, storey in enumerate(STOREYS) for name in storey}

# Below, and yet not to be known: a plan is all that passes from deciding to whoever uses it, and data knows no model.
STRANGERS: dict[str, set[str]] = {
    "data": {"model"},
    "evaluation": {"budget", "decide", "train"},
    "suites": {"budget", "decide", "train"},
    "export": {"budget", "data", "decide", "train", "evaluation", "suites"},
    "bench": {"budget", "data", "decide", "train", "export"},
    "report": {"budget", "data", "decide", "train", "export"},
    "folder": {"model", "data", "budget", "decide", "train", "evaluation", "export", "bench", "report"},
    "timing": {"data", "decide", "train", "export", "report", "suites", "evaluation"},
    "history": {"model", "data", "budget", "decide", "train", "export", "bench", "report"},
    "watch": {"model", "data", "budget", "decide", "train", "evaluation", "export", "bench", "report"},
    "trackers": {"model", "data", "budget", "decide", "train", "evaluation", "export", "bench", "report"},
    "console": {"model", "data", "budget", "decide", "train", "evaluation", "export", "bench", "report"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; packages by their own."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
HOMES = {name: name.split(".")[1] for name in MODULES if name != PACKAGE}


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
    """What runs when the module is imported: neither functions nor what only type checkers read."""

    class Skip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Skip().visit(tree)


def faults(module: str, tree: ast.AST) -> list[str]:
    """What a module imports against the rules."""
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
        elif other in STRANGERS.get(home, set()):
            wrong.append(f"{module} imports {name}, which {home} must not know")
    return wrong


def test_every_module_has_a_storey() -> None:
    """A new module is given its place in the list above before it is used."""
    assert set(HOMES.values()) == set(HEIGHT)
    assert len(HEIGHT) == sum(map(len, STOREYS))


def test_strangers_stand_below() -> None:
    """What is above is out of reach anyway: the table of strangers says only what the storeys do not."""
    assert all(HEIGHT[name] < HEIGHT[home] for home, names in STRANGERS.items() for name in names)


@pytest.mark.parametrize("module", HOMES)
def test_imports_point_down(module: str) -> None:
    """In functions, too: an import that waits is an import."""
    assert faults(module, ast.parse(MODULES[module].read_text(encoding="utf-8"))) == []


def test_no_module_needs_itself_to_be_imported() -> None:
    """Within packages as well."""
    needs = {
        name: set(imported(at_import(ast.parse(path.read_text(encoding="utf-8"))))) - {name}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    tuple(TopologicalSorter(needs).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("prunetune.errors", "import prunetune.plan"),
        ("prunetune.plan", "from prunetune.config import RunConfig"),
        ("prunetune.train.loop", "from prunetune.evaluation import suite"),
        ("prunetune.train.loop", "def late():\n    from prunetune.evaluation.suite import evaluate"),
        ("prunetune.export.write", "from prunetune.decide.select import select"),
        ("prunetune.export.write", "from prunetune.train import loop"),
        ("prunetune.data.splits", "from prunetune.model.loading import load"),
        ("prunetune.pipeline", "from prunetune.summary import of_run"),
        ("prunetune.pipeline", "from prunetune import cli"),
        ("prunetune.report.page", "from prunetune import Plan"),
    ],
)
def test_the_rules_bite(module: str, line: str) -> None:
    """Each of these is found, so that silence above means something."""
    assert len(faults(module, ast.parse(line))) == 1


def test_what_is_allowed_is_allowed() -> None:
    """Down, and inside one's own package."""
    fine = "import torch\nfrom prunetune.errors import PlanError\nfrom prunetune.train import players, state"
    assert faults("prunetune.train.loop", ast.parse(fine)) == []
