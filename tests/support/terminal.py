"""What a person sees: a program run in a pseudo-terminal of a given width, and the screens that it drew."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence

from rich.cells import cell_len

ROWS = 40
TOKEN = re.compile(r"\x1b\[\??([0-9;]*)([a-zA-Z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """The part of a terminal that `rich` uses: text, line ends, cursor up, erase; no scrolling."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row, self.column = width, [""], 0, 0
        self.torn: list[str] = []  # what ran over the right edge
        self.frames: list[str] = []  # the screen before each time that lines are erased, and at the end

    def feed(self, output: str) -> None:
        for token in TOKEN.finditer(output):
            argument, command, end, text = token.groups()
            if text:
                self.lines[self.row] = self.lines[self.row][: self.column].ljust(self.column) + text
                self.column += len(text)
                if cell_len(self.lines[self.row]) > self.width:
                    self.torn.append(self.lines[self.row])
            elif end == "\r":
                self.column = 0
            elif end == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif command == "A":
                self.row = max(0, self.row - int(argument or 1))
            elif command == "K":
                self.frames.append("\n".join(self.lines))
                self.lines[self.row] = ""
            else:
                assert command in "mhl", f"{token.group()!r} is not known here"
        self.frames.append("\n".join(self.lines))


def run_in_terminal(arguments: Sequence[str], width: int) -> tuple[int, Screen]:
    """Run Python with these arguments in a pseudo-terminal; its exit code, and what was on the screen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env=environment | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(theirs)
    output = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not read:
            break
        output += read
    os.close(ours)
    screen = Screen(width)
    screen.feed(output.decode())
    return process.wait(), screen
