"""Tables as plain text, laid out by rich: fitted to a terminal, one line a row in files and pipes."""

import io
import shutil
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from prunetune.utils.untrusted import printable

MIN_WIDTH = 60  # columns that a table may take in a narrower terminal, too
MIN_TEXT_WIDTH = 8  # columns that a text is folded into at least
UNLIMITED_WIDTH = 10_000  # columns in files and pipes: rows are not broken, so that grep finds them


def table_width() -> int:
    """Columns that a table may take on standard output."""
    return max(MIN_WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else UNLIMITED_WIDTH


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> list[str]:
    """The lines of a table without rules and colours, headings first.

    A heading that begins with ">" is of numbers: its column is set to the right and never broken. A row may end early.
    """
    table, least = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=""), 0
    lines = [headings, *rows]
    for place, heading in enumerate(headings):
        is_number, heading = heading.startswith(">"), heading.removeprefix(">")
        justify: JustifyMethod = "right" if is_number else "left"
        table.add_column(plain_text(heading), justify=justify, no_wrap=is_number, overflow="fold")
        widest = max(cell_len(line[place].removeprefix(">")) for line in lines if place < len(line))
        least += 2 + (widest if is_number else min(widest, MIN_TEXT_WIDTH))
    for row in lines[1:]:
        table.add_row(*map(plain_text, row))
    file = io.StringIO()
    console = Console(file=file, width=UNLIMITED_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(table, width=max(least, width or table_width()))  # in fewer, rich would leave digits out
    return [line.rstrip() for line in file.getvalue().splitlines()]


def plain_text(text: str, style: str = "") -> Text:
    """One line of text for rich in which nothing is markup, and nothing steers a terminal."""
    return Text(printable(text.replace("\n", " ")), style=style)
