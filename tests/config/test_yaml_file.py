"""Laws of YAML that others wrote: whatever it holds, it is read in seconds, or refused in one short line."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunetune.config.recipe import load_recipe
from prunetune.config.yaml_file import parse_yaml, read_yaml
from prunetune.data.sources import Source
from prunetune.errors import ConfigError


def bomb(first: str, level: str) -> str:
    """Nine levels, each of nine aliases of the level before."""
    levels = [f"a{n}: &a{n} " + level.replace("*", ",".join([f"*a{n - 1}"] * 9)) for n in range(1, 9)]
    return "\n".join([f"a0: &a0 {first}", *levels, ""])


LISTS = bomb("[x,x,x,x,x,x,x,x,x]", "[*]")
REFUSED = {
    "aliases": LISTS,
    "aliases in a value": LISTS + "model: *a8",
    "aliases in a key": LISTS + "? *a8\n: 1",
    "merges": bomb("{a: 1, b: 2}", "{<<: [*]}"),
    "a list in itself": "a: &a [*a]",
    "a mapping in itself": "a: &a {b: *a}",
    "brackets": "[" * 100_000,
    "levels": "- " * 50_000,
    "many values": "- 1\n" * 30_000,
    "a long number": "seed: 0x" + "f" * 5000,
    "a long number of base 60": "seed: 1" + ":59" * 100_000,
    "half of a surrogate pair": 'model: "\\ud800"',
    "a tag that does not fit": "seed: !!bool 5",
    "no time": "seed: !!timestamp x",
    "no day": "seed: 2001-02-31",
    "no number": "seed: !!int ''",
    "code": "seed: !!python/object/apply:os.getcwd []",
    "a large file": "#" * 2_000_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", REFUSED)
def test_file_out_of_bounds_is_refused_in_one_short_line(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(REFUSED[kind])
    with pytest.raises(ConfigError, match=r"recipe\.yaml: (not valid YAML|cannot read)") as refused:
        read_yaml(file, "the recipe", "see recipes/")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700


def test_aliases_and_merges_of_usual_size_are_read() -> None:
    text = "a: &a {b: [1, 2], c: 3}\nd: {<<: *a, c: 4}\ne: [*a, *a]"
    both = {"b": [1, 2], "c": 3}
    assert parse_yaml(text) == {"a": both, "d": {"b": [1, 2], "c": 4}, "e": [both, both]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("budget: {flops: %s}", "1" * 100_000 + "!"),
        ("budget: {latency: %s}", "1e" + "1" * 100_000 + "!"),
        ("budget: {protect: %s}", "0-99999999999"),
        ("budget: {protect: %s}", "1" * 5000),
        ("budget: {keep: %s}", "1" * 5000),
        ("limits: [%s]", "'valid.nll <= " + "1" * 100_000 + " stop'"),
        ("limits: [%s]", "'valid.nll <= " + "1" * 500 + " -> stop'"),
        ("validate: {back_off: %s}", "1" * 299),
        ("train: {steps: %s}", "1" * 200),
        ("train: {packing: %s}", "1" * 200),
        ("seed: %s", "99999999999999999999"),
        ("x%s: 1", "1" * 2000),
        ("model: [%s]", "a, " * 1000),
    ],
)
def test_value_out_of_bounds_is_refused_in_one_short_line(option: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(option % value)
    with pytest.raises(ConfigError) as refused:
        load_recipe(file).budget.protected_layers()
    assert len(str(refused.value)) < 2000  # an unknown key lists all that are known


@pytest.mark.timeout(60)
def test_name_of_a_source_is_read_in_one_pass() -> None:
    name = "a*" + "1" * 100_000 + "x"
    assert Source.parse(name) == Source(name, 1.0)
    assert Source.parse("a*b*2.5e1") == Source("a*b", 25.0)
