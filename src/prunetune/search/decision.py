"""A decision: which units are open, and their plan once that is final."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunetune.plan import Plan
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.units import Site


@dataclass(frozen=True)
class Decision:
    """Hard gates of the dense model's units, and their plan once it is final."""

    gates: Mapping[str, Tensor]  # {site: [U]}, each 0 or 1
    plan: Plan | None = None

    @classmethod
    def from_plan(cls, plan: Plan, sites: Sequence[Site], device: torch.device | str = "cpu") -> Decision:
        """The gates of a plan, with it."""
        return cls(detach_to(gates_from_plan(plan, sites), device), plan)


def detach_to(values: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """{site: [U]} detached and on a device, in one transfer instead of one per site."""
    return split_like(values, torch.cat([value.detach() for value in values.values()]).to(device))


def split_like(values: Mapping[str, Tensor], joined: Tensor) -> dict[str, Tensor]:
    """A vector over all units, split into {site: [U]} of the same names and lengths."""
    return dict(zip(values, torch.split(joined, [len(value) for value in values.values()]), strict=True))
