"""The two-stage methods: one function each, which scores the units of a dense model on calibration batches.

Each returns {site: [U]}, float32 on the CPU; higher scores are kept. `search.select` ranks them over all sites. A new
method is one decorated function here (docs/extend/baseline.md). Shapes: U units of a site, C columns of its consumer,
H hidden size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.baselines.registry import Calibration, baseline
from prunetune.data.batches import IGNORE_INDEX, Batch
from prunetune.errors import ConfigError
from prunetune.model.activations import Moments, block_influences, input_grams, input_moments
from prunetune.model.lm_head import select_head_inputs
from prunetune.plan import Plan
from prunetune.pruning.compensation import compensate_consumers, consumer_name, record_curvature, removal_costs
from prunetune.pruning.cut import add_biases
from prunetune.pruning.linears import as_out_in, get_base_linear
from prunetune.pruning.masking import masked
from prunetune.pruning.units import Site, hidden_site, unit_weights
from prunetune.search.select import Scores
from prunetune.utils.determinism import derive_seed


@baseline("random", source="none: the floor that every method has to beat")
def random(calibration: Calibration) -> Scores:
    """Uniform random numbers in [0, 1), from a stream of its own for each site."""
    scores = {}
    for site in calibration.sites:
        rng = torch.Generator().manual_seed(derive_seed(calibration.seed, f"baseline random {site.name}"))
        scores[site.name] = torch.rand(site.units, generator=rng)
    return scores


@baseline("magnitude", source="Li et al. 2017, arXiv 1608.08710, section 3.1 (filters); Han et al. 2015 (weights)")
def magnitude(calibration: Calibration) -> Scores:
    """Root mean square of a unit's parameters, so that KV groups and channels compare."""
    sums = {}
    for site in calibration.sites:
        weights = unit_weights(calibration.model, site)
        squares = (weight.sum_per_unit(weight.parameter.float().square()) for weight in weights)
        sums[site.name] = sum(squares, torch.zeros(site.units).double())
    return {name: mean.sqrt() for name, mean in _per_price(sums, calibration).items()}


@baseline(
    "wanda-sp", source="Sun et al. 2024, arXiv 2306.11695, section 3; An et al. 2024, arXiv 2312.11983, section 4"
)
def wanda_sp(calibration: Calibration) -> Scores:
    """|W| times the L2 norm of its input, summed over a unit's consumer columns; then the rank within the site.

    The score of a weight is Wanda's, its structured form FLAP's, which prunes all layers alike: ranks as shares in
    (0, 1) make `select` do so. Inputs are those of the dense model; the authors' release takes them from a model whose
    earlier layers are pruned already.
    """
    scores = {}
    for site, weight, moments in _consumers(calibration):
        columns = weight.float().abs().sum(0).double().cpu() * moments.norm  # [C]
        units = columns.view(site.units, -1).sum(1)
        order = torch.argsort(units, descending=True, stable=True)  # of equal units, the lower index ranks higher
        scores[site.name] = 1 - (order.argsort() + 0.5) / site.units
    return scores


@torch.no_grad()
def bias_compensation(calibration: Calibration, plan: Plan) -> dict[str, Tensor]:
    """Mean output of the removed columns: {consumer: float32 [H] on the CPU}, for sites that lose units.

    The baseline bias of FLAP (An et al. 2024, arXiv 2312.11983, section 3).
    """
    sites = [site for site in calibration.sites if len(plan.kept[site.name]) < site.units and site.consumer]
    moments = input_moments(calibration.model, [consumer_name(site) for site in sites], calibration.batches)
    biases = {}
    for site in sites:
        assert site.consumer is not None
        name = site.consumer.module
        weight, mean = _weight(calibration.model, name), moments[name].average.float()
        mean[site.consumer.indices(plan.kept[site.name], site.units)] = 0
        biases[name] = (weight.float() @ mean.to(weight.device)).cpu()
    return biases


