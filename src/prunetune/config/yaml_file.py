"""YAML files that people write: read whole, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from prunetune.errors import ConfigError


def read_yaml(path: Path, what: str, hint: str) -> Any:
    """What a file says; raises `ConfigError` where it cannot be read, or says a key twice: one would be lost."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as missing:  # of these, what is not UTF-8
        raise ConfigError(f"{path}: cannot read {what} ({missing}); {hint}") from missing
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as broken:  # ValueError: the 31st of June
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(broken).split())}") from broken


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                where = f"line {key.start_mark.line + 1} says {key.value} a second time"
                raise yaml.YAMLError(f"{where}, and only one would count: merge the two")
            seen.add(str(key.value))
        return node
