"""Packages that only some jobs need: asked for, imported, or reported missing with the command that installs them."""

import re
from importlib import import_module
from importlib.metadata import requires
from importlib.util import find_spec
from types import ModuleType

from prunetune.errors import MissingPackage


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported; it is not imported here."""
    return find_spec(module) is not None


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra by their own names: prunetune itself is on no index."""
    marked = [line for line in requires("prunetune") or () if re.search(f"extra == [\"']{extra}[\"']", line)]
    return " ".join(["pip install", *(f"'{line.partition(';')[0].strip()}'" for line in marked)])


def import_optional(module: str, *, extra: str, use: str) -> ModuleType:
    """The module; raises `MissingPackage`, which says what needs it and how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"{use} needs the package {error.name}; run: {install_command(extra)}") from error


def require_installed(*modules: str, extra: str, use: str) -> None:
    """Raise `MissingPackage` before any work where one of the modules cannot be imported."""
    missing = [module.replace("_", "-") for module in modules if not is_installed(module)]
    if missing:
        raise MissingPackage(f"{use} needs {', '.join(missing)}; run: {install_command(extra)}")
