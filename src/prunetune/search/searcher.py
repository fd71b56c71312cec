"""The search: gates of each step from the generator's logits, the budget loss, and the final plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from prunetune.config.recipe import RunConfig
from prunetune.cost.parameters import keep_ratio_loss, kept_share
from prunetune.pruning.units import Site
from prunetune.search.decision import Decision, detach_to, split_like
from prunetune.search.decision_generator import build_generator
from prunetune.search.gumbel_gates import gumbel_sigmoid, round_straight_through, straight_through
from prunetune.search.initial_logits import importance_to_logits, score_threshold
from prunetune.search.nested_sites import NestedSites, plan_from_gates
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import best_units, min_feasible_keep, select
from prunetune.utils.seeds import derive_seed


class Searcher:
    """The generator, the initial logits that its output is added to, and the way from logits to gates.

    *sampled* gates are Gumbel draws that may keep any share; a budget loss pulls it to the target (ATP, authors' code).
    *projected* gates keep the highest logits within the budget of the step, so that adapters always train under a legal
    plan; their gradient is that of a sigmoid around the budget's quantile of the logits.

    `annealed_keep` returns the share to keep at a step, `keep` is that of the final plan. U: units of a site.
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
        """Whether gates are Gumbel draws, and the budget is a loss."""
        return self.config.gates == "sampled"

    def init_from_importance(self, importance: Mapping[str, Tensor]) -> None:
        """Set the initial logits from measured importance, {site: [U]} of any scale."""
        logits = importance_to_logits(importance, self.sites, self.constraints.limits)
        self.initial_logits = {name: value.to(self.device) for name, value in logits.items()}

    def logits(self) -> dict[str, Tensor]:
        """{site: [U]}, differentiable in the generator."""
        return {name: self.initial_logits[name] + change for name, change in self.generator().items()}

    def sample(self, step: int) -> dict[str, Tensor]:
        """Gates of a search step with their gradient: {site: [U]}.

        In the forward pass they are 0 or 1, or soft without `search.straight_through`.
        """
        logits, straight = self.logits(), self.config.straight_through
        if self.is_sampled:
            drawn = self._draw(logits, "search", step)
            self.last_gates = {name: (soft.detach() > 0.5).float() for name, soft in drawn.items()}
            return {name: round_straight_through(soft) for name, soft in drawn.items()} if straight else drawn
        keep, nested_sites = self.annealed_keep(step), NestedSites(self.sites, detach_to(logits, "cpu"))
        best = best_units(nested_sites, keep, self.constraints)
        hard = torch.cat(list(best.values())).to(self.device).float()
        self.last_gates = split_like(best, hard)
        threshold = score_threshold(nested_sites, keep, self.constraints.limits)
        soft = torch.sigmoid((torch.cat(list(logits.values())) - threshold) / self.config.temperature)
        return split_like(logits, straight_through(soft, hard) if straight else soft)

    def budget_loss(self, gates: Mapping[str, Tensor]) -> Tensor:
        """|log(kept share / target)| of gates {site: [U]}: the share of parameters, or of prices under limits."""
        limits = self.constraints.limits
        target = limits.price_share_at(self.allowed_keep) if limits else self.allowed_keep
        return keep_ratio_loss(kept_share(gates, self.sites, limits.prices if limits else None), target)

    @torch.no_grad()
    def decide(self, step: int) -> Decision:
        """The hard gates under which the adapters take their half of a step.

        Sampled gates are drawn anew. Projected ones, and those of a joint step, are those of this step's `sample`.
        """
        if not self.is_sampled or self.config.step == "joint":
            return Decision(self.last_gates)
        drawn = self._draw(self.logits(), "decide", step)
        return Decision({name: (soft > 0.5).float() for name, soft in drawn.items()})

    @torch.no_grad()
    def final_decision(self) -> Decision:
        """The final gates and their plan: no noise, within the budget, equal logits by index."""
        logits = detach_to(self.logits(), "cpu")
        return Decision.from_plan(
            select(logits, self.sites, self.allowed_keep, self.constraints), self.sites, self.device
        )

    @torch.no_grad()
    def with_legal_plan(self, decision: Decision) -> Decision:
        """A decision with its plan. For a Gumbel draw: the plan of the highest logits that keeps as large a share."""
        if not self.is_sampled:
            return Decision(decision.gates, plan_from_gates(detach_to(decision.gates, "cpu")))
        share = float(kept_share(decision.gates, self.sites))
        keep = max(min_feasible_keep(self.sites, self.constraints), share)
        return Decision.from_plan(
            select(detach_to(self.logits(), "cpu"), self.sites, keep, self.constraints), self.sites, self.device
        )

    def set_budget(self, annealed_keep: Callable[[int], float], allowed_keep: float) -> None:
        """Change the budget from here on: `annealed_keep` of each step, and `allowed_keep` of the final plan."""
        self.annealed_keep, self.allowed_keep = annealed_keep, allowed_keep

    def _draw(self, logits: Mapping[str, Tensor], purpose: str, step: int) -> dict[str, Tensor]:
        """Soft Gumbel gates {site: [U]}, from a random stream of this purpose and step."""
        rng = torch.Generator().manual_seed(derive_seed(self.seed, f"gates-{purpose}", step))
        draw = partial(gumbel_sigmoid, temperature=self.config.temperature, offset=self.config.offset, rng=rng)
        return {name: draw(value) for name, value in logits.items()}

    def parameter_names(self) -> list[str]:
        """Names of the generator's parameters, in the order of its optimiser."""
        return [name for name, _ in self.generator.named_parameters()]

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and initial logits, for a checkpoint."""
        weights = {f"net.{name}": weight for name, weight in self.generator.state_dict().items()}
        return weights | {f"start.{name}": logits for name, logits in self.initial_logits.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        weights, logits = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("net.", "start.")
        )
        self.generator.load_state_dict(weights)
        self.initial_logits = {name: value.to(self.device) for name, value in logits.items()}
