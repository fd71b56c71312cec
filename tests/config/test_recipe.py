"""Options: each is a recipe key and a flag with checked bounds, and a written recipe is read back."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.cli.app import app
from prunetune.cli.flags import flags_to_overrides, make_flags_class
from prunetune.config.fields import RETIRED, fields_by_path, merge_mappings
from prunetune.config.recipe import RequireConfig, RunConfig, from_mapping, load_recipe, load_saved_recipe, to_mapping
from prunetune.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OPTIONS = fields_by_path(RunConfig)


def kind_of(path: str) -> Any:
    """The type of an option."""
    cls: Any = RunConfig
    for name in path.split("."):
        cls = typing.get_type_hints(cls)[name]
    return cls


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a.b": v} as {"a": {"b": v}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def value_at(values: Any, path: str) -> Any:
    """The value under a dotted path, of a mapping or of a config."""
    for name in path.split("."):
        values = values[name] if isinstance(values, dict) else getattr(values, name)
    return values


OWN_WORDS: dict[str, Any] = {
    "limits": ["valid.nll <= 2 -> stop", "valid.accuracy >= 0.9x -> roll-back"],
    "report_to": ["wandb", "mlflow"],
    "budget.quality_limits": ["triage.accuracy=0.6", "nll=1.3"],
    "budget.flops": "60%",
    "budget.vocab": "auto",
    "budget.memory": "1.5GB",
    "budget.file": "800MB",
    "budget.latency": "25ms",
    "budget.throughput": "300/s",
}


def other_value(path: str) -> Any:
    """A legal value that is not the default."""
    kind, default, bounds = kind_of(path), OPTIONS[path].default, OPTIONS[path].metadata
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != default)
    if path in OWN_WORDS:
        return OWN_WORDS[path]
    if typing.get_origin(kind) is tuple:
        if typing.get_origin(typing.get_args(kind)[0]) is typing.Literal:
            return list(typing.get_args(typing.get_args(kind)[0])[1:3])
        return {str: ["a.jsonl", "b/*.csv*2"], int: [3, 4], float: [0.5, 0.25]}[typing.get_args(kind)[0]]
    if kind is bool:
        return not default
    if kind is str:
        return "else"
    if kind is int:
        return default + 3
    low = bounds["ge"] if bounds["ge"] is not None else bounds["gt"]
    return default / 2 if default else (low or 0.0) + 0.25


def required_options(path: str) -> dict[str, Any]:
    """Other options that an option requires."""
    return {"budget": {"quality": 0.9}} if path == "budget.quality_of" else {}


def boundary_values(path: str) -> tuple[list[float], list[float]]:
    """Values just allowed and just refused by an option's bounds."""
    low, high, above = (OPTIONS[path].metadata[name] for name in ("ge", "le", "gt"))
    step = 1 if int in (kind_of(path), *typing.get_args(kind_of(path))) else 1e-6
    fine = [bound for bound in (low, high) if bound is not None] + ([above + step] if above is not None else [])
    wrong = ([low - step] if low is not None else []) + ([high + step] if high is not None else [])
    return fine, wrong + ([above] if above is not None else [])


BOUNDED = [path for path in OPTIONS if boundary_values(path)[1]]
NUMBERS = [path for path in OPTIONS if kind_of(path) in (int, float)]


# -- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OPTIONS)
def test_every_option_has_help_that_ends_a_sentence(path: str) -> None:
    help_text = OPTIONS[path].metadata["help"]
    assert help_text.strip() == help_text
    assert help_text.endswith(".")
    assert len(help_text) > 8


@pytest.mark.parametrize("path", OPTIONS)
def test_default_is_within_its_own_bounds(path: str) -> None:
    """Otherwise the recipe that a run saves could not be read back."""
    default = OPTIONS[path].default
    given_back = value_at(from_mapping(nested(path, list(default) if isinstance(default, tuple) else default)), path)
    assert given_back == default
    assert isinstance(default, type(given_back))  # of budget.keep, a number that knows it is a default


