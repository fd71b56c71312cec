"""Law of run folders whose files hold anything: each reader shows what is left, or says in one line what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prunetune.report import write_report
from prunetune.runs.diff import diff_runs
from prunetune.runs.history import list_runs
from prunetune.runs.listing import render_runs_table
from prunetune.train.checkpoints import Checkpoints, TrainingState
from support.fuzz import ODD, damaged, fuzzed, refused_or_fine, torn
from support.report import make_run

FILES = (
    "plan.json", "manifest.json", "metrics.jsonl", "validation.jsonl", "evaluation/dense.json",
    "evaluation/pruned.json", "config.yaml",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small runs, "good" and "other"."""
    good = make_run(tmp_path_factory.mktemp("fuzz") / "good")
    plan = json.loads((good / "plan.json").read_text())
    plan["sites"] = dict(list(plan["sites"].items())[:4])
    (good / "plan.json").write_text(json.dumps(plan))
    for name in ("dense", "tuned", "pruned"):
        file = good / "evaluation" / f"{name}.json"
        scores = json.loads(file.read_text())
        scores["tasks"] = {task: scores["tasks"][task] for task in ("overruling", "billsum", "text")}
        for task in scores["tasks"].values():
            task["items"] = task["items"][:3]
        file.write_text(json.dumps(scores))
    for name in ("metrics.jsonl", "validation.jsonl"):
        (good / name).write_text("\n".join((good / name).read_text().splitlines()[:4]) + "\n")
    shutil.copytree(good, good.parent / "other")
    return good.parent


def contents(good: Path, name: str) -> Any:
    text = (good / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)


def written(name: str, value: Any) -> bytes:
    if name.endswith(".jsonl"):
        lines = value if isinstance(value, list) else [value]
        return "\n".join(map(json.dumps, lines)).encode()
    return json.dumps(value).encode()


@st.composite
def damaged_file(draw: st.DrawFn, good: Path) -> tuple[str, bytes]:
    """The name of a file of a run, and its bytes as they might be."""
    name = draw(st.sampled_from(FILES))
    value = draw(st.one_of(damaged(contents(good, name)), ODD))
    return name, draw(st.one_of(st.just(written(name, value)), torn((good / name).read_bytes())))


def test_report_of_a_damaged_run_is_written_or_refused(runs: Path) -> None:
    @given(file=damaged_file(runs / "good"))
    @fuzzed(2, most=100)  # each draws all figures
    def check(file: tuple[str, bytes]) -> None:
        name, content = file
        shutil.copytree(runs / "good", runs / "other", dirs_exist_ok=True)
        (runs / "other" / name).write_bytes(content)
        with refused_or_fine():
            write_report(runs / "other")

    check()


def test_damaged_run_is_listed_and_compared_or_refused(runs: Path) -> None:
    @given(file=damaged_file(runs / "good"))
    @fuzzed(12)
    def check(file: tuple[str, bytes]) -> None:
        name, content = file
        shutil.copytree(runs / "good", runs / "other", dirs_exist_ok=True)
        (runs / "other" / name).write_bytes(content)
        with refused_or_fine():
            assert "good" in render_runs_table(list_runs(runs))
        for pair in (("good", "other"), ("other", "good")):
            with refused_or_fine():
                diff_runs([runs / run for run in pair])

    check()


def test_checkpoint_of_any_state_is_read_or_passed_over(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(TrainingState(step=1))
    store.save(TrainingState(step=2))
    file = tmp_path / "step-0000002" / "state.json"
    text = file.read_bytes()

    @given(content=st.one_of(damaged(json.loads(text)).map(json.dumps).map(str.encode), torn(text)))
    @fuzzed(20)
    def check(content: bytes) -> None:
        file.write_bytes(content)
        with refused_or_fine():
            state = store.latest()
            assert state is not None
            assert state.step in (1, 2)

    check()
