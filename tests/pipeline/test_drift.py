"""A run measures its models' drift from the untuned one once, and says it in the terminal, the report and a file."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.cli.output import render_run
from prunetune.config.recipe import from_mapping
from prunetune.errors import DataError
from prunetune.evaluation.drift_results import drift_verdict
from prunetune.evaluation.results import Evaluation
from prunetune.export import selfcheck
from prunetune.pipeline import multi_size
from prunetune.pipeline import stages as stage
from prunetune.pipeline.run import run
from support.again import ReaderHere
from support.evaluation import write_model_and_rows


@pytest.fixture(scope="module", autouse=True)
def reopened_here() -> Iterator[None]:
    """Checks of written models open them in this process: fresh ones take seconds, and other tests start them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "FreshReader", ReaderHere)
        yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_rows(tmp_path_factory.mktemp("place"), 24)


def recipe(workspace: Path, out: Path, **evaluate: Any) -> dict[str, Any]:
    """A run of two steps without a teacher."""
    return {
        "model": str(workspace / "dense"),
        "out": str(out),
        "device": "cpu",
        "data": {"train": [str(workspace / "rows.jsonl")]},
        "budget": {"keep": 0.6, "align": 8},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-2},
        "search": {"init_batches": 1},
        "distill": {"teacher": "none"},
        "evaluate": {"limit": 2, "generate_limit": 0, **evaluate},
    }


@pytest.fixture(scope="module")
def done(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(from_mapping(recipe(workspace, tmp_path_factory.mktemp("runs") / "run")))


def test_run_measures_the_dense_tuned_and_the_pruned_model(done: Path) -> None:
    measured = Evaluation.from_json((done / "evaluation" / "drift.json").read_text())
    assert list(measured.tasks) == ["tuned", "pruned"]
    tuned, pruned = measured.tasks.values()
    assert {score.n for result in (tuned, pruned) for score in result.scores.values()} == {48}
    assert pruned.scores["kl"].value > tuned.scores["kl"].value > 0
    assert json.loads((done / "manifest.json").read_text())["timings"]["drift"] > 0


def test_terminal_and_report_say_the_verdict(done: Path) -> None:
    words = drift_verdict(Evaluation.from_json((done / "evaluation" / "drift.json").read_text()))
    assert words.startswith("Of the untuned model's own tokens on 48 general prompts, the pruned model would choose ")
    assert f"outside the domain {words}" in " ".join(render_run(done).split())
    page = (done / "report.html").read_text()
    assert words.replace("'", "&#39;") in page
    assert page.count('<th scope="row" class="text">mathematics</th><td>5</td>') == 1
    assert page.count('<th scope="row" class="text">all prompts</th><td>48</td>') == 1


def test_resumed_run_measures_again_only_what_cannot_be_read(
    workspace: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, file = from_mapping(recipe(workspace, done)), done / "evaluation" / "drift.json"
    before, measured = file.read_text(), []
    measure = stage.measure_drift
    monkeypatch.setattr(stage, "measure_drift", lambda *args: measured.append(args[0]) or measure(*args))
    run(config, resume=True)
    assert (measured, file.read_text()) == ([], before)
    file.write_text(before[:100])
    run(config, resume=True)
    assert (measured, file.read_text()) == (["tuned", "pruned"], before)


def test_drift_that_is_off_is_neither_measured_nor_said(workspace: Path, tmp_path: Path) -> None:
    folder = run(from_mapping(recipe(workspace, tmp_path / "run", drift=False, dense_tuned=False)))
    assert not (folder / "evaluation" / "drift.json").exists()
    assert "outside the domain" not in render_run(folder)
    page = (folder / "report.html").read_text()
    assert "Outside the domain" not in page
    assert "drift" not in page.partition("Not all of this run was found")[2].partition("</aside>")[0]


def test_model_that_cannot_read_the_prompts_ends_its_run_all_the_same(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise DataError("tokens beyond the embedding")

    monkeypatch.setattr(stage, "continuations", refuse)
    folder = run(from_mapping(recipe(workspace, tmp_path / "run", dense_tuned=False)))
    assert "drift is not measured: tokens beyond the embedding" in caplog.text
    assert (folder / "report.html").exists()


def load_for_drift_by(load: Callable[[Any, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the function that loads models for this stage alone; the others load by it, too."""

    def evaluate_drift(*args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "load_model", load)
            stage.evaluate_drift(*args)

    for module in ("run", "multi_size"):
        monkeypatch.setattr(f"prunetune.pipeline.{module}.evaluate_drift", evaluate_drift)


def test_one_model_is_in_memory_at_a_time(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []
    load = stage.load_model

    def load_alone(context: Any, name: str) -> Any:
        assert all(reference() is None for reference in alive)
        model = load(context, name)
        alive.append(weakref.ref(model))
        return model

    load_for_drift_by(load_alone, monkeypatch)
    run(from_mapping(recipe(workspace, tmp_path / "run")))
    assert len(alive) == 3


def test_each_of_several_sizes_is_measured_against_one_reference(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = stage.load_model
    load_for_drift_by(lambda context, name: loaded.append(name) or load(context, name), monkeypatch)
    monkeypatch.setattr(multi_size, "measure_gain", lambda *_: None)
    values = recipe(workspace, tmp_path / "run", dense_tuned=False) | {"budget": {"keep": [0.8, 0.6], "align": 8}}
    folder = run(from_mapping(values))
    assert loaded == ["dense", "pruned", "pruned"]
    large, small = (
        Evaluation.from_json((folder / "sizes" / size / "evaluation" / "drift.json").read_text())
        for size in ("0.8", "0.6")
    )
    assert large.tasks["pruned"].items[0].expected == small.tasks["pruned"].items[0].expected
    assert large.tasks["pruned"].scores["kl"] != small.tasks["pruned"].scores["kl"]
    assert all("Outside the domain" in (folder / "sizes" / size / "report.html").read_text() for size in ("0.8", "0.6"))
