"""The licence that a base model states, in its card's front matter or the keys of a .gguf file. Nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prunetune.errors import PrunetuneError
from prunetune.model.loading import DEMO, cached_hub_file, demo_file

FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True)
class LicenseInfo:
    """What the base says of itself; all empty where it says nothing."""

    id: str = ""  # "apache-2.0", "llama3.2", "other"
    name: str = ""
    link: str = ""
    where: str = ""  # "its model card", "its LICENSE file"


def read_license(model: str) -> LicenseInfo:
    """Look where the model is: a folder, a .gguf file, `demo`, or a hub name whose card is in the cache."""
    path = Path(model).expanduser()
    try:
        if model == DEMO or path.suffix == ".gguf":
            return _of_gguf(demo_file() if model == DEMO else path)
        card = path / "README.md" if path.is_dir() else cached_hub_file(model, "README.md")
        found = _of_card(card) if card and card.is_file() else LicenseInfo()
        beside = next((name for name in FILES if (path / name).is_file()), "")
        return found if found.id or not beside else LicenseInfo(id="other", where=f"its file {beside}")
    except (OSError, ValueError, LookupError, PrunetuneError):  # a card can be written without
        return LicenseInfo()


def _of_card(card: Path) -> LicenseInfo:
    """Hugging Face's keys `license`, `license_name`, `license_link`."""
    head, begin, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    front, end, _ = rest.partition("\n---")
    if head.strip() or not begin or not end:
        return LicenseInfo()
    try:
        values: Any = yaml.safe_load(front)
    except yaml.YAMLError:
        return LicenseInfo()
    return _said(values, "license", "_", "its model card") if isinstance(values, dict) else LicenseInfo()


def _of_gguf(file: Path) -> LicenseInfo:
    """The keys `general.license`, `general.license.name`, `general.license.link`."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    values = {key: fields[key].contents() for key in fields if key.startswith("general.license")}
    return _said(values, "general.license", ".", "its .gguf file")


def _said(values: dict[str, Any], key: str, joint: str, where: str) -> LicenseInfo:
    found = values.get(key)
    first = found[0] if isinstance(found, list) and found else found
    if not first:
        return LicenseInfo()
    name, link = (str(values.get(f"{key}{joint}{part}") or "") for part in ("name", "link"))
    return LicenseInfo(str(first), name, link, where)
