"""The units that stay: all that passes from deciding to cutting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import lt
from pathlib import Path
from typing import Any

from prunetune.errors import PlanError

FORMAT = "prunetune-plan-1"


@dataclass(frozen=True)
class Plan:
    """The units kept at each site, out of how many. Round-trips through JSON."""

    kept: Mapping[str, tuple[int, ...]]  # site name -> ascending unit indices
    units: Mapping[str, int]  # site name -> units of the dense model

    def __post_init__(self) -> None:
        if set(self.kept) != set(self.units):
            odd = sorted(set(self.kept) ^ set(self.units))[0]
            raise PlanError(f"plan names {odd} only once: every site needs both its kept units and its unit count")
        for site, kept in self.kept.items():
            if not all(map(lt, kept, kept[1:])) or (kept and not 0 <= kept[0] <= kept[-1] < self.units[site]):
                raise PlanError(f"plan at {site}: kept units must ascend within 0..{self.units[site] - 1}")

    def widths(self) -> dict[str, int]:
        """Units kept at each site."""
        return {site: len(kept) for site, kept in self.kept.items()}

    def to_json(self) -> str:
        """The plan as JSON text, stable to the byte."""
        sites = {site: {"units": self.units[site], "kept": list(kept)} for site, kept in self.kept.items()}
        return json.dumps({"format": FORMAT, "sites": sites}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; raises `PlanError` on anything else."""
        try:
            data: Any = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"plan has format {data['format']!r}; this version reads {FORMAT!r}")
            sites = data["sites"]
            return cls(
                kept={name: tuple(int(unit) for unit in site["kept"]) for name, site in sites.items()},
                units={name: int(site["units"]) for name, site in sites.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as broken:
            raise PlanError(f"not a plan: {broken!r}; expected the text of a plan.json") from broken

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a `plan.json`."""
        return cls.from_json(path.read_text(encoding="utf-8"))
