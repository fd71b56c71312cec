"""Sharing weights in memory between a dense teacher and its student, before the cut and after it.

Before the cut, `copy_sharing_weights` gives the teacher modules of its own over the student's tensors, so that hooks
and adapters of the student do not reach it. At every cut, `cut_sharing_weights` reorders the units of the teacher, the
*weight owner*: those that the student keeps come first, then the others, both as in the dense model. The weights of the
student are then views of the first rows or columns.

The order of units changes the teacher's output by rounding only. KV groups attend independently, their query heads move
along with them, and o sums what they output; channels are independent until down sums them. So where rows of q, k and
v, or of gate and up, move together with columns of o, or of down, the same terms are summed.

Shapes: of a weight W [out, in], a cut keeps k rows or columns: W[:k] of producers, W[:, :k] of the consumer.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.linears import ROWS, get_base_linear, stored_axis
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.nf4 import NF4Linear
from prunetune.pruning.units import Site, UnitKind, kept_mask


def copy_sharing_weights(model: nn.Module) -> Any:
    """A frozen copy of the modules over the same tensors, in eval mode; to be made before adapters are added.

    Putting another tensor into the model leaves the copy as it is. Writing into a weight, as `merge_adapters` does
    without `trainable`, changes both.
    """
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    memo |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, memo).eval()


@torch.no_grad()
def cut_sharing_weights(
    model: nn.Module, weight_owner: nn.Module, plan: Plan, *, sites: Iterable[Site], before: Plan | None = None
) -> None:
    """`cut_linears` of a model whose frozen weights are the weight owner's, in place, layer by layer.

    At a further cut, `before` is the plan of the dense model's units that the earlier ones have left; the owner's order
    afterwards is that of a single cut, so that a resumed run, which makes one, has a teacher of the same bits.
    Holds at most one more layer on the way. Where `can_share_weights` is false (fused projections, query heads,
    experts), the cut model gets a copy, and the weight owner keeps its order. Raises `PlanError` where the plan was
    made for another model.
    """
    sites = tuple(sites)
    gates_from_plan(plan, sites)  # refuses a plan of another model before anything is cut
    for layer in dict.fromkeys(site.layer for site in sites):
        layer_sites = [site for site in sites if site.layer == layer]
        losing = [site for site in layer_sites if len(plan.kept[site.name]) < site.units]
        shared = []  # whose tensors in the weight owner are the model's, and can be reordered
        for site in filter(can_share_weights, losing):
            linears = [linear_slice.module for linear_slice, _ in site.linear_slices()]
            pairs = [(get_base_linear(model, name), get_base_linear(weight_owner, name)) for name in linears]
            same = (getattr(a, n).data_ptr() == getattr(b, n).data_ptr() for a, b in pairs for n in _weight_names(a))
            shared += [site] if all(same) else []
        cut_linears(model, plan, sites=layer_sites)
        for site in shared:
            kept, units = plan.kept[site.name], list(range(site.units))
            if before is not None:  # the dense model's units in the order that earlier cuts have given the owner
                left = before.kept[site.name]
                units = [*left, *(~kept_mask(left, before.units[site.name])).nonzero().flatten().tolist()]
            removed = sorted(set(range(len(units))) - set(kept), key=units.__getitem__)
            for linear_slice, axis in site.linear_slices():
                order = linear_slice.indices((*kept, *removed), len(units))
                owned = get_base_linear(weight_owner, linear_slice.module)
                _reorder_and_view(owned, get_base_linear(model, linear_slice.module) if kept else None, order, axis)


def can_share_weights(site: Site) -> bool:
    """Whether any kept units of a site can be the first rows or columns of its dense weights."""
    weights, plain_kinds = site.weights, (UnitKind.KV_GROUP, UnitKind.MLP_CHANNEL)
    if site.kind not in plain_kinds or weights.params or weights.consumer_is_childs:
        return False
    return not any(len(linear.part_sizes) > 1 or linear.total_rows for linear, _ in site.linear_slices())


@torch.no_grad()
def unshare_weights(model: nn.Module) -> None:
    """Copy every weight that is a view of a larger one, in place, so that the owner can be freed, or files written."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _weight_names(linear: Any) -> tuple[str, ...]:
    """The attributes that hold a linear's weights."""
    return ("packed", "scales") if isinstance(linear, NF4Linear) else ("weight",)


def _reorder_and_view(owned: Any, cut: Any, order: Tensor, axis: int) -> None:
    """Reorder the owner's rows or columns, in place, and make the cut linear's weights views of the first.

    Holds no second weight but the rows or columns that the cut removed: all of them if there is no cut linear left.
    """
    dim = 0 if isinstance(owned, NF4Linear) else stored_axis(owned, axis)  # 4-bit weights are stored with them as rows
    for name in _weight_names(owned):
        weight, cut_weight = getattr(owned, name), getattr(cut, name, None)
        kept, index = 0 if cut_weight is None else cut_weight.shape[dim], order.to(weight.device)
        removed = weight.index_select(dim, index[kept:])
        view = weight.detach().narrow(dim, 0, kept)
        weight.narrow(dim, kept, len(index) - kept).copy_(removed)
        if cut_weight is None:
            continue
        view.copy_(cut_weight)
        setattr(cut, name, nn.Parameter(view, requires_grad=False) if isinstance(cut_weight, nn.Parameter) else view)
    if axis == ROWS and owned.bias is not None:
        index = order.to(owned.bias.device)
        owned.bias = nn.Parameter(owned.bias.index_select(0, index), requires_grad=False)
