"""Helpers for tests of HTML pages: a parser that checks nesting, and a hostile text."""

from __future__ import annotations

from html.parser import HTMLParser

STEERING = "\x1b]0;title\x07\x1b[2J\x9b\u202e\u2066\u200f\u2028\r"  # of terminals, and of who reads a page
ATTACK = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>$x_1$ #010105 &amp; \N{CJK UNIFIED IDEOGRAPH-6A21}"
    + STEERING
)


def steering(text: str) -> set[str]:
    """The characters of a text that steer a terminal, or the direction in which it is read."""
    return set(text) & set("\x1b\x07\x9b\u202e\u2066\u200f\u2028\r")


VOID = {"meta", "input", "br", "hr", "img", "link"}


class Outline(HTMLParser):
    """Tags and attributes of a page; fails on tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def attributes(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.tags if name in attrs]
