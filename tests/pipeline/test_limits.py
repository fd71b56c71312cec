"""Limits on scores in a whole run: records, reports, refused limits, and how the run ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.cli.output import render_run
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping, to_mapping
from prunetune.config.score_limits import ScoreLimit, normalize_limit
from prunetune.errors import ConfigError, DataError, LimitBroken
from prunetune.pipeline import stages
from prunetune.pipeline.monitor import make_monitor, pack_plan
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.run import run
from prunetune.plan import Plan
from prunetune.runs.history import list_runs
from prunetune.utils.console import PlainConsole
from support.data import write_lines
from support.evaluation import characters, speaker

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.5, "align": 8},
    "train": {"steps": 8, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, "validate_every": 1},
    "lora": {"rank": 4},
    "search": {"cuts": 4, "span": 0.75, "init_batches": 1, "batch_size": 4},  # cuts before steps 1, 2, 4 and 5
    "distill": {"teacher": "none"},
    "evaluate": {"drift": False, "limit": 4, "generate_limit": 0, "dense_tuned": False},
}


def unpack_plan(sites: dict[str, dict[str, Any]]) -> Plan:
    """Read what `pack_plan` wrote."""
    masks = {site: int(value["mask"], 16) for site, value in sites.items()}
    units = {site: int(value["units"]) for site, value in sites.items()}
    return Plan({site: tuple(u for u in range(units[site]) if mask >> u & 1) for site, mask in masks.items()}, units)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    guard = [f"The {n}th fox is quick and brown." for n in range(6)]
    model_that_knows(guard).save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    rows = [{"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(40)]
    write_lines(folder / "rows.jsonl", *rows)
    write_lines(folder / "guard.jsonl", *({"text": text} for text in guard))
    return folder


def model_that_knows(texts: list[str]) -> Any:
    """A model trained on these texts, so that pruning raises its loss on them."""
    model = speaker().train()
    ids = torch.tensor(characters()(texts)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def config_of(workspace: Path, out: Path, *gates: str, **changes: Any) -> RunConfig:
    paths = {
        "model": str(workspace / "dense"),
        "out": str(out),
        "data": {
            "train": [str(workspace / "rows.jsonl")],
            "guard": [str(workspace / "guard.jsonl")],
            "valid_share": 0.2,
        },
        "limits": list(gates),
    }
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def free(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation and without limits."""
    return run(config_of(workspace, tmp_path_factory.mktemp("free") / "run", validate={"accuracy": True}))


def limit_between(free: Path, step: int = 8) -> float:
    """A guard limit that the dense model meets and the model of the run `free` at a step breaks."""
    scores = [line["guard.nll"] for line in lines(free / "validation.jsonl")]
    assert scores[step] > scores[0], "pruning costs this model something"
    return (scores[0] + scores[step]) / 2


def test_guard_scores_are_recorded_and_reported(free: Path) -> None:
    validation = lines(free / "validation.jsonl")
    assert [line["step"] for line in validation] == list(range(9))
    for line in validation:
        assert {"nll", "valid.nll", "valid.accuracy", "guard.nll", "guard.perplexity", "seconds"} <= set(line)
        assert 0 <= line["valid.accuracy"] <= 1
    manifest = json.loads((free / "manifest.json").read_text())
    assert manifest["validation"]["every"] == 1
    assert 0 < manifest["validation"]["share"] < 1
    assert manifest["data"]["counts"]["guard"] == 6
    assert len(manifest["data"]["hashes"]["guard"]) == 64
    assert manifest["gates"]["limits"] == []
    files = sorted(path.name for path in (free / "decisions").iterdir())
    assert files == [f"step-{step:07d}.json" for step in range(1, 9)]
    last = json.loads((free / "decisions" / files[-1]).read_text())
    assert unpack_plan(last["kept_units"]) == Plan.load(free / "plan.json")
    assert last["guard.nll"] == validation[-1]["guard.nll"]


def test_guard_changes_no_weight(workspace: Path, free: Path, tmp_path: Path) -> None:
    alone = run(config_of(workspace, tmp_path / "run", data={"guard": []}))
    for name in ("plan.json", "model/model.safetensors"):
        assert (alone / name).read_bytes() == (free / name).read_bytes()
    assert [line["step"] for line in lines(alone / "validation.jsonl")] == list(range(1, 9))


