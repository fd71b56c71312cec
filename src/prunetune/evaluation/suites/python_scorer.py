"""The scorer `python`: a function of the user's own; off unless the user allows code with --allow-code."""

import math
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from prunetune.errors import ConfigError, DataError
from prunetune.evaluation.suites.protocol import Response
from prunetune.evaluation.suites.text_scorers import MetricValues, ScorerOptions
from prunetune.utils.failures import typed_line
from prunetune.utils.untrusted import short_repr


def python_function_scores(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """Call `module:function` with the answer, the reference and the row (a mapping); it returns a number or a bool.

    Raises `ConfigError` where it cannot be imported, and `DataError` where it fails or returns anything else.
    """
    name, values = options["function"], []
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # which a console command does not see by itself
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as missing:
        raise ConfigError(f"python: {name} cannot be imported ({missing}); write it as module:function") from missing
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ConfigError(f"python: {name} is a {type(function).__name__}; name a function")
    for answer in answers:
        item = answer.prompt.record.source or answer.prompt.record.id
        try:
            value = function(answer.text, answer.prompt.expected, answer.prompt.fields)
        except Exception as broken:  # the user's code can raise anything
            reason = typed_line(broken)
            raise DataError(f"python: {name} failed on item {item}: {reason}", quoted=reason) from broken
        if not isinstance(value, bool | int | float) or math.isinf(value):
            shown = short_repr(value)
            raise DataError(f"python: {name} gave {shown} for item {item}; it has to give a number", quoted=shown)
        values.append(float(value))
    return {"python": values}
