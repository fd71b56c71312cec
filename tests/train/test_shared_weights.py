"""Laws of a teacher that shares its student's weights: the run equals that with a separate one, and takes no memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.config.recipe import DistillConfig, RunConfig
from prunetune.data import batches
from prunetune.pipeline.prepare import resolve_auto
from prunetune.pruning.cut import merge_adapters
from prunetune.pruning.masking import masked
from prunetune.pruning.sites import find_sites
from prunetune.pruning.teacher_student_weights import can_share_weights, unshare_weights
from prunetune.train import loop
from prunetune.train.adapters import LARGE_MODEL_PARAMS, add_adapters, trainable_parameters
from prunetune.train.checkpoints import Checkpoints, CheckpointStore
from prunetune.train.forward import Teacher, base_teacher
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.losses import checkpointed_relative_error, relative_error
from prunetune.train.passes import PackedPasses
from support.loop import (
    AllCheckpoints,
    RecordingObserver,
    config_of,
    identical,
    job_of,
    load_into_dense,
    losses,
    weights_of,
)
from support.models import relative, tiny, tokens
from support.multi_size import larger, smaller
from support.shared_weights import memory_of

DISTILL = DistillConfig(share=1.0)
both = pytest.mark.parametrize("weights", ["adapters", "all"])
families = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])


def recipe(weights: str) -> RunConfig:
    return config_of(
        {"train": {"weights": weights}, "lora": {"dropout": 0.1}, "distill": {"logits": 1.0, "hidden": 1.0}}
    )


def job_with_shared_teacher(
    config: RunConfig, family: str = "llama", *, store: CheckpointStore | None = None
) -> TrainingJob:
    """The job of a run whose teacher is the untuned model, with shared weights."""
    job = job_of(config, family=family, store=store)
    return replace(job, teacher=base_teacher(job.model, DISTILL))


@both
@families
def test_run_equals_that_with_a_teacher_of_its_own_weights(family: str, weights: str) -> None:
    config = recipe(weights)
    together, apart = job_with_shared_teacher(config, family), job_of(config, family=family)
    apart = replace(apart, teacher=Teacher(tiny(family).requires_grad_(False), is_tuned=False))
    before = tiny(family).state_dict()
    assert tune_and_prune(together) == tune_and_prune(apart)
    assert losses(together) == pytest.approx(losses(apart), rel=1e-4)
    assert together.teacher is not None
    assert apart.teacher is not None
    after = together.teacher.model.state_dict()
    if weights == "all" or not any(map(can_share_weights, together.sites)):
        assert losses(together) == losses(apart)
        assert identical(before, after)
        return
    # Units are in another order after four cuts.
    assert not identical(before, after)
    assert all(torch.allclose(tensor.norm(), after[name].norm()) for name, tensor in before.items())
    with torch.no_grad():
        logits, expected = (job.teacher.model(tokens()).logits for job in (together, apart) if job.teacher)
    assert relative(logits, expected) < 1e-6


@both
def test_resumed_at_any_step_equals_uninterrupted(weights: str, tmp_path: Path) -> None:
    config, store = recipe(weights), AllCheckpoints(tmp_path)
    whole = job_with_shared_teacher(config, "qwen2", store=store)
    plan = tune_and_prune(whole)
    for step in (1, 2, 3, 5):
        resumed = job_with_shared_teacher(config, "qwen2", store=store.at(step))
        assert tune_and_prune(resumed) == plan
        assert identical(weights_of(resumed), weights_of(whole)), step
        assert losses(resumed) == losses(whole)[step:]


@both
def test_smaller_size_with_shared_teacher_equals_a_separate_one(weights: str) -> None:
    job, apart = (smaller(larger(weights, "llama"), weights, "llama", cuts=2) for _ in range(2))
    job = replace(job, teacher=base_teacher(job.model, DISTILL))
    apart = replace(apart, teacher=Teacher(tiny("llama").requires_grad_(False), is_tuned=False))
    assert tune_and_prune(job) == tune_and_prune(apart)
    assert losses(job) == pytest.approx(losses(apart), rel=1e-5)
    assert job.teacher is not None
    if weights == "all":  # whose weights took the place of the student's, and were tuned
        assert identical(tiny("llama").state_dict(), job.teacher.model.state_dict())
    else:
        assert memory_of(job.model, job.teacher.model) == memory_of(job.teacher.model)


@both
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_checkpoint_equals_model_in_memory(family: str, weights: str, tmp_path: Path) -> None:
    config, store, tokens = recipe(weights), Checkpoints(tmp_path), torch.tensor([[1, 5, 6, 7, 3, 4]])
    job = job_with_shared_teacher(config, family, store=store)
    plan, state = tune_and_prune(job), store.latest()
    assert state is not None
    dense = tiny(family).requires_grad_(False)
    if weights == "adapters":
        add_adapters(dense, job.sites, config.lora, seed=0)
    load_into_dense(dense, state, job.sites)
    with torch.no_grad():
        logits = job.model(tokens).logits
        with masked(dense, plan, sites=job.sites):
            torch.testing.assert_close(logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
        unshare_weights(job.model)
        merge_adapters(job.model)
        torch.testing.assert_close(job.model(tokens).logits, logits, rtol=1e-5, atol=1e-5)


class MemoryObserver(RecordingObserver):
    """Measures the memory of student and teacher after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.job: Any = None
        self.memory: list[int] = []
        self.tuned: list[int] = []  # weights that are tuned

    def step(self, record: dict[str, Any]) -> None:
        super().step(record)
        self.memory.append(memory_of(self.job.model, self.job.teacher.model))
        self.tuned.append(sum(weight.nbytes for weight in trainable_parameters(self.job.model).values()))


