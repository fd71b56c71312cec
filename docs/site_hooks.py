"""Hooks of mkdocs: anchors as on GitHub, pages that lie outside docs/, and links to files that are no page."""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "addresses.toml").read_text(encoding="utf-8"))["repository"]
EXAMPLES = sorted(ROOT.glob("examples/*/README.md"))
# File of the repository -> page of the site.
PAGES = {
    **{f"examples/{file.parent.name}/README.md": f"examples/{file.parent.name}.md" for file in EXAMPLES},
    "benchmarks/README.md": "research/benchmarks.md",
    "benchmarks/data/README.md": "research/data-sets.md",
    "CONTRIBUTING.md": "extend/contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FILES = {page: file for file, page in PAGES.items()}
LINK = re.compile(r"\[(?P<text>[^\[\]]+)\]\((?P<file>[^)\s#:]+)(?P<heading>#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """The repository's address, where there is one; anchors of headings as GitHub makes them."""
    config.repo_url = REPOSITORY or None
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Pages from outside docs/."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A link to a file that is no page goes to the repository; without an address of one, its text stands alone.

    Raises `SystemExit` if the clone has no such file.
    """
    here = page.file.src_uri
    folder = posixpath.dirname(FILES.get(here, f"docs/{here}"))

    def site_link(link: re.Match[str]) -> str:
        path, heading = posixpath.normpath(posixpath.join(folder, link["file"])), link["heading"] or ""
        if not (ROOT / path).exists():
            raise SystemExit(f"{here}: a link to {path}, which is not there; put its name right")
        if path in PAGES or (path.startswith("docs/") and not path.endswith(".py")):
            target = PAGES.get(path, path.removeprefix("docs/"))
            return f"[{link['text']}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{heading})"
        return f"[{link['text']}]({REPOSITORY}/blob/main/{path}{heading})" if REPOSITORY else link["text"]

    return LINK.sub(site_link, markdown)
