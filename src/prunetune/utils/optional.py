"""Packages that only some scores need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from prunetune.errors import MissingPackage


def import_optional(module: str, *, extra: str, use: str) -> ModuleType:
    """The module, or a `MissingPackage` that says what for and how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        raise MissingPackage(
            f"{use} needs the package {missing.name}; run: pip install 'prunetune[{extra}]'"
        ) from missing
