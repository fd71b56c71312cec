"""Laws of amounts: a formatted amount is parsed back, shares are at most 1, and a rounded amount meets its limit."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.quantities import EXAMPLES, UNITS, Amount, format_amount, format_amount_rounded_to_limit
from prunetune.config.recipe import RunConfig, from_mapping, to_mapping
from prunetune.errors import ConfigError

kinds = pytest.mark.parametrize("kind", UNITS)


@kinds
def test_formatted_amount_is_parsed_back(kind: str) -> None:
    for exponent in torch.linspace(-5, 15, 40).tolist():
        value = 10**exponent
        assert Amount.parse(format_amount(value, kind, 12), kind) == Amount(pytest.approx(value), is_share=False)


@kinds
def test_rounded_amount_meets_the_limit_and_is_close(kind: str) -> None:
    for exponent in torch.linspace(-5, 15, 99).tolist():
        value, read = 10**exponent, Amount.parse(format_amount_rounded_to_limit(10**exponent, kind), kind).value
        assert read <= value if kind == "throughput" else read >= value
        assert read == pytest.approx(value, rel=3e-4)


@kinds
def test_examples_in_error_messages_are_parsed(kind: str) -> None:
    assert not Amount.parse(EXAMPLES[kind], kind).is_share


@pytest.mark.parametrize("text", ["0.6", "60%", "0.6x", " .6 "])
def test_number_without_unit_is_a_share(text: str) -> None:
    amount = Amount.parse(text, "memory")
    assert amount.is_share
    assert amount.resolve(10) == pytest.approx(6)
    assert Amount.parse("1.5x", "throughput").resolve(10) == 15
    assert Amount.parse("1", "memory").resolve(10) == 10


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("memory", "15"), ("memory", "-1GB"), ("memory", "0"), ("memory", "0GB"), ("memory", "nan"),
        ("memory", "1.5 s"), ("memory", "much"), ("memory", "1e999GB"), ("flops", "1.2GB"), ("latency", "5"),
        ("throughput", "0.5"), ("throughput", "300"), ("throughput", "0/s"), ("file", "1,5GB"), ("latency", "120%"),
    ],
)  # fmt: skip
def test_bad_amount_is_refused_in_one_line(kind: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^budget\.{kind}: '.*write") as refused:
        Amount.parse(text, kind)
    assert "\n" not in str(refused.value)


def test_keep_is_1_if_only_other_budgets_are_given() -> None:
    assert RunConfig().budget.keep == 0.6
    assert from_mapping({"budget": {"memory": "1GB"}}).budget.keep == 1
    assert from_mapping({"budget": {"memory": 0.5, "keep": 0.6}}).budget.keep == 0.6


def test_recipe_with_budgets_round_trips() -> None:
    config = from_mapping({"budget": {"memory": 0.5, "throughput": "1.5x"}, "workload": {"batch": 8}})
    assert from_mapping(to_mapping(config)) == config
    assert set(config.budget.amounts()) == {"memory", "throughput"}
    for wrong in ({"memory": True}, {"latency": "soon"}, {"flops": []}):
        with pytest.raises(ConfigError, match=r"budget\."):
            from_mapping({"budget": wrong}).budget.amounts()
