"""Folders made by version 0.1.0 open with every command, and its interrupted run is refused.

The fixture is what `fixtures/make_release_fixture.py` made at commit 03ca826: `run` and `interrupted` of one recipe,
`second` of less budget (without its model), `comparison`; pages and states that no command needs are left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures.make_release_fixture import sha256

FIXTURE = Path(__file__).parents[1] / "fixtures" / "release-0.1.0"
EXPECTED: dict[str, Any] = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
ON_CPU = ("--device", "cpu", "--dtype", "float32")
IN_SUITE = ("--suite", "suite.yaml", *ON_CPU, "--no-cache")
IN_COMPARISON = ("recipe.yaml", "--train.steps", "6", "--out", "comparison", "--resume")
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder: a copy of the fixture; recipes in it name their files from there."""
    folder = tmp_path / "release"
    shutil.copytree(FIXTURE, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PRUNETUNE_HOME", raising=False)
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    yield folder
    assert not list(folder.rglob("*.partial"))


def test_fixture_equals_files_of_0_1_0() -> None:
    assert {name: sha256(FIXTURE / name) for name in EXPECTED["sha256"]} == EXPECTED["sha256"]
    assert EXPECTED["commit"].startswith("03ca826")
    assert EXPECTED["made_with"]["prunetune"] == "0.1.0"


# -- a run -----------------------------------------------------------------------------------------------------------


def test_run_of_0_1_0_opens_with_report(say: Said, release: Path) -> None:
    code, out, _ = say("report", "run")
    assert (code, out) == (0, "run/report.html\n")
    page = (release / "run" / "report.html").read_text(encoding="utf-8")
    assert "58.3" in page
    assert "is missing" not in page
    assert "cannot be read" not in page


def test_run_of_0_1_0_opens_with_bench(say: Said, release: Path) -> None:
    few = ("--prompt", "8", "--generate", "2", "--batch", "1", "--runs", "1")
    code, out, _ = say("bench", "run", *ON_CPU, *few, "--json", "bench.json")
    assert code == 0
    assert "[0] model (dense)" in out
    assert "[1] run" in out
    assert json.loads((release / "bench.json").read_text(encoding="utf-8"))


def test_run_of_0_1_0_opens_with_eval_and_scores_as_then(say: Said, release: Path) -> None:
    code, _, _ = say("eval", "run", *IN_SUITE, "--out", "scores.json")
    assert code == 0
    tasks = json.loads((release / "scores.json").read_text(encoding="utf-8"))["tasks"]
    scores = {f"{task}.{name}": score["value"] for task in tasks for name, score in tasks[task]["scores"].items()}
    assert scores == pytest.approx(EXPECTED["scores"], rel=1e-4)


def test_run_of_0_1_0_opens_with_check_and_holds(say: Said) -> None:
    code, out, _ = say("check", "run", *IN_SUITE)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith(("holds", "broken"))] == [
        "holds   shelf", "holds   count", "holds   rooms", "holds   rooms",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "export_name"),
    [("", "per-layer"), ("--to uniform --pad", "uniform"), ("--to gguf --dtype f32", "gguf-f32.gguf")],
)
def test_run_of_0_1_0_opens_with_export(say: Said, release: Path, options: str, export_name: str) -> None:
    code, out, _ = say("export", "run", *options.split())
    assert code == 0
    assert out.splitlines()[-1] == f"run/exports/{export_name}"
    if export_name == "per-layer":
        exported = load_file(release / "run" / "exports" / export_name / "model.safetensors")
        before = load_file(FIXTURE / "run" / "model" / "model.safetensors")
        assert exported.keys() == before.keys()
        assert all(torch.equal(exported[name], before[name]) for name in before)


