"""Two-stage baselines: score a dense model's units on calibration batches, cut, and tune afterwards.

One function per method, named with its source. Each returns {site: [U]}, float32 on the CPU; higher stays. `select`
ranks the scores over all sites. Shapes: U units of a site, C columns of its consumer, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.baselines.activations import block_influences, input_moments
from prunetune.cost.limits import BudgetLimits
from prunetune.data.batches import IGNORE_INDEX, Batch
from prunetune.errors import ConfigError
from prunetune.model.lm_head import select_head_inputs
from prunetune.plan import Plan
from prunetune.pruning.linears import as_out_in, get_base_linear
from prunetune.pruning.masking import masked
from prunetune.pruning.unit_weights import unit_weights
from prunetune.pruning.units import Site
from prunetune.search.select import Scores
from prunetune.utils.seeds import derive_seed


@dataclass(frozen=True)
class Calibration:
    """What every baseline may look at."""

    model: Any  # dense, frozen, in eval mode, on its device, without adapters
    sites: tuple[Site, ...]
    batches: tuple[Batch, ...]  # padded on the right; on the CPU or the model's device
    seed: int = 0
    limits: BudgetLimits | None = None  # budgets of another kind than parameters

    def unit_price(self, site: Site) -> float:
        """What a unit takes of the budget with all that is inside it: parameters, or what its limits count."""
        return (
            self.limits.prices_with_children[site.name]
            if self.limits and self.limits.prices_with_children
            else site.total_unit_params
        )


Baseline = Callable[[Calibration], Scores]
MAX_GRADIENT_PARAMS = 2**28  # parameters that `taylor` holds gradients of: 1 GiB in float32


def random(calibration: Calibration) -> Scores:
    """Uniform in [0, 1), a stream of its own for each site."""

    def drawn(site: Site) -> Tensor:
        seed = derive_seed(calibration.seed, f"baseline random {site.name}")
        return torch.rand(site.units, generator=torch.Generator().manual_seed(seed))

    return {site.name: drawn(site) for site in calibration.sites}


@torch.no_grad()
def magnitude(calibration: Calibration) -> Scores:
    """Root mean square of a unit's parameters, so that a group and a channel compare.

    Norms of whole filters: Li et al. 2017 (arXiv 1608.08710, section 3.1); of weights: Han et al. 2015.
    """
    totals = {}
    for site in calibration.sites:
        owned = unit_weights(calibration.model, site)
        totals[site.name] = _total([weight.sum_per_unit(weight.parameter.float().square()) for weight in owned], site)
    return {name: mean.sqrt() for name, mean in _normalize_by_price(totals, calibration).items()}


@torch.no_grad()
def wanda_sp(calibration: Calibration) -> Scores:
    """|W| times the L2 norm of its input, summed over a unit's consumer columns; as a rank share in (0, 1).

    Weight score: Sun et al. 2024 (Wanda, arXiv 2306.11695, section 3); its structured form: An et al. 2024 (FLAP,
    arXiv 2312.11983, section 4), which prunes all layers alike. Shares of ranks inside a site make `select` do so.
    Inputs are the dense model's; that release takes them from a model whose earlier layers are pruned already.
    """
    moments = input_moments(calibration.model, _consumers(calibration), calibration.batches)
    found = {}
    for site in calibration.sites:
        consumer = _consumer(site)
        weight = _weight(calibration.model, consumer)
        columns = weight.float().abs().sum(0).double().cpu() * moments[consumer].norm
        found[site.name] = _rank_percentile(columns.view(site.units, -1).sum(1))
    return found


@torch.no_grad()
def flap(calibration: Calibration) -> Scores:
    """Input variance times squared column norm (WIFV), standardised, then averaged over a unit's columns.

    An et al. 2024 (FLAP, arXiv 2312.11983, section 3), variant AL-AM: z-scores within each layer and kind of module,
    one ranking over all. Standardised over columns before they are averaged, as in the authors' release: the deviation
    of three groups would be noise. A site whose columns do not differ scores 0. That release also squares attention's
    metric first and leaves out a first sample's fluctuation; here both kinds follow the formula, over all tokens.
    """
    moments = input_moments(calibration.model, _consumers(calibration), calibration.batches)
    found = {}
    for site in calibration.sites:
        consumer = _consumer(site)
        weight = _weight(calibration.model, consumer)
        columns = weight.float().square().sum(0).double().cpu() * moments[consumer].variance
        found[site.name] = _standardised(columns).view(site.units, -1).mean(1).float()
    return found


def taylor(calibration: Calibration) -> Scores:
    """|w dL/dw| per parameter of a unit, L the mean loss of all labels.

    First order, element-wise, summed over the group: Ma et al. 2023 (LLM-Pruner, arXiv 2305.11627, section 3.2). As
    many sites at a time have gradients as hold `AT_ONCE` parameters: large models cost passes, not memory.
    """
    totals: dict[str, Tensor] = {}
    for sites in _portions(calibration.sites):
        weights = {site.name: unit_weights(calibration.model, site) for site in sites}
        gradients = iter(_gradients(calibration, [one.parameter for owned in weights.values() for one in owned]))
        for site in sites:
            products = [
                weight.sum_per_unit((next(gradients) * weight.parameter.detach().float()).abs())
                for weight in weights[site.name]
            ]
            totals[site.name] = _total(products, site)
    return _normalize_by_price(totals, calibration)


def _portions(sites: tuple[Site, ...]) -> list[list[Site]]:
    portions: list[list[Site]] = [[]]
    for site in sites:
        if (
            portions[-1]
            and sum(other.units * other.total_unit_params for other in portions[-1])
            + site.units * site.total_unit_params
            > MAX_GRADIENT_PARAMS
        ):
            portions.append([])
        portions[-1].append(site)
    return portions


def _gradients(calibration: Calibration, weights: list[Tensor]) -> list[Tensor]:
    """Of the mean loss of all labels, summed in float32; the weights are left as frozen as they were."""
    labels = sum(batch.target_tokens for batch in calibration.batches)
    before = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in calibration.batches:
            loss = _loss_sum(calibration.model, batch) / labels
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += gradient.float()
    finally:
        for weight, needed in zip(weights, before, strict=True):
            weight.requires_grad_(needed)
    return sums


def fisher(calibration: Calibration) -> Scores:
    """Mean over examples of the squared gradient at each gate, per parameter of the unit.

    Molchanov et al. 2019 (arXiv 1906.10771, section 3): gates of one behind each unit, loss the example's mean.
    """
    model, sites = calibration.model, calibration.sites
    device = next(model.parameters()).device
    gates = {site.name: torch.ones(site.units, device=device, requires_grad=True) for site in sites}
    sums = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    rows = [row for batch in calibration.batches for row in _examples(batch)]
    for row in rows:
        with masked(model, gates, sites=sites):
            loss = _loss_sum(model, row) / row.target_tokens
        gradients = torch.autograd.grad(loss, list(gates.values()))
        for name, gradient in zip(gates, gradients, strict=True):
            sums[name] += gradient.double().square().cpu()
    return {site.name: (sums[site.name] / max(len(rows), 1) / calibration.unit_price(site)).float() for site in sites}


def block_influence(calibration: Calibration) -> Scores:
    """1 - mean cosine between a layer's input and output, the same for all its units: whole layers go first.

    Men et al. 2024 (ShortGPT, arXiv 2403.03853, section 3). Floors of the plan's shape stay, ties go by index.
    """
    layers = dict.fromkeys(site.layer_prefix for site in calibration.sites)
    found = block_influences(calibration.model, layers, calibration.batches)
    return {site.name: torch.full((site.units,), found[site.layer_prefix]) for site in calibration.sites}


BASELINES: dict[str, Baseline] = {
    "random": random,
    "magnitude": magnitude,
    "wanda-sp": wanda_sp,
    "flap": flap,
    "taylor": taylor,
    "fisher": fisher,
    "block-influence": block_influence,
}


@torch.no_grad()
def bias_compensation(calibration: Calibration, plan: Plan) -> dict[str, Tensor]:
    """What removed columns add on average: {consumer: float32 [H] on the CPU}, for sites that lose units.

    The baseline bias of FLAP (An et al. 2024, arXiv 2312.11983, section 3); `surgery.add_biases` takes it.
    """
    losing = [site for site in calibration.sites if len(plan.kept[site.name]) < site.units and site.consumer]
    names = [_consumer(site) for site in losing]
    moments = input_moments(calibration.model, names, calibration.batches)
    biases = {}
    for site, name in zip(losing, names, strict=True):
        weight, consumer = _weight(calibration.model, name), site.consumer
        assert consumer is not None
        mean = moments[name].average.float()
        mean[consumer.indices(plan.kept[site.name], site.units)] = 0
        biases[name] = (weight.float() @ mean.to(weight.device)).cpu()
    return biases


def _consumers(calibration: Calibration) -> list[str]:
    return [_consumer(site) for site in calibration.sites]


def _consumer(site: Site) -> str:
    if site.consumer is None:
        raise ConfigError(
            f"this baseline looks at what a linear reads, and {site.kind.recipe_name} have none of their own: leave "
            "wanda-sp and flap out of compare.methods, or take kv-groups, query-heads and mlp-channels as budget.units"
        )
    return site.consumer.module


def _weight(model: Any, name: str) -> Tensor:
    linear = get_base_linear(model, name)
    return as_out_in(linear, linear.weight)


def _total(parts: Sequence[Tensor], site: Site) -> Tensor:
    return sum(parts, torch.zeros(site.units).double())


def _normalize_by_price(totals: Mapping[str, Tensor], calibration: Calibration) -> Scores:
    """Sums over what a unit alone owns -> sums over all that leaves with it, over its price; float32."""
    named, sums = {site.name: site for site in calibration.sites}, dict(totals)
    for site in calibration.sites:
        outer = named.get(site.parent)
        if outer is not None and not outer.kind.is_whole_block:  # a whole block's total is of all its weights already
            sums[outer.name] = sums[outer.name] + totals[site.name].view(outer.units, -1).sum(1)
    return {name: (total / calibration.unit_price(named[name])).float() for name, total in sums.items()}


def _rank_percentile(values: Tensor) -> Tensor:
    """Ranks as shares in (0, 1), the best nearest to 1; of equals, the lower index is the better."""
    order = torch.argsort(values, descending=True, stable=True)
    shares = torch.empty(len(values))
    shares[order] = 1 - (torch.arange(len(values)) + 0.5) / len(values)
    return shares


def _standardised(values: Tensor) -> Tensor:
    deviation = values.std() if len(values) > 1 else values.new_zeros(())
    return (values - values.mean()) / deviation if deviation > 0 else torch.zeros_like(values)


def _loss_sum(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over the labels."""
    placed = batch.to(next(model.parameters()).device)
    with select_head_inputs(model, placed.prediction_mask):
        logits = model(input_ids=placed.input_ids, use_cache=False).logits
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), placed.targets, reduction="sum")


def _examples(batch: Batch) -> list[Batch]:
    """Each example with a label, alone and without padding."""
    rows = []
    for index, length in enumerate(batch.lengths):
        labels = batch.labels[index : index + 1, :length]
        counted = int((labels[:, 1:] != IGNORE_INDEX).sum())
        if counted:
            ids = batch.input_ids[index : index + 1, :length]
            rows.append(Batch(ids, labels, counted, (length,), batch.example_ids[index : index + 1]))
    return rows