def test_paths_name_every_leaf_once() -> None:
    leaves = [path for path in OPTIONS if not isinstance(value_at(RunConfig(), path), dict)]
    assert leaves == list(OPTIONS)
    assert set(OPTIONS) >= {"model", "out", "seed", "layout", "data.train", "data.search", "data.valid", "data.test"}
    assert set(OPTIONS) >= {"budget.keep", "train.steps", "train.learning_rate", "lora.rank"}


# -- round trip ------------------------------------------------------------------------------------------------------


def test_default_recipe_round_trips() -> None:
    assert from_mapping(to_mapping(RunConfig())) == RunConfig()
    assert from_mapping({}) == RunConfig()


@pytest.mark.parametrize("path", OPTIONS)
def test_every_option_round_trips_through_yaml(path: str) -> None:
    config = from_mapping(merge_mappings(required_options(path), nested(path, other_value(path))))
    assert config != RunConfig()
    plain = to_mapping(config)
    assert value_at(plain, path) == other_value(path)
    assert from_mapping(yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))) == config


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]


# -- what is refused, and how ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"modle": "x"}, "recipe: unknown key modle; did you mean model?"),
        ({"budget": {"kep": 0.5}}, "recipe: unknown key budget.kep; did you mean budget.keep?"),
        ({"train": {"learning_rte": 1}}, "recipe: unknown key train.learning_rte; did you mean train.learning_rate?"),
        ({"rank": 8}, "recipe: unknown key rank; did you mean lora.rank?"),
        (
            {"layout": "unifrom"},
            "recipe: layout must be one of per-layer, uniform, got 'unifrom'; did you mean uniform?",
        ),
        ({"budget": 0.5}, "recipe: budget is a section with keys of its own, got 0.5"),
        ({"budget": {"keep": 0}}, "recipe: budget.keep must lie in (0, 1], got 0"),
        ({"train": {"steps": 1.5}}, "recipe: train.steps must be a whole number, got 1.5"),
        ({"data": {"train": 3}}, "recipe: data.train must be a source or a list of sources, got 3"),
        (
            {"search": {"share": 0.9, "settle": 0.2}},
            "search.share + search.settle is 1.1: together they may be 1 at most; lower one of them",
        ),
    ],
)
def test_error_names_the_key_and_the_accepted_values(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_mapping(values)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"zzzzzz": 1}, r"unknown key zzzzzz; known are model, out, .*, train, lora, .*compare$"),
        ({"lora": {"zzzzzz": 1}}, r"unknown key lora\.zzzzzz; known are lora\.rank, .*lora\.quantize"),
        ({"data.train": "x.jsonl"}, r"unknown key data\.train; write train under data:$"),
    ],
)
def test_unknown_key_gets_a_suggestion(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_mapping(values)


@pytest.mark.parametrize("path", BOUNDED)
def test_bounds_hold_to_the_edge(path: str) -> None:
    fine, wrong = boundary_values(path)
    for value in fine:
        # The two phases share the steps: what one takes, the other leaves.
        other_values: dict[str, Any] = {"search": {"share": 1e-6, "settle": 0}} if path.startswith("search.") else {}
        other_values |= {"budget": {"keep": 1}} if path == "budget.sizes" else {}
        if path not in ("search.settle", "budget.sizes") or value < 1:  # a search takes some; a size is a smaller one
            read = value_at(from_mapping(merge_mappings(other_values, nested(path, value))), path)
            assert read == ((value,) if isinstance(read, tuple) else value)
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"{path} must lie in "):
            from_mapping(nested(path, value))


@pytest.mark.parametrize("path", OPTIONS)
@pytest.mark.parametrize("value", [{"a": [1]}, None, [None]], ids=["mapping", "nothing", "nothings"])
def test_value_of_a_wrong_type_is_refused_by_name(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=path):
        from_mapping(nested(path, value))


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", [True, "many", float("nan"), float("inf")], ids=str)
def test_number_that_is_not_finite_is_refused(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=path):
        from_mapping(nested(path, value))


