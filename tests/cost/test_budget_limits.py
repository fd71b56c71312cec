"""Laws of limits on costs: what holds between the dense model and the point where all of them are met."""

from __future__ import annotations

import pytest

from prunetune.config.quantities import Amount
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.budget_limits import BudgetLimit, BudgetLimits, make_budget_limit, make_budget_limits
from prunetune.cost.deployment import WeightsCost
from prunetune.cost.layer_shapes import model_shape
from prunetune.pruning.sites import find_sites
from support.models import tiny

MODEL = tiny()
SHAPE = model_shape(MODEL, find_sites(MODEL))
WORKLOAD = WorkloadConfig(batch=3, generate=7)
FILE = WeightsCost(SHAPE, WORKLOAD)
DENSE_BYTES = 2 * sum(parameter.numel() for parameter in MODEL.parameters())


def limit_of(limit: float, dense: float) -> BudgetLimit:
    return BudgetLimit("file", (FILE,), limit, dense)


def test_shares_and_limits_fall_in_a_straight_line_to_where_all_limits_hold() -> None:
    limits = BudgetLimits((limit_of(40.0, 100.0),), requested_keep=0.7, feasible_keep=0.5, feasible_price_share=0.3)
    for coordinate, progress in ((1.0, 0.0), (0.9, 0.2), (0.75, 0.5), (0.5, 1.0), (0.2, 1.0), (0.0, 1.0)):
        assert limits.progress(coordinate) == pytest.approx(progress)
        assert limits.params_share_at(coordinate) == pytest.approx(1 - 0.3 * progress)
        assert limits.price_share_at(coordinate) == pytest.approx(1 - 0.7 * progress)
        ((cost, limit),) = limits.cost_limits_at(coordinate)
        assert cost is FILE
        assert limit == pytest.approx(100.0 - 60.0 * progress)


def test_limit_above_the_dense_cost_never_falls_below_itself() -> None:
    loose = limit_of(120.0, 100.0)
    assert loose.is_met_by_dense
    assert [loose.limit_at(progress) for progress in (0.0, 0.5, 1.0)] == [120.0] * 3
    assert limit_of(100.0, 100.0).is_met_by_dense
    assert not limit_of(99.0, 100.0).is_met_by_dense


def test_share_is_of_the_dense_cost() -> None:
    (limit,) = make_budget_limits({"file": Amount(0.5, True)}, SHAPE, WORKLOAD)
    assert (limit.kind, limit.dense_cost, limit.limit) == ("file", DENSE_BYTES, DENSE_BYTES / 2)
    assert limit.cost(SHAPE.dense_counts()) == DENSE_BYTES
    assert limit.to_amount(3.0) == 3.0


def test_throughput_limits_the_seconds_of_a_batch() -> None:
    """The made-up cost of a batch is taken for its seconds: 21 tokens are generated meanwhile."""
    limit = make_budget_limit("throughput", Amount(2.0, True), (FILE,), WORKLOAD)
    assert limit.limit == pytest.approx(DENSE_BYTES / 2)
    assert limit.to_amount(DENSE_BYTES) == pytest.approx(21 / DENSE_BYTES)
    absolute = make_budget_limit("throughput", Amount(6.0, False), (FILE,), WORKLOAD)
    assert absolute.limit == pytest.approx(3.5)
    assert absolute.format_cost(3.5).startswith("6")


def test_limits_that_name_no_share_leave_parameters_alone_and_hold_in_full_at_zero() -> None:
    limits = BudgetLimits((limit_of(40.0, 100.0),))
    for coordinate in (1.0, 0.5, 0.0):
        assert limits.params_share_at(coordinate) == 1.0
        assert limits.progress(coordinate) == 1 - coordinate
