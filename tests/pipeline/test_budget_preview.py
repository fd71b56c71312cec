"""Previews of budgets agree with models that are cut to them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prunetune import find_sites
from prunetune.bench.local import decode_bytes
from prunetune.pipeline.plan_constraints import ParamCounts, preview_budget
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.units import prunable_params
from support.models import tiny


def count_params(model: object, prunable: int) -> ParamCounts:
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    everything = sum(weight.numel() for weight in model.parameters())
    return ParamCounts(everything, prunable, 0 if head is table else table.numel(), head.numel())


def test_keep_one_previews_the_dense_model() -> None:
    preview = preview_budget(ParamCounts(100, 60, 10, 10), 1.0)
    assert (preview.parameters, preview.weight_bytes, preview.prefill_speedup, preview.decode_speedup) == (
        100,
        200,
        1.0,
        1.0,
    )


def test_preview_prefill_speedup_exceeds_decode_speedup() -> None:
    preview = preview_budget(ParamCounts(100, 60, 10, 10), 0.5)
    assert preview.parameters == 70
    assert preview.prefill_speedup == pytest.approx(80 / 50)
    assert preview.decode_speedup == pytest.approx(90 / 60)
    assert preview.decode_speedup < preview.prefill_speedup < 1 / 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_preview_equals_the_cut_model(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    sites = find_sites(model)
    dense = count_params(model, prunable_params(sites))
    read = 4 * (dense.total - dense.embedding)
    plan = Plan({site.name: tuple(range(site.units // 2)) for site in sites}, {site.name: site.units for site in sites})
    small = cut(model, plan)

    class EmptyCache:  # of layers that have lost their attention: their caches are never filled
        layers = (SimpleNamespace(keys=None, values=None),)

    preview = preview_budget(dense, 0.5)
    assert preview.parameters == sum(weight.numel() for weight in small.parameters())
    assert preview.decode_speedup == pytest.approx(read / decode_bytes(small, EmptyCache()))
