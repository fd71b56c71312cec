"""The search: gates of each step from the generator's logits, the budget loss, and the final plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunetune.config.recipe import RunConfig
from prunetune.cost.parameters import keep_ratio_loss, kept_share
from prunetune.pruning.units import Site
from prunetune.search.decision import Decision, detach_to, split_like
from prunetune.search.decision_generator import DecisionGenerator
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select
from prunetune.utils.seeds import derive_seed


class Searcher:
    """The generator, and the way from its logits to gates and to the final plan (ATP, authors' code).

    Gates are Gumbel draws that may keep any share; a budget loss pulls it to `allowed_keep`, the share that the final
    plan may keep. U: units of a site.
    """

    def __init__(
        self, sites: tuple[Site, ...], constraints: PlanConstraints, config: RunConfig, device: torch.device
    ) -> None:
        self.sites, self.constraints, self.device = sites, constraints, device
        self.config, self.seed, self.allowed_keep = config.search, config.seed, config.budget.keep
        seed = derive_seed(config.seed, "generator")
        self.generator = DecisionGenerator(sites, seed=seed).to(device)

    def logits(self) -> dict[str, Tensor]:
        """{site: [U]}, differentiable in the generator, without its dropout."""
        logits: dict[str, Tensor] = self.generator()
        return logits

    def sample(self, step: int) -> dict[str, Tensor]:
        """Soft gates {site: [U]} of a generator step, differentiable: functions of seed and step; its dropout acts."""
        dropout_rng = torch.Generator().manual_seed(derive_seed(self.seed, "generator-dropout", step))
        return self._draw(self.generator(dropout_rng), "search", step)

    def budget_loss(self, gates: Mapping[str, Tensor]) -> Tensor:
        """|log(kept share / target)| of gates {site: [U]}: the share of parameters, or of prices under limits.

        It sees gates rounded to 0 or 1, with the gradient of soft ones.
        """
        limits = self.constraints.limits
        target = limits.price_share_at(self.allowed_keep) if limits else self.allowed_keep
        return keep_ratio_loss(kept_share(_rounded(gates), self.sites, limits.prices if limits else None), target)

    def backward(self, gates: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
        """Add the gradients of the model's loss, known at the gates, and of the budget loss; returns the latter."""
        budget_loss = self.budget_loss(gates)
        # The gradient of gates @ gradients at the gates is the model's: so it flows on into the generator.
        loss = torch.cat(list(gates.values())) @ torch.cat([gradients[name] for name in gates])
        (loss + self.config.ratio_weight * budget_loss).backward()  # type: ignore[no-untyped-call]
        return float(budget_loss.detach())

    @torch.no_grad()
    def decide(self, step: int) -> Decision:
        """The hard gates under which the adapters take their half of a step: a draw of their own, without dropout."""
        return Decision(_rounded(self._draw(self.logits(), "decide", step)))

    @torch.no_grad()
    def final_decision(self) -> Decision:
        """The final gates and their plan: no noise, within the budget, equal logits by index."""
        plan = select(detach_to(self.logits(), "cpu"), self.sites, self.allowed_keep, self.constraints)
        return Decision.from_plan(plan, self.sites, self.device)

    def _draw(self, logits: Mapping[str, Tensor], purpose: str, step: int) -> dict[str, Tensor]:
        """Soft Gumbel gates {site: [U]}, from a random stream of this purpose and step."""
        rng = torch.Generator().manual_seed(derive_seed(self.seed, f"gates-{purpose}", step))
        joined, config = torch.cat(list(logits.values())), self.config
        return split_like(logits, gumbel_sigmoid(joined, temperature=config.temperature, offset=config.offset, rng=rng))


def _rounded(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{site: [U]}, each 0 or 1, with the gradient of the gates."""
    return split_like(gates, round_straight_through(torch.cat(list(gates.values()))))


def gumbel_sigmoid(logits: Tensor, *, temperature: float, offset: float, rng: torch.Generator) -> Tensor:
    """Soft gates in (0, 1), of the shape of the logits: sigmoid((logits + noise + offset) / temperature).

    The noise is one Gumbel draw, so a gate is above 0.5 with probability 1 - exp(-exp(logit + offset)): at logit 0 and
    offset 3 with 1 - 2e-9, and training starts dense.
    """
    exponential = torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=rng)
    noise = -exponential.log().to(logits.device, logits.dtype)  # minus the log of an exponential draw is Gumbel
    return torch.sigmoid((logits + noise + offset) / temperature)


def round_straight_through(soft: Tensor) -> Tensor:
    """1 above 0.5, else 0, with the gradient of `soft`."""
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
