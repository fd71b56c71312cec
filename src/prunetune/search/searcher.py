"""From the generator's logits to gates and, in the end, to the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunetune.config.recipe import RunConfig
from prunetune.cost.parameters import keep_ratio_loss, kept_share
from prunetune.plan import Plan
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import Site
from prunetune.search.generator import build_generator
from prunetune.search.initial_logits import importance_to_logits, score_threshold
from prunetune.search.nested_sites import NestedSites, plan_from_gates
from prunetune.search.sampling import gumbel_sigmoid, round_straight_through, straight_through
from prunetune.search.select import PlanConstraints, best_units, min_feasible_keep, select
from prunetune.utils.seeds import derive_seed


@dataclass(frozen=True)
class Decision:
    """Hard gates for the adapters' half-step, and the plan once it is final."""

    gates: Mapping[str, Tensor]  # {site: [U]} of 0 and 1
    plan: Plan | None = None


class Searcher:
    """The generator, the logits it started from, and how logits become gates.

    *sampled* gates are Gumbel draws that may hold any share; a budget loss pulls them to the target (ATP, section 3.2).
    *projected* gates are the highest logits under the budget of the step, so that the adapters always see a legal plan;
    their gradient is that of a sigmoid around the budget's quantile.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        constraints: PlanConstraints,
        config: RunConfig,
        annealed_keep: Callable[[int], float],
        device: torch.device,
    ) -> None:
        self.sites, self.constraints, self.device = sites, constraints, device
        self.config, self.seed, self.allowed_keep = config.search, config.seed, config.budget.keep
        self.annealed_keep = annealed_keep
        seed = derive_seed(config.seed, "generator")
        self.generator = build_generator(sites, kind=self.config.generator, seed=seed).to(device)
        self.initial_logits = {site.name: torch.zeros(site.units, device=device) for site in sites}
        self.last_gates: Mapping[str, Tensor] = {}  # hard gates of the last sample

    @property
    def is_sampled(self) -> bool:
        """Whether gates are noisy draws, and the budget is a loss."""
        return self.config.gates == "sampled"

    def init_from_importance(self, importance: Mapping[str, Tensor]) -> None:
        """Take measured importance ({site: [U]}, any scale) as the starting logits."""
        self.initial_logits = {
            name: logits.to(self.device)
            for name, logits in importance_to_logits(importance, self.sites, self.constraints.limits).items()
        }

    def logits(self) -> dict[str, Tensor]:
        """{site: [U]}, differentiable in the generator."""
        return {name: self.initial_logits[name] + moved for name, moved in self.generator().items()}

    def sample(self, step: int) -> dict[str, Tensor]:
        """Gates of a search step, with a gradient: rounded in the forward pass, or soft (`search.hard`)."""
        logits = self.logits()
        if self.is_sampled:
            drawn = self._draw(logits, "search", step)
            self.last_gates = {name: (soft.detach() > 0.5).float() for name, soft in drawn.items()}
            return (
                {name: round_straight_through(soft) for name, soft in drawn.items()}
                if self.config.straight_through
                else drawn
            )
        keep, nest = self.annealed_keep(step), NestedSites(self.sites, detach_to(logits, "cpu"))
        best = best_units(nest, keep, self.constraints)
        legal = torch.cat(list(best.values())).to(self.device).float()
        self.last_gates = split_like(best, legal)
        middle = score_threshold(nest, keep, self.constraints.limits)
        soft = torch.sigmoid((torch.cat(list(logits.values())) - middle) / self.config.temperature)
        return split_like(logits, straight_through(soft, legal) if self.config.straight_through else soft)

    def budget_loss(self, gates: Mapping[str, Tensor]) -> Tensor:
        """How far sampled gates are from the budget: of parameters, or of what limits price."""
        limits = self.constraints.limits
        target = limits.price_share_at(self.allowed_keep) if limits else self.allowed_keep
        return keep_ratio_loss(kept_share(gates, self.sites, limits.prices if limits else None), target)

    @torch.no_grad()
    def decide(self, step: int) -> Decision:
        """The gates under which the adapters take their half-step.

        A new draw; hard gates of the same step's `sample` where these are projected, or moved both players at once.
        """
        if not self.is_sampled or self.config.step == "joint":
            return Decision(self.last_gates)
        drawn = self._draw(self.logits(), "decide", step)
        return Decision({name: (soft > 0.5).float() for name, soft in drawn.items()})

    @torch.no_grad()
    def final_decision(self) -> Decision:
        """The final decision: no noise, exact budget, ties broken by index."""
        plan = select(detach_to(self.logits(), "cpu"), self.sites, self.allowed_keep, self.constraints)
        return self.decision_from_plan(plan)

    @torch.no_grad()
    def with_legal_plan(self, decision: Decision) -> Decision:
        """An open decision with its plan; of a noisy draw, the plan of the highest logits that is about as large."""
        if not self.is_sampled:
            return Decision(decision.gates, plan_from_gates(detach_to(decision.gates, "cpu")))
        lowest, share = min_feasible_keep(self.sites, self.constraints), float(kept_share(decision.gates, self.sites))
        return self.decision_from_plan(
            select(detach_to(self.logits(), "cpu"), self.sites, max(lowest, share), self.constraints)
        )

    def set_budget(self, annealed_keep: Callable[[int], float], allowed_keep: float) -> None:
        """Another budget from here on: at each step, and at the end."""
        self.annealed_keep, self.allowed_keep = annealed_keep, allowed_keep

    def decision_from_plan(self, plan: Plan) -> Decision:
        """A given plan as a decision."""
        return Decision(detach_to(gates_from_plan(plan, self.sites), self.device), plan)

    def dense_decision(self) -> Decision:
        """Everything stays."""
        return Decision({site.name: torch.ones(site.units, device=self.device) for site in self.sites})

    def _draw(self, logits: Mapping[str, Tensor], purpose: str, step: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(derive_seed(self.seed, f"gates-{purpose}", step))
        return {
            name: gumbel_sigmoid(value, temperature=self.config.temperature, offset=self.config.offset, rng=rng)
            for name, value in logits.items()
        }

    def parameter_names(self) -> list[str]:
        """Names of the generator's parameters, in its optimiser's order."""
        return [name for name, _ in self.generator.named_parameters()]

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and starting logits, for a checkpoint."""
        start = {f"start.{name}": logits for name, logits in self.initial_logits.items()}
        return {**{f"net.{name}": weight for name, weight in self.generator.state_dict().items()}, **start}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` took."""
        self.generator.load_state_dict(
            {name[4:]: weight for name, weight in tensors.items() if name.startswith("net.")}
        )
        self.initial_logits = {
            name[6:]: value.to(self.device) for name, value in tensors.items() if name.startswith("start.")
        }


def detach_to(values: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Detached copies on a device, in one transfer instead of one per site."""
    return split_like(values, torch.cat([value.detach() for value in values.values()]).to(device))


def split_like(values: Mapping[str, Tensor], joined: Tensor) -> dict[str, Tensor]:
    """One long vector in the pieces of `values`."""
    return dict(zip(values, torch.split(joined, [len(value) for value in values.values()]), strict=True))
