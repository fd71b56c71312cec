"""The scorer `python`: a function of the user's own; off unless the user allows code with --allow-code."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from prunetune.errors import ConfigError, DataError
from prunetune.evaluation.suites.protocol import Response
from prunetune.evaluation.suites.text_scorers import MetricValues, ScorerOptions
from prunetune.utils.untrusted import short_repr


def python_function_scores(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """Call `module:function` with the answer, the reference and the row (a mapping); it returns a number or a bool.

    Raises `ConfigError` where it cannot be imported, and `DataError` where it fails or returns anything else.
    """
    function = _function(options["function"])
    return {"python": [_value(function, options["function"], answer) for answer in answers]}


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        with _cwd_on_path():
            function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as missing:
        raise ConfigError(f"python: {name} cannot be imported ({missing}); write it as module:function") from missing
    if not callable(function):
        raise ConfigError(f"python: {name} is a {type(function).__name__}; name a function")
    return function  # type: ignore[no-any-return]


@contextmanager
def _cwd_on_path() -> Iterator[None]:
    """Make modules of the working folder importable, which a console command does not see by itself."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.pop(0)


def _value(function: Callable[..., Any], name: str, answer: Response) -> float:
    item = answer.prompt.record.source or answer.prompt.record.id
    try:
        value = function(answer.text, answer.prompt.expected, answer.prompt.fields)
    except Exception as broken:  # the user's code can raise anything
        reason = f"{type(broken).__name__}: {' '.join(str(broken).split())[:200]}"
        raise DataError(f"python: {name} failed on item {item}: {reason}", quoted=reason) from broken
    if not isinstance(value, bool | int | float) or math.isinf(value):
        shown = short_repr(value)
        raise DataError(f"python: {name} gave {shown} for item {item}; it has to give a number", quoted=shown)
    return float(value)
