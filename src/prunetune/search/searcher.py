"""The search of ATP: the pruning-decision generator, gates of each step from its logits, the budget loss, the plan."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunetune.config.recipe import RunConfig
from prunetune.pruning.units import Site, kept_share
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import Decision, detach_to, select, split_like
from prunetune.utils.determinism import derive_seed


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


# -- the generator: L layers, E embedding width, U units of a site -----------------------------------------------------

# Authors' code:
EMBEDDING = 64  # width of a layer vector
HEADS, FEED_FORWARD, DROPOUT = 4, 256, 0.1  # of each of the transformer's two layers


class EncoderLayer(nn.Module):
    """A transformer encoder layer (Vaswani et al. 2017: norms behind the sums) that is told what to drop.

    PyTorch's own draws its dropout from the process's random state, which runs in other threads change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries_keys_values, self.mixed = nn.Linear(EMBEDDING, 3 * EMBEDDING), nn.Linear(EMBEDDING, EMBEDDING)
        self.up, self.down = nn.Linear(EMBEDDING, FEED_FORWARD), nn.Linear(FEED_FORWARD, EMBEDDING)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(EMBEDDING), nn.LayerNorm(EMBEDDING)

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """[L, E] -> [L, E]; `drop` is applied where an encoder layer has dropout."""
        heads = self.queries_keys_values(x).view(len(x), 3, HEADS, -1)
        queries, keys, values = heads.permute(1, 2, 0, 3)  # [HEADS, L, E / HEADS] each
        attention = drop(torch.softmax(queries @ keys.mT / queries.shape[-1] ** 0.5, -1))
        x = self.attention_norm(x + drop(self.mixed((attention @ values).transpose(0, 1).flatten(1))))
        output: Tensor = self.feed_forward_norm(x + drop(self.down(drop(F.relu(self.up(x))))))
        return output


class DecisionGenerator(nn.Module):
    """A small transformer over the layer sequence, and one linear head per site.

    The decision has no input: it depends on the weights alone. The layer vectors are fixed and orthogonal, so that
    layers start out distinct.
    """

    def __init__(self, sites: Sequence[Site], *, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        layers = max(site.layer for site in sites) + 1
        self.register_buffer("layer_vectors", orthogonal_vectors(layers, EMBEDDING, rng))
        with torch.random.fork_rng(devices=[]):  # modules draw from the global generator when they are created
            self.encoder = nn.ModuleList(EncoderLayer() for _ in range(2))
            self.norm = nn.LayerNorm(EMBEDDING)
            self.heads = nn.ModuleList(nn.Linear(EMBEDDING, site.units, bias=False) for site in sites)
        self.sites = tuple(sites)
        for name, parameter in self.named_parameters():  # weights as `nn.Linear` draws them, but zero biases
            if parameter.dim() > 1:
                bound = parameter.shape[1] ** -0.5
                parameter.data.uniform_(-bound, bound, generator=rng)
            elif "bias" in name:
                parameter.data.zero_()

    def forward(self, dropout_rng: torch.Generator | None = None) -> dict[str, Tensor]:
        """{site: logits [U]}; with a random generator, dropout is drawn from it."""

        def drop(x: Tensor) -> Tensor:
            if dropout_rng is None:
                return x
            return x * (torch.rand(x.shape, generator=dropout_rng) >= DROPOUT).to(x.device) / (1 - DROPOUT)

        x = self.get_buffer("layer_vectors")
        for layer in self.encoder:
            x = layer(x, drop)
        features = self.norm(x)
        return {site.name: head(features[site.layer]) for site, head in zip(self.sites, self.heads, strict=True)}


def orthogonal_vectors(rows: int, width: int, rng: torch.Generator) -> Tensor:
    """[rows, width] vectors of norm 1; each run of `width` rows from the first on is orthogonal."""
    blocks = [torch.linalg.qr(torch.randn(width, width, generator=rng))[0] for _ in range(-(-rows // width))]
    return torch.cat(blocks)[:rows]


def keep_ratio_loss(share: Tensor, target: float) -> Tensor:
    """|log(share / target)| (ATP, authors' code): zero on target; twice the target costs as much as half of it."""
    return torch.log(share.clamp_min(1e-6) / target).abs()
