"""Values and files that nobody should have written, for tests whose law is: one line says what is wrong, or it works.

`PRUNETUNE_FUZZ_EXAMPLES` is how many a test tries, and `PRUNETUNE_FUZZ_LOG` a file that gets a line for each.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from prunetune.errors import PrunetuneError

LIMIT = 10.0  # seconds of a processor for one example


def fuzzed(examples: int, *, most: int = 10**6) -> Callable[[Any], Any]:
    """Hypothesis with the same examples at every run: so many, or what the environment says and `most` at most."""
    return settings(
        max_examples=min(most, int(os.environ.get("PRUNETUNE_FUZZ_EXAMPLES") or examples)),
        derandomize=True,
        database=None,
        deadline=None,  # a busy machine would break it: `refused_or_fine` counts the processor's time
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def refused_or_fine() -> Iterator[None]:
    """Lets pass what users are told in one line; every other exception is a fault."""
    started, outcome = time.process_time(), "failed"
    try:
        yield
        outcome = "fine"
    except PrunetuneError as refused:
        outcome, message = "refused", str(refused)
        if "\n" in message or len(message) > 3000 or message != message.encode("utf-8", "replace").decode():
            raise AssertionError(f"this is no line to read: {message[:200]!r}") from refused
    finally:
        seconds = time.process_time() - started
        if log := os.environ.get("PRUNETUNE_FUZZ_LOG"):
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"outcome": outcome, "seconds": seconds}) + "\n")
    if seconds > LIMIT:
        raise AssertionError(f"it took {seconds:.1f} s")


def nested(depth: int) -> Any:
    """Lists in each other."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


LARGE = {
    "digits": lambda: "1" * 20_000 + "x", "number": lambda: 10**400, "list": lambda: ["x"] * 2000,
    "deep": lambda: nested(50), "too deep": lambda: nested(150), "name": lambda: "x" * 300,
    "accents": lambda: "é" * 200, "weight": lambda: {"source": "a", "weight": 10**400},
}  # fmt: skip
# Values of JSON and of YAML that fit no field, or hardly.
ODD = st.one_of(
    st.sampled_from([
        None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**18, 0.5, -0.5, 1e-320, 1e308, -1e308,
        float("nan"), float("inf"), -float("inf"), "", " ", "auto", "off", "none", "0.5", "-1", "1e999", "NaN", "\0",
        "~nosuchuser/x", "../..", "a/b", "*", "[", "a*1", "\u202e\x1b[31m", "\ud800", "0-99999999999",
    ]),
    st.sampled_from([[], {}, [[]], [None], {"": ""}, {"a": {"b": [1, "x"]}}]).map(copy.deepcopy),
    st.sampled_from(sorted(LARGE)).map(lambda name: LARGE[name]()),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(-5, 5), st.text(max_size=3)), max_size=3),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in nested mappings and lists; of long lists, the first entries."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(place for key, child in entries for place in places(child, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """The value of a JSON file with one to three entries replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(ODD)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.integers(0, 5)):
            case 0:
                del parent[path[-1]]
            case 1 if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = draw(ODD)
            case _:
                parent[path[-1]] = draw(ODD)
    return value


@st.composite
def torn(draw: st.DrawFn, text: bytes) -> bytes:
    """A file of which a part is cut out, repeated or overwritten."""
    at = draw(st.integers(0, len(text)))
    middle = draw(
        st.one_of(st.binary(max_size=12), st.sampled_from([b"", b"\xff\xfe", b"\0", b"[" * 2000, b"NaN", b"&a [*a]"]))
    )
    return text[:at] + middle + text[at + draw(st.integers(0, 30)) :]
