"""The example of docs/extend/scorer.md works as written: a custom function, and a scorer in the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.evaluation.results import TaskResult
from prunetune.evaluation.suites import evaluate_suite, load_suite, scorers, text_scorers
from support.data import write_lines
from support.suites import ScriptedBackend

PAGE = Path(__file__).parents[3] / "docs" / "extend" / "scorer.md"
ROWS = [{"prompt": "How much? ", "completion": "take 20 mg 3 times"}, {"prompt": "And then? ", "completion": "stop"}]


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def scored(folder: Path, suite: str, answer: str) -> TaskResult:
    """Result of the only task of a suite file; the model gives every row the same answer."""
    (task,) = yaml.safe_load(suite)["tasks"].values()
    write_lines(folder / task["data"], *ROWS)
    (folder / "suite.yaml").write_text(suite, encoding="utf-8")
    backend = ScriptedBackend(lambda record: answer)
    (result,) = evaluate_suite(backend, load_suite(folder / "suite.yaml"), allow={"code"}).tasks.values()
    assert not result.error
    return result


def test_scorer_of_the_example_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text(blocks("python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = scored(tmp_path, blocks("yaml")[0], "20 pills")
    assert result.scores["same_numbers"].value == pytest.approx((0.5 + 0.0) / 2)


def test_scorer_is_one_function_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, table = blocks("python")[1:]
    names: dict[str, Any] = {**vars(text_scorers), **vars(scorers)}
    exec(function, names)
    monkeypatch.setattr(text_scorers, "length_ratio", names["length_ratio"], raising=False)
    exec(table, names)
    monkeypatch.setattr(scorers, "SCORERS", scorers.SCORERS | names["SCORERS"])
    result = scored(tmp_path, blocks("yaml")[1], "one two three four")
    assert list(result.scores) == ["rouge_l", "rouge_1", "rouge_2", "length_ratio"]
    assert result.scores["length_ratio"].value == pytest.approx((4 / 5 + 3.0) / 2)
