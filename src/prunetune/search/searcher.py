"""From the generator's logits to gates and, in the end, to the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunetune.config.recipe import RunConfig
from prunetune.cost.parameters import kept_share, ratio_loss
from prunetune.plan import Plan
from prunetune.pruning.masking import gates_of
from prunetune.pruning.sites import Site
from prunetune.search.generator import generator_for
from prunetune.search.initial_logits import quantile, to_logits
from prunetune.search.nested_sites import Nest, plan_of
from prunetune.search.sampling import gumbel_sigmoid, rounded, straight_through
from prunetune.search.select import Shape, best_units, feasible_keep, select
from prunetune.utils.seeds import derive


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
        shape: Shape,
        config: RunConfig,
        keep_at: Callable[[int], float],
        device: torch.device,
    ) -> None:
        self.sites, self.shape, self.device = sites, shape, device
        self.config, self.seed, self.keep = config.search, config.seed, config.budget.keep
        self.keep_at = keep_at
        seed = derive(config.seed, "generator")
        self.generator = generator_for(sites, kind=self.config.generator, seed=seed).to(device)
        self.start = {site.name: torch.zeros(site.units, device=device) for site in sites}
        self.last: Mapping[str, Tensor] = {}  # hard gates of the last sample

    @property
    def is_sampled(self) -> bool:
        """Whether gates are noisy draws, and the budget is a loss."""
        return self.config.gates == "sampled"

    def start_from(self, importance: Mapping[str, Tensor]) -> None:
        """Take measured importance ({site: [U]}, any scale) as the starting logits."""
        self.start = {
            name: logits.to(self.device)
            for name, logits in to_logits(importance, self.sites, self.shape.limits).items()
        }

    def logits(self) -> dict[str, Tensor]:
        """{site: [U]}, differentiable in the generator."""
        return {name: self.start[name] + moved for name, moved in self.generator().items()}

    def sample(self, step: int) -> dict[str, Tensor]:
        """Gates of a search step, with a gradient: rounded in the forward pass, or soft (`search.hard`)."""
        logits = self.logits()
        if self.is_sampled:
            drawn = self._draw(logits, "search", step)
            self.last = {name: (soft.detach() > 0.5).float() for name, soft in drawn.items()}
            return {name: rounded(soft) for name, soft in drawn.items()} if self.config.hard else drawn
        keep, nest = self.keep_at(step), Nest(self.sites, moved_to(logits, "cpu"))
        best = best_units(nest, keep, self.shape)
        legal = torch.cat(list(best.values())).to(self.device).float()
        self.last = split_as(best, legal)
        middle = quantile(nest, keep, self.shape.limits)
        soft = torch.sigmoid((torch.cat(list(logits.values())) - middle) / self.config.temperature)
        return split_as(logits, straight_through(soft, legal) if self.config.hard else soft)

    def budget_loss(self, gates: Mapping[str, Tensor]) -> Tensor:
        """How far sampled gates are from the budget: of parameters, or of what limits price."""
        limits = self.shape.limits
        target = limits.share_at(self.keep) if limits else self.keep
        return ratio_loss(kept_share(gates, self.sites, limits.prices if limits else None), target)

    @torch.no_grad()
    def decide(self, step: int) -> Decision:
        """The gates under which the adapters take their half-step.

        A new draw; hard gates of the same step's `sample` where these are projected, or moved both players at once.
        """
        if not self.is_sampled or self.config.step == "joint":
            return Decision(self.last)
        drawn = self._draw(self.logits(), "decide", step)
        return Decision({name: (soft > 0.5).float() for name, soft in drawn.items()})

    @torch.no_grad()
    def conclude(self) -> Decision:
        """The final decision: no noise, exact budget, ties broken by index."""
        return self.fixed(select(moved_to(self.logits(), "cpu"), self.sites, self.keep, self.shape))

    @torch.no_grad()
    def legal(self, decision: Decision) -> Decision:
        """An open decision with its plan; of a noisy draw, the plan of the highest logits that is about as large."""
        if not self.is_sampled:
            return Decision(decision.gates, plan_of(moved_to(decision.gates, "cpu")))
        lowest, share = feasible_keep(self.sites, self.shape), float(kept_share(decision.gates, self.sites))
        return self.fixed(select(moved_to(self.logits(), "cpu"), self.sites, max(lowest, share), self.shape))

    def follow(self, keep_at: Callable[[int], float], keep: float) -> None:
        """Another budget from here on: at each step, and at the end."""
        self.keep_at, self.keep = keep_at, keep

    def fixed(self, plan: Plan) -> Decision:
        """A given plan as a decision."""
        return Decision(moved_to(gates_of(plan, self.sites), self.device), plan)

    def undecided(self) -> Decision:
        """Everything stays."""
        return Decision({site.name: torch.ones(site.units, device=self.device) for site in self.sites})

    def _draw(self, logits: Mapping[str, Tensor], purpose: str, step: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(derive(self.seed, f"gates-{purpose}", step))
        return {
            name: gumbel_sigmoid(value, temperature=self.config.temperature, offset=self.config.offset, rng=rng)
            for name, value in logits.items()
        }

    def parameter_names(self) -> list[str]:
        """Names of the generator's parameters, in its optimiser's order."""
        return [name for name, _ in self.generator.named_parameters()]

    def tensors(self) -> dict[str, Tensor]:
        """Weights and starting logits, for a checkpoint."""
        start = {f"start.{name}": logits for name, logits in self.start.items()}
        return {**{f"net.{name}": weight for name, weight in self.generator.state_dict().items()}, **start}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` took."""
        self.generator.load_state_dict(
            {name[4:]: weight for name, weight in tensors.items() if name.startswith("net.")}
        )
        self.start = {name[6:]: value.to(self.device) for name, value in tensors.items() if name.startswith("start.")}


def moved_to(values: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Detached copies on a device, in one transfer instead of one per site."""
    return split_as(values, torch.cat([value.detach() for value in values.values()]).to(device))


def split_as(values: Mapping[str, Tensor], joined: Tensor) -> dict[str, Tensor]:
    """One long vector in the pieces of `values`."""
    return dict(zip(values, torch.split(joined, [len(value) for value in values.values()]), strict=True))
