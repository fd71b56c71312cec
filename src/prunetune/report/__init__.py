"""One self-contained HTML page of a run."""

from prunetune.report.page import write_report

__all__ = ["write_report"]
