"""Two-stage methods that search for a whole plan while all weights are frozen: a generator, and evolution."""

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.baselines.registry import Calibration, baseline
from prunetune.baselines.scores import fisher
from prunetune.data.batches import Batch
from prunetune.model.lm_head import capture_head_inputs, chunked_loss, logits_function
from prunetune.plan import Plan
from prunetune.pruning.masking import gates_from_plan, masked
from prunetune.search.plan_rules import block_size, min_width
from prunetune.search.searcher import Searcher
from prunetune.search.select import split_like
from prunetune.utils.determinism import derive_seed

GENERATIONS, OFFSPRING = 16, 8
SELECTION = ((2, 1), (1, 4))  # (survivors, batches that they are chosen on), one round after the other


@baseline("generator", source="Gao et al. 2024 (DISP-LLM), arXiv 2410.11988, section 4", needs_gradients=True)
def generator(calibration: Calibration) -> Plan:
    """Plan of a pruning-decision generator, trained by Gumbel gates and a budget loss while all weights are frozen.

    It takes as many steps as progressive removal takes for all its cuts: `search.span` of train.steps.
    """
    config, search = calibration.config, calibration.config.search
    device = next(calibration.model.parameters()).device
    searcher = Searcher(calibration.sites, calibration.constraints, config, device)
    weights = list(searcher.generator.parameters())
    optimizer = torch.optim.AdamW(weights, lr=search.learning_rate)
    for step in range(max(1, round(config.train.steps * search.span))):
        gates = searcher.sample(step)
        gradients = calibration.gate_gradients(step, {name: gate.detach() for name, gate in gates.items()})
        searcher.backward(gates, gradients)
        torch.nn.utils.clip_grad_norm_(weights, config.train.clip)
        optimizer.step()
        optimizer.zero_grad()
    plan = searcher.final_decision().plan
    assert plan is not None
    return plan


@baseline(
    "evolution",
    source="Sieberling et al. 2024 (EvoPress), arXiv 2410.14649, section 3; see also DarwinLM, arXiv 2502.07780",
)
def evolution(calibration: Calibration) -> Plan:
    """Plan that starts from `fisher` and evolves: blocks move between sites while this lowers KL(dense || pruned).

    Each of 16 generations makes 8 offspring. Inside a site units stay ranked by score. The two best on one batch are
    compared with their parent on four; batches change with the generation. Nothing is tuned meanwhile: plans are masks.
    In the uniform layout no block can move, and the plan is that of `fisher`.
    """
    scores = fisher(calibration)
    assert not isinstance(scores, Plan)
    parent = calibration.select(scores)
    if calibration.constraints.layout == "uniform":
        return parent
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    by_site = split_like(scores, 1 - (order.argsort() + 0.5) / len(order))  # ranks in (0, 1), all different
    rng = random.Random(derive_seed(calibration.seed, "baseline evolution"))  # noqa: S311
    for generation in range(GENERATIONS):
        candidates = [_mutate(parent, by_site, calibration, rng) for _ in range(OFFSPRING)]
        for survivors, count in SELECTION:
            if survivors == 1:
                candidates = [parent, *candidates]
            indices = range(generation * count, generation * count + count)
            batches = [calibration.batches[index % len(calibration.batches)] for index in indices]
            divergences = _divergences(calibration, candidates, batches)
            best = sorted(range(len(candidates)), key=divergences.__getitem__)[:survivors]  # of equals the parent
            candidates = [candidates[index] for index in best]
        (parent,) = candidates
    return parent


def _mutate(plan: Plan, ranks: dict[str, Tensor], calibration: Calibration, rng: random.Random) -> Plan:
    """The plan with one to three blocks moved between sites of one kind, as far as budget and constraints allow."""
    sites, constraints = calibration.sites, calibration.constraints
    gates = gates_from_plan(plan, sites)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        outer = [site for site in sites if not site.parent]
        counts = {site.name: int(gates[site.name].sum()) for site in outer}
        pairs = [
            (donor, taker)
            for donor in outer
            if counts[donor.name] - block_size(donor, constraints) >= min_width(donor, constraints)
            for taker in outer
            if taker.kind is donor.kind and taker is not donor and counts[taker.name] < taker.units
        ]
        if pairs:
            donor, taker = rng.choice(pairs)
            size = min(block_size(donor, constraints), taker.units - counts[taker.name])
            kept = gates[donor.name].nonzero().flatten()
            gates[donor.name][kept[ranks[donor.name][kept].argsort()[:size]]] = 0
            closed = (1 - gates[taker.name]).nonzero().flatten()
            gates[taker.name][closed[ranks[taker.name][closed].argsort(descending=True)[:size]]] = 1
    # Chosen units come first and then the others by rank, so the plan is legal and maximal whatever was moved.
    return calibration.select({name: gate + ranks[name] for name, gate in gates.items()})


@torch.no_grad()
def _divergences(calibration: Calibration, plans: list[Plan], batches: list[Batch]) -> list[float]:
    """KL(dense || masked), summed over all tokens of these batches but padding, of each plan."""
    model, totals = calibration.model, [0.0] * len(plans)
    logits, vocabulary = logits_function(model), int(model.config.get_text_config().vocab_size)
    for batch in batches:
        dense = _head_inputs(model, batch)

        def divergence(hidden: Tensor, chunk: slice, dense: Tensor = dense) -> Tensor:
            expected, actual = (logits(rows).float().log_softmax(-1) for rows in (dense[chunk], hidden))
            return F.kl_div(actual, expected, reduction="sum", log_target=True)

        for index, plan in enumerate(plans):
            with masked(model, plan, sites=calibration.sites):
                hidden = _head_inputs(model, batch)
            totals[index] += float(chunked_loss(hidden, vocabulary, divergence))
    return totals


def _head_inputs(model: torch.nn.Module, batch: Batch) -> Tensor:
    """What the head would read of a batch's tokens without padding: [N, H]."""
    placed = batch.to(next(model.parameters()).device)
    with capture_head_inputs(model) as captured:
        model(input_ids=placed.input_ids, use_cache=False)
    return captured[0][placed.token_mask.flatten()]
