"""docs/extend/option.md: its edits, applied to a copy of the package, give options that work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EDIT = re.compile(r"^```diff\n--- (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SUITE = "tasks: {a: {data: a.jsonl, scorer: accuracy}, b: {data: b.jsonl, scorer: rouge}}"


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources to which every edit of the page was applied."""
    copy = tmp_path_factory.mktemp("edited")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    edits = EDIT.findall((ROOT / "docs" / "extend" / "option.md").read_text(encoding="utf-8"))
    assert len(edits) == 4
    for name, lines in edits:
        source = (copy / name).read_text(encoding="utf-8")
        before, after = (
            "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] in signs) for signs in (" -", " +")
        )
        assert source.count(before) == 1, f"{name} has no such line any more:\n{before}"
        (copy / name).write_text(source.replace(before, after), encoding="utf-8")
    return copy


def python(edited: Path, *arguments: str) -> str:
    """What a Python process with the edited package prints."""
    environment = os.environ | {"PYTHONPATH": str(edited / "src"), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=edited)
    assert not done.returncode, done.stderr
    return done.stdout


def test_one_field_is_a_flag_and_a_recipe_key(edited: Path) -> None:
    assert "--note" in python(edited, "-m", "prunetune", "run", "--help")
    (edited / "recipe.yaml").write_text("note: second try\ndata: {train: a.jsonl}", encoding="utf-8")
    code = (
        "from pathlib import Path; from prunetune.config.recipe import load_recipe, to_mapping; "
        "print(to_mapping(load_recipe(Path('recipe.yaml')))['note'])"
    )
    assert python(edited, "-c", code) == "second try\n"


@pytest.mark.parametrize("command", ["eval", "check"])
def test_one_field_is_a_flag_of_eval_and_check(edited: Path, command: str) -> None:
    shown = python(edited, "-m", "prunetune", command, "--help")
    assert "--tasks" in shown
    assert "Only these tasks of the suite" in shown


def test_new_option_of_eval_selects_tasks(edited: Path) -> None:
    (edited / "suite.yaml").write_text(SUITE, encoding="utf-8")
    code = (
        "from prunetune.evaluation.suites.options import EvalOptions; "
        "print([[t.name for t in EvalOptions(tasks=tasks).open_suite('suite.yaml').tasks] for tasks in ((), ('b',))])"
    )
    assert python(edited, "-c", code) == "[['a', 'b'], ['b']]\n"
