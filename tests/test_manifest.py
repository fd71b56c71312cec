"""manifest.json: it is written back to the byte, and any JSON object can be read."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from prunetune.manifest import (
    DataFacts,
    DenseModelFacts,
    GainFacts,
    LimitActionFacts,
    LimitFacts,
    LimitsFacts,
    Manifest,
    SpeedupFacts,
)
from prunetune.report import write_report
from prunetune.runs.folder import RunFolder
from support.report import make_run, make_sizes, manifest

ODD: tuple[Any, ...] = (None, True, 3, -1.5, "text", [], [3, None, ["x"]], {}, {"a": {"b": [1]}}, float("nan"), 10**400)
WHOLE = manifest() | {
    "gain": {
        "smaller": 0.1,
        "speed": {"throughput": {"median": 1.1, "min": 1.0, "max": 1.2}},
        "figures": {"prefill": {"dense": 0.02, "pruned": 0.01}},
        "counted": {"prefill": 1.5},
        "limits": [{"gate": "gain.faster >= 1.2", "limit": 1.2, "found": 1.1, "held": False, "says": "too slow"}],
        "uneven": ["MLP width of layer 7 is 613"],
    },
    "budgets": [{"budget": "flops", "limit": 2, "dense": 3, "counted": 1, "words": "1 of 2"}],
    "size": {"keep": 0.5, "larger": None},
    "quantised": {"scheme": "nf4", "error": 0.01, "same": 0.99},
}


def with_value(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The same JSON with another value at a path."""
    if not path:
        return value
    changed = dict(values) if isinstance(values, dict) else list(values)
    changed[path[0]] = with_value(changed[path[0]], path[1:], value)
    return changed


def paths(values: Any) -> list[tuple[Any, ...]]:
    """Paths to all values of a JSON."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for name, value in items for path in [(name,), *((name, *rest) for rest in paths(value))]]


def test_manifest_is_written_as_read_to_the_byte(tmp_path: Path) -> None:
    for folder in (make_run(tmp_path / "one"), make_sizes(tmp_path / "several")):
        values = json.loads((folder / "manifest.json").read_text())
        text = json.dumps(values | {"later": {"version": [1]}}, indent=2) + "\n"
        assert Manifest.from_json(text).to_json() == text


def test_unknown_keys_survive_an_update(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    before = {"later": 1, "model": {"name": "a", "later": 2, "params": 3}, "failed": "x"}
    (tmp_path / "manifest.json").write_text(json.dumps(before))
    folder.update_manifest(model=replace(folder.read_manifest().model, bytes=6), failed="")
    after = json.loads((tmp_path / "manifest.json").read_text())
    assert after == before | {"model": before["model"] | {"bytes": 6}, "failed": ""}  # type: ignore[operator]
    assert list(after) == list(before)


def test_sections_are_written_with_their_keys_in_order() -> None:
    limit = LimitFacts(condition="guard.nll <= 3", limit=3, measured=None, is_met=False)
    action = LimitActionFacts(step=2, conditions=("guard.nll <= 3",), action="stopped at step 2")
    limits = LimitsFacts(limits=(limit,), actions=(action,), requested_keep=0.5, allowed_keep=0.6, kept=None)
    model = DenseModelFacts(name="a", params=2, decoder_params=1, identity={"a.safetensors": "5f"})
    written = replace(Manifest.empty(), failed="", limits=limits, model=model, commit="")
    assert json.dumps(written.to_dict()) == json.dumps({
        "commit": "",
        "model": {"name": "a", "params": 2, "decoder_params": 1, "identity": {"a.safetensors": "5f"}},
        "gates": {
            "limits": [{"gate": "guard.nll <= 3", "limit": 3, "found": None, "held": False}],
            "events": [{"step": 2, "gates": ["guard.nll <= 3"], "did": "stopped at step 2"}],
            "keep_asked": 0.5, "keep_allowed": 0.6, "kept": None,
        },
        "failed": "",
    })  # fmt: skip


def test_empty_section_is_false_and_has_every_field() -> None:
    empty = Manifest.empty()
    assert not empty
    assert empty.to_dict() == {}
    assert not empty.gain
    assert not empty.size
    assert (empty.model.bytes, empty.gain.smaller, empty.limits.limits) == (None, None, ())
    assert GainFacts.from_dict({"smaller": 0.1})
    assert {item.name for item in fields(DataFacts)} == {"source", "hashes", "counts", "too_long", "dropped"}


def test_command_is_read_from_a_list_or_a_string() -> None:
    assert Manifest.from_dict(manifest()).command == "prunetune run recipes/legal.yaml --budget.keep 0.6"
    assert Manifest.from_dict({"command": ["a", "b c"]}).command == "a 'b c'"
    assert Manifest.from_dict({"command": "a b"}).command == "a b"


def test_nan_is_kept_for_scores_alone() -> None:
    limit = LimitFacts.from_dict(json.loads('{"found": NaN, "limit": Infinity}'))
    assert str(limit.measured) == "nan"
    assert limit.limit is None
    assert SpeedupFacts.from_dict({"median": 10**400, "min": True}).median is None


def test_update_manifest_refuses_an_unknown_field(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="gates"):
        RunFolder(tmp_path).update_manifest(gates={})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_manifest_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(text)


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:20])
def test_any_value_is_read_and_written_back(value: Any) -> None:
    for path in paths(WHOLE):
        text = json.dumps(with_value(WHOLE, path, value), indent=2) + "\n"
        assert Manifest.from_json(text).to_json() == text, path


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:20])
def test_any_value_has_a_report(value: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in (
        "evaluation/dense.json",
        "evaluation/tuned.json",
        "evaluation/pruned.json",
        "metrics.jsonl",
        "plan.json",
    ):
        (folder / name).unlink()  # the manifest alone is what matters here, and pictures take time
    (folder / "validation.jsonl").unlink()
    for depth, parity in itertools.product(
        (1, 2, 3, 4), (0, 1)
    ):  # half of the values of a depth at once, then the others
        values: Any = WHOLE
        for path in [path for path in paths(WHOLE) if len(path) == depth][parity::2]:
            values = with_value(values, path, value)
        (folder / "manifest.json").write_text(json.dumps(values))
        assert "<h1>" in write_report(folder).read_text(encoding="utf-8"), (depth, parity)
