"""What a latency table says of a dense model and of plans for it: whether time follows parameters, and what binds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prunetune.bench.latency.tables import get_latency_table
from prunetune.config.recipe import RunConfig
from prunetune.cost.budget_limits import costs_for_budget
from prunetune.cost.deployment import Costs, total_cost
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.model.loading import load_meta_model
from prunetune.pipeline.plan_constraints import make_plan_constraints
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select

TRIES = 200  # random plans of as many parameters


@dataclass(frozen=True)
class Place:
    """The dense model, and what this device takes for it."""

    config: RunConfig
    device: torch.device
    table: Path  # measured once, and kept for whoever goes on

    @cached_property
    def structure(self) -> Any:
        """On the meta device."""
        return load_meta_model(self.config.model, trust_remote_code=self.config.trust_remote_code)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """What may go."""
        return find_sites(self.structure, self.config.budget.units)

    @cached_property
    def shape(self) -> PlanConstraints:
        """What a plan may look like."""
        return make_plan_constraints(self.config, self.sites, self.structure.config)

    @cached_property
    def anatomy(self) -> ModelShape:
        """What plans cost by."""
        return model_shape(self.structure, self.sites)

    @cached_property
    def costs(self) -> Costs:
        """Seconds by the table of this device."""
        workload, given = self.config.workload, str(self.table) if self.table.exists() else ""
        table = get_latency_table(self.structure.config, self.sites, workload, self.device, self.shape.align, given)
        self.table.write_text(table.to_json() + "\n", encoding="utf-8")
        return costs_for_budget("latency", self.anatomy, workload, table)

    def told(self, counts: dict[str, int]) -> float:
        """Seconds by the table."""
        return max(total_cost(cost, counts) for cost in self.costs)

    def params(self, counts: dict[str, int]) -> int:
        """Prunable ones."""
        return sum(counts[site.name] * site.unit_params for site in self.sites)


def widths(place: Place, plan: Plan) -> dict[str, Any]:
    """By kind, from the first layer to the last, and the share of it that is left."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(site.kind for site in place.sites):
        sites = [site for site in place.sites if site.kind == kind]
        kept = [len(plan.kept[site.name]) for site in sites]
        found[kind] = {"layers": kept, "kept": sum(kept) / sum(site.units for site in sites)}
    return found


def of_time(place: Place, keep: Plan) -> dict[str, Any]:
    """Whether time follows parameters, by the table: what a parameter of each kind takes, and how plans scatter."""
    dense = place.anatomy.dense_counts()
    each = {}
    for kind in dict.fromkeys(site.kind for site in place.sites):
        half = {site.name: site.units // 2 for site in place.sites if site.kind == kind}
        less = dense | {name: max(1, units) for name, units in half.items()}
        if gone := place.params(dense) - place.params(less):
            each[kind] = 1e12 * (place.told(dense) - place.told(less)) / gone
    share, rng = place.params(keep.widths()) / place.params(dense), torch.Generator().manual_seed(0)
    told = [place.told(random_plan(place, share, rng).widths()) for _ in range(TRIES)]
    longest: Any = max(place.costs, key=lambda cost: total_cost(cost, keep.widths()))
    return {
        "us_per_million_params": each,
        "random_plans_s": {"median": statistics.median(told), "min": min(told), "max": max(told)},
        "outside_layers": longest.fixed / total_cost(longest, dense),
        "binds": [track for track, _ in longest.tracks],
    }


def random_plan(place: Place, share: float, rng: torch.Generator) -> Plan:
    """Of as many parameters, with sites apart and a random taste for each kind."""
    taste = {kind: 2 * torch.randn(1, generator=rng) for kind in dict.fromkeys(site.kind for site in place.sites)}
    scores = {
        site.name: torch.randn(site.units, generator=rng) + torch.randn(1, generator=rng) + taste[site.kind]
        for site in place.sites
    }
    return select(scores, place.sites, share, place.shape)


def reason(found: dict[str, Any]) -> str:
    """In words."""
    time, kept = found["time"], found["kept"]
    rates = ", ".join(f"{kind} {value:.2f}" for kind, value in time["us_per_million_params"].items())
    random, dense = time["random_plans_s"], found["table_s"]["dense"]
    return (
        f"us per million parameters by the table: {rates}; random plans of as many parameters take "
        f"{1e3 * random['min']:.2f} to {1e3 * random['max']:.2f} ms (dense {1e3 * dense:.2f}, of it "
        f"{time['outside_layers']:.0%} outside the layers; {' and '.join(time['binds'])} bind); "
        f"the latency target keeps {kept['latency']:.1%} of the parameters for {kept['keep']:.1%}, " + ", ".join(
            f"{kind} {found['widths']['latency'][kind]['kept']:.0%} for {found['widths']['keep'][kind]['kept']:.0%}"
            for kind in found["widths"]["keep"]
        )
    )  # fmt: skip
