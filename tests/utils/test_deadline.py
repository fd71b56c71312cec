"""Laws of calls within a time: results and errors come through, and what has no end is ended."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from prunetune.utils.deadline import call_within


def test_result_and_error_come_through() -> None:
    assert call_within(60, lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 // 0)


def test_call_without_an_end_is_ended() -> None:
    before = threading.active_count()
    with pytest.raises(TimeoutError, match=r"longer than 0\.1 s"):
        call_within(0.1, lambda: sum(1 for _ in itertools.count()))
    while threading.active_count() > before:  # the test's own timeout ends this
        time.sleep(0.05)
