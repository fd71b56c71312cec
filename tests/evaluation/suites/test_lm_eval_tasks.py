"""Tasks of lm-eval by name: scores equal those of lm-eval, on a task defined in the test."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from prunetune.evaluation.suites import LocalModel, evaluate_suite, parse_suite
from support.data import write_lines
from support.evaluation import characters, speaker
from support.suites import chosen

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's own

NAME = "prunetune_test_organs"
METRICS = ("acc", "acc_norm")


def tasks_in(folder: Path) -> Path:
    # lm-eval moves white space at a prompt's end to its choices.
    rows = write_lines(folder / "organs.jsonl", *({**row, "prompt": row["prompt"].strip()} for row in chosen(12)))
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": rows}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }
    (folder / "organs.yaml").write_text(yaml.safe_dump(task))
    return folder


def scored(folder: Path, monkeypatch: pytest.MonkeyPatch, **tasks: Any) -> Any:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    suite = parse_suite({"tasks": tasks}, folder=folder)
    return evaluate_suite(LocalModel(speaker(), characters()), suite, allow={"code"})


def test_lm_eval_scores_equal_those_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    tasks_in(tmp_path)
    ours = {"data": "organs.jsonl", "scorer": "accuracy", "limit": 0}
    evaluation = scored(
        tmp_path,
        monkeypatch,
        theirs={"lm_eval": NAME, "include": ".", "limit": 0},
        sums={**ours, "likelihood": "sum"},
        characters={**ours, "likelihood": "characters"},
        few={"lm_eval": NAME, "include": ".", "limit": 5},
    )
    assert [result.error for result in evaluation.tasks.values()] == [""] * 4
    theirs = evaluation.tasks["theirs"]
    assert theirs.scores["acc"].value == pytest.approx(evaluation.tasks["sums"].scores["accuracy"].value, abs=1e-9)
    assert theirs.scores["acc_norm"].value == pytest.approx(evaluation.tasks["characters"].scores["accuracy"].value)
    assert theirs.scores["acc"].se == pytest.approx(evaluation.tasks["sums"].scores["accuracy"].se, abs=1e-9)
    by_prompt = {item.prompt: item for item in evaluation.tasks["sums"].items}
    for item in theirs.items:
        assert item.correct == by_prompt[item.prompt].correct
    assert (theirs.scores["acc"].n, len(evaluation.tasks["few"].items)) == (12, 5)


def test_unknown_lm_eval_task_is_an_error_before_any_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = SimpleNamespace(all_tasks=["arc_easy", "pubmedqa"])  # reading lm-eval's own takes a while
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda **_: index))
    evaluation = scored(tmp_path, monkeypatch, wrong={"lm_eval": "arc_eazy"})
    assert "lm_eval task 'arc_eazy' is not known; did you mean arc_easy?" in evaluation.tasks["wrong"].error
    index.all_tasks = [f"task_{number}" for number in range(2000)]
    evaluation = scored(tmp_path, monkeypatch, wrong={"lm_eval": "zzz"})
    assert "2,000 are known, and none has a name like it" in evaluation.tasks["wrong"].error


def test_missing_lm_eval_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    evaluation = scored(tmp_path, monkeypatch, any={"lm_eval": "arc_easy"})
    assert "pip install 'lm-eval>=" in evaluation.tasks["any"].error
