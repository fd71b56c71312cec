"""Package metadata, version, citation, hooks and CI files; nothing is built or downloaded."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def parsed(name: str) -> Any:
    """A YAML file of the repository."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


class FakeInterface:
    """Stands in for hatchling's, which is installed only while a package is built."""

    def __init__(self, root: str) -> None:
        self.root = root


@pytest.fixture
def urls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, str]]:
    """What the metadata hook makes of the addresses.toml in a folder."""
    hatchling = ModuleType("hatchling.metadata.plugin.interface")
    hatchling.MetadataHookInterface = FakeInterface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, hatchling.__name__, hatchling)
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["Addresses"]

    def make(root: Path) -> dict[str, str]:
        metadata: dict[str, Any] = {}
        hook(str(root)).update(metadata)
        assert set(metadata) == {"urls"}
        urls: dict[str, str] = metadata["urls"]
        return urls

    return make


def test_urls_are_the_addresses_that_are_filled_in(urls: Callable[[Path], dict[str, str]], tmp_path: Path) -> None:
    text = (ROOT / "addresses.toml").read_text(encoding="utf-8")
    empty = re.sub(r'^(\w+) = "[^"]*"', r'\1 = ""', text, flags=re.MULTILINE)
    (tmp_path / "addresses.toml").write_text(empty)
    assert urls(tmp_path) == {}
    (tmp_path / "addresses.toml").write_text(empty.replace('issues = ""', 'issues = "https://issues.invalid"'))
    assert urls(tmp_path) == {"Issues": "https://issues.invalid"}
    (tmp_path / "addresses.toml").write_text(empty.replace('= ""', '= "https://all.invalid"'))
    assert sorted(urls(tmp_path)) == ["Documentation", "Homepage", "Issues", "Repository"]


def test_metadata_leaves_urls_and_version_to_the_build() -> None:
    assert sorted(PROJECT["dynamic"]) == ["urls", "version"]
    assert not {"urls", "version"} & set(PROJECT)
    assert PYPROJECT["tool"]["hatch"]["metadata"]["hooks"] == {"custom": {}}
    assert PYPROJECT["tool"]["hatch"]["version"]["source"] == "vcs"


def test_version_flag_prints_the_installed_version(say: Callable[..., tuple[int, str, str]]) -> None:
    assert say("--version") == (0, f"{version('prunetune')}\n", "")


def test_classifiers_name_the_pythons_of_the_workflow() -> None:
    versions = parsed(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", name) for name in PROJECT["classifiers"]]
    assert [match[1] for match in named if match] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_workflow_runs_checks_on_a_clone_with_tags() -> None:
    workflow = parsed(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (checkout,) = (step for step in job["steps"] if "checkout" in step.get("uses", ""))
    assert checkout["with"]["fetch-depth"] == 0
    assert workflow["permissions"] == {"contents": "read"}


def test_hooks_run_pinned_tools_of_the_environment() -> None:
    repositories = {entry["repo"]: entry["hooks"] for entry in parsed(".pre-commit-config.yaml")["repos"]}
    assert set(repositories) == {"local", "meta"}
    assert {hook["language"] for hook in repositories["local"]} == {"system"}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tools = {hook["entry"].split()[0] for hook in repositories["local"]} - {"bash", "git"}
    assert tools == {"mypy", "ruff"}
    assert all(f"\n{tool}==" in pins for tool in tools)


def test_citation_names_the_licence_and_no_version() -> None:
    cited = parsed("CITATION.cff")
    assert "version" not in cited
    assert (cited["title"], cited["license"], cited["abstract"]) == (
        PROJECT["name"],
        PROJECT["license"],
        PROJECT["description"],
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_form_asks_for_version_command_error_and_manifest(form: Path) -> None:
    body = str(yaml.safe_load(form.read_text(encoding="utf-8"))["body"])
    for item in ("prunetune --version", "command", "manifest.json"):
        assert item in body
    assert re.search("error|what it printed", body)
