"""Law of endpoints: whatever they reply is an answer that can be written down, or refused in one line."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prunetune.data.records import Message, Record
from prunetune.evaluation.suites.endpoint import Endpoint
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.protocol import GenerationSettings
from support.endpoint import serving
from support.fuzz import ODD, damaged, fuzzed, refused_or_fine, torn

REPLY = {
    "id": "x",
    "choices": [
        {
            "text": "Where? Here",
            "message": {"role": "assistant", "content": "Here"},
            "logprobs": {"token_logprobs": [None, -0.5, -1.5], "text_offset": [0, 6, 7]},
        }
    ],
    "usage": {"total_tokens": 3},
}
RECORDS = {
    "chat": Record("chat", messages=(Message("user", "Where?"),), completion="Here"),
    "completion": Record("completion", prompt="Where?", completion=" Here", choices=(" Here", " There"), answer=0),
    "text": Record("text", completion="Where? Here"),
}


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_any_reply_is_an_answer_or_refused() -> None:
    replies: list[bytes] = []

    @given(
        reply=st.one_of(damaged(REPLY).map(as_bytes), torn(as_bytes(REPLY)), ODD.map(as_bytes)),
        kind=st.sampled_from(("generate", "nll", "loglikelihood")),
        record=st.sampled_from(sorted(RECORDS)),
    )
    @fuzzed(60)
    def check(reply: bytes, kind: Any, record: str) -> None:
        replies[:] = [reply]
        settings = GenerationSettings("auto", 8, ("\n",))
        with refused_or_fine():
            answers = endpoint.run_requests(kind, [RECORDS[record]], settings, lambda _: None)
            json.dumps(answers, ensure_ascii=False).encode()

    with serving(lambda *_: replies[0]) as server:
        endpoint = Endpoint(EndpointClient(f"{server.url}/v1"), "m")
        check()
