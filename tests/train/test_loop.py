"""Laws of the loop: it learns, ends on budget, repeats itself to the bit, and resumes exactly."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import dense_plan, kept_params, prunable_params
from prunetune.train.adapters import trainable_parameters
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.train.forward import Teacher
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import mean_loss
from prunetune.train.passes import PaddedPasses
from prunetune.train.schedule import learning_rate
from support.loop import (
    GENERATOR,
    KEEP,
    AllCheckpoints,
    config_of,
    examples,
    identical,
    job_of,
    losses,
    search_losses,
    tuned,
    weights_of,
)
from support.models import random_plan, tiny

METHODS = {
    "progressive": {},
    "generator": {"method": "generator"},
}
every_method = pytest.mark.parametrize("method", METHODS)

# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@every_method
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_run_learns_and_ends_on_budget(family: str, method: str, layout: str) -> None:
    config = config_of({"layout": layout, "search": METHODS[method], "train": {"steps": 20, "batch_size": 8}})
    job = job_of(config, family=family)
    plan = tune_and_prune(job)
    assert kept_params(job.sites, plan) <= KEEP * prunable_params(job.sites)
    assert kept_params(job.sites, plan) > (KEEP - 0.15) * prunable_params(job.sites)
    assert sum(losses(job)[-3:]) < 0.8 * sum(losses(job)[:3])
    assert all(math.isfinite(loss) for loss in losses(job))
    if layout == "uniform":
        assert len({(site.kind, len(plan.kept[site.name])) for site in job.sites}) == 2
    linears = dict(job.model.named_modules())
    for site in job.sites:
        if plan.kept[site.name]:
            base = linears[site.consumer.module].base_layer
            assert base.weight.shape[1] == len(plan.kept[site.name]) * site.consumer.rows_per_unit


def test_records_of_progressive_removal_hold_phases_and_widths_of_every_cut() -> None:
    job = job_of(config_of({"search": {"cuts": 3, "span": 0.6}}))
    plan = tune_and_prune(job)
    records = job.observer.steps  # type: ignore[attr-defined]
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["phase"] for record in records] == ["prune"] * 4 + ["tune"] * 6
    assert [record["step"] for record in records if "widths" in record] == [1, 3, 5]
    assert [record["step"] for record in records if "changed" in record] == [3, 5]
    kept = [record["kept"] for record in records]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == pytest.approx(kept_params(job.sites, plan) / prunable_params(job.sites))
    assert records[4]["widths"] == {name: len(units) for name, units in plan.kept.items()}
    changed = sum(records[2]["widths"].values()) - sum(records[4]["widths"].values())
    assert records[4]["changed"] == pytest.approx(changed / sum(site.units for site in job.sites))
    assert not any("search_loss" in record or "lasso" in record for record in records)


def test_records_of_a_generator_hold_phase_losses_and_widths() -> None:
    job = job_of(config_of(GENERATOR))
    plan = tune_and_prune(job)
    notes: Any = job.observer
    assert [record["step"] for record in notes.steps] == list(range(1, 11))
    assert [record["phase"] for record in notes.steps] == ["search"] * 4 + ["settle"] * 3 + ["tune"] * 3
    assert [record["lr"] for record in notes.steps] == [learning_rate(step, job.config.train) for step in range(10)]
    kept = [record["kept"] for record in notes.steps]
    assert kept[-1] == pytest.approx(kept_params(job.sites, plan) / prunable_params(job.sites))
    assert all(("search_loss" in record) == (record["phase"] == "search") for record in notes.steps)
    assert all(("lasso" in record) == (record["phase"] != "tune") for record in notes.steps)
    assert [record["step"] for record in notes.validations] == [5, 10]


def test_run_without_settling_or_tuning_ends_on_budget() -> None:
    for search in ({"share": 1.0, "settle": 0.0}, {"share": 0.5, "settle": 0.0}, {"share": 0.5, "settle": 0.5}):
        job = job_of(config_of({"train": {"steps": 4}, "search": {"method": "generator", **search}}))
        assert kept_params(job.sites, tune_and_prune(job)) <= KEEP * prunable_params(job.sites)


@every_method
def test_run_of_one_step_ends_on_budget(method: str) -> None:
    job = job_of(config_of({"train": {"steps": 1}, "search": METHODS[method]}))
    assert kept_params(job.sites, tune_and_prune(job)) <= KEEP * prunable_params(job.sites)


def test_given_plan_is_tuned_without_search() -> None:
    model = tiny()
    plan = random_plan(model)
    job = job_of(config_of(), plan=plan, model=model)
    assert tune_and_prune(job) == plan
    assert {record["phase"] for record in job.observer.steps} == {"tune"}  # type: ignore[attr-defined]
    assert losses(job)[-1] < losses(job)[0]
    dense = job_of(config_of(), plan=dense_plan(find_sites(tiny())))
    tune_and_prune(dense)
    assert {record["kept"] for record in dense.observer.steps} == {1.0}  # type: ignore[attr-defined]


@every_method
def test_same_seed_gives_the_same_bits(method: str) -> None:
    config = config_of({"search": METHODS[method], "lora": {"dropout": 0.1}})
    first, second = job_of(config), job_of(config)
    torch.manual_seed(1)
    plan = tune_and_prune(first)
    torch.manual_seed(2)  # nothing may hang on the state of the process
    assert tune_and_prune(second) == plan
    assert identical(weights_of(first), weights_of(second))
    assert losses(first) == losses(second)


def test_another_seed_gives_other_losses() -> None:
    first, second = job_of(config_of()), job_of(config_of({"seed": 1}))
    tune_and_prune(first)
    tune_and_prune(second)
    assert losses(first) != losses(second)


def test_base_weights_are_unchanged_until_the_cut() -> None:
    model = tiny()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tune_and_prune(job_of(config_of(), plan=dense_plan(find_sites(model)), model=model))
    after = {name.replace(".base_layer", ""): value for name, value in model.named_parameters() if ".lora_" not in name}
    assert identical(before, {name: value.detach() for name, value in after.items()})


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "train"),
    [
        ("llama", "generator", {}),
        ("qwen3", "generator", {"optimizer": "muon"}),
        ("qwen2", "generator", {"weights": "all"}),
        ("llama", "progressive", {"optimizer": "muon"}),
        ("phi3", "progressive", {"weights": "all"}),
    ],
)
def test_resumed_at_any_step_equals_uninterrupted(
    family: str, method: str, train: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of({"lora": {"dropout": 0.1}, "train": train, "search": METHODS[method]})
    every = AllCheckpoints(tmp_path)
    whole = job_of(config, family=family, store=every)
    plan = tune_and_prune(whole)
    for step in range(1, config.train.steps + 1):
        resumed = job_of(config, family=family, store=every.at(step))
        assert tune_and_prune(resumed) == plan
        assert identical(weights_of(resumed), weights_of(whole)), step
        assert losses(resumed) == losses(whole)[step:]
        assert search_losses(resumed) == search_losses(whole)[step:]


def test_seconds_of_a_resumed_run_continue(tmp_path: Path) -> None:
    every, config = AllCheckpoints(tmp_path), config_of()
    tune_and_prune(job_of(config, store=every))
    state = every.at(3).latest()
    assert state is not None
    assert state.seconds > 0
    every.at(3).save(replace(state, seconds=1000.0))
    resumed = job_of(config, store=every.at(3))
    tune_and_prune(resumed)
    seconds = [record["seconds"] for record in resumed.observer.steps]  # type: ignore[attr-defined]
    assert seconds == sorted(seconds)
    assert seconds[0] > 1000


def test_checkpoints_keep_the_newest_two(tmp_path: Path) -> None:
    tune_and_prune(job_of(config_of(), store=Checkpoints(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000009", "step-0000010"]


@pytest.mark.parametrize(("method", "steps"), [("progressive", [1, 2, 3, 10]), ("generator", [4, 7, 10])])
def test_checkpoints_are_written_before_cuts_and_where_phases_end(
    method: str, steps: list[int], tmp_path: Path
) -> None:
    every = AllCheckpoints(tmp_path)
    changes = {"train": {"checkpoint_every": 100}, "search": {"method": method}}
    tune_and_prune(job_of(config_of(changes), store=every))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == steps


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "cut short":
        file.write_bytes(data[: len(data) // 2])
    elif how == "one bit":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["cut short", "one bit", "empty", "missing"])
@pytest.mark.parametrize("part", ["adapters.safetensors", "generator_optimizer.safetensors", "state.json"])
def test_latest_passes_over_a_damaged_checkpoint(part: str, how: str, tmp_path: Path) -> None:
    state = {name: {"w": torch.arange(4.0)} for name in ("adapters", "generator_optimizer")}
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.save(TrainingState(step, None, False, state))
    damage(tmp_path / "step-0000006" / part, how)
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == 3
    damage(tmp_path / "step-0000003" / part, how)
    assert checkpoints.latest() is None


def test_run_resumed_past_a_damaged_checkpoint_ends_the_same(tmp_path: Path) -> None:
    config, checkpoints = config_of(), Checkpoints(tmp_path / "a")
    whole = job_of(config, store=AllCheckpoints(tmp_path / "b"))
    plan = tune_and_prune(whole)
    for step in (5, 6):
        shutil.copytree(tmp_path / "b" / str(step) / f"step-{step:07d}", tmp_path / "a" / f"step-{step:07d}")
    damage(tmp_path / "a" / "step-0000006" / "adapters.safetensors", "one bit")
    resumed = job_of(config, store=checkpoints)
    assert tune_and_prune(resumed) == plan
    assert identical(weights_of(resumed), weights_of(whole))


def test_latest_ignores_a_partly_written_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(TrainingState(1, None, False, {"adapters": {"w": torch.zeros(1)}}))
    (tmp_path / "step-0000002.partial").mkdir()
    state = checkpoints.latest()
    assert state is not None
    assert state.step == 1
    checkpoints.save(TrainingState(2, random_plan(tiny()), True, {"adapters": {"w": torch.ones(1)}}))
    state = checkpoints.latest()
    assert state is not None
    assert (state.step, state.plan, state.is_cut) == (2, random_plan(tiny()), True)
    assert torch.equal(state.tensors["adapters"]["w"], torch.ones(1))


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["progressive", "generator"])
def test_nan_loss_fails_with_step_and_rows(method: str) -> None:
    model = tiny()
    job = job_of(config_of({"train": {"max_skipped": 0}, "search": {"method": method}}), model=model)
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(ModelError, match=r"is nan at step 1 \(rows row \d+, row \d+, row \d+") as refused:
        tune_and_prune(job)
    assert "\n" not in str(refused.value)


def test_nan_of_the_teacher_fails_the_run() -> None:
    model = tiny("llama", seed=5)
    model.lm_head.weight.data[5] = math.nan
    job = job_of(config_of({**GENERATOR, "distill": {"hidden": 0}}))
    with pytest.raises(ModelError, match=r"is nan at step 3 \(rows row"):
        tune_and_prune(replace(job, teacher=Teacher(model)))


@pytest.mark.parametrize("micro_tokens", [1, 20, 40])
def test_micro_batches_add_up_to_one_batch(micro_tokens: int) -> None:
    rows = examples(12)

    def gradients(tokens: int) -> tuple[Mapping[str, float], dict[str, Tensor]]:
        model = tuned(tiny())
        loss = PaddedPasses(model, (), 0, config_of({"train": {"micro_tokens": tokens}})).tune(rows, None)
        return loss, {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}

    loss, whole = gradients(10**6)
    small_loss, parts = gradients(micro_tokens)
    assert small_loss == pytest.approx(loss, rel=1e-5)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name


def test_mean_loss_is_per_answer_token() -> None:
    model, rows = tiny(), examples(5)
    summed, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row.token_ids])).logits[0].detach().log_softmax(-1)
        for position in range(row.answer_start, len(row.token_ids)):
            summed -= float(logits[position - 1, row.token_ids[position]])
            count += 1
    assert mean_loss(model, rows, 0, 16384) == pytest.approx(summed / count, rel=1e-5)
    assert mean_loss(model, rows, 0, 1) == pytest.approx(summed / count, rel=1e-5)
