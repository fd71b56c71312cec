"""A plan: the units that a pruned model keeps. It is all that a decision passes on to the cut."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import lt
from pathlib import Path
from typing import Any, Self

from prunetune.errors import PlanError
from prunetune.utils.untrusted import parse_json, read_text, short_repr, shorten

FORMAT = "prunetune-plan-1"


@dataclass(frozen=True)
class Plan:
    """The units kept at each site, and the units of the dense model. Round-trips through JSON.

    Raises `PlanError` where kept units do not ascend, or lie outside the dense model's.
    """

    kept: Mapping[str, tuple[int, ...]]  # site name -> ascending unit indices
    units: Mapping[str, int]  # site name -> units of the dense model

    def __post_init__(self) -> None:
        if set(self.kept) != set(self.units):
            site = sorted(set(self.kept) ^ set(self.units))[0]
            raise PlanError(f"plan names {site} only once: every site needs both its kept units and its unit count")
        for site, kept in self.kept.items():
            if not all(map(lt, kept, kept[1:])) or (kept and not 0 <= kept[0] <= kept[-1] < self.units[site]):
                raise PlanError(f"plan at {site}: kept units must ascend within 0..{self.units[site] - 1}")

    def widths(self) -> dict[str, int]:
        """The number of units kept at each site."""
        return {site: len(kept) for site, kept in self.kept.items()}

    def to_json(self) -> str:
        """The plan as JSON text, the same bytes for equal plans."""
        sites = {site: {"units": self.units[site], "kept": list(kept)} for site, kept in self.kept.items()}
        return json.dumps({"format": FORMAT, "sites": sites}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan that `to_json` wrote; raises `PlanError` on anything else."""
        try:
            data: Any = parse_json(text)
            if data["format"] != FORMAT:
                raise PlanError(f"plan has format {short_repr(data['format'])}; this version reads {FORMAT!r}")
            sites = data["sites"]
            return cls(
                kept={name: tuple(int(unit) for unit in site["kept"]) for name, site in sites.items()},
                units={name: int(site["units"]) for name, site in sites.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as broken:
            raise PlanError(f"not a plan: {shorten(repr(broken))}; expected the text of a plan.json") from broken

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `plan.json`; raises `PlanError` where it is not a plan."""
        try:
            return cls.from_json(read_text(path))
        except (OSError, ValueError) as broken:
            raise PlanError(f"{path}: cannot be read ({broken}); put it back, or name another run") from broken
