"""Evaluations whose rows are hidden: their scores and paired tests stay, texts and ids do not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunetune.evaluation.paired import compare_paired
from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.evaluation.statistics import aggregate_items, paired_difference
from prunetune.evaluation.suites.cache import AnswerStore, CachedBackend
from prunetune.evaluation.suites.check import check_limits
from prunetune.evaluation.suites.protocol import GenerationSettings
from prunetune.evaluation.suites.suite import parse_suite
from prunetune.utils.redaction import SHOW_ALL, Redaction
from support.evaluation import question

HIDE = Redaction(samples=False)
LABELS = ("heart", "head", "lung")


def evaluation(shift: int, *, row_ids: bool = True) -> Evaluation:
    """Twelve items of three labels; the answers are wrong where `shift` says."""
    items = []
    for n in range(12):
        expected, got = LABELS[n % 3], LABELS[(n + (n % (shift + 2) == 0)) % 3]
        scores = {"accuracy": float(expected == got), "bleu": 50.0, "nll": 1.0, "tokens": 3.0}
        id = f"patient {n}" if row_ids else f"t/a.jsonl:{n + 1}"
        items.append(Item(id, f"Where is {n}?", expected, got, expected == got, scores, f"a.jsonl:{n + 1}"))
    scores = {metric: aggregate_items(items, metric) for metric in ("accuracy", "macro_f1", "nll")}
    return Evaluation({"t": TaskResult("t", scores | {"bleu": Score(50.0, 1.0, 12)}, tuple(items))})


def kept(given: Evaluation) -> Evaluation:
    """The evaluation as its file has it."""
    return Evaluation.from_json(given.to_json())


def test_hidden_items_have_scores_lines_and_numbers_of_answers_only() -> None:
    hidden = kept(evaluation(0).redacted(HIDE)).tasks["t"]
    assert hidden.scores == evaluation(0).tasks["t"].scores
    assert [item.id for item in hidden.items] == [f"a.jsonl:{n + 1}" for n in range(12)]
    assert {item.prompt for item in hidden.items} == {"[hidden]"}
    assert {item.expected for item in hidden.items} == {f"[hidden] answer {n}" for n in (1, 2, 3)}
    assert [item.got == item.expected for item in hidden.items] == [item.correct for item in hidden.items]
    assert kept(evaluation(0).redacted(HIDE).redacted(HIDE)) == kept(evaluation(0).redacted(HIDE))


def test_text_that_looks_hidden_is_hidden_too() -> None:
    item = Item("a", "[hidden] Jane Roe", "[hidden] answer Jane", "[hidden] answer 1 Jane", True, {})
    assert "Jane" not in Evaluation({"t": TaskResult("t", {}, (item,))}).redacted(HIDE).to_json()


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "nll"])
def test_paired_tests_of_hidden_items_are_those_of_shown_ones(metric: str) -> None:
    a, b = evaluation(0), evaluation(1)
    hidden = [kept(each.redacted(HIDE)).tasks["t"] for each in (a, b)]
    assert compare_paired(*hidden, metric) == compare_paired(a.tasks["t"], b.tasks["t"], metric)
    assert paired_difference(*hidden, metric) == paired_difference(a.tasks["t"], b.tasks["t"], metric)


def test_bleu_of_hidden_items_is_unknown_and_not_that_of_the_marks() -> None:
    hidden = [kept(evaluation(shift).redacted(HIDE)).tasks["t"] for shift in (0, 1)]
    assert math.isnan(paired_difference(*hidden, "bleu").value)


@pytest.mark.parametrize("hidden", [(True, False), (False, True), (True, True)])
def test_check_pairs_hidden_results_with_shown_ones_by_line(hidden: tuple[bool, bool]) -> None:
    suite = parse_suite({"tasks": {"t": {"data": "a.jsonl", "scorer": "accuracy", "limits": {"drop": 0.0}}}})
    model, reference = (
        kept(each.redacted(HIDE)) if hide else each
        for each, hide in zip((evaluation(0), evaluation(1)), hidden, strict=True)
    )
    plain = check_limits(evaluation(0), evaluation(1), suite)
    result = check_limits(model, reference, suite, HIDE)
    assert (result.errors, result.verdicts) == ({}, plain.verdicts)
    assert plain.failures
    lines = {f"patient {n}": f"a.jsonl:{n + 1}" for n in range(12)}
    assert [failure.id for failure in result.failures] == [lines[failure.id] for failure in plain.failures]
    assert not any(label in result.to_json() for label in (*LABELS, "patient", "Where"))


def test_failure_of_results_without_lines_has_no_id() -> None:
    suite = parse_suite({"tasks": {"t": {"data": "a.jsonl", "scorer": "accuracy"}}})
    result = check_limits(kept(evaluation(0)), kept(evaluation(1)), suite, HIDE)
    assert {failure.id for failure in result.failures} == {"[hidden]"}


def test_redacted_ids_stay_unique() -> None:
    items = evaluation(0).redacted(Redaction(patterns=(r"patient \d+",))).tasks["t"].items
    assert [item.id for item in items[:2]] == ["[redacted]", "[redacted]#2"]
    assert len({item.id for item in items}) == 12


def test_by_default_nothing_changes() -> None:
    assert evaluation(0).redacted(SHOW_ALL) == evaluation(0)


class Writer:
    """Answers every question with its prompt."""

    name, fingerprint = "writer", "1"

    def run_requests(self, kind: str, records: Any, settings: Any, tick: Any) -> list[Any]:
        return [record.prompt for record in records]


@pytest.mark.parametrize(
    ("redaction", "stored"), [(SHOW_ALL, 3), (HIDE, 0), (Redaction(patterns=("Q1",)), 2)], ids=["on", "off", "redact"]
)
def test_cache_keeps_only_answers_that_may_be_shown(redaction: Redaction, stored: int, tmp_path: Path) -> None:
    backend = CachedBackend(Writer(), AnswerStore(tmp_path / "cache"), redaction)  # type: ignore[arg-type]
    records, settings = [question(n) for n in range(3)], GenerationSettings()
    first = backend.run_requests("generate", records, settings, lambda _: None)
    assert first == backend.run_requests("generate", records, settings, lambda _: None)
    assert backend.cache_hits == stored
    assert b"Q1" not in b"".join(file.read_bytes() for file in (tmp_path / "cache").iterdir()) or redaction == SHOW_ALL


def test_lines_of_files_of_one_name_are_told_apart() -> None:
    items = [replace(item, line="a.jsonl:1") for item in evaluation(0).tasks["t"].items[:2]]
    hidden = Evaluation({"t": TaskResult("t", {}, tuple(items))}).redacted(HIDE).tasks["t"].items
    assert [item.id for item in hidden] == ["a.jsonl:1", "a.jsonl:1#2"]
