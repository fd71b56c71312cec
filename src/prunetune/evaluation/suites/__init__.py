"""Suites: tasks with data, prompts, scorers and limits in one YAML file, run on any model or server."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunetune.evaluation.suites.local import LocalModel
    from prunetune.evaluation.suites.run import evaluate_suite, load_prompts
    from prunetune.evaluation.suites.suite import Suite, Task, load_suite, parse_suite

__all__ = ["LocalModel", "Suite", "Task", "evaluate_suite", "load_prompts", "load_suite", "parse_suite"]

# Reading a suite must not wait for torch.
_HOMES = {
    "LocalModel": "local",
    "Suite": "suite",
    "Task": "suite",
    "evaluate_suite": "run",
    "load_suite": "suite",
    "load_prompts": "run",
    "parse_suite": "suite",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"prunetune.evaluation.suites.{_HOMES[name]}"), name)
