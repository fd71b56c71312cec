"""Write docs/reference/commands.md and metrics.md from the code: `python docs/make_reference.py`."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

from prunetune.cli.app import app
from prunetune.config.fields import fields_by_path
from prunetune.config.recipe import RunConfig
from prunetune.evaluation.suites.scorers import SCORERS

REFERENCE = Path(__file__).parent / "reference"
COMMANDS = """\
<!-- Written by docs/make_reference.py from prunetune.cli; change it there. -->
# Commands

`prunetune COMMAND --help` shows the same in the terminal. `--quiet` (`-q`) before or after any command prints results,
warnings and errors only. `run`, `demo` and `compare` take every [option of a recipe](options.md) as a flag.

| exit code | means |
|---|---|
| 0 | done |
| 1 | a limit, a required gain or the self-check failed; or a bug, with its traceback |
| 2 | something to correct: one line says what was found, what is accepted, and the next step |
| 130 | interrupted; `run`, `demo` and `compare` continue with `--resume` |
"""
METRICS = """\
<!-- Written by docs/make_reference.py from prunetune.evaluation; change it there. -->
# Metrics

A run chooses scores by the rows: accuracy for choices, ROUGE-L and exact match for other answers, NLL for all answers,
perplexity for texts. A [suite](../guides/evaluate.md) names its scorers. Both count tokens
[in the same way](../guides/evaluate.md#how-tokens-are-counted), and every score has a
[standard error](../guides/evaluate.md#what-the-statistics-mean).

| scorer | is | gives | uses | options |
|---|---|---|---|---|
"""
# How a request is called in the table, and what the scorers are that share a function with another.
USES = {"loglikelihood": "choices", "nll": "the right answer, or a text", "generate": "a greedy answer"}
SHARED = {
    "macro_f1": "Mean over labels of the F1 of each label.",
    "nll": "Negative log-likelihood in nats per token; lower is better.",
    "perplexity": "exp(NLL per token); lower is better. Depends on the tokenizer.",
    "bits_per_byte": "NLL in bits per byte of text; lower is better. Does not depend on the tokenizer.",
}


def pages() -> dict[str, str]:
    """File name -> text of each page."""
    parts = [COMMANDS]
    for name in sorted(name for name in app if not name.startswith("-")):
        command = app[name]
        docstring = inspect.getdoc(command.default_command) or ""
        about, _, described = docstring.partition("\n\nParameters\n----------\n")
        arguments = dict(re.findall(r"^(\w+)\n((?:[ ]{4}.*\n?)+)", described + "\n", re.MULTILINE))
        collected = [item for item in command.assemble_argument_collection() if item.show]
        places = [_place(item) for item in collected if not item.names[0].startswith("-")]
        recipe_flags = {f"--{path.replace('_', '-')}" for path in fields_by_path(RunConfig)}
        takes_recipe = name in ("run", "demo", "compare")
        rows = []
        for item in collected:
            shown = item.names[0]
            if takes_recipe and shown in recipe_flags:
                continue
            text, default = item.parameter.help or "", item.field_info.default
            text = text or arguments.get(item.field_info.name, "").strip()
            known = re.search(r" ?\[default: (.*)\]$", text)
            if known:
                text, default = text[: known.start()], known[1]
            choices = ", ".join(f"`{choice}`" for choice in item.get_choices() or ())
            default = "required" if item.required else _default(default)
            rows.append((f"`{shown}`", " ".join(text.split()), choices or _kind(item.hint), default))
        if name == "data":  # the options of the section, without its prefix in the table of options
            rows = [row for row in rows if not row[0].startswith("`--data.")]
            rows.append(("`--data.*`", "How rows are read: the [options of `data`](options.md#data).", "", ""))
        usage = " ".join(["prunetune", name, *places, *(["[OPTIONS]"] if len(rows) > len(places) else [])])
        parts.append(f"## `{name}`\n\n{about}\n\n```text\n{usage}\n```\n")
        parts.append(_table(("argument or flag", "what it does", "values", "default"), rows))
    rows = [
        (f"`{name}`", _scorer_text(name), ", ".join(f"`{metric}`" for metric in scorer.metrics),
         USES[scorer.request_kind], ", ".join(f"`{option}`" for option in scorer.options))
        for name, scorer in SCORERS.items()
    ]  # fmt: skip
    metrics = METRICS + "".join(_row(row) + "\n" for row in rows)
    return {"commands.md": "\n".join(parts), "metrics.md": metrics}


def _scorer_text(name: str) -> str:
    scorer = SCORERS[name]
    text = SHARED.get(name) or " ".join((inspect.getdoc(scorer.score) or "").partition("\n\n")[0].split())
    needs = f" Needs `--allow-{scorer.permission}`." if scorer.permission else ""
    return f"{text}{needs}"


def _place(item: Any) -> str:
    many = "..." if typing.get_origin(item.hint) is tuple else ""
    return f"{item.names[0]}{many}" if item.required else f"[{item.names[0]}{many}]"


def _kind(hint: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "switch", Path: "path"}
    if typing.get_origin(hint) is tuple:
        return f"{_kind(typing.get_args(hint)[0])}, several"
    inner = [kind for kind in typing.get_args(hint) if kind in names]
    return names.get(hint) or (names[inner[0]] if inner else _kind(typing.get_args(hint)[0]))


def _default(value: Any) -> str:
    if value in (None, "", (), inspect.Parameter.empty) or value is False or value == "False":
        return ""
    return "on" if value == "True" else f"`{', '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join([_row(head), "|" + "---|" * len(head), *map(_row, rows)]) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
