"""Law: the units and the gates of a step are those of the same search in plain lists, to the bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from prunetune.config.quantities import Amount
from prunetune.config.recipe import WorkloadConfig, from_mapping
from prunetune.cost.layer_shapes import model_shape
from prunetune.cost.limits import make_budget_limits
from prunetune.cost.parameters import prunable_params
from prunetune.plan import Plan
from prunetune.pruning.sites import Site, find_sites
from prunetune.search.feasibility import with_limits
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import block_size
from prunetune.search.searcher import Searcher
from prunetune.search.select import BudgetTracker, PlanConstraints, min_feasible_keep, min_widths, select
from prunetune.search.uniform import UniformPlanner
from support.models import tiny
from support.nested import both, everywhere, shape_for, sites_of

SEEDS = 8
BOUNDS = ({}, {"min_groups": 2, "min_queries": 2}, {"min_share": 0.5, "protected": frozenset({1, 3})})
Scores = Mapping[str, Tensor]


def drawn(sites: tuple[Site, ...], seed: int) -> dict[str, Tensor]:
    """Random scores: all different, few different ones, next to equal ones, zeros of both signs."""
    rng = torch.Generator().manual_seed(seed)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in sites}
    change = (lambda x: x, torch.round, lambda x: 0.1 + 1e-7 * x.round(), lambda x: 0.0 * x)[seed % 4]
    return {name: change(values) for name, values in scores.items()}


class Plain:
    """One unit after the other."""

    def __init__(self, sites: tuple[Site, ...], scores: Scores, within: Plan | None) -> None:
        self.sites, self.scores, self.nest = sites, scores, NestedSites(sites, None, within)
        self.order = {site.name: self.lanes(site, within) for site in sites}

    def lanes(self, site: Site, within: Plan | None) -> list[list[int]]:
        """The units of each lane, by what stays, then by score, then by index."""
        stays, values = set(within.kept[site.name] if within else range(site.units)), self.scores[site.name].tolist()
        lanes = [
            range(lane * site.units_per_group, (lane + 1) * site.units_per_group) for lane in range(site.parent_groups)
        ]
        return [sorted(lane, key=lambda unit: (unit not in stays, -values[unit], unit)) for lane in lanes]

    def ranked(self, site: Site) -> Tensor:
        """[lanes, units of a lane] scores."""
        return torch.stack([self.scores[site.name][lane] for lane in self.order[site.name]])

    def mean(self, site: Site) -> list[float]:
        """Over lanes, of each rank."""
        found: list[float] = self.ranked(site).mean(0).double().tolist()
        return found

    def cap(self, site: Site, widths: Mapping[str, int]) -> float:
        """What is inside is worth no more than what has to come before it."""
        outer = self.nest.parent(site)
        if outer is None:
            return math.inf
        return min(math.inf if widths[outer.name] else self.mean(outer)[0], self.cap(outer, widths))

    def free(self, target: int, shape: PlanConstraints, room: BudgetTracker) -> dict[str, int]:
        """Widths of the layout per-layer."""
        widths, offers = min_widths(self.nest, shape), []
        for place, site in enumerate(self.sites):
            most, cap = self.nest.max_width(site), self.cap(site, widths)
            sums = [0.0, *itertools.accumulate(self.mean(site))]
            for low, high in itertools.pairwise([*range(widths[site.name], most, block_size(site, shape)), most]):
                offers.append((-min((sums[high] - sums[low]) / (high - low), cap), place, low, high - low))
        room.start_from(widths)
        closed, waiting = set[int](), dict[int, int]()
        for _, place, _, block in sorted(offers):
            site = self.sites[place]
            wider = {**widths, site.name: widths[site.name] + block + waiting.get(place, 0)}
            price = self.nest.total_params(wider)
            if place in closed or price == self.nest.total_params(widths) or price > target:
                closed.add(place)
            elif room.try_add(site, wider[site.name] - widths[site.name], widths):
                widths, waiting[place] = wider, 0
            else:
                waiting[place] = wider[site.name] - widths[site.name]
        return widths

    def uniform(self, target: int, shape: PlanConstraints, room: BudgetTracker) -> dict[str, int]:
        """Widths of the layout uniform: of the shapes that fit, the one worth most."""
        nest, first = NestedSites(self.sites, self.scores), self.nest.first_unit
        nest.max_widths = self.nest.max_widths
        nest.ranked_scores = {site.name: self.ranked(site).double() for site in self.sites}
        nest.ranked_units = {name: torch.tensor(lanes) + first[name] for name, lanes in self.order.items()}
        scored = UniformPlanner(nest, shape)
        fitting = scored.maximal_fits(target, room.fits)
        chosen = max(
            fitting, key=lambda counts: (scored.weighted_score(counts, fitting[counts][1]), fitting[counts][0])
        )
        return scored.widths_by_site(chosen, fitting[chosen][1])

    def plan(self, keep: float, shape: PlanConstraints) -> Plan:
        """What `select` should find."""
        room = BudgetTracker(self.nest, shape.limits.cost_limits_at(keep) if shape.limits else ())
        share = shape.limits.params_share_at(keep) if shape.limits else keep
        find = self.uniform if shape.layout == "uniform" else self.free
        widths, kept = (
            find(int(share * prunable_params(self.sites) * (1 + 1e-12)), shape, room),
            dict[str, tuple[int, ...]](),
        )
        for site in self.sites:
            outer = self.nest.parent(site)
            is_open = site.open_parent_groups(kept[outer.name] if outer else None, outer.units if outer else 1)
            best = [unit for lane in is_open for unit in self.order[site.name][lane][: widths[site.name]]]
            kept[site.name] = tuple(sorted(best))
        return Plan(kept, {site.name: site.units for site in self.sites})

    def quantile(self, keep: float, shape: PlanConstraints) -> float:
        """The score at which so much of all prices is reached."""
        limits, scores = shape.limits, torch.cat([self.scores[site.name] for site in self.sites]).tolist()
        each = limits.prices if limits and limits.prices else {site.name: site.unit_params for site in self.sites}
        prices = [float(each[site.name]) for site in self.sites for _ in range(site.units)]
        order = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
        held, whole = 0.0, float(torch.tensor(prices, dtype=torch.float64).sum())
        for unit in order:
            held += prices[unit]
            if held / whole >= (limits.price_share_at(keep) if limits else keep):
                break
        return float(scores[unit])


def shapes(sites: tuple[Site, ...], family: str, layout: str, seed: int) -> PlanConstraints:
    """With other bounds for each seed, and within a further budget for some."""
    shape = shape_for(layout, **BOUNDS[seed % 3])
    if seed % 4 < 2:
        return shape
    anatomy = model_shape(tiny(family, layers=5, groups=3, ratio=3, hidden_size=72), sites)
    return with_limits(
        shape, sites, make_budget_limits({"memory": Amount.parse("0.8", "memory")}, anatomy, WorkloadConfig()), 1.0
    )


def assert_plain(sites: tuple[Site, ...], shape: PlanConstraints, seed: int) -> None:
    scores, low = drawn(sites, seed), min_feasible_keep(sites, shape)
    keep = low + (1 - low) * (seed % 5 + 1) / 6
    plan = select(scores, sites, keep, shape)
    assert plan == Plain(sites, scores, None).plan(keep, shape)
    others, less = drawn(sites, seed + 1), low + (keep - low) / 2
    if shape.limits is None:
        inside = select(others, sites, less, shape, larger_plan=plan)
        assert inside == Plain(sites, others, plan).plan(less, shape)
    config = from_mapping({"layout": shape.layout, "search": {"generator": "none", "straight_through": False}})
    searcher = Searcher(sites, shape, config, lambda step: keep, torch.device("cpu"))
    searcher.initial_logits = scores
    gates, middle = searcher.sample(1), Plain(sites, scores, None).quantile(keep, shape)
    soft = torch.sigmoid((torch.cat(list(scores.values())) - middle) / config.search.temperature)
    assert torch.equal(torch.cat(list(gates.values())), soft)
    assert searcher.with_legal_plan(searcher.decide(1)).plan == plan


@everywhere
@both
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_kind_of_unit(family: str, layout: str, seed: int) -> None:
    sites = sites_of(family, layout == "uniform")
    assert_plain(sites, shapes(sites, family, layout, seed), seed)


@both
@pytest.mark.parametrize("seed", range(SEEDS))
def test_usual_units_in_sums_that_round(layout: str, seed: int) -> None:
    sites = find_sites(tiny("llama", intermediate_size=1000, layers=4))
    assert_plain(sites, PlanConstraints(layout, 32), seed)
