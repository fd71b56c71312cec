"""`[project.urls]`: the addresses of addresses.toml that are filled in."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LABELS = {"homepage": "Homepage", "repository": "Repository", "documentation": "Documentation", "issues": "Issues"}


class Addresses(MetadataHookInterface):
    """Called by hatchling whenever it reads the metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the urls."""
        addresses = tomllib.loads((Path(self.root) / "addresses.toml").read_text(encoding="utf-8"))
        metadata["urls"] = {label: addresses[key] for key, label in LABELS.items() if addresses[key]}
