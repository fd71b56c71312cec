"""Write docs/reference/options.md, the list of all options, from their fields: `python docs/make_recipes.py`."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from prunetune.config.fields import fields_by_path
from prunetune.config.recipe import RunConfig

TARGET = Path(__file__).parent / "reference" / "options.md"
INTRODUCTION = """\
<!-- Written by docs/make_recipes.py from prunetune.config.recipe; change it there. -->
# Options

A recipe is a YAML file of options. Every option has a default, so a recipe holds only what differs:

```yaml
model: Qwen/Qwen3-0.6B
out: runs/support
data:
  train: [support/tickets.jsonl, {source: support/manual.csv, weight: 0.5}]
  test: support/test.jsonl
budget:
  keep: 0.6
```

Every option is a flag too, under its dotted name, and flags win over the recipe:
`prunetune run recipe.yaml --budget.keep 0.5 --data.train a.jsonl --data.train b.csv` (a list repeats its flag;
a switch takes `=true` or `=false`; underscores may be written as hyphens). An unknown key is refused with the key
that was probably meant, and a value outside its bounds with the bounds, before anything is read or written. The run
folder keeps the full recipe as `config.yaml`, which is a recipe itself: its relative paths start where the run was
begun, so `--resume`, `bench`, `check` and `eval` take the folder from anywhere. Examples: [recipes/](../../recipes).

Relative paths in a recipe start from the recipe's folder, except `out`, which starts from the working folder, as paths
in flags do. If `data.root` is given, sources start from it. In this version a file that is only in the working folder
is still found there, and a line says so.
"""


def page() -> str:
    """The text of the page: one table per section of a recipe."""
    options = fields_by_path(RunConfig)
    sections: dict[str, list[str]] = {}
    for path in options:
        sections.setdefault(path.rpartition(".")[0], []).append(path)
    blocks = [INTRODUCTION]
    for section, names in sections.items():
        owner: Any = RunConfig
        for name in filter(None, section.split(".")):
            owner = typing.get_type_hints(owner)[name]
        blocks.append(f"## {f'`{section}`' if section else 'The run'}\n\n{_summary(owner)}\n")
        rows = [_row(path, options[path], typing.get_type_hints(owner)[options[path].name]) for path in names]
        blocks.append("\n".join(["| option | what it does | values | default |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(blocks)


def _summary(owner: Any) -> str:
    return " ".join((owner.__doc__ or "").split())


def _row(path: str, field: dataclasses.Field[Any], kind: Any) -> str:
    cells = (f"`{path}`", field.metadata["help"], _values(kind, field.metadata), _default(field.default))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(kind: Any, bounds: typing.Mapping[str, Any]) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        entry = typing.get_args(kind)[0]
        return f"{bounds['entry_name']}s" if entry is str else f"list: {_values(entry, bounds)}"
    name = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}[kind]
    low, high, above = bounds["ge"], bounds["le"], bounds["gt"]
    limits = [f"above {above:g}"] if above is not None else [f"{low:g} or more"] if low is not None else []
    limits += [f"{high:g} at most"] if high is not None else []
    return ", ".join([name, *limits])


def _default(value: Any) -> str:
    if value == () or value == "":
        return "none"
    if isinstance(value, tuple):
        return ", ".join(_default(entry) for entry in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
