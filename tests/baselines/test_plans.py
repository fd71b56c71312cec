"""Methods that give a whole plan: the generator learns what its gradients say, evolution lowers the divergence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.baselines import BASELINES, Calibration, plans
from prunetune.config.recipe import from_mapping
from prunetune.data.batches import Batch, collate
from prunetune.data.encoding import Example
from prunetune.plan import Plan
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params, prunable_params
from prunetune.search.plan_rules import PlanConstraints
from support.models import tiny, tokens


def batches(count: int = 3) -> tuple[Batch, ...]:
    rows = [tokens(batch=1, length=length, seed=length)[0].tolist() for length in range(9, 9 + count)]
    return tuple(collate([Example(id=str(len(row)), token_ids=tuple(row), answer_start=4)], 0) for row in rows)


def calibration(model: Any, *, keep: float = 0.6, units: Any = ("kv-groups", "mlp-channels"), **options: Any) -> Any:
    model.requires_grad_(False)
    config = from_mapping({"budget": {"keep": keep}, "seed": 3, **options})
    return Calibration(model, find_sites(model, units), batches(), config, PlanConstraints(align=8))


def plan_of(name: str, given: Calibration) -> Plan:
    plan = BASELINES[name](given)
    assert isinstance(plan, Plan)
    return plan


def test_generator_keeps_the_units_whose_gates_lower_the_loss() -> None:
    """The loss is minus the sum of the gates of one half of each site: its gradient is -1 there and 0 elsewhere."""
    wanted: dict[str, Tensor] = {}

    def gate_gradients(step: int, gates: Any) -> Any:
        assert not any(gate.requires_grad for gate in gates.values())
        return {name: -1.0 * wanted[name] for name in gates}

    options = {"span": 1.0, "learning_rate": 0.01}
    given = calibration(tiny("llama"), keep=0.5, search=options, train={"steps": 60})
    for site in given.sites:
        wanted[site.name] = torch.zeros(site.units)
        wanted[site.name][site.units // 2 :] = 1.0
    plan = plan_of("generator", replace(given, gate_gradients=gate_gradients))
    for site in given.sites:
        assert set(plan.kept[site.name]) <= set(range(site.units // 2, site.units))
    assert kept_params(given.sites, plan) <= 0.5 * prunable_params(given.sites)


def test_generator_reads_the_gradients_of_as_many_steps_as_the_cuts_take() -> None:
    steps: list[int] = []

    def gate_gradients(step: int, gates: Any) -> Any:
        steps.append(step)
        return {name: torch.ones_like(gate) for name, gate in gates.items()}

    given = replace(calibration(tiny(), search={"span": 0.1}, train={"steps": 50}), gate_gradients=gate_gradients)
    plan_of("generator", given)
    assert steps == [*range(5)]


def test_divergence_is_that_of_all_tokens() -> None:
    model = tiny("llama")
    given = calibration(model)
    plan = given.select(BASELINES["magnitude"](given))
    (got,) = plans._divergences(given, [plan], list(given.batches))
    expected = 0.0
    gates = gates_from_plan(plan, given.sites)
    with torch.no_grad():
        for batch in given.batches:
            dense = model(batch.input_ids).logits.softmax(-1)
            hooks = []
            for site in given.sites:  # the mask, by hand
                columns = gates[site.name].repeat_interleave(site.consumer.rows_per_unit)
                module = model.get_submodule(site.consumer.module)
                hooks.append(module.register_forward_pre_hook(lambda _, x, columns=columns: (x[0] * columns,)))
            pruned = model(batch.input_ids).logits.softmax(-1)
            for hook in hooks:
                hook.remove()
            expected += float((dense * (dense / pruned).log()).sum())
    assert got == pytest.approx(expected, rel=1e-4)


def test_evolution_lowers_the_divergence_on_budget_and_repeats() -> None:
    given = calibration(tiny("llama", layers=4))
    start, evolved = given.select(BASELINES["fisher"](given)), plan_of("evolution", given)
    before, after = plans._divergences(given, [start, evolved], list(given.batches))
    assert after < 0.99 * before
    assert kept_params(given.sites, evolved) <= 0.6 * prunable_params(given.sites)
    assert kept_params(given.sites, evolved) >= kept_params(given.sites, start)
    assert plan_of("evolution", given) == evolved
    ranks = BASELINES["fisher"](given)
    for site in given.sites:  # inside a site the best units stay
        kept = list(evolved.kept[site.name])
        best = ranks[site.name].argsort(descending=True, stable=True)[: len(kept)].tolist()
        assert sorted(best) == kept


def test_evolution_keeps_its_start_where_no_block_can_move() -> None:
    given = calibration(tiny("llama"), keep=0.8)
    uniform = replace(given, constraints=replace(given.constraints, layout="uniform"))
    assert plan_of("evolution", uniform) == uniform.select(BASELINES["fisher"](uniform))
    protected = replace(given, constraints=replace(given.constraints, protected=frozenset({0, 2})))
    assert plan_of("evolution", protected) == protected.select(BASELINES["fisher"](protected))


@pytest.mark.parametrize("units", [("kv-groups", "query-heads", "mlp-channels"), ("attention-blocks", "mlp-blocks")])
def test_evolution_of_nested_and_whole_units_is_legal(units: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "GENERATIONS", 3)
    given = calibration(tiny("llama"), units=units)
    plan = plan_of("evolution", given)
    gates_from_plan(plan, given.sites)  # checks the nesting
    assert kept_params(given.sites, plan) <= 0.6 * prunable_params(given.sites)
