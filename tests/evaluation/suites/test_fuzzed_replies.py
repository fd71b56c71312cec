"""Law of endpoints: whatever they reply is an answer that can be written down, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prunetune.data.records import Record
from prunetune.evaluation.suites.endpoint import Endpoint
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.protocol import GenerationSettings
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
    "chat": Record("chat", messages=(("user", "Where?"),), completion="Here"),
    "completion": Record("completion", prompt="Where?", completion=" Here", choices=(" Here", " There"), answer=0),
    "text": Record("text", completion="Where? Here"),
}


class Replying(EndpointClient):
    """A client whose server says this."""

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._decoded(bytearray(self.key_env, "latin-1"))  # type: ignore[arg-type]


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@given(
    reply=st.one_of(damaged(REPLY).map(as_bytes), torn(as_bytes(REPLY)), ODD.map(as_bytes)),
    kind=st.sampled_from(("generate", "nll", "loglikelihood")),
    record=st.sampled_from(sorted(RECORDS)),
)
@fuzzed(80)
def test_any_reply_is_an_answer_or_refused(reply: bytes, kind: Any, record: str) -> None:
    endpoint = Endpoint(Replying("http://localhost:1/v1", key_env=reply.decode("latin-1")), "m")
    with refused_or_fine():
        answers = endpoint.run_requests(kind, [RECORDS[record]], GenerationSettings("auto", 8, ("\n",)), lambda _: None)
        json.dumps(answers, ensure_ascii=False).encode()
