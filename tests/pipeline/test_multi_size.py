"""Runs of several sizes: nested, on budget, each cut from the one before, and the same bytes after a kill."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from prunetune.bench.models import resolve_models
from prunetune.bench.options import BenchOptions
from prunetune.bench.tile_alignment import misaligned_widths
from prunetune.cli import app
from prunetune.cli.output import render_run
from prunetune.compare.run import compare
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping, to_mapping
from prunetune.errors import ConfigError, LimitBroken, ModelError, PlanError, RunFolderError
from prunetune.evaluation.suites.open_model import resolve_checkpoint
from prunetune.export import selfcheck
from prunetune.export.source import ExportSource
from prunetune.pipeline import finish, multi_size, recording
from prunetune.pipeline import run as run_module
from prunetune.pipeline.run import run as run_pipeline
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params, prunable_params
from prunetune.runs.folder import RunFolder, create_run_folder, open_run
from prunetune.runs.history import list_runs
from prunetune.runs.watch import active_run
from prunetune.train.checkpoints import Checkpoints, TrainingState
from support.evaluation import speaker, write_model_and_rows

KEEPS = (0.8, 0.6, 0.45)
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": "0.45, 0.8, 0.6", "align": 8},
    "train": {
        "steps": 10,
        "size_share": 0.3,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "validate_every": 2,
    },
    "lora": {"rank": 4, "dropout": 0.1},
    "search": {"cuts": 3, "span": 0.3, "init_batches": 1, "batch_size": 4},
    "distill": {"teacher": "base"},
    "evaluate": {"drift": False, "limit": 2, "generate_limit": 0, "dense_tuned": False},
    "require": {"prompt": 8, "generate": 2, "runs": 1},
}
SOUND = SimpleNamespace(to_dict=lambda: {"ok": True, "max_relative": 0.0, "limit": 1e-4, "tokens": 1})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    return write_model_and_rows(tmp_path_factory.mktemp("place"), 24)


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    paths = {"model": str(workspace / "dense"), "out": str(out), "data": {"train": [str(workspace / "rows.jsonl")]}}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


@pytest.fixture(scope="module")
def done(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of two sizes, with all stages."""
    changes: dict[str, Any] = {"budget": {"keep": [0.8, 0.5]}, "require": {"smaller": 0.01}}
    return run_pipeline(
        config_of(workspace, tmp_path_factory.mktemp("runs") / "two", **changes), command="prunetune run"
    )


@pytest.fixture
def only_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip writing, scoring and timing; tests read the checkpoints of tuning."""
    for name in ("_finish_and_evaluate", "measure_gain"):
        monkeypatch.setattr(multi_size, name, lambda *_: None)
    monkeypatch.setattr(recording, "write_report", lambda _: None)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check of written models in a fresh process, which other tests cover."""
    monkeypatch.setattr(finish, "check_checkpoint", lambda *_, **__: SOUND)
    monkeypatch.setattr(selfcheck, "FreshReader", nullcontext)


def of(run: Path, keep: float) -> Path:
    return run / "sizes" / f"{keep:g}"


def last_state(run: Path, keep: float) -> TrainingState:
    state = Checkpoints(of(run, keep) / "checkpoints").latest()
    assert state is not None
    return state


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -- what a run of several sizes leaves ------------------------------------------------------------------------------


def test_every_size_is_a_run_folder(done: Path) -> None:
    for keep in (0.8, 0.5):
        folder, config = open_run(of(done, keep))
        assert (config.budget.keep, config.budget.sizes, config.out) == (keep, (), str(folder.path))
        names = ("config.yaml", "plan.json", "metrics.jsonl", "validation.jsonl", "manifest.json", "report.html")
        assert all((folder.path / name).is_file() for name in names)
        assert all(folder.evaluation_file(name).is_file() for name in ("dense", "pruned"))
        assert kept_params(find_sites(speaker()), Plan.load(folder.plan_file)) <= keep * prunable_params(
            find_sites(speaker())
        )
        manifest = folder.read_manifest()
        assert manifest.selfcheck.ok
        assert set(manifest.gain.speedups) == {"throughput", "prefill", "decode"}
        assert manifest.size.to_dict() == {"keep": keep, "larger": None if keep == 0.8 else 0.8}
        assert manifest.timings["tune and prune"] > 0
        assert manifest.gain.limits[0].is_met
        assert ExportSource.open(folder.path).run == folder.path
        assert resolve_checkpoint(str(folder.path)) == str(folder.model_folder)
    assert [entry.path.name for entry in list_runs(done / "sizes")] == ["0.5", "0.8"]


