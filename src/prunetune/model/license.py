"""The licence of a base model, read from its card, its .gguf file or a LICENSE file, without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.config.yaml_file import parse_yaml
from prunetune.model.loading import DEMO, cached_hub_file, demo_file
from prunetune.utils.files import expand_path

LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True)
class LicenseInfo:
    """The licence that a base model states; all fields are empty where it states none."""

    id: str = ""  # "apache-2.0", "llama3.2", "other"
    name: str = ""
    link: str = ""
    where: str = ""  # "its model card", "its LICENSE file"


def read_license(model: str) -> LicenseInfo:
    """Read the licence of a folder, a .gguf file, `demo`, or a hub name whose card is in the cache."""
    path = expand_path(model)
    try:
        if model == DEMO or path.suffix == ".gguf":
            return _license_in_gguf(demo_file() if model == DEMO else path)
        card = path / "README.md" if path.is_dir() else cached_hub_file(model, "README.md")
        license_info = _license_in_card(card) if card and card.is_file() else LicenseInfo()
        file = next((name for name in LICENSE_FILES if (path / name).is_file()), "")
        return license_info if license_info.id or not file else LicenseInfo(id="other", where=f"its file {file}")
    except Exception:  # of whatever a stranger's files hold; a model card can be written without a licence
        return LicenseInfo()


def _license_in_card(card: Path) -> LicenseInfo:
    """Hugging Face's keys `license`, `license_name`, `license_link`."""
    before, begin, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    front_matter, end, _ = rest.partition("\n---")
    if before.strip() or not begin or not end:
        return LicenseInfo()
    values: Any = parse_yaml(front_matter)
    return _license_in_values(values, "license", "_", "its model card") if isinstance(values, dict) else LicenseInfo()


def _license_in_gguf(file: Path) -> LicenseInfo:
    """The keys `general.license`, `general.license.name`, `general.license.link`."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    values = {key: fields[key].contents() for key in fields if key.startswith("general.license")}
    return _license_in_values(values, "general.license", ".", "its .gguf file")


def _license_in_values(values: dict[str, Any], key: str, separator: str, where: str) -> LicenseInfo:
    ids = values.get(key)
    first_id = ids[0] if isinstance(ids, list) and ids else ids
    if not first_id:
        return LicenseInfo()
    name, link = (str(values.get(f"{key}{separator}{suffix}") or "") for suffix in ("name", "link"))
    return LicenseInfo(str(first_id), name, link, where)
