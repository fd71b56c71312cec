"""What a budget would mean agrees with models that are cut to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prunetune import find_sites
from prunetune.bench.local import decode_bytes
from prunetune.cost.parameters import total
from prunetune.pipeline.budget_preview import Holdings, preview
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from support.models import tiny


def holdings(model: object, prunable: int) -> Holdings:
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    everything = sum(weight.numel() for weight in model.parameters())
    return Holdings(everything, prunable, 0 if head is table else table.numel(), head.numel())


def test_all_is_kept_at_one() -> None:
    found = preview(Holdings(100, 60, 10, 10), 1.0)
    assert (found.parameters, found.weight_bytes, found.prefill, found.decode) == (100, 200, 1.0, 1.0)


def test_prefill_gains_more_than_decode_and_no_more_than_what_is_left() -> None:
    found = preview(Holdings(100, 60, 10, 10), 0.5)
    assert found.parameters == 70
    assert found.prefill == pytest.approx(80 / 50)
    assert found.decode == pytest.approx(90 / 60)
    assert found.decode < found.prefill < 1 / 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_what_cutting_gives(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    sites = find_sites(model)
    dense = holdings(model, total(sites))
    read = 4 * (dense.everything - dense.table)
    plan = Plan({site.name: tuple(range(site.units // 2)) for site in sites}, {site.name: site.units for site in sites})
    small = cut(model, plan)

    class Empty:  # of layers that have lost their attention: their caches are never filled
        layers = (SimpleNamespace(keys=None, values=None),)

    found = preview(dense, 0.5)
    assert found.parameters == sum(weight.numel() for weight in small.parameters())
    assert found.decode == pytest.approx(read / decode_bytes(small, Empty()))
