"""YAML that others wrote: safe-loaded within bounds, without repeated keys, with errors in one line."""

from pathlib import Path
from typing import Any

import yaml

from prunetune.errors import ConfigError
from prunetune.utils.untrusted import MAX_DEPTH, MAX_DIGITS, SURROGATES, read_text, shorten

MAX_BYTES = 2**20  # of a file
MAX_NODES = 20_000  # values with all aliases and merges expanded


def read_yaml(path: Path, what: str, hint: str) -> Any:
    """The values in a YAML file; `what` names the file in errors, and `hint` is the next step.

    Raises `ConfigError` if the file cannot be read or repeats a key, of which one value would be lost.
    """
    try:
        text = read_text(path, max_bytes=MAX_BYTES)
    except (OSError, ValueError) as missing:  # ValueError: not UTF-8
        raise ConfigError(f"{path}: cannot read {what} ({missing}); {hint}") from missing
    try:
        return parse_yaml(text)
    except ValueError as broken:
        raise ConfigError(f"{path}: not valid YAML: {broken}") from broken


def parse_yaml(text: str) -> Any:
    """The values of a YAML text; raises `ValueError`, with one line, whatever is wrong."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as broken:  # the 31st of June, !!bool 5
        raise ValueError(shorten(str(broken), 400)) from broken
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    composed = 0  # scalars so far

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _count_nodes(node, {})
        return node

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise RecursionError
        super().fetch_flow_collection_start(token_class)

    def compose_scalar_node(self, anchor: Any) -> Any:
        node: Any = super().compose_scalar_node(anchor)
        self.composed += 1
        if self.composed > MAX_NODES:
            raise _error(node, f"is beyond the {MAX_NODES:,} values that are read at most: write fewer")
        if SURROGATES.search(node.value):
            raise _error(node, "holds half of a surrogate pair, which is no character: correct it")
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > MAX_DIGITS:
            raise _error(node, f"holds a number of {len(node.value):,} digits: shorten it, or quote it if it is text")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _error(key, f"repeats the key {key.value}, and only one value would count: merge the two")
            seen.add(key.value)
        return node


def _error(node: Any, problem: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {node.start_mark.line + 1} {problem}")


def _count_nodes(node: Any, counts: dict[Any, int]) -> int:
    """The node and all below it, aliases expanded; `counts` has the nodes that are counted already."""
    if isinstance(node, yaml.CollectionNode) and node not in counts:
        counts[node] = MAX_NODES  # until it is known: a node that holds itself has no end
        children = [child for entry in node.value for child in (entry if isinstance(entry, tuple) else (entry,))]
        counts[node] = 1 + sum(_count_nodes(child, counts) for child in children)
        if counts[node] > MAX_NODES:
            raise _error(node, f"holds more than {MAX_NODES:,} values with its aliases (*) expanded: write fewer")
    return counts.get(node, 1)