@baseline(
    "flap",
    source="An et al. 2024, arXiv 2312.11983, section 3, variant AL-AM",
    compensate=lambda calibration, plan: add_biases(calibration.model, bias_compensation(calibration, plan)),
)
def flap(calibration: Calibration) -> Scores:
    """Input variance times squared column norm, standardised within the site, then averaged over a unit's columns.

    Standardised over columns before they are averaged, as in the authors' release: the deviation of three groups would
    be noise. A site whose columns do not differ scores 0. That release also squares attention's metric first and leaves
    out a first sample's fluctuation; here both kinds follow the formula, over all tokens.
    """
    scores = {}
    for site, weight, moments in _consumers(calibration):
        columns = weight.float().square().sum(0).double().cpu() * moments.variance  # [C]
        deviation = columns.std() if len(columns) > 1 else columns.new_zeros(())
        standardised = (columns - columns.mean()) / deviation if deviation > 0 else torch.zeros_like(columns)
        scores[site.name] = standardised.view(site.units, -1).mean(1).float()
    return scores


@baseline("taylor", source="Ma et al. 2023 (LLM-Pruner), arXiv 2305.11627, section 3.2", needs_gradients=True)
def taylor(calibration: Calibration) -> Scores:
    """|w dL/dw| of each weight, L the mean loss of all labels, summed over a unit and divided by its parameters.

    Gradients of all prunable weights are held at a time, in float32: 28 GB for 7e9 of them.
    """
    model, sums = calibration.model, dict[str, Tensor]()
    weights = {site.name: unit_weights(model, site) for site in calibration.sites}
    parameters = [weight.parameter for own in weights.values() for weight in own]
    gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    labels = sum(batch.target_tokens for batch in calibration.batches)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in calibration.batches:
            of_batch = torch.autograd.grad(_loss_sum(model, batch) / labels, parameters)
            for total, gradient in zip(gradients, of_batch, strict=True):
                total += gradient.float()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)  # as the method was given them
    remaining = iter(gradients)
    for site in calibration.sites:
        products = [
            weight.sum_per_unit((next(remaining) * weight.parameter.detach().float()).abs())
            for weight in weights[site.name]
        ]
        sums[site.name] = sum(products, torch.zeros(site.units).double())
    return _per_price(sums, calibration)


@baseline("fisher", source="Molchanov et al. 2019, arXiv 1906.10771, section 3", needs_gradients=True)
def fisher(calibration: Calibration) -> Scores:
    """Mean over examples of the squared gradient at a gate of one on each unit, per parameter of the unit.

    The loss of an example is the mean over its labels.
    """
    model, sites = calibration.model, calibration.sites
    gates = {name: gate.requires_grad_() for name, gate in calibration.open_gates().items()}
    sums = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    examples = []  # each one that has a label as a batch of its own, without padding
    for batch in calibration.batches:
        for index, length in enumerate(batch.lengths):
            labels = batch.labels[index : index + 1, :length]
            if target_tokens := int((labels[:, 1:] != IGNORE_INDEX).sum()):
                ids, names = batch.input_ids[index : index + 1, :length], batch.example_ids[index : index + 1]
                examples.append(Batch(ids, labels, target_tokens, (length,), names))
    for example in examples:
        with masked(model, gates, sites=sites):
            loss = _loss_sum(model, example) / example.target_tokens
        gradients = torch.autograd.grad(loss, list(gates.values()))
        for name, gradient in zip(gates, gradients, strict=True):
            sums[name] += gradient.double().square().cpu()
    count = max(len(examples), 1)
    return {site.name: (sums[site.name] / count / calibration.unit_price(site)).float() for site in sites}


@baseline("gate-gradients", source="Molchanov et al. 2019, arXiv 1906.10771, section 3, on the recipe's training loss")
def gate_gradients(calibration: Calibration) -> Scores:
    """Mean squared gradient of the whole training loss at a gate of one on each unit, per parameter.

    The mean is over batches. What progressive removal decides by, here in one shot: the loss has the answers, and the
    teacher's logits, hidden states and texts.
    """
    gates, count = calibration.open_gates(), calibration.num_batches
    sums = {name: torch.zeros(len(gate), dtype=torch.float64) for name, gate in gates.items()}
    for step in range(count):
        for name, gradient in calibration.gate_gradients(step, gates).items():
            sums[name] += gradient.double().square().cpu() / count
    return {site.name: (sums[site.name] / calibration.unit_price(site)).float() for site in calibration.sites}


