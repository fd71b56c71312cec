"""Compensation: the columns of a linear that stay take over the output of those that a plan removes (least squares).

A linear reads columns x [C] and outputs W x. Of the Gram matrix G = sum of x x^T over tokens, damped by a share of its
mean diagonal, the change of the kept columns K that changes the output least when the columns R are removed is
W[:, R] G[R, K] G[K, K]^-1 (optimal brain surgeon, Hassibi and Stork 1993; for structures OSSCAR, Meng et al. 2024,
arXiv 2403.12983, and SlimGPT, Ling et al. 2024, arXiv 2412.18110).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.linears import COLUMNS, as_out_in, get_base_linear
from prunetune.pruning.units import Site, kept_indices
from prunetune.utils.capture_lock import CAPTURE_LOCK

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
