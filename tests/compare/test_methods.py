"""Methods and variants of a comparison, and the grid of its cells."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import prunetune.compare.run
from prunetune.baselines import BASELINES
from prunetune.compare.grid import Cell, best_learning_rate, grid_from_config
from prunetune.compare.methods import built_in_methods, resolve_methods
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import CompareConfig, RunConfig, from_mapping, load_recipe
from prunetune.errors import ConfigError

ROOT = Path(__file__).parents[2]


def config_of(tmp_path: Path, variants: Any = None, **compare: Any) -> RunConfig:
    if variants is not None:
        (tmp_path / "v.yaml").write_text(variants if isinstance(variants, str) else yaml.safe_dump(variants))
        compare["variants"] = str(tmp_path / "v.yaml")
    return from_mapping({"data": {"distill_texts": "t.jsonl"}, "distill": {"teacher": "dense"}, "compare": compare})


def names(config: RunConfig) -> list[str]:
    return [method.name for method in resolve_methods(config)]


def test_default_methods_are_five_baselines_between_dense_and_progressive() -> None:
    baselines = ["wanda-sp", "taylor", "fisher", "gate-gradients", "obs"]
    assert names(RunConfig()) == ["dense", "dense-equal-help", *baselines, "progressive"]


def test_every_baseline_that_is_not_default_is_named_in_the_help() -> None:
    (option,) = (item for item in dataclasses.fields(CompareConfig) if item.name == "methods")
    assert all(
        name in (*option.default, *option.metadata["help"].replace(",", " ").replace(")", " ").split())
        for name in BASELINES
    )


@pytest.mark.parametrize(("help", "baselines_have_it"), [("equal", True), ("as-published", False)])
def test_help_goes_to_all_methods_or_to_the_recipes_own(help: str, baselines_have_it: bool, tmp_path: Path) -> None:
    config = config_of(tmp_path, {"mine": {"two-stage": "fisher"}, "plain": {"dense": True}}, help=help)
    had = {method.name: method.equal_help for method in resolve_methods(config)}
    assert [had[name] for name in ("progressive", "dense-equal-help", "mine")] == [True] * 3
    assert [had[name] for name in ("dense", "plain")] == [False] * 2
    assert {had[name] for name in BASELINES if name in had} == {baselines_have_it}


def test_variants_are_all_added_unless_some_are_named(tmp_path: Path) -> None:
    variants = {"a": {}, "b": {"lora": {"rank": 4}}}
    assert names(config_of(tmp_path, variants, methods=["dense"])) == ["dense", "a", "b"]
    assert names(config_of(tmp_path, variants, methods=["b", "dense", "b"])) == ["b", "dense"]


@pytest.mark.parametrize(
    ("variants", "line"),
    [
        ({"dense": {}}, "none of untuned, dense"),
        ({"a/b": {}}, "letters, digits"),
        ({"a": 3}, "mapping of changes"),
        ({"a": {"lora": {"rnak": 4}}}, "did you mean lora.rank?"),
        ({"a": {"lora": {"rank": 0}}}, "lora.rank must lie in"),
        ({"a": {"data": {"train": "x.jsonl"}}}, "data.train is the same for all"),
        ({"a": {"seed": 3}}, "seed is the same for all"),
        ({"a": {"budget": {"keep": 0.5}}}, "budget.keep is the same for all"),
        ({"a": {"two-stage": "tailor"}}, "two-stage must be one of"),
        ({"a": {"two-stage": "taylor", "dense": True}}, "exclude each other"),
        ("- a\n", "map names to changes"),
        ("", "holds no variant"),
        ({}, "holds no variant"),
        ("a: [", "not valid YAML"),
    ],
)
def test_invalid_variant_is_refused_in_one_line(variants: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_methods(config_of(tmp_path, variants))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def write_recipe(file: Path, **values: Any) -> str:
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_further_recipes_are_methods_with_the_names_of_their_files(tmp_path: Path) -> None:
    """What a recipe leaves out is the default, not the first recipe's."""
    same = {"data": {"train": str(tmp_path / "rows.jsonl")}, "budget": {"keep": 0.5}}
    first = from_mapping(
        merge_mappings(same, {"train": {"steps": 7}, "out": "runs/a", "compare": {"methods": ["progressive"]}})
    )
    gates = write_recipe(tmp_path / "gates.yaml", **same, search={"method": "generator"}, device="cpu")
    slow = write_recipe(tmp_path / "slow.yaml", **same, train={"learning_rate": 1e-5}, compare={"seeds": [4]})
    config = dataclasses.replace(first, compare=dataclasses.replace(first.compare, recipes=(gates, slow)))
    methods = {method.name: method for method in resolve_methods(config)}
    assert list(methods) == ["progressive", "gates", "slow"]
    for name, path in (("gates", gates), ("slow", slow)):
        alone = load_recipe(Path(path))
        rate = methods[name].own_learning_rate or first.train.learning_rate
        cell_config = Cell(methods[name], 0.5, 0, rate).config(config)
        assert (cell_config.train, cell_config.search, cell_config.lora) == (alone.train, alone.search, alone.lora)
        assert (cell_config.device, cell_config.out, cell_config.compare) == (config.device, "runs/a", config.compare)


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("b", {"budget": {"keep": 0.4}}, "budget.keep is the same for all methods"),
        ("b", {"model": "other"}, "model is the same for all methods"),
        ("b", {"train": {"learning_rate": "auto"}}, "train.learning_rate auto is of one run"),
        ("taylor", {}, "a variant's name is letters, digits, dots and dashes, and none of"),
        ("a b", {}, "a variant's name is letters"),
        ("b", {"tran": {}}, "tran"),
    ],
)
def test_recipe_that_is_no_method_of_the_comparison_is_refused(
    name: str, values: dict[str, Any], line: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / f"{name}.yaml", **values)
    config = from_mapping({"compare": {"recipes": [path]}})
    with pytest.raises(ConfigError, match=re.escape(line)):
        [method.own_learning_rate for method in resolve_methods(config)]
    (tmp_path / "more").mkdir()
    twin = write_recipe(tmp_path / "more" / "c.yaml")
    twins = from_mapping({"compare": {"recipes": [twin, write_recipe(tmp_path / "c.yaml")]}})
    with pytest.raises(ConfigError, match="two methods would be called c: rename"):
        resolve_methods(twins)


