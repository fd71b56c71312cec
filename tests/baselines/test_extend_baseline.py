"""The example in docs/extend/baseline.md: one function adds a method to `prunetune compare`, with a plan on budget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prunetune.baselines import BASELINES, Baseline, Calibration, baseline
from prunetune.compare.charts import method_styles
from prunetune.compare.methods import resolve_methods
from prunetune.config.recipe import from_mapping
from prunetune.errors import ConfigError
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import kept_params, prunable_params
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select
from support.models import tiny

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "baseline.md"
EXAMPLE, LISTING = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def added() -> Iterator[Baseline]:
    """The method of the page, registered for one test."""
    names: dict[str, Baseline] = {}
    exec(compile(EXAMPLE, PAGE.name, "exec"), names)
    yield BASELINES["late-weights"]
    del BASELINES["late-weights"]


def test_example_is_a_method_of_compare(added: Baseline) -> None:
    config = from_mapping({"compare": {"methods": ["dense", added.name, "progressive"]}})
    method = resolve_methods(config)[1]
    assert (method.name, method.kind, method.baseline) == ("late-weights", "two-stage", "late-weights")
    assert set(method_styles(["dense", added.name, "progressive"], "progressive")) == {
        "dense",
        added.name,
        "progressive",
    }


def test_example_can_be_the_baseline_of_a_variant(added: Baseline, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("taught: {two-stage: late-weights}\n")
    config = from_mapping({"compare": {"methods": ["taught"], "variants": str(tmp_path / "v.yaml")}})
    assert [method.baseline for method in resolve_methods(config)] == [added.name]


def test_example_makes_a_plan_on_budget(added: Baseline) -> None:
    model = tiny("llama").requires_grad_(False)
    sites = find_sites(model)
    scores = added(Calibration(model, sites, ()))
    assert {name: (score.shape, score.dtype) for name, score in scores.items()} == {
        site.name: (torch.Size([site.units]), torch.float32) for site in sites
    }
    plan = select(scores, sites, 0.6, PlanConstraints(align=8))
    assert 0.5 < kept_params(sites, plan) / prunable_params(sites) <= 0.6


def test_listing_of_the_page_names_every_method(added: Baseline, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(LISTING, PAGE.name, "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(BASELINES)
    assert (
        lines[-1]
        == "late-weights: Mean absolute weight of a unit, times the number of its layer. (made up for this page)"
    )


def test_unregistered_method_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown method 'late-weights'"):
        resolve_methods(from_mapping({"compare": {"methods": ["late-weights"]}}))


@pytest.mark.parametrize("name", ["taylor", "My Score", "a_b", "-a", "", "a/b"])
def test_name_that_is_taken_or_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a new name of lower-case letters"):
        baseline(name, source="nowhere")


@pytest.mark.parametrize("name", BASELINES)
def test_every_method_has_a_description_and_a_source(name: str) -> None:
    assert BASELINES[name].name == name
    assert BASELINES[name].description.endswith((".", ":"))
    assert BASELINES[name].source


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_gradients_are_on_where_a_method_needs_them(needs_gradients: bool) -> None:
    method = Baseline("probe", lambda _: {"on": torch.tensor(torch.is_grad_enabled())}, "", needs_gradients)
    for ambient in (torch.no_grad(), torch.enable_grad()):
        with ambient:
            assert bool(method(Calibration(None, (), ()))["on"]) == needs_gradients