@pytest.mark.parametrize(("written", "read"), [("1e-3", 1e-3), ("5.0e-4", 5e-4), ("1", 1.0), ("2.5E+1", 25.0)])
def test_yaml_spellings_of_a_number_are_read(tmp_path: Path, written: str, read: float) -> None:
    """YAML reads 1e-3 as text."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"train: {{learning_rate: {written}}}")
    rate = load_recipe(recipe).train.learning_rate
    assert rate == read
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("demo", ("demo",)),
        (["a.jsonl", "b.csv*2"], ("a.jsonl", "b.csv*2")),
        ([{"source": "a.jsonl", "weight": 0.5}], ("a.jsonl*0.5",)),
        ([{"source": "a.jsonl", "weight": 1}], ("a.jsonl",)),
        ({"source": "a.jsonl"}, ("a.jsonl",)),
        ([], ()),
    ],
)
def test_sources_are_texts_or_weighted(written: Any, read: tuple[str, ...]) -> None:
    assert from_mapping({"data": {"train": written}}).data.train == read


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "just text",
        "model: [",
        "model: a\n  b: c: d\n",
        "\x00",
        "budget:\n\tkeep: 1\n",
        "out: 2026-06-31\n",
        "[" * 5000,
        "seed: 1\nmodel: a\nseed: 2\n",
        "budget: {keep: 0.5, align: 8, keep: 0.6}\n",
    ],
)
def test_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe)
    assert str(refused.value).startswith(str(recipe))
    assert "\n" not in str(refused.value)


def test_repeated_key_is_refused_with_its_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("budget: {keep: 0.5}\nseed: 1\nbudget: {align: 8}\n")
    with pytest.raises(ConfigError, match="line 3 repeats the key budget"):
        load_recipe(recipe)
    recipe.write_text("train: &a {steps: 3}\nsearch: &b {batch_size: 4}\nlora: {<<: *b, <<: *b}\n")
    with pytest.raises(ConfigError, match="line 3 repeats the key <<"):
        load_recipe(recipe)
    recipe.write_text("train: &a {batch_size: 4}\nsearch: {<<: *a, batch_size: 8}\n")  # merged, and then overridden
    assert load_recipe(recipe).search.batch_size == 8


def test_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the recipe .* name a YAML file"):
        load_recipe(tmp_path / "absent.yaml")


def test_empty_recipe_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    assert load_recipe(tmp_path / "r.yaml") == RunConfig()


# -- flags -----------------------------------------------------------------------------------------------------------


def parsed(*tokens: str) -> tuple[Path, dict[str, Any]]:
    """Recipe and flags as the command line reads them."""
    _, bound, _ = app.parse_args(["run", "r.yaml", *tokens], exit_on_error=False, print_error=False)
    return bound.arguments["recipe"], flags_to_overrides(bound.arguments.get("flags"))


def tokens_of(path: str, value: Any) -> list[str]:
    """A flag as a user types it."""
    if isinstance(value, bool):
        section, _, name = path.rpartition(".")
        flag = f"{section}.{'' if value else 'no-'}{name}" if section else f"{'' if value else 'no-'}{name}"
        return [f"--{flag.replace('_', '-')}"]
    flag = f"--{path.replace('_', '-')}"
    return [token for entry in (value if isinstance(value, list) else [value]) for token in (flag, str(entry))]


def test_command_line_without_flags_overrides_no_option() -> None:
    assert flags_to_overrides(make_flags_class(RunConfig)()) == {}
    assert flags_to_overrides(None) == {}
    assert parsed() == (Path("r.yaml"), {})


@pytest.mark.parametrize("path", OPTIONS)
def test_every_option_is_a_flag(path: str) -> None:
    value = other_value(path)
    read = OPTIONS[path].metadata["flag_type"] or (lambda value: value)  # more than one type may be written there
    assert parsed(*tokens_of(path, value))[1] == nested(path, read(value))


def test_flag_alias_sets_the_same_option() -> None:
    assert parsed("--keep", "0.8,0.5")[1] == parsed("--budget.keep", "0.8,0.5")[1] == {"budget": {"keep": "0.8,0.5"}}


@pytest.mark.parametrize("path", OPTIONS)
def test_flag_overrides_only_its_option(path: str, tmp_path: Path) -> None:
    """Other options of the recipe keep their values."""
    recipe = tmp_path / "r.yaml"
    rest = merge_mappings(required_options(path), {"seed": 5} if path != "seed" else {"out": "there"})
    recipe.write_text(yaml.safe_dump(merge_mappings(to_mapping(RunConfig()), rest)))
    config = load_recipe(recipe, parsed(*tokens_of(path, other_value(path)))[1])
    keep = {"budget": {"keep": RunConfig().budget.keep}}  # a recipe that names it means it, whatever else is given
    assert config == from_mapping(merge_mappings(merge_mappings(keep, rest), nested(path, other_value(path))))


def test_flags_of_zero_and_false_override() -> None:
    """A flag with a false value still overrides the recipe."""
    flags = parsed("--seed", "0", "--lora.dropout", "0", "--no-trust-remote-code")[1]
    assert flags == {"seed": 0, "lora": {"dropout": 0.0}, "trust_remote_code": False}


def test_flags_are_checked_by_the_same_bounds(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"budget\.keep must lie in \(0, 1\], got 2"):
        load_recipe(tmp_path / "r.yaml", parsed("--budget.keep", "2")[1])


def test_mappings_are_merged_by_section() -> None:
    below = {"a": {"x": 1, "y": 2}, "b": 1}
    assert merge_mappings(below, {"a": {"y": 3}, "c": 4}) == {"a": {"x": 1, "y": 3}, "b": 1, "c": 4}
    assert below == {"a": {"x": 1, "y": 2}, "b": 1}


# -- recipes that come along -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_round_trips(recipe: Path) -> None:
    config = load_recipe(recipe)
    assert config.data.train
    assert from_mapping(to_mapping(config)) == config


def test_demo_recipe_of_the_package_equals_the_one_in_recipes() -> None:
    packaged = ROOT / "src" / "prunetune" / "demo.yaml"
    assert packaged.read_bytes() == (ROOT / "recipes" / "demo.yaml").read_bytes()


# -- the command itself ----------------------------------------------------------------------------------------------

HELP = """
import sys
from prunetune.cli.app import main
sys.argv = ["prunetune", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "pandas"} & set(sys.modules)
    print("HEAVY", sorted(heavy))