def test_command_takes_several_recipes_and_no_flags_of_one(
    tmp_path: Path, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RunConfig] = []
    monkeypatch.setattr(prunetune.compare.run, "compare", lambda config, **_: asked.append(config) or 1 / 0)
    monkeypatch.chdir(tmp_path)
    paths = [write_recipe(tmp_path / f"{name}.yaml") for name in "abc"]
    with pytest.raises(ZeroDivisionError):
        say("compare", *paths, "--compare.seeds", 1, "--out", "runs/x")
    assert (asked[0].compare.recipes, asked[0].compare.seeds) == (tuple(paths[1:]), (1,))
    code, _, error = say("compare", *paths, "--train.steps", 9, "--budget.keep", 0.3)
    assert (code, error.count("\n"), len(asked)) == (2, 1, 1)
    assert "flags of budget, train would change the first of several recipes only" in error


def test_cell_config_is_the_recipe_with_grid_values_and_overrides(tmp_path: Path) -> None:
    changes = {"search": {"share": 0.5}, "distill": {"teacher": "none"}, "train": {"weights_rate": 4e-3}}
    config = config_of(tmp_path, {"a": changes})
    (method,) = (method for method in resolve_methods(config) if method.name == "a")
    cell_config = Cell(method, 0.7, 5, 2e-3).config(config)
    rates = {"learning_rate": 2e-3, "weights_rate": 8e-3}  # twice the recipe's 1e-3, so both are doubled
    expected = {"seed": 5, "budget": {"keep": 0.7}, "train": rates, "search": {"share": 0.5}}
    unchanged = {"compare": {"variants": config.compare.variants}, "distill": {"teacher": "none"}}
    assert cell_config == from_mapping(merge_mappings(expected, unchanged))  # without the teacher's texts


def test_grid_without_compare_options_has_one_value_each() -> None:
    grid = grid_from_config(from_mapping({"budget": {"keep": 0.5}, "train": {"learning_rate": 3e-4}}))
    assert (grid.keeps, grid.seeds, grid.learning_rates) == ((0.5,), (0,), (3e-4,))
    assert [cell.name for cell in grid.cells(built_in_methods()["dense"], 3e-4)] == ["dense-keep1-seed0-lr0.0003"]


def test_cell_names_are_unique() -> None:
    config = from_mapping({"compare": {"keeps": [0.6, 0.5, 0.6], "seeds": [0, 1], "learning_rates": [1e-3, 1e-4]}})
    grid = grid_from_config(config)
    cells = [
        cell.name
        for method in resolve_methods(config)
        for rate in grid.learning_rates
        for cell in grid.cells(method, rate)
    ]
    assert len(set(cells)) == len(cells) == 2 * 2 * (2 + 2 * 6)


def test_best_learning_rate_is_the_first_with_the_lowest_nll() -> None:
    trials = [{"learning_rate": rate, "valid_nll": nll} for rate, nll in ((1.0, None), (2.0, 0.5), (3.0, 0.5))]
    assert best_learning_rate(trials) == 2.0
    assert best_learning_rate([{"learning_rate": 1.0, "error": "nan"}]) is None


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "quality").glob("*.yaml")), ids=lambda file: file.stem)
def test_benchmark_files_are_valid(file: Path) -> None:
    if file.stem.endswith("-valid"):
        assert resolve_methods(from_mapping(yaml.safe_load(file.read_text())))
        return
    assert len(resolve_methods(from_mapping({"compare": {"variants": str(file)}}))) > len(resolve_methods(RunConfig()))
