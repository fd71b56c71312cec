"""The history: what is known of runs stands in their folders, and no error with it stops a run."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import socket
from pathlib import Path

import pytest

from prunetune.config.recipe import from_mapping
from prunetune.errors import ConfigError, LimitBroken, ModelError
from prunetune.manifest import DenseModelFacts, PrunedModelFacts
from prunetune.runs.folder import RunFolder, create_run_folder, run_lock
from prunetune.runs.history import FOLDERS, list_runs, record_status
from prunetune.runs.listing import filter_runs, render_runs_table, runs_to_json
from support.report import evaluations, make_run, make_sizes

RELEASE = Path(__file__).parents[1] / "fixtures" / "release-0.1.0"


def finished(place: Path, name: str, model: str = "tiny", **options: object) -> RunFolder:
    config = from_mapping({"model": model, "out": str(place / name), **options})
    folder = RunFolder(place / name)
    create_run_folder(folder, config)
    with record_status(folder):
        (folder.path / "evaluation" / "pruned.json").write_text(evaluations()["pruned"].to_json())
        folder.update_manifest(
            command=f"prunetune run {name}",
            model=DenseModelFacts.from_dict({"decoder_params": 100}),
            pruned=PrunedModelFacts.from_dict({"decoder_params": 60}),
        )
    return folder


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNETUNE_HOME", raising=False)


def test_finished_run_is_listed_with_its_scores(tmp_path: Path) -> None:
    finished(tmp_path, "a", seed=3)
    (entry,) = list_runs(tmp_path)
    assert (entry.name, entry.kind, entry.status, entry.model, entry.seed, entry.requested_keep, entry.kept) == (
        "a", "run", "done", "tiny", 3, 0.6, 0.6,
    )  # fmt: skip
    assert entry.metrics["accuracy"] == pytest.approx(evaluations()["pruned"].mean_accuracy())
    assert entry.metrics["casehold.accuracy"] == evaluations()["pruned"].tasks["casehold"].scores["accuracy"].value
    assert entry.command == "prunetune run a"
    assert entry.started <= entry.ended
    assert "a  " in render_runs_table([entry])
    assert "60.0%" in render_runs_table([entry])
    (told,) = json.loads(runs_to_json([entry]))
    assert (told["name"], told["path"], told["metrics"]) == ("a", str(tmp_path / "a"), dict(entry.metrics))


def test_sizes_and_comparisons_are_listed_with_their_scores(tmp_path: Path) -> None:
    make_sizes(tmp_path / "several", keeps=(0.8, 0.6))
    shutil.copytree(RELEASE / "comparison", tmp_path / "side-by-side")
    entries = {entry.name: entry for entry in list_runs(tmp_path)}
    assert {name: entry.kind for name, entry in entries.items()} == {
        "several": "run", "several/sizes/0.8": "size", "several/sizes/0.6": "size", "side-by-side": "comparison",
    }  # fmt: skip
    assert entries["several/sizes/0.8"].metrics["accuracy"] > 0
    comparison = entries["side-by-side"]
    table = json.loads((tmp_path / "side-by-side" / "comparison.json").read_text())
    assert comparison.status == "done"
    assert comparison.metrics["dense 0.6 acc"] == table["rows"][0]["scores"]["acc"]["value"]
    assert f"comparison, {len(comparison.metrics)} scores" in render_runs_table([comparison])


def test_prunetune_home_gathers_runs_of_all_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNETUNE_HOME", str(tmp_path / "home"))
    for place in ("here", "there", "there"):
        finished(tmp_path / place, "run")
    assert {entry.path.parent.name for entry in list_runs(tmp_path / "nowhere")} == {"here", "there"}
    assert len((tmp_path / "home" / FOLDERS).read_text().splitlines()) == 2
    shutil.rmtree(tmp_path / "there")
    assert [entry.path.parent.name for entry in list_runs(tmp_path / "here")] == ["here"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (ModelError("x"), "failed"),
        (LimitBroken("x"), "limit broken"),
        (OSError(), "failed"),
    ],
)
def test_status_says_how_a_run_ended(error: BaseException, status: str, tmp_path: Path) -> None:
    config, folder = from_mapping({"out": str(tmp_path / "a")}), RunFolder(tmp_path / "a")
    create_run_folder(folder, config)
    recording = record_status(folder)
    recording.__enter__()
    with run_lock(folder):
        (running,) = list_runs(tmp_path)
        assert (running.status, running.ended) == ("running", "")
    (killed,) = list_runs(tmp_path)
    assert killed.status == "interrupted", "no process works on it"
    folder.update_manifest(host="elsewhere")
    assert list_runs(tmp_path)[0].status == "running", "its lock is not seen from here"
    assert not recording.__exit__(type(error), error, None), "the error goes on"
    (ended,) = list_runs(tmp_path)
    assert ended.status == status


def test_resumed_run_keeps_its_first_start_and_names_its_host(tmp_path: Path) -> None:
    folder = finished(tmp_path, "a")
    folder.update_manifest(started="2020-01-01T00:00:00+00:00")
    with record_status(folder):
        pass
    manifest = folder.read_manifest()
    assert (manifest.started, manifest.host) == ("2020-01-01T00:00:00+00:00", socket.gethostname())
    assert manifest.ended is not None
    assert manifest.ended > manifest.started


def test_folder_that_is_no_run_is_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "b")
    (tmp_path / "notes").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("{{{")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("model: tiny")
    (tmp_path / "half" / "manifest.json").write_text('{"status": 3, "started": [], "command": {}}')
    assert {entry.name: entry.status for entry in list_runs(tmp_path)} == {"b": "done", "half": "interrupted"}


def test_filter_runs_by_model_status_and_conditions(tmp_path: Path) -> None:
    finished(tmp_path, "a", model="Qwen/Qwen3")
    finished(tmp_path, "b", model="llama", seed=1)
    make_run(tmp_path / "c")
    everything = list_runs(tmp_path)

    def names(**filters: object) -> set[str]:
        return {entry.name for entry in filter_runs(everything, **filters)}  # type: ignore[arg-type]

    assert names() == {"a", "b", "c"}
    assert names(model="qwen") == {"a"}
    assert names(status="done", where=["seed >= 1"]) == {"b"}
    assert names(where=["accuracy > 0.99"]) == set()
    assert names(where=["casehold.accuracy>0.1", "kept < 0.61"]) == {"a", "b", "c"}
    assert names(status="interrupted") == set()
    with pytest.raises(ConfigError, match="--where 'acuracy' is not known; did you mean accuracy"):
        names(where=["acuracy > 0"])
    with pytest.raises(ConfigError, match="--status 'finished' is not known; known are running, done"):
        names(status="finished")
    for wrong in ("accuracy", "accuracy > high", ""):
        with pytest.raises(ConfigError, match="is no condition: write one such as"):
            names(where=[wrong])
    assert render_runs_table([]) == "no runs"


# -- nothing wrong with it stops a run -------------------------------------------------------------------------------


def _finish(place: Path, number: int) -> None:
    finished(place, f"run-{number}")


def test_runs_at_the_same_time_are_all_listed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_finish, args=(tmp_path, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {entry.name: entry.status for entry in list_runs(tmp_path)} == {
        f"run-{number}": "done" for number in range(6)
    }


def test_unwritable_home_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNETUNE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        finished(tmp_path, "a")
    assert "prunetune runs does not list this run" in caplog.text
    assert [entry.name for entry in list_runs(tmp_path)] == ["a"]


def test_ending_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished(tmp_path, "a")

    def fail() -> None:
        (folder.path / "manifest.json").write_text("{")
        raise ModelError("the cause")

    with pytest.raises(ModelError, match="the cause"), caplog.at_level(logging.WARNING), record_status(folder):
        fail()
    assert "how the run ended cannot be written" in caplog.text


def test_missing_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; name the one that holds the run folders"):
        list_runs(tmp_path / "nowhere")
