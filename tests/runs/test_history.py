"""The history: every run is registered, also of several processes, and no error with it stops a run."""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest

from prunetune.config.recipe import from_mapping
from prunetune.errors import ConfigError, LimitBroken, ModelError
from prunetune.manifest import DenseModelFacts, PrunedModelFacts
from prunetune.runs.folder import RunFolder, create_run_folder, run_lock
from prunetune.runs.history import COLUMNS, NAME, list_runs, register_run
from prunetune.runs.listing import filter_runs, render_runs_table
from support.report import evaluations, make_run


def registered(place: Path, name: str, model: str = "tiny", **options: object) -> RunFolder:
    config = from_mapping({"model": model, "out": str(place / name), **options})
    folder = RunFolder(place / name)
    create_run_folder(folder, config)
    with register_run(folder, config, f"prunetune run {name}"):
        (folder.path / "evaluation" / "pruned.json").write_text(evaluations()["pruned"].to_json())
        folder.update_manifest(
            model=DenseModelFacts.from_dict({"decoder_params": 100}),
            pruned=PrunedModelFacts.from_dict({"decoder_params": 60}),
        )
    return folder


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNETUNE_HOME", raising=False)


def test_finished_run_is_listed_with_its_scores(tmp_path: Path) -> None:
    registered(tmp_path, "a", seed=3)
    (entry,) = list_runs(tmp_path)
    assert (entry.name, entry.status, entry.model, entry.seed, entry.requested_keep, entry.kept) == (
        "a",
        "done",
        "tiny",
        3,
        0.6,
        0.6,
    )
    assert entry.metrics["accuracy"] == pytest.approx(evaluations()["pruned"].mean_accuracy())
    assert entry.metrics["casehold.accuracy"] == evaluations()["pruned"].tasks["casehold"].scores["accuracy"].value
    assert entry.command == "prunetune run a"
    assert entry.started <= entry.ended
    assert "a  " in render_runs_table([entry])
    assert "60.0%" in render_runs_table([entry])


def test_prunetune_home_gathers_runs_of_all_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNETUNE_HOME", str(tmp_path / "home"))
    for place in ("here", "there"):
        registered(tmp_path / place, "run")
    assert {entry.path.parent.name for entry in list_runs(tmp_path / "here")} == {"here", "there"}
    assert not (tmp_path / "here" / NAME).exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (ModelError("x"), "failed"),
        (LimitBroken("x"), "gate failed"),
        (OSError(), "failed"),
    ],
)
def test_status_says_how_a_run_ended(error: BaseException, status: str, tmp_path: Path) -> None:
    config, folder = from_mapping({"out": str(tmp_path / "a")}), RunFolder(tmp_path / "a")
    create_run_folder(folder, config)
    registering = register_run(folder, config, "")
    registering.__enter__()
    with run_lock(folder):
        (running,) = list_runs(tmp_path)
        assert running.status == "running"
    (killed,) = list_runs(tmp_path)
    assert killed.status == "interrupted", "no process works on it"
    assert not registering.__exit__(type(error), error, None), "the error goes on"
    (ended,) = list_runs(tmp_path)
    assert ended.status == status


def test_removed_folder_is_gone_and_unregistered_folder_is_found(tmp_path: Path) -> None:
    shutil.rmtree(registered(tmp_path, "a").path)
    make_run(tmp_path / "b")
    (tmp_path / "notes").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("{{{")
    assert {entry.name: entry.status for entry in list_runs(tmp_path)} == {"a": "gone", "b": "done"}


def test_filter_runs_by_model_status_and_conditions(tmp_path: Path) -> None:
    registered(tmp_path, "a", model="Qwen/Qwen3")
    registered(tmp_path, "b", model="llama", seed=1)
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


def _register(place: Path, number: int) -> None:
    registered(place, f"run-{number}")


def test_runs_at_the_same_time_are_all_registered(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_register, args=(tmp_path, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {entry.name: entry.status for entry in list_runs(tmp_path)} == {
        f"run-{number}": "done" for number in range(6)
    }


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\x00" + b"\x00" * 5, b"\x00" * 5000])
def test_broken_history_is_renamed_and_rebuilt(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registered(tmp_path, "before")
    (tmp_path / NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        registered(tmp_path, "after")
    assert "renamed to" in caplog.text
    assert {entry.name for entry in list_runs(tmp_path)} == {"before", "after"}, (
        "what it lacks is read from the folders"
    )
    assert [path.read_bytes() for path in tmp_path.glob(f"{NAME}.broken-*")] == [content]


def test_locked_history_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prunetune.utils.sqlite.LOCK_TIMEOUT", 0.05)
    registered(tmp_path, "a")
    holder = sqlite3.connect(tmp_path / NAME, isolation_level=None)
    holder.execute("begin exclusive")
    with caplog.at_level(logging.WARNING):
        registered(tmp_path, "b")
        assert caplog.text.count("cannot be written (database is locked); the run continues without it") == 2
        assert {entry.name for entry in list_runs(tmp_path)} == {"a", "b"}
    assert "cannot be read (database is locked); the run folders are read instead" in caplog.text
    holder.close()
    assert {entry.name for entry in list_runs(tmp_path)} == {"a", "b"}


def test_unwritable_home_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNETUNE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        registered(tmp_path, "a")
    assert "the run continues without it" in caplog.text
    assert [entry.name for entry in list_runs(tmp_path)] == ["a"]


def test_folder_in_the_history_s_place_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).mkdir()
    registered(tmp_path, "a")
    assert [entry.name for entry in list_runs(tmp_path)] == ["a"]
    assert "cannot be read (unable to open database file); the run folders are read instead" in caplog.text


@pytest.mark.parametrize("value", ["{", "null", '{"accuracy": "high"}', b"\xff\x00", -1.5])
def test_damaged_row_is_read_from_its_run_folder(value: object, tmp_path: Path) -> None:
    """In every column any value: the run is listed, from the row where it says the same or from the folder."""
    registered(tmp_path, "a", seed=3)
    (whole,) = list_runs(tmp_path)
    for column in COLUMNS[1:]:
        with sqlite3.connect(tmp_path / NAME) as store, suppress(sqlite3.IntegrityError):  # "not null"
            store.execute(f"update runs set {column} = ?", (value,))
        store.close()
        (entry,) = list_runs(tmp_path)
        render_runs_table([entry])
        assert entry.name == "a"
        assert entry.metrics == whole.metrics
        assert filter_runs([entry], where=["accuracy >= 0"]) == [entry]


def test_flipped_bytes_of_a_history_end_no_listing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        registered(tmp_path, name)
    whole, rng = (tmp_path / NAME).read_bytes(), random.Random(0)
    for _ in range(12):
        damaged = bytearray(whole)
        for place in (rng.randrange(100), rng.randrange(len(whole)), len(whole) - 1 - rng.randrange(3000)):
            damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / NAME).write_bytes(damaged)
        entries = list_runs(tmp_path)
        assert {"a", "b"} <= {entry.name for entry in entries}
        render_runs_table(entries)


def test_deleted_history_is_rebuilt_from_folders(tmp_path: Path) -> None:
    registered(tmp_path, "a")
    (tmp_path / NAME).unlink()
    (entry,) = list_runs(tmp_path)
    assert (entry.name, entry.status) == ("a", "done")


def test_missing_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; name the one that holds the run folders"):
        list_runs(tmp_path / "nowhere")
