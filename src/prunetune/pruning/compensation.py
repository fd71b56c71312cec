"""Second-order pruning: what the columns of a linear that stay make up for, and what removing a unit costs the loss.

A linear reads columns x [C] and outputs W x. Of the Gram matrix G = sum of x x^T over tokens, damped by a share of its
mean diagonal, the change of the kept columns K that changes the output least when the columns R are removed is
W[:, R] G[R, K] G[K, K]^-1 (optimal brain surgeon, Hassibi and Stork 1993; for structures OSSCAR, Meng et al. 2024,
arXiv 2403.12983, and SlimGPT, Ling et al. 2024, arXiv 2412.18110).

To second order, a change D of a linear's weight [H, C] changes the loss by tr(G D A D^T) / 2N. Here A [C, C] is the sum
over N tokens of x x^T, x the linear's input, and G [H, H] the sum of g g^T, g the loss's gradient at its output: the
Fisher matrix as a Kronecker product (Martens and Grosse 2015, arXiv 1503.05671; to compare layers by it: van der
Ouderaa et al. 2024, LLM Surgeon, arXiv 2312.17244).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import ConfigError
from prunetune.plan import Plan
from prunetune.pruning.linears import COLUMNS, ROWS, as_out_in, axis_size, get_base_linear
from prunetune.pruning.units import Site, kept_indices
from prunetune.utils.threads import CAPTURE_LOCK

DAMPING = 0.01  # of the mean diagonal, added to the diagonal


@torch.no_grad()
def compensate_consumers(
    model: nn.Module, sites: Iterable[Site], plan: Plan, grams: Mapping[str, Tensor], damping: float = DAMPING
) -> None:
    """Update the kept columns of every linear that loses some and has a Gram matrix in `grams`; to call before the cut.

    `grams`, {linear: [C, C]}, are of the inputs of the model that `plan` is of. The linears get new parameters, solved
    in float64 and stored in the dtype that they had, so that whoever shares the old ones keeps them. Call it once for
    a plan and linear. Linears that lose all their columns stay as they are.
    """
    for (name, axis), kept in kept_indices(plan, sites).items():
        if axis != COLUMNS or name not in grams:
            continue
        linear = get_base_linear(model, name)
        weight = as_out_in(linear, linear.weight).detach().double()  # [out, C]
        kept, gram = kept.to(weight.device), damped(grams[name].to(weight.device), damping)
        is_removed = torch.ones(len(gram), dtype=torch.bool, device=weight.device).index_fill_(0, kept, False)
        removed = is_removed.nonzero().flatten()
        target = weight[:, removed] @ gram[removed][:, kept]  # [out, K]
        with CAPTURE_LOCK:
            change = torch.cholesky_solve(target.t(), torch.linalg.cholesky(gram[kept][:, kept])).t()
        updated = as_out_in(linear, weight.index_add(1, kept, change))
        stored = updated.to(linear.weight.dtype).contiguous()
        linear.weight = nn.Parameter(stored, requires_grad=linear.weight.requires_grad)


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """A Gram matrix that can be inverted: [C, C] in float64, with this share of its mean diagonal on its diagonal."""
    gram = gram.double()
    ridge = damping * gram.diagonal().mean().clamp_min(1e-30)
    return gram + ridge * torch.eye(len(gram), dtype=torch.float64, device=gram.device)


@torch.no_grad()
def removal_errors(weight: Tensor, gram: Tensor, units: int, damping: float = DAMPING) -> Tensor:
    """What removing each unit adds to the squared output error, all others compensating: float64 [units].

    Units own equal runs of the C columns of `weight` [out, C], whose input's Gram matrix is `gram` [C, C]. They are
    removed greedily, the one of the least error first, and weight and inverse Gram matrix are updated after each
    (Kurtic et al. 2023, ZipLM, arXiv 2302.04089, algorithm 1). Of many units a 64th goes at a time. Errors never fall
    along this order, so that they rank units as they were removed. Nothing waits for a GPU.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))
    weight, size = weight.double(), weight.shape[1] // units
    errors, largest = weight.new_zeros(units), weight.new_zeros(())
    is_left = torch.ones(units, dtype=torch.bool, device=weight.device)
    own_columns = torch.arange(units * size, device=weight.device).view(units, size)
    identity = torch.eye(size, dtype=torch.float64, device=weight.device)
    for start in range(0, units, at_once := max(1, units // 64)):
        blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, size, size]
        columns = weight.view(len(weight), units, size).permute(1, 2, 0)  # [units, size, out]
        blocks = torch.where(is_left[:, None, None], blocks, identity)  # of removed units, whose columns are zero
        alone = (columns * _solve(blocks, columns)).sum((1, 2)).masked_fill(~is_left, torch.inf)
        removed = alone.argsort(stable=True)[: min(at_once, units - start)]
        for_removed = torch.maximum(alone[removed], largest)
        errors[removed], largest, is_left[removed] = for_removed, for_removed[-1], False
        gone = own_columns[removed].flatten()
        update = _solve(inverse[gone][:, gone], inverse[gone])  # [removed columns, C]
        weight = weight - weight[:, gone] @ update
        inverse = inverse - inverse[:, gone] @ update
        weight[:, gone] = inverse[gone] = inverse[:, gone] = 0.0
    return errors


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix`^-1 `right` of positive definite matrices [.., n, n], without a look at whether they are."""
    if matrix.shape[-1] == 1:
        return right / matrix
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(matrix).L)


@dataclass(frozen=True)
class Curvature:
    """Of one linear, over the tokens at which the loss depends on it."""

    inputs: Tensor  # A, float32 [C, C]
    gradients: Tensor  # G, float32 [H, H]
    tokens: Tensor  # N, a float32 scalar

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums, which add up over passes and ranks."""
        return self.inputs, self.gradients, self.tokens

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Include a pass: inputs [.., C] of the linear, and the loss's gradient [.., H] at its output.

        A token without gradient, such as padding, is left out; so is a pass whose gradient is not finite.
        """
        with torch.autocast(gradient.device.type, enabled=False):  # sums of products in 16 bits would not be definite
            outputs = gradient.detach().flatten(0, -2).float()
            outputs = torch.where(outputs.isfinite().all(), outputs, 0.0)
            counts = (outputs != 0).any(1, keepdim=True)
            rows = torch.where(counts, inputs.detach().flatten(0, -2).float(), 0.0)
            self.inputs.addmm_(rows.t(), rows)
            self.gradients.addmm_(outputs.t(), outputs)
            self.tokens.add_(counts.sum())


def consumer_name(site: Site) -> str:
    """Name of the linear that reads the units; raises `ConfigError` for units that no linear of their own reads."""
    if site.consumer is None:
        raise ConfigError(
            f"scores that measure the input of a unit's output linear, such as wanda-sp or obs, cannot score "
            f"{site.kind.recipe_name}, which have none of their own: leave them out, or set budget.units to "
            "kv-groups, query-heads and mlp-channels"
        )
    return site.consumer.module


@contextmanager
def record_curvature(model: nn.Module, sites: Iterable[Site]) -> Iterator[Mapping[str, Curvature]]:
    """While the block lasts, every backward pass adds to the curvature of each site's consumer: {linear: Curvature}.

    The sums stay in the same tensors, so that passes may be recorded. The loss is what runs backward.
    """
    curvatures, handles = {}, []

    def hook(curvature: Curvature) -> Any:
        def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():  # else activations will be computed again
                if not output.requires_grad:  # the first one of a frozen model
                    output.requires_grad_()
                rows = inputs[0]
                output.register_hook(lambda gradient: curvature.add(rows, gradient))  # type: ignore[no-untyped-call]

        return record

    try:
        for name in dict.fromkeys(map(consumer_name, sites)):
            linear = get_base_linear(model, name)
            sizes = [(axis_size(linear, axis),) * 2 for axis in (COLUMNS, ROWS)]
            curvature = Curvature(*(linear.weight.new_zeros(size, dtype=torch.float32) for size in (*sizes, ())))
            curvatures[name] = curvature
            handles.append(model.get_submodule(name).register_forward_hook(hook(curvature)))
        yield curvatures
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def removal_costs(model: nn.Module, site: Site, curvature: Curvature) -> Tensor:
    """What removing each unit adds to the loss once its consumer's other columns took over, twice that: float64 [U].

    `removal_errors` of the consumer, its output first multiplied by a root of G, so that an error is a change of loss.
    """
    name = consumer_name(site)
    linear: Any = get_base_linear(model, name)
    with CAPTURE_LOCK:
        root = torch.linalg.cholesky(damped(curvature.gradients))  # L of G = L L^T
        weight = root.t() @ as_out_in(linear, linear.weight.double())
        return removal_errors(weight, curvature.inputs, site.units) / curvature.tokens.clamp_min(1)
