"""Public names of `prunetune`, which imports no heavy package."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import prunetune
import prunetune.evaluation.suites.evaluate_and_check
import prunetune.evaluation.suites.suite
import prunetune.pipeline.run

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "pandas")
PROGRAM = f"""
import json, sys
from prunetune import run, evaluate, check, Plan, RunConfig, load_suite
RunConfig()
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def test_importing_prunetune_imports_no_heavy_package() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(prunetune, name) is not None for name in prunetune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = prunetune.absent


@pytest.mark.parametrize(
    ("public", "internal"),
    [
        (prunetune.run, prunetune.pipeline.run.run),
        (prunetune.load_suite, prunetune.evaluation.suites.suite.load_suite),
        (prunetune.evaluate, prunetune.evaluation.suites.evaluate_and_check.evaluate),
        (prunetune.check, prunetune.evaluation.suites.evaluate_and_check.check),
    ],
)
def test_public_functions_accept_every_argument_they_pass_on(
    public: Callable[..., Any], internal: Callable[..., Any]
) -> None:
    signatures = [inspect.signature(function).parameters for function in (public, internal)]
    names = [[(name, parameter.kind) for name, parameter in signature.items()] for signature in signatures]
    assert names[0] == names[1]
    defaults = [
        {name: parameter.default for name, parameter in signature.items() if name != "options"}
        for signature in signatures
    ]
    assert defaults[0] == defaults[1]