def _compensate_consumers(calibration: Calibration, plan: Plan) -> None:
    """Let the kept columns of every consumer take over the output of the removed ones, on dense inputs."""
    grams = input_grams(calibration.model, map(consumer_name, calibration.sites), calibration.batches)
    compensate_consumers(calibration.model, calibration.sites, plan, grams)


@baseline(
    "obs",
    source="Kurtic et al. 2023 (ZipLM), arXiv 2302.04089; Meng et al. 2024 (OSSCAR), arXiv 2403.12983; layers compared "
    "as in van der Ouderaa et al. 2024 (LLM Surgeon), arXiv 2312.17244",
    needs_gradients=True,
    compensate=_compensate_consumers,
)
def obs(calibration: Calibration) -> Scores:
    """Output error of a unit's consumer that its other columns cannot make up for, in terms of the loss, per parameter.

    Optimal brain surgeon for structures: `removal_costs` on the curvature of the answers' loss, which compares layers.
    After the plan is known, the kept columns are updated.
    """
    with record_curvature(calibration.model, calibration.sites) as curvatures:
        for batch in calibration.batches:
            _loss_sum(calibration.model, batch).backward()  # type: ignore[no-untyped-call]
    scores = {}
    for site in calibration.sites:
        costs = removal_costs(calibration.model, site, curvatures[consumer_name(site)])
        scores[site.name] = (costs / calibration.unit_price(site)).float().cpu()
    return scores


@baseline("block-influence", source="Men et al. 2024 (ShortGPT), arXiv 2403.03853, section 3")
def block_influence(calibration: Calibration) -> Scores:
    """1 - mean cosine between a layer's input and output, the same for all its units: whole layers are pruned first.

    Layers still keep what the plan's constraints demand. Equal scores rank by index.
    """
    if hidden_site(calibration.sites):
        raise ConfigError("block-influence scores layers, and hidden-channels are in all of them: leave one out")
    layers = dict.fromkeys(site.layer_prefix for site in calibration.sites)
    influences = block_influences(calibration.model, layers, calibration.batches)
    return {site.name: torch.full((site.units,), influences[site.layer_prefix]) for site in calibration.sites}


# -- shared by the methods -----------------------------------------------------------------------------------------


def _consumers(calibration: Calibration) -> Iterator[tuple[Site, Tensor, Moments]]:
    """Each site with its consumer's weight [H, C] and the moments of that linear's input [C]."""
    names = [consumer_name(site) for site in calibration.sites]
    moments = input_moments(calibration.model, names, calibration.batches)
    for site, name in zip(calibration.sites, names, strict=True):
        yield site, _weight(calibration.model, name), moments[name]


def _weight(model: Any, name: str) -> Tensor:
    """Weight of a linear: [out, in]."""
    linear = get_base_linear(model, name)
    return as_out_in(linear, linear.weight)


def _per_price(sums: Mapping[str, Tensor], calibration: Calibration) -> Scores:
    """Sums over each unit's own parameters -> float32 sums over all that is removed with it, divided by its price."""
    sites, totals = {site.name: site for site in calibration.sites}, dict(sums)
    for site in calibration.sites:
        parent = sites.get(site.parent)
        if parent is not None and not parent.kind.is_whole_block:  # a whole block's sum has all its weights already
            totals[parent.name] = totals[parent.name] + sums[site.name].view(parent.units, -1).sum(1)
    return {name: (total / calibration.unit_price(sites[name])).float() for name, total in totals.items()}


def _loss_sum(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over the labels."""
    placed = batch.to(next(model.parameters()).device)
    with select_head_inputs(model, placed.prediction_mask):
        logits = model(input_ids=placed.input_ids, use_cache=False).logits
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), placed.targets, reduction="sum")
