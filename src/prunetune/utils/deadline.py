"""Calls of what others wrote, such as templates, within a time."""

import ctypes
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
RENDER_SECONDS = 10.0  # for a template


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises, run in a thread of its own; raises `TimeoutError` once it takes longer."""
    results: list[T] = []
    failures: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.append(call())
            failures.put(None)
        except BaseException as failed:
            failures.put(failed)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        failure = failures.get(timeout=seconds)
    except queue.Empty:
        # Raised in the thread at its next instruction, so that its loop ends.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError(f"it takes longer than {seconds:g} s") from None
    if failure is not None:
        raise failure
    return results[0]
