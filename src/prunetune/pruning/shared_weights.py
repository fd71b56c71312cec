"""Two models in the memory of one: a frozen dense model beside its copy, and beside what a cut leaves of that.

Before the cut, `twin` has the very tensors of the model in modules of its own: neither hears of the other's hooks and
adapters. At the cut, `cut_beside` puts the units of the one that stays dense, the *lender*, into another order: first
those that the other keeps. Weights of the cut model then are the first lines of the lender's, as views.

The order changes nothing that the lender computes but the order of sums. KV groups attend each by itself, their query
heads along with them, and o adds up what they give; channels are independent until down adds them up. So where rows of
q, k and v, or of gate and up, move in step with columns of o, or of down, the same terms are added.

Shapes: a weight W [out, in], of which a cut keeps k lines: W[:k] of what produces units, W[:, :k] of what consumes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.linears import ROWS, get_base_linear, stored_axis
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.nf4 import NF4Linear
from prunetune.pruning.units import LinearSlice, Site, kept_mask


def copy_sharing_weights(model: nn.Module) -> Any:
    """The same modules once more, over the same tensors: frozen, in eval mode, whatever becomes of the model.

    To be made before adapters are added. What puts other tensors in place leaves the twin as it is; what writes into
    weights (`merge_adapters`, but for its trainable sums) changes both.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo).eval()


@torch.no_grad()
def cut_sharing_weights(model: nn.Module, weight_owner: nn.Module, plan: Plan, *, sites: Iterable[Site]) -> None:
    """`cut_linears` of a model whose frozen weights are the lender's, in place, layer by layer.

    Holds at most one layer more on the way. What is kept of fused projections, of query heads one by one and of experts
    is no first lines of anything: there the cut model has a copy, and the lender keeps its order. Raises `PlanError`
    where the plan was made for another model.
    """
    sites = tuple(sites)
    gates_from_plan(plan, sites)  # refuses before anything is cut
    for layer in dict.fromkeys(site.layer for site in sites):
        here = [site for site in sites if site.layer == layer]
        lent = [
            site
            for site in here
            if 0 < len(plan.kept[site.name]) < site.units and _shares_weights(weight_owner, model, site)
        ]
        cut_linears(model, plan, sites=here)
        for site in lent:
            for part, axis in site.linear_slices():
                order = _order(part, plan.kept[site.name], site.units)
                _reorder_and_view(
                    get_base_linear(weight_owner, part.module), get_base_linear(model, part.module), order, axis
                )


def can_share_weights(site: Site) -> bool:
    """Whether what stays of a site can be the first lines of its dense weights, whatever stays."""
    plain = site.kind in ("attention", "mlp") and not site.param_slices and not site.columns_owned_by_child
    return plain and not any(len(part.part_sizes) > 1 or part.total_rows for part, _ in site.linear_slices())


@torch.no_grad()
def unshare_weights(model: nn.Module) -> None:
    """Give what is a view of a larger tensor memory of its own, in place: the lender may go, and safetensors come."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _shares_weights(weight_owner: nn.Module, model: nn.Module, site: Site) -> bool:
    """Whether the lender's weights at a site are the model's, and can be put in order."""
    pairs = [
        (get_base_linear(model, part.module), get_base_linear(weight_owner, part.module))
        for part, _ in site.linear_slices()
    ]
    return can_share_weights(site) and all(
        getattr(mine, name).data_ptr() == getattr(whole, name).data_ptr()
        for mine, whole in pairs
        for name in _names(mine)
    )


def _order(part: LinearSlice, kept: Sequence[int], units: int) -> Tensor:
    """Lines of all units, those that stay first: long [units * lines of a unit]."""
    gone = (~kept_mask(kept, units)).nonzero().flatten()
    return part.indices((*kept, *gone.tolist()), units)


def _names(linear: Any) -> tuple[str, ...]:
    """The tensors that hold a linear's weights."""
    return ("packed", "scales") if isinstance(linear, NF4Linear) else ("weight",)


def _reorder_and_view(whole: Any, cut: Any, order: Tensor, axis: int) -> None:
    """Put the lines of a linear in this order, in place; a cut one, which has copies of the first, gets views.

    No second weight is held but the lines that go.
    """
    dim = 0 if isinstance(whole, NF4Linear) else stored_axis(whole, axis)  # in 4 bits, lines that can go are rows
    for name in _names(whole):
        lines, copied = getattr(whole, name), getattr(cut, name)
        kept, index = copied.shape[dim], order.to(lines.device)
        gone = lines.index_select(dim, index[kept:])
        first = lines.detach().narrow(dim, 0, kept)
        first.copy_(copied)
        lines.narrow(dim, kept, len(index) - kept).copy_(gone)
        setattr(cut, name, nn.Parameter(first, requires_grad=False) if isinstance(copied, nn.Parameter) else first)
    if axis == ROWS and whole.bias is not None:
        index = order.to(whole.bias.device)
        whole.bias = nn.Parameter(whole.bias.index_select(0, index), requires_grad=False)
