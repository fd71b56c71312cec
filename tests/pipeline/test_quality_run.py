"""`budget.quality` in a whole run: the reference is the tuned dense model, and other budgets count as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunetune.cli.output import render_run
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import ConfigError, LimitBroken
from prunetune.evaluation.results import Evaluation
from prunetune.pipeline import monitor
from prunetune.pipeline.run import run
from support.data import write_lines
from support.evaluation import characters, speaker

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"align": 8, "quality": 0.95},
    "train": {"steps": 16, "batch_size": 4, "validate_every": 50, "checkpoint_every": 50},
    "lora": {"rank": 4, "dense_rank": 4},
    "search": {"init_batches": 1, "batch_size": 4},
    "evaluate": {"drift": False, "limit": 6, "generate_limit": 0},
    "require": {"prompt": 16, "generate": 4, "runs": 3},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    speaker().save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    rows = [{"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(40)]
    write_lines(folder / "rows.jsonl", *rows)
    return folder


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    data = {"train": [str(workspace / "rows.jsonl")], "valid_share": 0.3}
    paths = {"model": str(workspace / "dense"), "out": str(out), "data": data}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> list[Evaluation]:
    """Quality falls by .02 each time that it is asked for; gives the references that it was asked with."""
    references: list[Evaluation] = []

    def kept(_: Evaluation, reference: Evaluation, names: Any) -> dict[str, float]:
        references.append(reference)
        return {"nll": 1 - 0.02 * len(references) if len(references) < 4 else 0.96}

    monkeypatch.setattr(monitor, "kept_quality", kept)
    return references


def test_run_goes_back_one_size_tells_what_the_next_had_and_keeps_its_limit(
    workspace: Path, tmp_path: Path, falling: list[Evaluation]
) -> None:
    folder = run(config_of(workspace, tmp_path / "run"))
    manifest = json.loads((folder / "manifest.json").read_text())
    cuts = [cut["kept"] for cut in manifest["cuts"]]
    (event,) = manifest["gates"]["events"]
    assert event["did"].endswith("quality of the smaller model: 0.94")
    assert manifest["gates"]["kept"] == pytest.approx(cuts[1]), "the third size broke the limit"
    assert manifest["gates"]["limits"][0]["held"]
    assert "valid.quality" in render_run(folder)
    assert "quality of the smaller model" in (folder / "report.html").read_text()
    assert len({reference.to_json() for reference in falling}) == 1, "of the dense model, tuned once"


def test_budget_that_quality_does_not_allow_is_told_and_exits_with_one(
    workspace: Path, tmp_path: Path, falling: list[Evaluation]
) -> None:
    with pytest.raises(LimitBroken, match="flops"):
        run(config_of(workspace, tmp_path / "run", budget={"flops": "0.5"}))
    assert (tmp_path / "run/report.html").exists()


def test_limit_that_the_tuned_dense_model_breaks_ends_the_run_before_it_prunes(workspace: Path, tmp_path: Path) -> None:
    limits = {"quality": {"choice.nll": 1e-6, "accuracy": 0.0}}
    with pytest.raises(
        LimitBroken, match=r"of the tuned dense model quality\.choice\.nll is .* has to be at most 1e-06"
    ):
        run(config_of(workspace, tmp_path / "run", budget=limits))
    assert not (tmp_path / "run" / "model").exists()


def test_run_within_absolute_limits_reports_them(workspace: Path, tmp_path: Path) -> None:
    folder = run(config_of(workspace, tmp_path / "run", budget={"keep": 0.8, "quality": {"choice.nll": 99}}))
    (limit,) = json.loads((folder / "manifest.json").read_text())["gates"]["limits"]
    assert (limit["gate"], limit["held"]) == ("quality.choice.nll <= 99 -> roll-back", True)


@pytest.mark.parametrize("quality", [{"quality": 0.9, "quality_of": ["chioce"]}, {"quality": {"chioce.nll": 1.3}}])
def test_limit_of_a_task_that_valid_lacks_is_refused_before_anything_is_tuned(
    quality: dict[str, Any], workspace: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"a limit of 'chioce(\.nll)?', and valid has the tasks choice: name TASK"):
        run(config_of(workspace, tmp_path / "run", budget=quality))
    assert not (tmp_path / "run").exists()
