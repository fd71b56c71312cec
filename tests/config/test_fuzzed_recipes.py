"""Law of recipes and suites of any content: they are read, or refused in one line, in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prunetune.config.recipe import RunConfig, from_mapping, load_recipe, to_mapping
from prunetune.data.sources import Source
from prunetune.evaluation.suites.suite import parse_suite
from support.fuzz import ODD, damaged, fuzzed, refused_or_fine, torn

RECIPE = to_mapping(RunConfig()) | {"limits": ["valid.nll <= 1.5x -> stop"]}
RECIPE["budget"] |= {"flops": "60%", "protect": "0-1"}
RECIPE["data"] |= {"train": ["a.jsonl*2"]}
SUITE = {
    "tasks": {"a": {"data": "a.jsonl", "scorer": [{"regex": {"pattern": "x"}}], "limits": {"min": 0.5}, "limit": 3}},
    "defaults": {"template": "raw"},
    "root": ".",
    "level": 0.05,
}
YAML = [
    "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nseed: [*c,*c,*c,*c]",
    "budget: &a {keep: 0.5}\ntrain: {<<: [*a, *a]}", "seed: !!bool 5", "model: !!timestamp x", "seed: 0x" + "f" * 5000,
    "seed: 1" + ":59" * 2000, "? [a]\n: 1", "&a *a", "a: &a [*a]", "model: !!python/name:os.system", "- " * 2000,
    'model: "\\ud800"', "model: 2001-02-31", "a: 1\n---\nb: 1", "model: !!binary x", "<<: 5", "data: {train: a*1}",
]  # fmt: skip


def use(config: RunConfig) -> None:
    config.budget.protected_layers()
    for source in config.data.train:
        Source.parse(source)


@given(values=damaged(RECIPE))
@fuzzed(40)
def test_any_mapping_is_a_recipe_or_refused(values: Any) -> None:
    with refused_or_fine():
        use(from_mapping(values))


@given(text=st.one_of(torn(yaml.safe_dump(RECIPE).encode()), st.sampled_from(YAML).map(str.encode), st.binary()))
@fuzzed(25)
def test_any_file_is_a_recipe_or_refused(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text)
    with refused_or_fine():
        use(load_recipe(file, {"train": {"steps": 5}}))


@given(values=st.one_of(damaged(SUITE), ODD))
@fuzzed(40)
def test_any_mapping_is_a_suite_or_refused(values: Any) -> None:
    with refused_or_fine():
        for task in parse_suite(values, folder=Path("/nowhere")).tasks:
            json.dumps(task.error)