@pytest.mark.parametrize(("family", "packed"), [("llama", False), ("gemma3_text", False), ("llama", True)])
def test_shared_teacher_takes_no_memory_of_its_own(family: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "TOKEN_STEP", 32)
    monkeypatch.setattr(batches, "LABEL_STEP", 32)
    if packed:
        monkeypatch.setattr(loop, "build_passes", PackedPasses)
    observer = MemoryObserver()
    config = config_of({"train": {"steps": 2}, "search": {"cuts": 2, "init_batches": 1}})
    job = observer.job = replace(job_with_shared_teacher(config, family), observer=observer)
    expected = memory_of(job.model)
    tune_and_prune(job)
    assert observer.memory == [expected] * 2


def test_tuning_all_weights_adds_their_memory_after_the_cut() -> None:
    observer = MemoryObserver()
    job = observer.job = replace(job_with_shared_teacher(config_of({"train": {"weights": "all"}})), observer=observer)
    shared = memory_of(job.model)
    tune_and_prune(job)
    assert observer.memory == [shared + tuned for tuned in observer.tuned]
    assert len(set(observer.tuned)) > 1, "less after every cut"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_relative_error_equals_plain_and_saves_inputs_only(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    output, aim = (torch.randn(2, 7, 16).to(dtype) for _ in range(2))
    output.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lean = checkpointed_relative_error(output, aim)
    assert sum(tensor.nbytes for tensor in kept) <= output.nbytes + aim.nbytes
    plain, share = relative_error(output, aim), torch.rand(14)
    assert torch.equal(lean, plain)
    gradients = [torch.autograd.grad((error * share).sum(), output)[0] for error in (lean, plain)]
    assert torch.equal(*gradients)


def test_resolve_auto_depends_on_the_model_size() -> None:
    sites = tuple(find_sites(tiny("llama")))
    large = tuple(replace(site, unit_params=LARGE_MODEL_PARAMS) for site in sites)
    config = config_of({"distill": {"teacher": "auto"}, "train": {"weights": "auto"}})
    assert resolve_auto(config, sites).distill.teacher == "dense"
    assert resolve_auto(config, large).distill.teacher == "base"
    assert [resolve_auto(config, given_sites).distill.share for given_sites in (sites, large)] == [1, 0.5]
    assert [resolve_auto(config, given_sites).train.weights for given_sites in (sites, large)] == ["all", "adapters"]
    for teacher in ("none", "base", "dense"):
        decided = {"distill": {"teacher": teacher, "share": 0.3}, "train": {"weights": "all"}}
        explicit = config_of(decided)
        assert resolve_auto(explicit, sites) == resolve_auto(explicit, large) == explicit
