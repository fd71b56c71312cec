"""Progress of a run in a Jupyter notebook: one line and a bar that are rewritten in place."""

import html
import sys
import time
from typing import Any

from prunetune.utils.console import format_step, format_validation_scores
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.untrusted import printable

UPDATE_SECONDS = 0.2  # at most so often, as each update is a message to the browser


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook; IPython is not imported to find out."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


class NotebookConsole:
    """The stage, a bar, the last step and the last validation; finished stages remain as lines above.

    Until it is closed, transformers shows no bars of its own.
    """

    def __init__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self.bars = transformers_logging if transformers_logging.is_progress_bar_enabled() else None
        transformers_logging.disable_progress_bar()
        self.name, self.done, self.total, self.text, self.validation_text = "", 0, 0, "", ""
        self.finished: list[str] = []
        self.updated = 0.0
        self.handle: Any = None

    def stage(self, name: str, total: int) -> None:
        self._finish()
        self.name, self.done, self.total, self.text = name, 0, total, ""
        self._show()

    def step(self, record: JsonObject) -> None:
        self.done, self.text = record["step"], format_step(record)
        self._show(at_most_every=UPDATE_SECONDS)

    def validation(self, record: JsonObject) -> None:
        self.validation_text = f"valid nll {record['nll']:.3f}{format_validation_scores(record)}"
        self._show()

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        self.done, self.total, self.text = done, total, task
        self._show(at_most_every=0.0 if done == total else UPDATE_SECONDS)

    def close(self) -> None:
        """Leave the finished stages as lines."""
        self._finish()
        self._show()
        if self.bars is not None:
            self.bars.enable_progress_bar()

    def _finish(self) -> None:
        if self.name:
            self.finished.append(" · ".join(filter(None, (self.name, self.text, self.validation_text))))
        self.name = self.validation_text = ""

    def _show(self, at_most_every: float = 0.0) -> None:
        from IPython.display import display  # where it runs, in a notebook, it is there

        if time.monotonic() - self.updated < at_most_every:
            return
        self.updated = time.monotonic()
        count = f"{self.done}/{self.total}" if self.total else ""
        now = " · ".join(filter(None, (self.name, count, self.text, self.validation_text))) if self.name else ""
        lines = [printable(line) for line in (*self.finished, now) if line]
        bar = f'<progress value="{self.done}" max="{self.total}"></progress> ' if self.name and self.total else ""
        escaped = [html.escape(line) for line in lines]
        page = "<br>".join([*escaped[:-1], bar + escaped[-1]] if escaped else [])
        data = {"text/plain": "\n".join(lines), "text/html": f'<div style="font-size: 90%">{page}</div>'}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)
