"""A model that is cut several times: its sites after a cut, and plans in their numbering.

Plans, scores and checkpoints always number the units of the dense model. Only gates and the next cut need the units of
the model as it is now, which count from 0 again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from prunetune.plan import Plan
from prunetune.pruning.linears import ROWS
from prunetune.pruning.units import Site, children_by_site, hidden_site, kept_indices, without_removed_modules


def remaining_sites(sites: Iterable[Site], plan: Plan) -> tuple[Site, ...]:
    """The sites of the model that `cut_linears(model, plan, sites=sites)` leaves; those without a unit are left out.

    Units, their groups and their parameters are those of the cut model; slices of a fused linear start where they now
    do. What still has rules of its own, such as the least number of experts, keeps them.
    """
    sites = without_removed_modules(tuple(sites), plan)
    hidden = hidden_site(sites)
    removed_channels = hidden.units - len(plan.kept[hidden.name]) if hidden else 0
    kept_rows = {name: index for (name, axis), index in kept_indices(plan, sites).items() if axis == ROWS}
    by_name = {site.name: site for site in sites}
    remaining: dict[str, Site] = {}
    for site in sites:
        kept = plan.kept[site.name]
        if not kept or (site.parent and site.parent not in remaining):
            continue
        parent = by_name.get(site.parent)
        open_groups = site.open_parent_groups(plan.kept[parent.name] if parent else None, parent.units if parent else 1)
        params = tuple(
            replace(param, parent_groups=len(open_groups)) if param.parent_groups > 1 else param
            for param in site.weights.params
        )
        producers = []
        for producer in site.producers:  # slices of a linear that another site shares move as rows before them leave
            if producer.total_rows and (rows := kept_rows.get(producer.module)) is not None:
                producer = replace(producer, start=int((rows < producer.start).sum()), total_rows=len(rows))
            producers.append(producer)
        remaining[site.name] = replace(
            site,
            units=len(kept),
            unit_params=site.unit_params - removed_channels * site.hidden_params,
            parent_groups=len(open_groups),
            weights=replace(site.weights, producers=tuple(producers), params=params),
        )
    children = children_by_site(remaining.values())
    for name, site in reversed(remaining.items()):  # inner sites first
        inside = [remaining[child.name] for child in children.get(name, ())]
        child_params = sum(child.units // site.units * child.total_unit_params for child in inside)
        if site is hidden_site(remaining.values()):
            child_params = sum(other.units * other.hidden_params for other in remaining.values())
        weights = site.weights
        if weights.consumer and weights.consumer_is_childs:  # what a group's gate scales: the query heads that it kept
            of_unit = sum(
                child.units // site.units * child.consumer.rows_per_unit for child in inside if child.consumer
            )
            weights = replace(weights, consumer=replace(weights.consumer, part_sizes=(of_unit,)))
        remaining[name] = replace(site, child_params=child_params, weights=weights)
    return tuple(remaining.values())


def plan_within(plan: Plan, larger: Plan) -> Plan:
    """A plan as one of the model that `larger` has cut: its units are those that `larger` keeps, counted from 0.

    Raises `KeyError` if the plan keeps a unit that `larger` does not.
    """
    position = {site: {unit: index for index, unit in enumerate(kept)} for site, kept in larger.kept.items() if kept}
    return Plan(
        {site: tuple(position[site][unit] for unit in plan.kept[site]) for site in position},
        {site: len(units) for site, units in position.items()},
    )


def in_dense_numbering(values: Mapping[str, Tensor], sites: Iterable[Site], plan: Plan | None) -> dict[str, Tensor]:
    """{site: [units of the cut model]} as {site: [units of the dense model]} on the CPU, zero for removed units.

    `sites` are the dense model's; without a plan, nothing has been cut.
    """
    if plan is None:
        return {site.name: values[site.name].detach().cpu() for site in sites}
    dense = {}
    for site in sites:
        dense[site.name] = torch.zeros(site.units)
        if site.name in values:
            dense[site.name][list(plan.kept[site.name])] = values[site.name].detach().float().cpu()
    return dense
