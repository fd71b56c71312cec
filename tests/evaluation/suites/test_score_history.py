"""Scores of suites over time: every model version that was scored has its row, and no row of data is in the file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prunetune.errors import ConfigError
from prunetune.evaluation.suites.evaluate_and_check import evaluate
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.evaluation.suites.score_history import history_file, read_scores, record_scores, render_history
from support.suites import ALL, model_folder, suite_file

SayType = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))


def test_each_version_of_a_model_has_its_scores(tmp_path: Path, say: SayType) -> None:
    suite = suite_file(tmp_path, {"organ": ALL["organ"]})
    model = str(model_folder(tmp_path / "model"))
    first = evaluate(model, suite)
    evaluate(model, suite)  # the same version: one row
    model_folder(tmp_path / "model", seed=1)
    second = evaluate(model, suite)
    versions = read_scores(suite)
    assert [scored.model for scored in versions] == [model, model]
    assert len({scored.version for scored in versions}) == 2
    assert {scored.evaluation.tasks["organ"].scores["accuracy"] for scored in versions} == {
        evaluation.tasks["organ"].scores["accuracy"] for evaluation in (first, second)
    }
    code, out, _ = say("history", str(suite))
    assert code == 0
    assert out.count("accuracy ") == 2
    code, out, _ = say("history", str(suite), "--json")
    assert [scored["tasks"]["organ"]["items"] for scored in json.loads(out)] == [[], []]


def test_suite_that_changed_since_is_told_apart(tmp_path: Path) -> None:
    suite = suite_file(tmp_path, {"organ": ALL["organ"]})
    scores = evaluate(str(model_folder(tmp_path / "model")), suite)
    suite.write_text(suite.read_text() + "# longer\n")
    record_scores(scores, str(suite), "endpoint", "")
    columns = [line.split()[4] for line in render_history(suite, read_scores(suite)).splitlines()[1:]]
    assert columns.count("now") == 1


def test_history_holds_no_word_of_a_row(tmp_path: Path) -> None:
    suite = suite_file(tmp_path, ALL)
    evaluate(str(model_folder(tmp_path / "model")), suite, options=EvalOptions(samples="off"))
    text = history_file().read_text()
    assert not [word for word in ("case", "heart", "answer", "föx", "f\\u00f6x", '"c0', '"q0') if word in text]


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    suite = suite_file(tmp_path, {"organ": ALL["organ"]})
    evaluate(str(model_folder(tmp_path / "model")), suite)
    with history_file().open("a") as file:
        file.write(json.dumps({"suite": str(suite.absolute()), "tasks": 3}) + '\n[1]\n{"suite": ')
    assert len(read_scores(suite)) == 1


def test_file_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    suite = suite_file(tmp_path, {"organ": ALL["organ"]})
    monkeypatch.setenv("PRUNETUNE_HOME", str(suite))
    with caplog.at_level(logging.WARNING):
        evaluate(str(model_folder(tmp_path / "model")), suite)
    assert "prunetune history will not list these scores" in caplog.text


def test_suite_without_scores_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no scores of this suite; prunetune eval and check add them"):
        read_scores(tmp_path / "suite.yaml")
