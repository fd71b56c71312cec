"""Comparison of finished runs: options, paired scores, kept units, flips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunetune.errors import RunFolderError
from prunetune.plan import Plan
from prunetune.runs.diff import count_kept_units, diff_runs, find_flips
from support.report import evaluations, make_run


def test_diff_shows_options_scores_and_flips(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    changed = (second / "config.yaml").read_text().replace("keep: 0.6", "keep: 0.5").replace("seed: 0", "seed: 7")
    (second / "config.yaml").write_text(changed)
    (second / "evaluation" / "pruned.json").write_text(evaluations()["dense"].to_json())
    said = diff_runs([first, second])
    assert "budget.keep" in said
    assert "seed" in said
    assert "train.steps" not in said
    assert "casehold accuracy" in said
    assert "100.0%" in said, "the plans are equal"
    flips, common = find_flips(evaluations()["pruned"], evaluations()["dense"])
    assert common == 850
    lost = sum(not flip.gained for flip in flips)
    assert f"of {common} that both answered, {lost} lost and {len(flips) - lost} gained" in said
    assert "options that differ: none" in diff_runs([first, first])


def test_kept_units_are_counted_by_kind_of_site() -> None:
    first = Plan(
        {"l.0.mlp": (0, 1, 2), "l.1.mlp": (0,), "l.0.self_attn": (0,)}, {"l.0.mlp": 4, "l.1.mlp": 4, "l.0.self_attn": 2}
    )
    other = Plan({"l.0.mlp": (1, 2, 3), "l.1.mlp": (1,), "l.0.self_attn": (0,)}, first.units)
    assert count_kept_units(first, other) == {"mlp": (4, 4, 2), "self_attn": (1, 1, 1)}


def test_diff_names_missing_plan_and_scores(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (second / "plan.json").unlink()
    (second / "evaluation" / "pruned.json").unlink()
    said = diff_runs([first, second])
    assert "a run has no plan" in said
    assert "a run has no scores" in said
    (second / "plan.json").write_text("{")
    for paths in ([first], [first, second], [first, tmp_path]):
        with pytest.raises(RunFolderError) as refused:
            diff_runs(paths)
        assert "\n" not in str(refused.value)


def test_diff_pairs_no_items_of_other_questions(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    data = json.loads((second / "evaluation" / "pruned.json").read_text())
    items = data["tasks"]["casehold"]["items"]
    for item, other in zip(items, [items[-1]["prompt"], *(item["prompt"] for item in items[:-1])], strict=True):
        item["prompt"], item["correct"] = f"moved: {other}", not item["correct"]
    (second / "evaluation" / "pruned.json").write_text(json.dumps(data))
    said = diff_runs([first, second])
    (row,) = (line for line in said.splitlines() if line.startswith("casehold accuracy"))
    assert row.endswith("–")
    assert f"casehold: of {len(items)} items with the same id in both results only 0 ask the same" in said
    assert "0 lost and 0 gained" in said


def test_diff_prints_no_control_characters_of_a_model(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    data = json.loads((second / "evaluation" / "pruned.json").read_text())
    for item in data["tasks"]["casehold"]["items"]:
        item["got"], item["correct"] = "\x1b[2J\nwiped", not item["correct"]
    (second / "evaluation" / "pruned.json").write_text(json.dumps(data))
    said = diff_runs([first, second])
    assert "wiped" in said
    assert "\x1b" not in said
