"""Write docs/reference/modules.md from the source: `python docs/make_modules.py`."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "prunetune"
TARGET = DOCS / "reference" / "modules.md"
PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
INTRODUCTION = """\
<!-- Written by docs/make_modules.py from the first lines of the docstrings; change them there. -->
# Modules

Every module with the first line of its docstring. Imports point down: a package uses what stands below it here, and
never what stands above it or on the same line.
"""


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for line in reversed(PROJECT["tool"]["prunetune"]["lines"]):
        for name in line:
            folder, module = SOURCE / name, SOURCE / f"{name}.py"
            if module.exists():
                parts.append(f"## `{name}.py`\n\n{first_line(module)}\n")
                continue
            paths = sorted(path for path in folder.rglob("*.py") if path.stem not in ("__init__", "__main__"))
            rows = [f"| `{path.relative_to(folder).with_suffix('')}` | {first_line(path)} |" for path in paths]
            about = first_line(folder / "__init__.py")
            parts.append("\n".join([f"## `{name}/`", "", about, "", "| module | |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(page(), encoding="utf-8")