"""


def prunetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), (), ("run", "--help"), ("demo", "--help"), ("compare", "--help")],
    ids=str,
)
def test_help_imports_no_torch(arguments: tuple[str, ...]) -> None:
    done = prunetune(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("HEAVY []")
    assert done.stderr == ""


def test_help_names_every_option() -> None:
    text = prunetune("run", "--help").stdout
    assert [path for path in OPTIONS if f"--{path.replace('_', '-')}" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("run", "absent.yaml"), "prunetune: absent.yaml: cannot read the recipe"),
        (("demo", "--budget.keep", "7"), "budget.keep must lie in (0, 1], got 7"),
        (("demo", "--budget.kep", "0.5"), "prunetune: Unknown option"),
        (("prune",), "prunetune: Unknown command"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_user_error_is_one_line_and_exit_code_2(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    done = prunetune(*arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout.strip() == "HEAVY []"


# -- names of the version before -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"gain": {"smaller": 0.3}}, {"require": {"smaller": 0.3}}),
        ({"track": ["wandb"]}, {"report_to": ["wandb"]}),
        ({"gates": ["valid.nll <= 2 -> stop"]}, {"limits": ["valid.nll <= 2 -> stop"]}),
        (
            {"data": {"texts": ["t.jsonl"], "texts_share": 0.5}},
            {"data": {"distill_texts": ["t.jsonl"], "distill_texts_share": 0.5}},
        ),
        ({"search": {"evidence": 3}}, {"search": {"init_batches": 3}}),
    ],
)
def test_old_option_names_read_as_the_new_ones_with_one_line(
    old: dict[str, Any], new: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert from_mapping(old) == from_mapping(new)
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert all(re.fullmatch(r"\S+ is now \S+: the next version will not read the old name", line) for line in lines)


def test_old_and_new_name_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"search\.init_batches and search\.evidence are one option"):
        from_mapping({"search": {"evidence": 3, "init_batches": 3}})


def test_new_flag_wins_over_old_name_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("search: {evidence: 3}\ngain: {smaller: 0.1}\n", encoding="utf-8")
    config = load_recipe(tmp_path / "recipe.yaml", {"search": {"init_batches": 4}, "require": {"faster": 1.2}})
    assert (config.search.init_batches, config.require.smaller, config.require.faster) == (4, 0.1, 1.2)


def test_old_flag_is_read_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Flags = make_flags_class(RunConfig)
    assert flags_to_overrides(Flags(gain=make_flags_class(RequireConfig)(smaller=0.2))) == {"gain": {"smaller": 0.2}}
    with pytest.raises(SystemExit):
        app(["run", "--help"])
    shown = capsys.readouterr().out
    assert "--require.smaller" in shown
    assert "--gain." not in shown
    assert "--search.evidence" not in shown


def test_saved_recipe_with_old_names_is_read_without_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text("search: {evidence: 3}\ntrack: [wandb]\n", encoding="utf-8")
    config = load_saved_recipe(tmp_path / "config.yaml")
    assert (config.search.init_batches, config.report_to) == (3, ("wandb",))
    assert not caplog.records


# -- retired options ---------------------------------------------------------------------------------------------------


def retired_recipe(path: str) -> dict[str, Any]:
    """A recipe that names a retired option, or a retired value of one."""
    name, _, value = path.partition("=")
    section, _, option = name.rpartition(".")
    return {section: {option: value or "anything", "share": 0.2}}


@pytest.mark.parametrize("path", RETIRED)
def test_retired_option_is_refused_in_one_line_with_the_next_step(path: str, tmp_path: Path) -> None:
    name = path.partition("=")[0]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(retired_recipe(path)), encoding="utf-8")
    for read in (lambda: from_mapping(retired_recipe(path)), lambda: load_recipe(tmp_path / "recipe.yaml")):
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)} '.*' is of an earlier version: .*: .+$") as refused:
            read()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", RETIRED)
def test_saved_recipe_with_a_retired_option_is_read_without_it_and_a_line(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(retired_recipe(path)), encoding="utf-8")
    assert load_saved_recipe(tmp_path / "config.yaml") == from_mapping({"search": {"share": 0.2}})
    assert not caplog.records


@pytest.mark.parametrize("path", [path for path in RETIRED if "=" not in path])
def test_retired_flag_says_what_to_do_and_is_not_shown(
    path: str, tmp_path: Path, say: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "recipe.yaml").write_text("{}", encoding="utf-8")
    code, _, err = say("run", tmp_path / "recipe.yaml", f"--{path}", "x")
    assert code == 2
    assert f"{path} 'x' is of an earlier version" in err
    assert f"--{path} " not in say("run", "--help")[1]


def test_values_that_are_not_retired_are_read() -> None:
    assert from_mapping({"search": {"sparsity": "off"}}).search.sparsity == "off"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"budget": {"keep": "0.8, 0.6000001, 0.6"}}, "budget.keep names 0.6000001 and 0.6"),
        ({"budget": {"keep": 0.6000001, "sizes": [0.6]}}, "budget.keep names 0.6000001 and 0.6"),
        ({"compare": {"keeps": [0.5, 0.7, 0.50000001]}}, "compare.keeps names 0.5 and 0.50000001"),
        ({"compare": {"learning_rates": [1e-3, 1.0000001e-3]}}, "compare.learning_rates names 0.001 and 0.0010000001"),
    ],
)
def test_numbers_by_which_files_are_named_differ_in_six_digits(values: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(names)}, .* leave one of them out") as refused:
        from_mapping(values)
    assert "\n" not in str(refused.value)


def test_numbers_named_twice_are_compared_once() -> None:
    assert from_mapping({"compare": {"keeps": [0.5, 0.5]}}).compare.keeps == (0.5, 0.5)