def test_run_folder_holds_files_that_sizes_share(done: Path) -> None:
    assert json.loads((done / "manifest.json").read_text())["sizes"] == ["sizes/0.8", "sizes/0.5"]
    assert {file.name for file in (done / "evaluation").iterdir()} == {"dense.json"}
    benches = json.loads((done / "bench.json").read_text())
    assert [[model["name"] for model in bench["models"]][1:] for bench in benches] == [
        [str(of(done, keep))] for keep in (0.8, 0.5)
    ]
    page = (done / "report.html").read_text()
    assert all(f'href="sizes/{name}/report.html"' in page for name in ("0.8", "0.5"))
    table = render_run(done)
    assert all(str(of(done, keep) / "model") in table for keep in (0.8, 0.5))


def test_commands_take_the_folder_of_a_size(done: Path) -> None:
    folders = [str(of(done, keep)) for keep in (0.8, 0.5)]
    with pytest.raises(ModelError, match="several sizes; name one of") as refused:
        resolve_checkpoint(str(done))
    assert all(name in str(refused.value) for name in folders)
    with pytest.raises(ModelError, match="several sizes: export one of") as refused:
        ExportSource.open(done)
    assert str(refused.value).endswith(", ".join(folders))
    models = resolve_models([str(done)], BenchOptions(prompt=4, generate=2))  # a bench takes all of them
    assert [model.label for model in models[1:]] == folders


def test_finished_run_resumes_to_itself(workspace: Path, done: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"budget": {"keep": [0.8, 0.5]}, "require": {"smaller": 0.01}}
    before = {keep: (of(done, keep) / "model" / "model.safetensors").read_bytes() for keep in (0.8, 0.5)}
    bench = (done / "bench.json").read_text()
    run_pipeline(config_of(workspace, done, **changes), resume=True)
    assert {keep: (of(done, keep) / "model" / "model.safetensors").read_bytes() for keep in (0.8, 0.5)} == before
    assert (done / "bench.json").read_text() == bench
    assert [entry.path.name for entry in list_runs(done / "sizes")] == ["0.5", "0.8"]


