"""Write the lines that depend on an address, between their marks: `python docs/make_addresses.py`."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(docs/make_addresses\.py(?: -->)?\n).*?^((?:# |<!-- )end of addresses)", re.DOTALL | re.MULTILINE)
Addresses = Mapping[str, str]


def read() -> Addresses:
    """Name -> address, as addresses.toml has them; "" where there is none yet."""
    return tomllib.loads((ROOT / "addresses.toml").read_text(encoding="utf-8"))


def pages(addresses: Addresses) -> dict[Path, str]:
    """The whole text of every file that holds such lines."""
    return {ROOT / name: _page(ROOT / name, lines(addresses)) for name, lines in LINES.items()}


def _page(file: Path, lines: str) -> str:
    text, blocks = BLOCK.subn(lambda block: block[1] + lines + block[2], file.read_text(encoding="utf-8"))
    if blocks != 1:
        raise SystemExit(f"{file.name}: {blocks} blocks of addresses, one is wanted; put its two marks back")
    return text


def badges(addresses: Addresses) -> str:
    """README.md: the state of the tests where there is a repository; licence and Python as pyproject.toml has them."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tests = f"{addresses['repository']}/actions/workflows/ci.yml"
    parts = [f"[![tests]({tests}/badge.svg)]({tests})"] if addresses["repository"] else []
    parts += [f"[{project['license']}](LICENSE)", f"Python {project['requires-python'].removeprefix('>=')} or later"]
    named = {"Home page": addresses["homepage"], "Documentation": addresses["documentation"]}
    parts += [f"[{name}]({address})" for name, address in named.items() if address]
    return f"\n{' · '.join(parts)}\n\n"


def contact(addresses: Addresses) -> str:
    """SECURITY.md: where a report goes."""
    where = _contact(addresses)
    if not where:
        return "\nThere is no public contact yet. Report it in private to whoever gave you prunetune.\n\n"
    return f"\nReport it in private: {f'[{where}](mailto:{where})' if _is_mail(where) else f'<{where}>'}\n\n"


def citation(addresses: Addresses) -> str:
    """CITATION.cff: its two keys that hold an address."""
    keys = {"repository-code": addresses["repository"], "url": addresses["homepage"] or addresses["documentation"]}
    return "".join(f"{key}: {json.dumps(address)}\n" for key, address in keys.items() if address)


def links(addresses: Addresses) -> str:
    """GitHub's page of issue forms: pages to look at instead. It takes no e-mail address."""
    where = _contact(addresses)
    rows = [
        ("Documentation", addresses["documentation"], "Guides and all options."),
        ("Security problem", "" if _is_mail(where) else where, "Report it in private, not as an issue."),
    ]
    entries = [f"  - name: {name}\n    url: {json.dumps(at)}\n    about: {about}\n" for name, at, about in rows if at]
    return "".join(["contact_links:\n", *entries]) if entries else ""


def _contact(addresses: Addresses) -> str:
    form = f"{addresses['repository']}/security/advisories/new" if addresses["repository"] else ""
    return addresses["security_contact"] or form


def _is_mail(address: str) -> bool:
    return "@" in address and "://" not in address


LINES: dict[str, Callable[[Addresses], str]] = {
    "README.md": badges,
    "SECURITY.md": contact,
    "CITATION.cff": citation,
    ".github/ISSUE_TEMPLATE/config.yml": links,
}

if __name__ == "__main__":
    for file, text in pages(read()).items():
        file.write_text(text, encoding="utf-8")
