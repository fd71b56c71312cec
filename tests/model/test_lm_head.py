"""The output head: run outside the model or in chunks, it gives the same logits, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from prunetune.model import lm_head
from prunetune.model.lm_head import capture_head_inputs, chunked_loss, logits_function
from support.models import FAMILIES, tiny, tokens

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED = [
    Gemma2Config(**SMALL, final_logit_softcapping=3.0),
    CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.25),
    GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=4.0),
]


def assert_apart(model: Any) -> None:
    ids = tokens()
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with capture_head_inputs(model) as hidden:
            assert model(input_ids=ids).logits.numel() == 0
        torch.testing.assert_close(logits_function(model)(hidden[0]).view(whole.shape), whole)
        torch.testing.assert_close(model(input_ids=ids).logits, whole)  # the hook is removed


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_head_inputs_give_the_models_logits(family: str) -> None:
    assert_apart(tiny(family))


@pytest.mark.parametrize("config", SCALED, ids=lambda config: config.model_type)
def test_captured_head_inputs_give_scaled_and_capped_logits(config: Any) -> None:
    torch.manual_seed(0)
    assert_apart(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_change_neither_loss_nor_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "LOGITS_PER_CHUNK", chunk * 97)
    rng = torch.Generator().manual_seed(0)
    weight, targets = torch.randn(97, 16, generator=rng), torch.randint(97, (7,), generator=rng)
    hidden = torch.randn(7, 16, generator=rng, requires_grad=True)

    def loss(rows: Tensor, places: slice) -> Tensor:
        return F.cross_entropy(rows @ weight.T, targets[places], reduction="sum")

    (expected,) = torch.autograd.grad(0.3 * loss(hidden, slice(None)), hidden)
    chunked = chunked_loss(hidden, 97, loss)
    torch.testing.assert_close(chunked, loss(hidden, slice(None)))
    (gradient,) = torch.autograd.grad(0.3 * chunked, hidden)
    torch.testing.assert_close(gradient, expected)


def test_chunked_loss_of_no_position_is_zero() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    total = chunked_loss(hidden, 97, lambda rows, _: rows.sum())
    total.backward()
    assert float(total.detach()) == 0


def test_chunked_loss_without_gradients_has_none() -> None:
    with torch.no_grad():
        total = chunked_loss(torch.ones(5, 4, requires_grad=True), 97, lambda rows, _: rows.sum())
    assert float(total) == 20
    assert not total.requires_grad
