"""Laws of fused models: the same numbers, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from model_helpers import random_plan, tiny
from prunetune.model import fusing
from prunetune.model.fusing import fused
from prunetune.model.sites import find_sites
from prunetune.model.surgery import cut_linears

# Norms of rows and of heads, rotary embeddings of whole and of half heads, one that is decorated, and none at all.
SOME = ("llama", "gemma3_text", "qwen3", "olmo2", "phi3", "gpt_neox", "opt")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what is compiled; graphs are taken, but run as they are: kernels are PyTorch's matter."""
    names: list[str] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        names.append(graph._get_name())
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(fusing, "_compiled", lambda function: torch.compile(function, dynamic=True, backend=backend))
    fusing._faster.cache_clear()
    torch.compiler.reset()
    yield names
    fusing._faster.cache_clear()
    torch.compiler.reset()


@torch.no_grad()
def logits(model: nn.Module, length: int) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(3, 3 + length)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("family", SOME)
def test_a_fused_model_gives_the_same_numbers(family: str, compiled: list[str]) -> None:
    model = tiny(family)
    before = logits(model, 9)
    with fused(model):
        assert torch.equal(logits(model, 9), before)
    assert torch.equal(logits(model, 9), before)


def test_no_length_and_no_width_is_compiled_anew(compiled: list[str]) -> None:
    model = tiny("llama", groups=4, ratio=2)
    sites = tuple(find_sites(model))
    with fused(model):
        logits(model, 9)
        first = len(compiled)
        logits(model, 17)
        cut_linears(model, random_plan(model), sites=sites)
        logits(model, 21)
    assert 0 < first <= 2  # the norm and the rotary embedding
    assert len(compiled) <= first + 2  # one KV group, and sizes that happened to be equal, are each one more


def test_nothing_is_left_behind(compiled: list[str]) -> None:
    model, other = tiny("llama"), tiny("llama")
    plain = [type(module).forward for module in model.modules()]
    with fused(model):
        assert any("forward" in vars(module) for module in model.modules())
        assert not any("forward" in vars(module) for module in other.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert [type(module).forward for module in model.modules()] == plain
