"""Sharing weights: both models compute the same as apart, hold the same tensors, and do not affect each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunetune import Plan
from prunetune.cost.training_memory import estimate_memory, training_setup, training_shapes
from prunetune.errors import PlanError
from prunetune.pruning.cut import add_biases, cut_linears, merge_adapters
from prunetune.pruning.masking import masked
from prunetune.pruning.nf4 import NF4Linear, quantize_linears_to_nf4
from prunetune.pruning.remaining_sites import plan_within, remaining_sites
from prunetune.pruning.sites import find_sites
from prunetune.pruning.teacher_student_weights import (
    can_share_weights,
    copy_sharing_weights,
    cut_sharing_weights,
    unshare_weights,
)
from prunetune.pruning.units import DEFAULT_UNITS, Site, dense_plan
from prunetune.train.adapters import trainable_parameters
from support.memory import SIZES, LiveMemoryCounter, config_of, skip_without_bitsandbytes
from support.models import ALL_FAMILIES, FAMILIES, random_plan, relative, tiny, tokens, with_lora
from support.nf4 import needs_nf4
from support.shared_weights import memory_of

TOLERANCE = 1e-6  # the same terms are summed in another order, in float32


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens(), use_cache=False).logits
    return logits


def student_and_teacher(
    family: str = "llama", *, four_bits: bool = False, **changes: Any
) -> tuple[Any, Any, tuple[Site, ...]]:
    """A student with adapters, its teacher, and the sites."""
    model = tiny(family, **changes).requires_grad_(False)
    sites = find_sites(model)
    if four_bits:
        quantize_linears_to_nf4(model, sites, dtype=torch.float32, device=torch.device("cpu"))
    teacher = copy_sharing_weights(model)
    return with_lora(model), teacher, sites


# -- before the cut --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi3", "gpt_oss", "mixtral", "bloom"])
def test_copy_sharing_weights_computes_the_same_and_holds_no_memory(family: str) -> None:
    model = tiny(family, tie_word_embeddings=family in FAMILIES).requires_grad_(False)
    before, size, sites, plan = logits_of(model), memory_of(model), find_sites(model), random_plan(model)
    teacher = copy_sharing_weights(model)
    mine, others = dict(model.named_parameters()), dict(teacher.named_parameters())
    assert mine.keys() == others.keys()
    assert all(
        tensor.data_ptr() == others[name].data_ptr() and tensor is not others[name] for name, tensor in mine.items()
    )
    assert memory_of(model, teacher) == size
    with_lora(model)
    assert not any("lora" in name for name, _ in teacher.named_parameters())
    with masked(model, plan, sites=sites):
        assert not torch.equal(logits_of(model), before)
        assert torch.equal(logits_of(teacher), before)
    assert teacher.config is not model.config
    assert not teacher.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuning_the_students_weights_leaves_the_teacher_unchanged(dtype: torch.dtype) -> None:
    model = tiny("qwen2").to(dtype).requires_grad_(False)
    sites, plan, teacher = find_sites(model), random_plan(model), copy_sharing_weights(model)
    plan = Plan({**plan.kept, sites[1].name: tuple(range(sites[1].units))}, plan.units)  # one is not cut at all
    before = logits_of(teacher)
    with_lora(model)
    cut_linears(model, plan, sites=sites)
    merge_adapters(model, trainable=True)
    add_biases(model, {f"{sites[0].name}.o_proj": torch.ones(48)})
    for weight in trainable_parameters(model).values():
        weight.data.mul_(2)
    assert torch.equal(logits_of(teacher), before)


# -- after it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_cut_sharing_weights_equals_cut_linears(family: str) -> None:
    (student, teacher, sites), apart = student_and_teacher(family), with_lora(tiny(family).requires_grad_(False))
    plan, before, size = random_plan(tiny(family)), logits_of(teacher), memory_of(teacher)
    cut_linears(apart, plan, sites=sites)
    cut_sharing_weights(student, teacher, plan, sites=sites)
    assert relative(logits_of(teacher), before) < TOLERANCE
    assert relative(logits_of(student), logits_of(apart)) < TOLERANCE
    for (name, parameter), (other, expected) in zip(student.named_parameters(), apart.named_parameters(), strict=True):
        assert (name, parameter.requires_grad) == (other, expected.requires_grad)
        assert torch.equal(parameter, expected), name
    copied = {linear.module for site in sites if not can_share_weights(site) for linear, _ in site.linear_slices()}
    copied_bytes = sum(
        parameter.nbytes
        for name, parameter in apart.named_parameters()
        if name.endswith("bias") or any(name.startswith(f"{module}.") for module in copied)
    )
    assert size <= memory_of(student, teacher) <= size + copied_bytes


@pytest.mark.parametrize("four_bits", [False, pytest.param(True, marks=needs_nf4)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "phi3", "mixtral"])
def test_two_cuts_give_both_models_the_bits_of_one(family: str, four_bits: bool) -> None:
    """Weights, biases and the order of the teacher's units, also where the second cut takes the last KV group."""
    (twice, teacher, sites), (once, other, _) = (student_and_teacher(family, four_bits=four_bits) for _ in range(2))
    before, size = logits_of(teacher), memory_of(teacher)
    second = random_plan(tiny(family), seed=1, keep=0.4)
    rng = torch.Generator().manual_seed(2)
    first = Plan(
        {
            site.name: tuple(
                sorted(
                    {*second.kept[site.name], *torch.randperm(site.units, generator=rng)[: site.units // 2].tolist()}
                )
            )
            for site in sites
        },
        second.units,
    )
    attention = [site.name for site in sites if site.kind == "attention"]
    second = Plan({**second.kept, **dict.fromkeys(attention[:1], ())}, second.units)
    cut_sharing_weights(once, other, second, sites=sites)
    cut_sharing_weights(twice, teacher, first, sites=sites)
    cut_sharing_weights(twice, teacher, plan_within(second, first), sites=remaining_sites(sites, first), before=first)
    for model, expected in ((twice, once), (teacher, other)):
        named, state = expected.state_dict(), model.state_dict()
        assert named.keys() == state.keys()
        assert all(torch.equal(tensor, named[name]) for name, tensor in state.items())
    assert relative(logits_of(teacher), before) < TOLERANCE
    assert torch.equal(logits_of(twice), logits_of(once))
    assert memory_of(twice, teacher) == memory_of(once, other) >= size


def test_can_share_weights_by_family_and_kind() -> None:
    def shareable(family: str, units: tuple[str, ...] = DEFAULT_UNITS) -> set[str]:
        return {site.kind for site in find_sites(tiny(family), units) if can_share_weights(site)}

    assert shareable("llama") == shareable("qwen2") == shareable("gemma3_text") == {"attention", "mlp"}
    assert shareable("gpt2") == {"mlp"}
    assert shareable("phi3") == shareable("qwen3_moe", ("experts", "expert-channels")) == set()
    assert shareable("llama", ("kv-groups", "query-heads", "mlp-channels", "layers")) == {"mlp"}


@needs_nf4
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_cut_sharing_weights_equals_cut_linears_in_4_bits(family: str) -> None:
    (student, teacher, sites), (apart, _, _) = (student_and_teacher(family, four_bits=True) for _ in range(2))
    plan, before, size = random_plan(tiny(family)), logits_of(teacher), memory_of(teacher)
    assert memory_of(student, teacher) == size
    cut_linears(apart, plan, sites=sites)
    cut_sharing_weights(student, teacher, plan, sites=sites)
    assert relative(logits_of(teacher), before) < TOLERANCE
    assert torch.equal(logits_of(student), logits_of(apart))
    biases = sum(
        linear.bias.nbytes for linear in apart.modules() if isinstance(linear, NF4Linear) and linear.bias is not None
    )
    assert size <= memory_of(student, teacher) <= size + biases


@pytest.mark.parametrize("quantize", ["off", "nf4"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_estimated_memory_equals_held_memory(family: str, quantize: str) -> None:
    skip_without_bitsandbytes(quantize)
    values: Any = {"teacher": "base", "quantize": quantize}
    plain_model, config = tiny(family, **SIZES), config_of(**values)
    sites = find_sites(plain_model)
    shapes = training_shapes(plain_model, sites)
    setup = replace(training_setup(config, torch.float32, longest=1), distills_hidden=False, keep=0.5)

    def estimate(phase: Literal["search", "tune"], **changes: Any) -> int:
        computed = estimate_memory(shapes, replace(setup, **changes), phase=phase)
        return computed.weights + computed.teacher

    student, teacher, sites = student_and_teacher(family, four_bits=quantize != "off", **SIZES)
    rest = sum(tensor.nbytes for name, tensor in teacher.named_buffers() if "inv_freq" in name)
    assert estimate("search") == memory_of(student, teacher) - rest
    assert estimate("search", teacher_is_base=False) == 2 * estimate("search")
    plan = Plan(
        {site.name: tuple(range(1, site.units, 2)) for site in sites}, {site.name: site.units for site in sites}
    )
    cut_sharing_weights(student, teacher, plan, sites=sites)
    assert estimate("tune") == memory_of(student, teacher) - rest
    merge_adapters(student, trainable=True)
    tuned = sum(tensor.nbytes for tensor in trainable_parameters(student).values())
    assert estimate("tune", all_weights=True) == memory_of(student, teacher) - rest - tuned


def test_cut_sharing_weights_with_nested_units() -> None:
    units = ("layers", "attention-blocks", "query-heads", "mlp-channels")
    model, apart = (tiny().requires_grad_(False) for _ in range(2))
    sites, plan = find_sites(model, units), random_plan(model, units=units)
    teacher, before = copy_sharing_weights(model), logits_of(model)
    cut_linears(apart, plan, sites=sites)
    cut_sharing_weights(model, teacher, plan, sites=sites)
    assert relative(logits_of(model), logits_of(apart)) < TOLERANCE
    assert relative(logits_of(teacher), before) < TOLERANCE


def test_cut_sharing_weights_holds_at_most_one_more_layer() -> None:
    student, teacher, sites = student_and_teacher(layers=6)
    plan = random_plan(tiny(layers=6), keep=0.9)
    layer = sum(weight.nbytes for weight in teacher.model.layers[0].parameters())
    adapter = sum(weight.nbytes for weight in trainable_parameters(student).values())
    with LiveMemoryCounter() as live:
        cut_sharing_weights(student, teacher, plan, sites=sites)
    assert live.peak <= layer + adapter + 2**14  # indices


def test_weights_of_another_model_are_copied() -> None:
    """A teacher that does not hold the student's weights keeps its own."""
    student, _, sites = student_and_teacher()
    other = tiny(seed=3).requires_grad_(False)
    before, size = logits_of(other), memory_of(other)
    cut_sharing_weights(student, other, random_plan(tiny()), sites=sites)
    assert torch.equal(logits_of(other), before)
    assert memory_of(student, other) > size + 1000


def test_cut_sharing_weights_refuses_a_plan_of_another_model_before_it_changes_anything() -> None:
    student, teacher, sites = student_and_teacher()
    before = logits_of(student)
    with pytest.raises(PlanError, match="fits only the dense model"):
        cut_sharing_weights(student, teacher, random_plan(tiny(intermediate_size=64)), sites=sites)
    assert torch.equal(logits_of(student), before)
    cut_sharing_weights(student, teacher, dense_plan(sites), sites=sites)  # a plan that keeps all does nothing
    assert torch.equal(logits_of(student), before)
    assert memory_of(student, teacher) == memory_of(teacher)


def test_unshared_weights_own_their_memory_and_can_be_saved(tmp_path: Path) -> None:
    student, teacher, sites = student_and_teacher()
    cut_sharing_weights(student, teacher, random_plan(tiny()), sites=sites)
    before = logits_of(student)
    unshare_weights(student)
    assert torch.equal(logits_of(student), before)
    for name, parameter in student.named_parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    merge_adapters(student)
    save_file(dict(student.named_parameters()), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in student.named_parameters())
