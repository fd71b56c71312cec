"""Budgets from the command line: previews before training, refused budgets, and a run that meets its budgets."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.bench.latency import tables
from prunetune.bench.latency.measure import LatencyTableBuilder
from prunetune.compare.run import compare
from prunetune.config.recipe import from_mapping
from prunetune.cost.latency_table import PHASES, TRACKS, LatencyTable
from prunetune.errors import ConfigError
from prunetune.plan import Plan
from support.data import pairs, write_lines
from support.evaluation import characters, speaker

Said = Callable[..., tuple[int, str, str]]
ALIGN = ("--align", "8")
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "train": {"steps": 6, "batch_size": 4},
    "lora": {"rank": 4},
    "search": {"share": 0.4, "settle": 0.2, "init_batches": 1, "batch_size": 4},
    "distill": {"teacher": "none"},
    "evaluate": {"drift": False, "limit": 4, "generate_limit": 0, "dense_tuned": False},
    "workload": {"prompt": 8, "generate": 4, "dtype": "float32"},
}


def sizes(models: Sequence[Any], workload: Any, runs: int) -> list[dict[str, float]]:
    """Seconds proportional to the number of parameters."""
    counts = [sum(weight.numel() for weight in model.parameters()) for model in models]
    return [dict.fromkeys(PHASES, 1e-6 * count) for count in counts]


def tracks(models: Sequence[Any], workload: Any, runs: int) -> list[dict[str, float]]:
    """The same seconds by track, all of them on the device."""
    times = sizes(models, workload, runs)
    return [dict.fromkeys(TRACKS, 0.0) | {f"{phase}.device": time[phase] for phase in PHASES} for time in times]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    speaker(layers=4).save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _a_device_of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("prunetune.bench.latency.short_models.CPU_CACHE", 1)
    monkeypatch.setattr(
        tables, "LatencyTableBuilder", functools.partial(LatencyTableBuilder, track_timer=tracks, request_timer=sizes)
    )
    monkeypatch.setattr("prunetune.bench.latency.verify.time_requests", sizes)


@pytest.fixture
def recipe(dense: Path, tmp_path: Path) -> Callable[..., str]:
    def write(**budget: Any) -> str:
        write_lines(tmp_path / "rows.jsonl", *pairs(20))
        paths = {"model": str(dense), "out": str(tmp_path / "run"), "data": {"train": [str(tmp_path / "rows.jsonl")]}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | paths | {"budget": {"align": 8, **budget}}))
        return str(tmp_path / "recipe.yaml")

    return write


def row(out: str, kind: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(f"{kind} ")).split()[1:]


def refused(outcome: tuple[int, str, str], *parts: str) -> None:
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("prunetune: ")
    assert err.count("\n") == 1, err
    for words in parts:
        assert words in err


# -- before any training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_sites_prints_previews_of_budgets(layout: str, say: Said, dense: Path) -> None:
    code, out, err = say("sites", str(dense), *ALIGN, "--layout", layout, "--context", "64", "--batch", "4")
    assert (code, err) == (0, "")
    for kind in ("flops", "memory", "file"):
        assert len(row(out, kind)) == 5
    assert "--measure" in out


def test_sites_measures_latency_on_request_and_caches_it(say: Said, dense: Path) -> None:
    code, out, _ = say("sites", str(dense), *ALIGN, "--measure", "--device", "cpu")
    assert code == 0
    assert row(out, "latency")[0].endswith("s")
    assert row(out, "throughput")[0].endswith("/s")
    again = say("sites", str(dense), *ALIGN, "--device", "cpu")[1]
    assert row(again, "latency") == row(out, "latency")


def test_preview_plans_do_not_depend_on_the_budget(say: Said, recipe: Callable[..., str]) -> None:
    plain, limited = (say("run", recipe(**budget), "--dry-run")[1] for budget in ({}, {"memory": 0.8}))
    assert row(limited, "file") == row(plain, "file")


def test_budget_that_cannot_be_counted_has_its_reason(say: Said, dense: Path) -> None:
    code, out, _ = say("sites", str(dense), *ALIGN, "--units", "query-heads", "--units", "mlp-channels")
    assert code == 0
    assert "query-heads" in " ".join(row(out, "latency"))
    refused(
        say("sites", str(dense), "--units", "query-heads", "--units", "mlp-channels", "--measure", "--device", "cpu"),
        "query-heads",
    )


def test_dry_run_writes_nothing(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    code, out, _ = say("run", recipe(memory=0.8), "--dry-run")
    assert code == 0
    assert "an even plan takes" in out
    assert "times the rows of train" in out
    assert "of the tokens of train (data.loss=assistants)" in out
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()


def test_least_budget_of_sites_is_accepted_by_run(say: Said, dense: Path, recipe: Callable[..., str]) -> None:
    workload = ("--prompt", "8", "--generate", "4", "--dtype", "float32")
    out = say("sites", str(dense), *ALIGN, *workload, "--measure", "--device", "cpu")[1]
    for kind in ("memory", "throughput"):
        assert say("run", recipe(**{kind: row(out, kind)[-1]}), "--dry-run")[0] == 0


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        ({"memory": "1kB"}, ("budget.memory", "feasible (", "budget.align")),
        ({"throughput": "1e9/s"}, ("budget.throughput", "above what is feasible (")),
        ({"latency": 0.001}, ("budget.latency", "feasible (")),
        ({"memory": "1TB"}, ("budget.memory", "nothing would have to be pruned")),
        ({"memory": "fast"}, ("budget.memory", "1.5GB")),
        ({"memory": 0.5, "keep": 0.001}, ("budget.keep", "feasible (")),
        ({"memory": 0.3, "min_share": 0.95}, ("budget.memory", "budget.min_share")),
        ({"latency": 0.8, "table": "nowhere.json"}, ("budget.table", "cannot be read")),
        ({"latency": 0.8, "units": ["query-heads"]}, ("query-heads", "budget.units")),
    ],
)
def test_infeasible_or_bad_budget_is_refused_in_one_line(
    budget: dict[str, Any], parts: Sequence[str], say: Said, recipe: Callable[..., str], tmp_path: Path
) -> None:
    outcome = say("run", recipe(**budget))
    refused((outcome[0], outcome[1], outcome[2].splitlines()[-1] + "\n"), *parts)
    assert not (tmp_path / "run").exists()


def test_nearest_feasible_value_of_an_error_is_accepted(say: Said, recipe: Callable[..., str]) -> None:
    for kind, wrong in (("flops", "1e-5M"), ("throughput", "1e9/s")):
        nearest = say("run", recipe(**{kind: wrong}))[2].partition("feasible (")[2].partition(";")[0]
        assert say("run", recipe(**{kind: nearest}), "--dry-run")[0] == 0


def test_missing_device_is_refused(say: Said, recipe: Callable[..., str], dense: Path) -> None:
    refused(say("run", recipe(latency=0.8), "--device", "cuda:7"), "cuda:7", "not available")
    refused(say("sites", str(dense), "--measure", "--device", "cuda:7"), "cuda:7", "not available")


def test_latency_table_of_another_device_is_refused(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    assert say("run", recipe(latency=0.8), "--dry-run")[0] == 0
    (file,) = (tmp_path / "cache" / "latency").iterdir()
    table = LatencyTable.from_json(file.read_text(), "x")
    other = tmp_path / "other.json"
    other.write_text(LatencyTable({**table.header, "device": "NVIDIA X"}, table.outside_layers, table.layers).to_json())
    outcome = say("run", recipe(latency=0.8, table=str(other)), "--dry-run")
    refused((outcome[0], outcome[1], outcome[2].splitlines()[-1] + "\n"), "device 'NVIDIA X'", "budget.table")
    assert say("run", recipe(latency=0.8, table=str(file)), "--dry-run")[0] == 0


# -- a run -----------------------------------------------------------------------------------------------------------


def test_run_meets_its_budgets(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    code, out, _ = say("run", recipe(memory=0.85, latency=0.9))
    assert code == 0
    rows = json.loads((tmp_path / "run" / "manifest.json").read_text())["budgets"]
    assert [budget["budget"] for budget in rows] == ["memory", "latency"]
    for budget in rows:
        assert 0.8 * budget["limit"] < budget["counted"] <= budget["limit"] * (1 + 1e-9)
        assert budget["words"] in out
    assert abs(rows[1]["error"]) < 0.05
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert any(len(kept) < plan.units[site] for site, kept in plan.kept.items())
    assert say("run", str(tmp_path / "recipe.yaml"), "--resume")[0] == 0


def test_comparison_meets_its_budget(recipe: Callable[..., str], tmp_path: Path) -> None:
    values = yaml.safe_load(Path(recipe(memory=0.85)).read_text())
    methods = {"methods": ["magnitude", "progressive"]}
    folder = compare(from_mapping(values | {"compare": methods}))
    cells = [json.loads(file.read_text()) for file in (folder / "cells").glob("*.json")]
    assert len(cells) >= 2
    assert all(cell["kept"] < 1 for cell in cells)
    with pytest.raises(ConfigError, match=r"compare\.keeps"):
        compare(from_mapping(values | {"out": str(tmp_path / "other"), "compare": methods | {"keeps": [0.5]}}))
