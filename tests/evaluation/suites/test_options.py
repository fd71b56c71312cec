"""The options of eval and check: every field is a flag, and the Python functions take the same values."""

from __future__ import annotations

import dataclasses

import pytest

from prunetune.cli.flags import flags_to_overrides, make_flags_class
from prunetune.config.fields import read_options
from prunetune.errors import ConfigError
from prunetune.evaluation.suites.options import CheckOptions, EvalOptions


@pytest.mark.parametrize("cls", [EvalOptions, CheckOptions])
def test_every_field_is_a_flag_with_the_same_default(cls: type[EvalOptions]) -> None:
    flags = make_flags_class(cls)
    assert [field.name for field in dataclasses.fields(flags)] == [field.name for field in dataclasses.fields(cls)]
    assert read_options(cls, flags_to_overrides(flags()), where="eval") == cls()
    given = flags(timeout=2.0, allow_code=True, cache=False)
    assert read_options(cls, flags_to_overrides(given), where="eval") == cls(timeout=2.0, allow_code=True, cache=False)


def test_check_has_the_options_of_eval_and_its_reference() -> None:
    only_check = {field.name for field in dataclasses.fields(CheckOptions)} - {
        field.name for field in dataclasses.fields(EvalOptions)
    }
    assert only_check == {"against"}


def test_permissions_are_off_unless_allowed() -> None:
    assert EvalOptions().permissions == frozenset()
    assert EvalOptions(allow_code=True, allow_judge=True).permissions == {"code", "judge"}


def test_option_out_of_bounds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^eval: max_tokens must lie in \[1, inf\), got 0"):
        read_options(EvalOptions, {"max_tokens": 0}, where="eval")
