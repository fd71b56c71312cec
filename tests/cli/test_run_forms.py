"""Ways to say what `prunetune run` does: a recipe, flags alone, or the folder of a run that is resumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import prunetune.pipeline.run
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import RunFolderError
from prunetune.evaluation.suites.open_model import read_run_config
from prunetune.runs.folder import RunFolder, check_folder, create_run_folder, write_recipe

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[RunConfig, bool]]:
    """The config of every run that the command line begins, and whether it is resumed; nothing is run."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[RunConfig, bool]] = []

    def run(config: RunConfig, *, resume: bool, **_: Any) -> Path:
        calls.append((config, resume))
        raise KeyboardInterrupt

    monkeypatch.setattr(prunetune.pipeline.run, "run", run)
    return calls


def begun(folder: str, **values: Any) -> RunConfig:
    config = from_mapping({"out": folder, "model": "m", "data": {"train": "rows.jsonl"}, **values})
    create_run_folder(RunFolder(Path(folder)), config)
    return config


def test_run_needs_no_recipe(say: Said, asked: list[tuple[RunConfig, bool]]) -> None:
    say("run", "--model", "m", "--data.train", "rows.jsonl", "--keep", "0.8,0.6")
    expected = from_mapping({"model": "m", "data": {"train": "rows.jsonl"}, "budget": {"keep": [0.8, 0.6]}})
    assert asked == [(expected, False)]


def test_run_without_recipe_and_rows_is_refused(say: Said, asked: list[tuple[RunConfig, bool]]) -> None:
    for flags in ((), ("--model", "m"), ("--resume",), ("--dry-run",)):
        code, out, error = say("run", *flags)
        assert (code, out, error.count("\n"), "--data.train" in error, asked) == (2, "", 1, True, [])


@pytest.mark.parametrize("words", [("--resume", "runs/x"), ("runs/x", "--resume"), ("--resume", "--out", "runs/x")])
def test_resume_needs_nothing_but_the_folder(
    words: tuple[str, ...], say: Said, asked: list[tuple[RunConfig, bool]]
) -> None:
    begun("runs/x", budget={"keep": [0.8, 0.6]}, train={"steps": 9, "learning_rate": "auto"}, seed=3)
    config = begun("runs/x", budget={"keep": [0.8, 0.6]}, train={"steps": 9, "learning_rate": "auto"}, seed=3)
    say("run", *words)
    say("run", *words, "--report_to", "wandb")
    assert asked == [(config, True), (replace(config, report_to=("wandb",)), True)]


def test_resumed_folder_that_was_moved_is_the_one_that_is_named(say: Said, asked: list[tuple[RunConfig, bool]]) -> None:
    config = begun("runs/x")
    Path("runs/x").rename("runs/y")
    say("run", "--resume", "runs/y")
    assert asked == [(replace(config, out="runs/y"), True)]


def test_resume_by_recipe_and_by_flags_still_works(say: Said, asked: list[tuple[RunConfig, bool]]) -> None:
    config = begun("runs/x")
    Path("recipe.yaml").write_text("model: m\ndata: {train: rows.jsonl}\nout: runs/x\n")
    say("run", "recipe.yaml", "--resume")
    say("run", "--model", "m", "--data.train", "rows.jsonl", "--out", "runs/x", "--resume")
    say("run", "--model", "m", "--data.train", "rows.jsonl", "--out", "runs/new", "--resume")
    assert asked == [(config, True), (config, True), (replace(config, out="runs/new"), True)]


def test_resumed_folder_does_not_let_code_of_its_model_run(say: Said, asked: list[tuple[RunConfig, bool]]) -> None:
    config = begun("runs/x", trust_remote_code=True)
    say("run", "--resume", "runs/x")
    say("run", "--resume", "runs/x", "--trust-remote-code=true")
    assert asked == [(replace(config, trust_remote_code=False), True), (config, True)]
    with pytest.raises(RunFolderError, match="trust_remote_code was True and is now False"):
        check_folder(asked[0][0], resume=True)


def test_folder_without_resume_or_without_a_run_is_refused(say: Said, asked: list[tuple[RunConfig, bool]]) -> None:
    begun("runs/x")
    for words, hint in ((("run", "runs/x"), "--resume"), (("run", "--resume", "runs"), "no run folder")):
        code, _, error = say(*words)
        assert (code, error.count("\n"), hint in error) == (2, 1, True), error
    assert not asked


@pytest.mark.parametrize("out", ["runs/x", "ABSOLUTE/runs/x"])
def test_run_is_resumed_from_any_working_folder(
    out: str, say: Said, asked: list[tuple[RunConfig, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of a saved recipe start where the run was begun, for `bench`, `check` and `eval`, too."""
    for file in ("work/m/config.json", "work/data/rows.jsonl", "work/v.yaml", "elsewhere/m/config.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path / "work")
    train = ["data/rows.jsonl*2", "data/*.jsonl", "owner/hub", str(tmp_path / "work/data/rows.jsonl")]
    values: dict[str, Any] = {"data": {"train": train}, "compare": {"variants": "v.yaml"}}
    config = begun(out.replace("ABSOLUTE", str(tmp_path)), **values)
    for folder in ("work", "work/m", "elsewhere", ".", "work"):
        monkeypatch.chdir(tmp_path / folder)
        start = os.path.relpath(tmp_path / "work")
        run = os.path.relpath(tmp_path / "work" / config.out)
        say("run", "--resume", run)
        resumed, _ = asked.pop()
        relative = {path: os.path.relpath(os.path.join(start, path)) for path in ("m", *train[:2], "v.yaml")}
        assert resumed.data.train == (relative[train[0]], relative[train[1]], *train[2:])
        assert (resumed.model, resumed.compare.variants) == (relative["m"], relative["v.yaml"])
        check_folder(resumed, resume=True)
        assert replace(read_run_config(Path(run)), out=run) == resumed
        write_recipe(RunFolder(Path(run)), resumed)  # as a comparison that is extended does


def test_run_is_resumed_after_it_was_moved_with_or_without_its_data(
    say: Said, asked: list[tuple[RunConfig, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("work", "with/data"):
        (tmp_path / work).mkdir(parents=True)
    monkeypatch.chdir("work")
    Path("rows.jsonl").touch()
    begun("runs/x")
    Path("runs/x").rename(tmp_path / "run")
    say("run", "--resume", "../run")  # from where its data is
    (tmp_path / "work").rename(tmp_path / "with/data/work")
    (tmp_path / "with/data/work/runs/x").mkdir()
    (tmp_path / "run").rename(tmp_path / "with/data/work/runs/x")
    monkeypatch.chdir(tmp_path)
    say("run", "--resume", "with/data/work/runs/x")
    assert [config.data.train for config, _ in asked] == [("rows.jsonl",), ("with/data/work/rows.jsonl",)]
