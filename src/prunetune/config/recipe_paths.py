"""Paths that a recipe names start from the recipe's folder; those of the command line from the working folder."""

import glob
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunetune.config.fields import fields_by_path
from prunetune.utils.untrusted import parse_json, read_text

log = logging.getLogger(__name__)
MAX_DEEP_STARS = 3  # ** in a glob: each multiplies the paths that are tried
WEIGHT = re.compile(r"\*[-+.\de]+$")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?([:@#][\w./-]+)*")


def start_from_recipe(cls: type[Any], values: Mapping[str, Any], recipe: Path, *, has_root: bool) -> dict[str, Any]:
    """The options of a recipe with its relative paths as the working folder sees them.

    Where there `has_root` (data.root), sources start from that.

    For one version a file that is only in the working folder is taken from there, with a warning. The config.yaml of a
    run folder names paths as they were seen from where the run was begun. What is read from a pipe is unchanged.
    """
    folder, result = recipe.parent, dict(values)
    is_saved = recipe.name == "config.yaml" and (folder / "manifest.json").exists()
    if is_saved:  # the working folder of the command that made it, by its manifest; ours, where it does not say
        run, folder = folder, Path()
        with suppress(OSError, ValueError, AttributeError, TypeError):  # whatever a damaged manifest holds
            begun_in = parse_json(read_text(run / "manifest.json")).get("begun_in")
            folder = Path(os.path.relpath(os.path.realpath(run / begun_in)))
    if not recipe.is_file() or folder.resolve() == Path.cwd():
        return result
    for option, item in fields_by_path(cls).items():
        *sections, name = option.split(".")
        if not item.metadata["is_path"] or (has_root and option.startswith("data.") and option != "data.root"):
            continue
        section = result
        for key in sections:
            inner = section.get(key)
            if not isinstance(inner, Mapping):  # absent, or an error of the user's that is said later
                section = {}
                break
            section[key] = section = dict(inner)
        if name in section:
            section[name] = _rebased(section[name], folder, option, is_saved=is_saved)
    return result


def _rebased(value: Any, folder: Path, option: str, *, is_saved: bool) -> Any:
    if isinstance(value, list):
        return [_rebased(entry, folder, option, is_saved=is_saved) for entry in value]
    if isinstance(value, Mapping) and "source" in value:
        return {**value, "source": _rebased(value["source"], folder, option, is_saved=is_saved)}
    path = WEIGHT.sub("", value.strip()) if isinstance(value, str) else ""
    if path in ("", "demo") or path.startswith(("/", "~")):
        return value
    start = glob.escape(str(folder)) if glob.has_magic(path) else str(folder)
    from_here = os.path.join(start, value.strip())
    if is_saved:
        from_here = os.path.relpath(from_here)  # as a recipe in the working folder would name it
    if _exists(os.path.join(start, path)):
        return from_here
    if _exists(path):
        if not is_saved:
            log.warning(
                "%s: %s was found in the working folder, not in the recipe's: the next version looks in %s only",
                option, path, folder,
            )  # fmt: skip
        return value
    ending = os.path.splitext(re.split("[:@#]", path)[0])[1]
    may_be_hub_name = HUB_NAME.fullmatch(path) and not ending[1:].isalpha()
    return value if may_be_hub_name else from_here


def _exists(path: str) -> bool:
    return os.path.exists(path) or (path.count("**") <= MAX_DEEP_STARS and any(glob.iglob(path, recursive=True)))