# -- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["all", "adapters"])
def test_run_killed_in_any_size_ends_with_the_same_bytes(
    weights: str, workspace: Path, tmp_path: Path, only_tuning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> RunConfig:
        return config_of(workspace, tmp_path / name, train={"weights": weights})

    whole = run_pipeline(config("whole"))
    plain, left = RunFolder.append_record, [("0.8", 2), ("0.8", 6), ("0.6", 1), ("0.45", 2)]

    def deadly(folder: RunFolder, name: str, record: dict[str, Any]) -> None:
        plain(folder, name, record)
        if left and name == "metrics.jsonl" and (folder.path.name, record["step"]) == left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append_record", deadly)
    for resume in (False, True, True, True):
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(config("killed"), resume=resume)
    killed = run_pipeline(config("killed"), resume=True)
    assert not left
    for keep in KEEPS:
        expected, resumed = last_state(whole, keep), last_state(killed, keep)
        assert (expected.step, expected.plan, expected.is_cut) == (resumed.step, resumed.plan, True)
        for group, tensors in expected.tensors.items():
            assert tensors.keys() == resumed.tensors[group].keys()
            assert all(torch.equal(tensor, resumed.tensors[group][name]) for name, tensor in tensors.items())
        steps = [line["step"] for line in lines(of(killed, keep) / "metrics.jsonl")]
        assert steps == list(range(1, expected.step + 1))
    plans = [last_state(whole, keep).plan for keep in KEEPS]
    for larger, smaller in itertools.pairwise(plans):
        assert larger is not None
        assert smaller is not None
        assert larger != smaller
        assert all(set(smaller.kept[name]) <= set(larger.kept[name]) for name in larger.kept)


def test_every_size_is_cut_on_from_where_the_larger_one_was(workspace: Path, tmp_path: Path, only_tuning: None) -> None:
    run = run_pipeline(config_of(workspace, tmp_path / "run", train={"size_share": [0.6, 0.5]}))
    records = {keep: lines(of(run, keep) / "metrics.jsonl") for keep in KEEPS}
    assert {keep: len(steps) for keep, steps in records.items()} == {0.8: 10, 0.6: 6, 0.45: 5}
    cuts = {keep: [line["step"] for line in steps if "widths" in line] for keep, steps in records.items()}
    assert cuts == {0.8: [1, 2, 3], 0.6: [1, 2, 3], 0.45: [1, 2, 3]}
    for larger, smaller in itertools.pairwise(KEEPS):
        kept = [line["kept"] for line in records[smaller]]
        assert smaller >= kept[2] > smaller - 0.1
        assert larger > kept[0] > kept[1] > kept[2] == kept[-1]
        branch = Checkpoints(of(run, larger) / "checkpoints" / "branch").latest()
        assert branch is not None
        assert branch.step == 3  # the last cut was tuned as long as those before
        assert branch.plan == last_state(run, larger).plan


def test_largest_size_equals_a_plain_run_to_the_bit(workspace: Path, tmp_path: Path, only_tuning: None) -> None:
    several = last_state(run_pipeline(config_of(workspace, tmp_path / "several")), 0.8)
    plain = run_pipeline(config_of(workspace, tmp_path / "plain", budget={"keep": 0.8}))
    state = Checkpoints(plain / "checkpoints").latest()
    assert state is not None
    assert (state.step, state.plan) == (several.step, several.plan)
    for group, tensors in state.tensors.items():
        assert tensors.keys() == several.tensors[group].keys()
        assert all(torch.equal(tensor, several.tensors[group][name]) for name, tensor in tensors.items())


def test_limits_of_every_size_refer_to_the_same_dense_model(workspace: Path, tmp_path: Path, only_tuning: None) -> None:
    run = run_pipeline(config_of(workspace, tmp_path / "run", gates=["valid.nll <= 100x -> stop"]))
    dense = last_state(run, 0.8).validation_history["dense"]
    assert dense["valid.nll"] > 0
    assert all(last_state(run, keep).validation_history["dense"] == dense for keep in KEEPS)
    scored = {keep: [line["step"] for line in lines(of(run, keep) / "validation.jsonl")] for keep in KEEPS}
    assert [0 in steps for steps in scored.values()] == [True, False, False]


def test_watch_follows_the_size_in_training(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run")
    create_run_folder(RunFolder(tmp_path / "run"), config)
    assert active_run(tmp_path / "run")[0].path == tmp_path / "run"
    create_run_folder(RunFolder(of(tmp_path / "run", 0.8)), config)
    assert active_run(tmp_path / "run")[0].path == of(tmp_path / "run", 0.8)
    (tmp_path / "run" / "report.html").write_text("all are done")
    assert active_run(tmp_path / "run")[0].path == tmp_path / "run"


def test_limit_that_stops_a_size_keeps_the_larger_ones(
    workspace: Path, tmp_path: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = multi_size.SizeTraining.train_size

    def stopped(chain: Any, size: Any) -> None:
        if size.config.budget.keep == 0.6:
            raise LimitBroken("stopped at step 2: valid.nll is 9")
        plain(chain, size)

    monkeypatch.setattr(multi_size.SizeTraining, "train_size", stopped)
    with pytest.raises(LimitBroken, match=r"size 0\.6: stopped at step 2"):
        run_pipeline(config_of(workspace, tmp_path / "run"))
    assert (of(tmp_path / "run", 0.8) / "report.html").is_file()
    assert not of(tmp_path / "run", 0.6).exists()
    assert "stopped at step 2" in (tmp_path / "run" / "report.html").read_text()
    assert "not made" in render_run(tmp_path / "run")


def test_one_size_alone_is_not_resumed(workspace: Path, tmp_path: Path, only_tuning: None) -> None:
    run = run_pipeline(config_of(workspace, tmp_path / "run"))
    with pytest.raises(RunFolderError, match="go on with the run around it"):
        run_pipeline(open_run(of(run, 0.6))[1], resume=True)
    (branch,) = of(run, 0.8).glob("checkpoints/branch/step-*")
    (branch / "adapters.safetensors").write_bytes(b"damaged")
    (of(run, 0.8) / "model").mkdir()
    for folder in of(run, 0.6).glob("checkpoints/*"):
        shutil.rmtree(folder)
    with pytest.raises(RunFolderError, match="the state that the next size goes on from cannot be read"):
        run_pipeline(config_of(workspace, tmp_path / "run"), resume=True)


# -- one size, and what is refused -----------------------------------------------------------------------------------


def test_one_size_in_a_list_is_a_plain_run(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, plain = (config_of(workspace, tmp_path, budget={"keep": keep}) for keep in ([0.6], 0.6))
    assert listed == plain

    def prepare(config: RunConfig, **_: Any) -> None:
        prepared.append(config)
        raise ConfigError("enough")

    prepared: list[RunConfig] = []
    monkeypatch.setattr(run_module, "prepare", prepare)
    with pytest.raises(ConfigError, match="enough"):
        run_pipeline(listed)
    assert prepared == [plain]


def test_budgets_are_read_from_lists_and_flags() -> None:
    for written in ("0.5, 0.8,0.6", [0.8, 0.6, 0.5], ["0.8", 0.5, 0.6]):
        assert from_mapping({"budget": {"keep": written}}).budget.keeps == (0.8, 0.6, 0.5)
    several = from_mapping({"budget": {"keep": [0.8, 0.5]}})
    assert from_mapping(to_mapping(several)) == several
    assert from_mapping(merge_mappings(to_mapping(several), {"budget": {"keep": "0.7"}})).budget.keeps == (0.7,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"keep": []}}, "empty list"),
        ({"budget": {"keep": "0.8,half"}}, "finite number, got 'half'"),
        ({"budget": {"keep": "0.8,0.8"}}, "have to fall"),
        ({"budget": {"keep": [0.8, 0.0]}}, r"must lie in \(0, 1\]"),
        ({"budget": {"keep": [0.8, float("nan")]}}, "finite number"),
        ({"budget": {"keep": 0.5, "sizes": [0.6]}}, "have to fall"),
        ({"budget": {"keep": [0.8, 0.5]}, "train": {"size_share": [0.1, 0.2, 0.3]}}, "3 numbers for 1 further sizes"),
        ({"budget": {"keep": [0.8, 0.5]}, "limits": ["valid.nll <= 2x -> roll-back"]}, "would move the budget"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping(changes)


def test_infeasible_sizes_are_refused_before_anything_is_written(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="below what is feasible"):
        run_pipeline(config_of(workspace, tmp_path / "run", budget={"keep": "0.8,0.01"}))
    several = config_of(workspace, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"compare\.keeps"):
        compare(several)
    assert not (tmp_path / "run").exists()


# -- the gain as a gate ----------------------------------------------------------------------------------------------


def test_run_below_the_required_gain_fails_and_names_widths(
    workspace: Path,
    tmp_path: Path,
    unchecked: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes: dict[str, Any] = {"budget": {"keep": 0.7, "align": 1}, "require": {"faster": 1e6, "smaller": 0.1}}
    out = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_mapping(config_of(workspace, out, **changes))))
    monkeypatch.setattr("sys.argv", ["prunetune", "run", str(recipe)])
    assert app._run_app() == 1
    err = capsys.readouterr().err
    assert "require.faster >= 1e+06" in err
    assert "require.smaller" not in err  # reached
    worst = misaligned_widths(Plan.load(out / "plan.json"), find_sites(speaker()))
    assert f"layer {worst[0].layer} is {worst[0].width}" in err
    assert "budget.align to 128" in err
    page = (out / "report.html").read_text()
    assert f"layer {worst[0].layer} is {worst[0].width}" in page
    assert "✗ no" in page
    manifest = json.loads((out / "manifest.json").read_text())
    assert [limit["held"] for limit in manifest["gain"]["limits"]] == [True, False]
    assert (out / "model").is_dir()