def test_run_of_0_1_0_opens_in_stock_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained("run/model", trust_remote_code=True, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("run/model", trust_remote_code=True)
    answer = model.generate(**tokenizer("Count from 3:", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert answer.shape[0] == 1
    pruned = json.loads(Path("run/manifest.json").read_text(encoding="utf-8"))["pruned"]
    assert sum(weight.numel() for weight in model.parameters()) == pruned["params"]


def test_runs_of_0_1_0_are_listed_by_runs(say: Said) -> None:
    code, out, _ = say("runs", ".")
    assert code == 0
    assert {tuple(line.split()[:2]) for line in out.splitlines()[1:]} == {
        ("run", "done"), ("second", "done"), ("interrupted", "interrupted"), ("comparison", "done"),
    }  # fmt: skip
    code, out, _ = say("runs", ".", "--where", "kept > 0.55", "--where", "shelf.nll > 0")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["run"]


def test_history_of_0_1_0_is_listed_by_runs(say: Said, release: Path) -> None:
    """Beside a runs.sqlite, which is not read any more: what it said stands in the run folders."""
    (release / "runs.sqlite").write_bytes(b"SQLite format 3\x00")
    shutil.rmtree(release / "second")
    code, out, _ = say("runs", ".")
    assert code == 0
    assert {tuple(line.split()[:2]) for line in out.splitlines()[1:]} == {
        ("run", "done"), ("interrupted", "interrupted"), ("comparison", "done"),
    }  # fmt: skip


def test_runs_of_0_1_0_open_with_compare_runs(say: Said) -> None:
    code, out, _ = say("compare-runs", "run", "second")
    assert code == 0
    assert ["budget.keep", "0.6", "0.5"] in [line.split() for line in out.splitlines()]
    assert "rows of" not in out
    assert "of 8 that both answered" in out


# -- going on, and again ---------------------------------------------------------------------------------------------


def test_finished_run_of_0_1_0_resumes_to_itself(say: Said, release: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = sha256(release / "run" / "model" / "SHA256SUMS")
    code, out, _ = say("run", "recipe.yaml", "--resume")
    assert code == 0
    assert "report     run/report.html" in out
    assert (release / "run" / "report.html").exists()
    assert sha256(release / "run" / "model" / "SHA256SUMS") == before
    assert not list((release / "run" / "checkpoints").iterdir())  # nothing was tuned
    sizes = [json.loads((folder / "run" / "manifest.json").read_text())["model"] for folder in (release, FIXTURE)]
    assert "model.safetensors" in sizes[0].pop("identity")  # which 0.1.0 did not record
    assert sizes[0] == sizes[1]
    lines = [record.getMessage() for record in caplog.records if "version 0.1.0" in record.getMessage()]
    assert len(lines) == 3  # dense, tuned and pruned scores counted the ends of answers


def test_interrupted_run_of_0_1_0_is_refused_and_can_be_finished_there(say: Said, release: Path) -> None:
    code, out, err = say("run", "recipe.yaml", "--out", "interrupted", "--resume")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("prunetune: the run was begun by version 0.1, ")
    assert "Traceback" not in err
    names = [file.relative_to(FIXTURE) for file in (FIXTURE / "interrupted" / "checkpoints").rglob("*.*")]
    for name in (*names, Path("interrupted", "config.yaml")):
        assert (release / name).read_bytes() == (FIXTURE / name).read_bytes()
    lines = (release / "interrupted" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == (FIXTURE / "interrupted" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:9]


# -- a comparison ----------------------------------------------------------------------------------------------------


def cells(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "comparison" / "cells").iterdir()}


def test_finished_comparison_of_0_1_0_resumes_to_the_same_table(say: Said, release: Path) -> None:
    code, out, _ = say("compare", *IN_COMPARISON)
    assert code == 0
    assert cells(release) == cells(FIXTURE)
    assert "one-stage" in out
    assert "| one-stage |" in (release / "comparison" / "table.md").read_text()
    after, before = (
        json.loads((folder / "comparison" / "comparison.json").read_text()) for folder in (release, FIXTURE)
    )
    for row, old in zip(after["rows"], before["rows"], strict=True):
        scores = {metric: row["scores"][metric] | score for metric, score in old["scores"].items()}
        assert row | old == row | {"scores": old["scores"], "kind": old["kind"]}
        assert row["scores"] | scores == row["scores"]
    assert (release / "comparison" / "comparison.html").exists()


def test_comparison_of_0_1_0_grows_by_a_method(say: Said, release: Path) -> None:
    methods = [token for name in ("dense", "one-stage", "magnitude") for token in ("--compare.methods", name)]
    code, out, _ = say("compare", *IN_COMPARISON, *methods)
    assert code == 0
    grown = cells(release)
    assert {name: grown[name] for name in cells(FIXTURE)} == cells(FIXTURE)
    assert len(grown) == 3
    assert "magnitude" in out
    assert "| magnitude |" in (release / "comparison" / "table.md").read_text()


@pytest.mark.parametrize("command", ["bench", "eval", "check", "export"])
def test_commands_on_a_comparison_of_0_1_0_are_refused(say: Said, command: str) -> None:
    suite = ("--suite", "suite.yaml") if command in ("eval", "check") else ()
    code, out, err = say(command, "comparison", *suite)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("prunetune: comparison: ")
    assert "Traceback" not in err


def test_comparison_of_0_1_0_is_listed_and_no_run(say: Said) -> None:
    _, out, _ = say("runs", ".")
    assert [line.split()[:2] for line in out.splitlines() if "comparison" in line] == [["comparison", "done"]]
