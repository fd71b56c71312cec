"""Laws of two models in one memory: same outputs, same tensors, and neither hears of what becomes of the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from model_helpers import ALL_FAMILIES, random_plan, relative, tiny, tokens, with_lora
from prunetune.errors import PlanError
from prunetune.model.four_bit import hold_in_four_bits
from prunetune.model.masking import masked
from prunetune.model.shared import cut_beside, let_go, twin
from prunetune.model.sites import dense_plan, find_sites
from prunetune.model.surgery import add_biases, cut_linears, merge_adapters
from prunetune.model.units import USUAL
from prunetune.train.adapters import adapters
from test_budget_memory import Live

CPU = torch.device("cpu")
FUSED = ("phi3", "glm", "glm4", "gpt_neox", "falcon", "bloom", "gpt_oss")  # all or some of their sites are copied


def held(*models: Any, but: str = "\0") -> int:
    """Bytes of all storages of the weights and buffers of these models, each counted once."""
    tensors: Iterable[tuple[str, Tensor]] = (
        pair for model in models for pair in (*model.named_parameters(), *model.named_buffers())
    )
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for name, one in tensors if but not in name}
    return sum(storages.values())


def says(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens(), use_cache=False).logits
    return logits


def shared(model: Any, other: Any) -> bool:
    mine, others = dict(model.named_parameters()), dict(other.named_parameters())
    return mine.keys() == others.keys() and all(
        one.data_ptr() == others[name].data_ptr() and one is not others[name] for name, one in mine.items()
    )


# -- before the cut --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_twin_says_the_same_and_holds_nothing(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied).requires_grad_(False)
    before, size = says(model), held(model)
    teacher = twin(model)
    assert shared(model, teacher)
    assert held(model, teacher) == size
    with_lora(model)
    assert not adapters(model).keys() & dict(teacher.named_parameters()).keys()
    with masked(model, random_plan(tiny(family)), sites=find_sites(tiny(family))):
        assert not torch.equal(says(model), before)
        assert torch.equal(says(teacher), before)
    assert teacher.config is not model.config
    assert not teacher.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_that_move_leave_the_twin_alone(dtype: torch.dtype) -> None:
    model = tiny("qwen2").to(dtype).requires_grad_(False)
    sites, plan, teacher = find_sites(model), random_plan(model), twin(model)
    before = says(teacher)
    with_lora(model)
    cut_linears(model, plan, sites=sites)
    merge_adapters(model, trainable=True)
    for weight in adapters(model).values():
        weight.data.mul_(2)
    add_biases(model, {})
    assert torch.equal(says(teacher), before)


# -- after it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_cut_beside_its_teacher_is_the_cut(family: str) -> None:
    model, apart = (with_lora(tiny(family).requires_grad_(False)) for _ in range(2))
    plain = tiny(family).requires_grad_(False)
    sites, plan, before = find_sites(plain), random_plan(plain), says(plain)
    student = twin(plain)
    with_lora(student)
    cut_linears(apart, plan, sites=sites)
    cut_beside(student, plain, plan, sites=sites)
    del model
    assert relative(says(plain), before) < 1e-5  # the same terms in another order
    assert relative(says(student), says(apart)) < 1e-6
    mine, theirs = adapters(student), adapters(apart)
    assert all(torch.equal(one, theirs[name]) for name, one in mine.items())
    for (name, one), (other_name, other) in zip(student.named_parameters(), apart.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name
    if family not in FUSED:
        assert held(plain, student, but=".lora_") <= held(plain) + sum(
            one.nbytes for name, one in student.named_parameters() if name.endswith("bias")
        )
