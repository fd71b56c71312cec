"""addresses.toml is the only source of the project's addresses, and every file that shows one agrees with it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_addresses.py"))
NAMES = ("homepage", "repository", "documentation", "issues", "security_contact")
NONE = dict.fromkeys(NAMES, "")
ALL = {name: f"https://{name.replace('_', '-')}.invalid" for name in NAMES}


def page(name: str, addresses: dict[str, str]) -> str:
    """A file as the script would write it."""
    text: str = SCRIPT["pages"](addresses)[ROOT / name]
    return text


def lines(addresses: dict[str, str]) -> str:
    """All text that the script writes between its marks."""
    return "".join(write(addresses) for write in SCRIPT["LINES"].values())


def test_files_equal_those_the_script_writes() -> None:
    """If this fails, run `python docs/make_addresses.py`."""
    for file, text in SCRIPT["pages"](SCRIPT["read"]()).items():
        assert file.read_text(encoding="utf-8") == text, file.name


def test_addresses_toml_has_every_name_and_no_other() -> None:
    assert tuple(SCRIPT["read"]()) == NAMES


def test_files_without_addresses_have_no_link() -> None:
    assert "://" not in lines(NONE)
    assert "@" not in lines(NONE)
    assert "There is no public contact yet." in page("SECURITY.md", NONE)


@pytest.mark.parametrize("addresses", [NONE, ALL], ids=["none", "all"])
def test_written_yaml_files_hold_the_given_addresses(addresses: dict[str, str]) -> None:
    cited = yaml.safe_load(page("CITATION.cff", addresses))
    assert (cited.get("repository-code", ""), cited.get("url", "")) == (addresses["repository"], addresses["homepage"])
    chooser = yaml.safe_load(page(".github/ISSUE_TEMPLATE/config.yml", addresses))
    urls = [link["url"] for link in chooser.get("contact_links", ())]
    assert urls == [url for url in (addresses["documentation"], addresses["security_contact"]) if url]


def test_badge_is_written_only_with_a_repository() -> None:
    assert "badge" not in SCRIPT["badges"](ALL | {"repository": ""})
    assert f"{ALL['repository']}/actions/workflows/ci.yml/badge.svg" in page("README.md", ALL)


def test_security_reports_go_to_the_contact_else_to_the_repository() -> None:
    assert f"<{ALL['security_contact']}>" in SCRIPT["contact"](ALL)
    assert f"<{ALL['repository']}/security/advisories/new>" in SCRIPT["contact"](ALL | {"security_contact": ""})


def test_email_address_is_a_contact_without_a_link() -> None:
    addresses = NONE | {"security_contact": "reports@mail.invalid"}
    assert "(mailto:reports@mail.invalid)" in SCRIPT["contact"](addresses)
    assert SCRIPT["links"](addresses) == ""


@pytest.mark.parametrize("text", ["# A page\n", "docs/make_addresses.py -->\nold\n"], ids=["none", "half"])
def test_file_without_its_marks_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"page\.md: 0 blocks of addresses, one is wanted"):
        SCRIPT["_page"](file, "new\n")
