"""YAML files written by users: safe-loaded, without repeated keys, with errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from prunetune.errors import ConfigError


def read_yaml(path: Path, what: str, hint: str) -> Any:
    """The values in a YAML file; `what` names the file in errors, and `hint` is the next step.

    Raises `ConfigError` if the file cannot be read or repeats a key, of which one value would be lost.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as missing:  # ValueError: not UTF-8
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
                where = f"line {key.start_mark.line + 1} repeats the key {key.value}"
                raise yaml.YAMLError(f"{where}, and only one value would count: merge the two")
            seen.add(str(key.value))
        return node
