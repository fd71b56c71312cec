"""The page of a comparison."""

from __future__ import annotations

from pathlib import Path


def write_page(folder: Path) -> Path:
    """Write `comparison.html` from `comparison.json`."""
    return folder / "comparison.html"