def test_roll_back_is_reported_and_the_run_ends_within_the_limit(workspace: Path, free: Path, tmp_path: Path) -> None:
    limit = limit_between(free)
    folder = run(config_of(workspace, tmp_path / "run", f"guard.nll <= {limit:.6f} -> roll-back"))
    manifest = json.loads((folder / "manifest.json").read_text())
    gates = manifest["gates"]
    assert all(limit_facts["held"] for limit_facts in gates["limits"])
    assert gates["events"][0]["did"].startswith("rolled back to step")
    assert gates["kept"] > gates["keep_asked"] == gates["keep_allowed"] == 0.5
    assert lines(folder / "validation.jsonl")[-1]["guard.nll"] <= limit
    assert manifest["pruned"]["decoder_params"] > 0.5 * manifest["model"]["decoder_params"]
    assert "rolled back to step" in render_run(folder)
    assert "50% was asked for" in render_run(folder)
    assert "rolled back to step" in (folder / "report.html").read_text()
    (entry,) = list_runs(tmp_path)
    assert entry.status == "done"


def test_rolled_back_model_shares_its_weights_with_its_teacher(
    workspace: Path, free: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[tuple[int, int]] = []
    genuine = stages.tune_and_prune

    def watched(job: Any) -> Plan:
        heads.append((job.model.lm_head.weight.data_ptr(), job.teacher.model.lm_head.weight.data_ptr()))
        return genuine(job)

    monkeypatch.setattr(stages, "tune_and_prune", watched)
    changes: dict[str, Any] = {"distill": {"teacher": "base"}, "train": {"weights": "adapters"}}
    limit = limit_between(free, step=2)
    folder = run(config_of(workspace, tmp_path / "run", f"guard.nll <= {limit:.6f} -> roll-back", **changes))
    assert json.loads((folder / "manifest.json").read_text())["gates"]["events"]
    assert len(heads) > 1
    assert all(mine == other for mine, other in heads)


def test_back_off_reports_the_allowed_budget(workspace: Path, free: Path, tmp_path: Path) -> None:
    limit = limit_between(free, step=2)  # two more cuts are to come
    gate = f"guard.nll <= {limit:.6f} -> back-off"
    folder = run(config_of(workspace, tmp_path / "run", gate, validate={"back_off": 0.25}))
    gates = json.loads((folder / "manifest.json").read_text())["gates"]
    assert gates["keep_allowed"] > gates["keep_asked"] == 0.5
    assert "50% was asked for" in render_run(folder)


def test_stop_leaves_a_report_and_exits_one(workspace: Path, free: Path, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run", f"guard.nll <= {limit_between(free):.6f} -> stop")
    for resume in (False, True):
        with pytest.raises(LimitBroken, match=r"stopped at step \d"):
            run(config, resume=resume)
    folder = tmp_path / "run"
    assert "stopped at step" in json.loads((folder / "manifest.json").read_text())["failed"]
    assert "stopped at step" in (folder / "report.html").read_text()
    assert not (folder / "model").exists()
    (entry,) = list_runs(tmp_path)
    assert entry.status == "limit broken"


def test_run_outside_a_limit_keeps_its_model_and_exits_one(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match=r"ended outside a limit: guard\.nll <= 0 -> roll-back") as failed:
        run(config_of(workspace, tmp_path / "run", "guard.nll <= 0 -> roll-back"))
    assert "\n" not in str(failed.value)
    assert (tmp_path / "run" / "model").exists()


def test_validation_scores_at_most_limit_items(workspace: Path, tmp_path: Path) -> None:
    rows = [{"text": f"The {n}th fox.", "task": f"task {n % 5}"} for n in range(30)]
    config = config_of(workspace, tmp_path / "run", data={"guard": [write_lines(tmp_path / "guard.jsonl", *rows)]})
    context = prepare(
        replace(config, validate=replace(config.validate, limit=7)), resume=False, console=PlainConsole(1)
    )
    assert len(make_monitor(context).guard_rows) == 7


# -- what a gate is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("guard.nll<=1.20x->roll-back", "guard.nll <= 1.2x -> roll-back"),
        ({"metric": "valid.accuracy", "min": 0.6, "action": "stop"}, "valid.accuracy >= 0.6 -> stop"),
        ({"metric": "guard.perplexity", "max": "1.5x", "action": "back-off"}, "guard.perplexity <= 1.5x -> back-off"),
        ("  valid.nll <= 2e-1 -> stop ", "valid.nll <= 0.2 -> stop"),
    ],
)
def test_limit_round_trips(entry: Any, text: str) -> None:
    assert normalize_limit(entry) == text
    assert str(ScoreLimit.parse(text)) == text
    config = from_mapping({"limits": [entry], "data": {"guard": "x.jsonl"}})
    assert config.limits == (text,)
    assert from_mapping(to_mapping(config)) == config


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("guard.nll", "is no limit; write one such as"),
        ("guard.nll <= x -> stop", "is no limit"),
        ("guard.nll <= -1 -> stop", "is no limit"),
        ("guard.loss <= 1 -> stop", "unknown metric 'guard.loss'"),
        ("guard.nll <= 1 -> explode", "unknown action 'explode'"),
        ("guard.nll >= 1 -> stop", "would refuse what is good"),
        ("valid.accuracy <= 1 -> stop", "would refuse what is good"),
        ({"metric": "valid.nll", "max": 1, "min": 0, "action": "stop"}, "a limit is text such as"),
        ({"metric": "valid.nll", "max": None, "action": "stop"}, "is no limit"),
        (3, "a limit is text such as"),
        ("guard.nll <= 1.2x -> stop", "name texts or rows in data.guard"),
    ],
)
def test_malformed_limit_is_refused_in_one_line(entry: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_mapping({"limits": [entry]})
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_limit_that_could_never_act_is_refused_before_anything_is_written(workspace: Path, tmp_path: Path) -> None:
    late = config_of(workspace, tmp_path / "run", "valid.nll <= 9 -> roll-back", train={"validate_every": 5})
    with pytest.raises(ConfigError, match=r"no validation comes before the last decision at step 4.* lower train"):
        run(late)
    blind = config_of(workspace, tmp_path / "run", "guard.accuracy >= 0.5 -> stop")
    with pytest.raises(DataError, match=r"needs rows with choices in data\.guard"):
        run(blind)
    write_lines(tmp_path / "long.jsonl", {"prompt": "long " * 50, "choices": ["yes", "no"], "answer": 0})
    small = config_of(workspace, tmp_path / "run", gain={"smaller": 0.9})
    with pytest.raises(
        ConfigError, match=r"under budget\.keep 0\.5 at most \d\d\.\d% of all parameters can be pruned .*: lower one"
    ):
        run(small)
    short = {"valid": [str(tmp_path / "long.jsonl")], "max_length": 40, "too_long": "drop"}
    idle = config_of(workspace, tmp_path / "run", "valid.nll <= 9 -> stop", data=short)
    with pytest.raises(DataError, match=r"valid has no row, or none that fits"):
        run(idle)
    (tmp_path / "long.jsonl").unlink()
    same = config_of(workspace, tmp_path / "run", data={"guard": [str(workspace / "rows.jsonl")]})
    with pytest.raises(DataError, match=r"data\.train and data\.guard overlap"):
        run(same)
    assert not list(tmp_path.iterdir())


def test_last_validated_plan_is_the_plan_that_is_cut(workspace: Path, tmp_path: Path) -> None:
    """This holds even if a generator searches until the last step."""
    search = {"method": "generator", "share": 1.0, "settle": 0, "learning_rate": 0.05}
    folder = run(config_of(workspace, tmp_path / "run", "valid.nll <= 9x -> stop", search=search))
    last = json.loads((folder / "decisions" / "step-0000008.json").read_text())
    assert unpack_plan(last["kept_units"]) == Plan.load(folder / "plan.json")


def test_packed_plan_round_trips() -> None:
    plan = Plan({"a": (), "b": (0, 63, 1535), "c": (0,)}, {"a": 3, "b": 1536, "c": 1})
    assert unpack_plan(json.loads(json.dumps(pack_plan(plan)))) == plan
