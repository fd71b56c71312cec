"""Endpoints: scores equal those of a model, and a failing endpoint gives each task an error in bounded time."""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prunetune.data.records import Message, Record
from prunetune.errors import ConfigError
from prunetune.evaluation.suites import evaluate_suite
from prunetune.evaluation.suites.endpoint import Endpoint
from prunetune.evaluation.suites.evaluate_and_check import evaluate
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.judge_scorer import _mark
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.evaluation.suites.protocol import BackendError, GenerationSettings
from support.endpoint import Reply, characters_model, now, serving, unused_port
from support.suites import ALL, ScriptedBackend, suite_in

RECORD = Record(kind="completion", prompt="Where? ", completion="heart", choices=("heart", "head"), answer=0)


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(EndpointClient(url, **({"retry_delay": 0.0, "timeout": 5.0} | options)), "m")


PLAIN = GenerationSettings()


def request_one(
    backend: Endpoint, request_kind: Any, record: Record = RECORD, settings: GenerationSettings = PLAIN
) -> Any:
    return backend.run_requests(request_kind, [record], settings, lambda _: None)[0]


def nats(text: str) -> float:
    return sum(ord(letter) % 7 for letter in text) / 10


def test_likelihoods_come_from_the_echo_of_the_prompt() -> None:
    with serving(characters_model) as server:
        outcome = request_one(endpoint(server.url), "loglikelihood")
        assert [tokens for _, tokens in outcome] == [5, 4]
        assert [value for value, _ in outcome] == pytest.approx([-nats("heart"), -nats("head")])
        assert request_one(endpoint(server.url), "nll") == pytest.approx([nats("heart"), 5, 5])
        text = Record(kind="text", completion="föx")
        assert request_one(endpoint(server.url), "nll", text) == pytest.approx([nats("öx"), 2, 3])  # the first has none
    body = server.requests[0][1]
    assert (body["model"], body["temperature"], body["echo"]) == ("m", 0, True)


def test_answers_are_generated_by_completion_or_chat() -> None:
    with serving(characters_model) as server:
        assert request_one(endpoint(server.url), "generate") == "to Where?"
        assert (
            request_one(endpoint(server.url), "generate", settings=GenerationSettings(template="chat")) == "re: Where?"
        )
        chat = Record(kind="chat", completion="c", messages=(Message("system", "s"), Message("user", "u")))
        assert (
            request_one(endpoint(server.url), "generate", chat, GenerationSettings(max_new_tokens=3, stop=(":",)))
            == "re"
        )
    path, body, _ = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert (body["max_tokens"], body["stop"]) == (3, [":"])


def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(characters_model) as server:
        with pytest.raises(BackendError, match="variable PRUNETUNE_TEST_KEY is not set"):
            request_one(endpoint(server.url, key_env="PRUNETUNE_TEST_KEY"), "generate")
        monkeypatch.setenv("PRUNETUNE_TEST_KEY", "k")
        request_one(endpoint(server.url, key_env="PRUNETUNE_TEST_KEY"), "generate")
    assert server.requests[-1][2]["Authorization"] == "Bearer k"


def test_server_without_echo_still_generates(tmp_path: Path) -> None:
    with serving(lambda path, body: characters_model(path, body, echo=False)) as server:
        outcome = evaluate_suite(
            endpoint(server.url), suite_in(tmp_path, ALL | {"open": {**ALL["open"], "scorer": "rouge"}})
        )
    assert "likelihoods are not possible here" in outcome.tasks["organ"].error
    assert "likelihoods are not possible here" in outcome.tasks["prose"].error
    assert outcome.tasks["open"].scores["rouge_l"].n == 6


def test_evaluate_opens_an_endpoint_by_its_address(tmp_path: Path) -> None:
    with serving(characters_model) as server:
        outcome = evaluate(server.url, suite_in(tmp_path, ALL), options=EvalOptions(model_name="mine"))
    assert [result.error for result in outcome.tasks.values()] == [""] * len(ALL)
    assert {body["model"] for _, body, _ in server.requests} == {"mine"}


def test_likelihoods_of_chats_and_lm_eval_tasks_are_refused() -> None:
    with pytest.raises(BackendError, match="likelihoods of a chat"):
        request_one(endpoint("http://127.0.0.1:9/v1"), "loglikelihood", settings=GenerationSettings(template="chat"))
    with pytest.raises(BackendError, match="need the weights"):
        endpoint("http://127.0.0.1:9/v1").model_and_tokenizer()


GARBAGE: dict[str, Reply] = {
    "did not reply with JSON": b"<html>busy</html>",
    "did not reply with JSON: '\ufffd\ufffd": b"\xff\xfe{}",
    "did not reply with a completion": {"choices": []},
    "did not reply with a completion: \\[1\\]": b"[1]",
    "did not reply with a completion: \"x\"": b'"x"',
    "did not reply with a completion: null": b"null",
    "completion: {\"choices\": \\[{\"text\": 3}\\]}": {"choices": [{"text": 3}]},
    "did not reply with JSON: '\\[\\[": b"[" * 100_000,
    "did not reply with JSON: '{\"choices\": NaN": b'{"choices": NaN}',
    "HTTP 404": 404,
    "HTTP 401": 401,
    "HTTP 503": 503,
}  # fmt: skip


@pytest.mark.parametrize("message", GARBAGE)
def test_unusable_reply_is_a_one_line_error(message: str) -> None:
    with serving(lambda *_: GARBAGE[message]) as server, pytest.raises(BackendError, match=message) as refused:
        request_one(endpoint(server.url), "generate")
    assert "\n" not in str(refused.value)
    # What may pass is tried again; what will not is not.
    assert len(server.requests) == (3 if "503" in message else 1)


def test_busy_server_is_asked_again() -> None:
    replies: list[Reply] = [503, 429, {"choices": [{"text": "yes"}]}]
    with serving(lambda *_: replies.pop(0)) as server:
        assert request_one(endpoint(server.url), "generate") == "yes"


@pytest.mark.parametrize("slow", [{"wait": 30.0}, {"drip": 0.2}, {"drip": 0.2, "drip_headers": True}])
def test_slow_reply_ends_at_the_deadline(slow: dict[str, Any]) -> None:
    started = now()
    late = r"no complete reply within 0.3 s"
    with serving(characters_model, **slow) as server, pytest.raises(BackendError, match=late):
        request_one(endpoint(server.url, timeout=0.3, max_attempts=2), "generate")
    assert now() - started < 20  # not a measure: it ends at all
    assert len(server.requests) == 2


def test_server_that_is_down_gives_every_task_an_error(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{unused_port()}/v1"
    outcome = evaluate_suite(endpoint(url), suite_in(tmp_path, ALL))
    for result in outcome.tasks.values():
        assert f"endpoint {url}" in result.error
        assert "is it up" in result.error
        assert "\n" not in result.error


def test_empty_answers_are_scored_as_wrong(tmp_path: Path) -> None:
    with serving(lambda *_: {"choices": [{"text": ""}]}) as server:
        tasks = {"open": {"data": "open.jsonl", "scorer": ["rouge", "exact_match", "bleu"]}}
        outcome = evaluate_suite(endpoint(server.url), suite_in(tmp_path, tasks))
    assert {metric: score.value for metric, score in outcome.tasks["open"].scores.items()} == dict.fromkeys(
        ("rouge_l", "rouge_1", "rouge_2", "exact_match", "bleu"), 0.0
    )


def test_first_failure_stops_a_task() -> None:
    with serving(lambda *_: 404) as server, pytest.raises(BackendError):
        endpoint(server.url).run_requests("generate", [RECORD] * 200, GenerationSettings(), lambda _: None)
    assert len(server.requests) < 20


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", "http://", "file:///etc/passwd"])
def test_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no URL"):
        EndpointClient(url)


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@h:port/v1", "http://user:hun/ter2@h/v1", "x://u:hunter2@h?hunter2", "u:hunter2@h/v1"]
)
def test_invalid_address_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="is no URL") as refused:
        EndpointClient(url)
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_redirect_is_refused_and_no_key_leaves_its_host(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNETUNE_TEST_KEY", "k")
    places: list[str] = []
    with serving(characters_model) as thief, serving(lambda *_: (status, places[-1])) as server:
        host = thief.url.split("/")[2]
        backend = endpoint(server.url, key_env="PRUNETUNE_TEST_KEY")
        for place in (
            f"{thief.url}/steal?token=s3",
            "/v2?token=s3",
            f"//{host}/v1",
            "ftp://x/v1",
            "file:///etc/passwd",
            "",
        ):
            places.append(place)
            with pytest.raises(BackendError, match="redirects to") as refused:
                request_one(backend, "generate")
            assert "\n" not in str(refused.value)
            assert "s3" not in str(refused.value)
        assert thief.requests == []
        assert len(server.requests) == len(places)


def test_judge_is_not_redirected_either(tmp_path: Path) -> None:
    with serving(characters_model) as thief, serving(lambda *_: (302, thief.url)) as server:
        assert "redirects to" in judged(tmp_path, server.url).error
    assert thief.requests == []


def test_secrets_of_an_address_stand_nowhere(
    tmp_path: Path, say: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """User, password and query go to the server, and into no log, result or error."""
    caplog.set_level(logging.DEBUG)
    suite_in(tmp_path, {"open": {**ALL["open"], "scorer": "exact_match"}})
    secrets = ("hunter2", "hunter", "s3cret")
    for reply in (characters_model, lambda *_: 404, lambda *_: b"<html>", lambda *_: {"choices": []}):
        with serving(reply) as server:
            url = server.url.replace("http://", "http://hunter:hunter2@") + "?api_key=s3cret"
            _, out, err = say("eval", url, "--suite", tmp_path / "suite.yaml", "--out", tmp_path / "scores.json")
            assert server.requests[0][0] == "/v1/completions?api_key=s3cret"
            assert server.requests[0][2]["Authorization"] == f"Basic {b64encode(b'hunter:hunter2').decode()}"
            for text in (out, err, (tmp_path / "scores.json").read_text(), caplog.text):
                assert not any(secret in text for secret in secrets)
                assert server.url in text or text in (out, err, caplog.text)


@pytest.mark.parametrize("reply", [401, b"<html> no s3cret, hunter2, sk-key", {"choices": ["s3cret hunter2 sk-key"]}])
def test_secrets_that_a_server_repeats_stand_in_no_error(reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNETUNE_TEST_KEY", "sk-key")
    with serving(lambda *_: reply, error="no s3cret, hunter2, sk-key" if reply == 401 else "") as server:
        hidden = server.url.replace("http://", "http://hunter:hunter2@")
        for client in (endpoint(f"{hidden}?key=s3cret"), endpoint(server.url, key_env="PRUNETUNE_TEST_KEY")):
            with pytest.raises(BackendError, match=r"\*\*\*") as refused:
                request_one(client, "generate")
            secrets = ("sk-key",) if client.client.key_env else ("s3cret", "hunter2")
            assert not any(secret in str(refused.value) for secret in secrets)


def test_key_that_no_header_can_hold_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNETUNE_TEST_KEY", "sk-first\nsk-second")
    with serving(characters_model) as server, pytest.raises(BackendError, match="no key can have") as refused:
        request_one(endpoint(server.url, key_env="PRUNETUNE_TEST_KEY"), "generate")
    assert "sk-" not in str(refused.value)
    assert server.requests == []
    with pytest.raises(ConfigError, match="a request holds one: leave one out"):
        EndpointClient("http://user:word@host/v1", key_env="PRUNETUNE_TEST_KEY")


def test_reply_s_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    with serving(lambda *_: b'{"choices": [{"text": "\\ud800 heart"}]}') as server:
        assert request_one(endpoint(server.url), "generate") == "\ufffd heart"
        suite = suite_in(tmp_path, {"open": {**ALL["open"], "scorer": "exact_match"}})
        evaluation = evaluate(server.url, suite)
    evaluation.to_json().encode()
    assert not evaluation.tasks["open"].error


@pytest.mark.parametrize("values", [["x"] * 8, [[]] * 8, [10**400] * 8, 5, {"a": 1}])
def test_log_probabilities_of_any_type_are_a_one_line_error(values: Any) -> None:
    logprobs = {"token_logprobs": values, "text_offset": list(range(5, 13)) if isinstance(values, list) else values}
    reply = {"choices": [{"text": "Where? heart", "logprobs": logprobs}]}
    message = "likelihoods are not possible|did not reply with JSON"  # a number of 401 digits is none
    with serving(lambda *_: reply) as server, pytest.raises(BackendError, match=message):
        request_one(endpoint(server.url), "nll")


def test_reply_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.evaluation.suites.http_client.MAX_REPLY_BYTES", 1000)
    with serving(lambda *_: b" " * 1001) as server, pytest.raises(BackendError, match="of more than 64 MiB is refused"):
        request_one(endpoint(server.url), "generate")
    assert len(server.requests) == 1


def test_error_of_a_server_is_one_line_that_steers_no_terminal() -> None:
    hostile = "busy\x1b[2J\u202e\n\x07" + "x" * 9999
    with serving(lambda *_: 404, error=hostile) as server, pytest.raises(BackendError) as refused:
        request_one(endpoint(server.url), "generate")
    assert r"HTTP 404: busy\x1b[2J\u202e \x07xxx" in str(refused.value)
    assert len(str(refused.value)) < 500


def test_proxy_of_the_environment_is_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    other = endpoint("http://host.invalid/v1", max_attempts=1)
    with serving(characters_model) as proxy, serving(characters_model) as server:
        for address in (proxy.url, proxy.url.split("/")[2]):
            monkeypatch.setenv("http_proxy", address)
            assert request_one(other, "generate") == "to Where?"
            assert request_one(endpoint(server.url), "generate") == "to Where?"
        assert [path for path, _, _ in proxy.requests] == ["http://host.invalid/v1/completions"] * 2
        monkeypatch.setenv("no_proxy", "example.org,host.invalid")
        with pytest.raises(BackendError, match="does not answer"):
            request_one(other, "generate")
        assert len(proxy.requests) == 2
        monkeypatch.setenv("no_proxy", "")
        for unusable in ("socks5://127.0.0.1:9", "nonsense://x", "http://x:y"):
            monkeypatch.setenv("http_proxy", unusable)
            with pytest.raises(BackendError, match="HTTP_PROXY cannot be used"):
                request_one(other, "generate")
            assert request_one(endpoint(server.url), "generate") == "to Where?"


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
def test_impossible_host_is_a_one_line_error(host: str) -> None:
    with pytest.raises(BackendError, match="does not answer"):
        request_one(endpoint(f"http://{host}/v1", max_attempts=1), "generate")


JUDGED: dict[str, Any] = {"data": "open.jsonl", "limit": 2}


def judged(tmp_path: Path, url: str, *, allow: Any = ("judge",), **options: Any) -> Any:
    tasks = {"t": {**JUDGED, "scorer": {"judge": {"url": url, "model": "j", **options}}}}
    return evaluate_suite(ScriptedBackend(lambda record: "my answer"), suite_in(tmp_path, tasks), allow=allow).tasks[
        "t"
    ]


def test_judge_scores_are_between_0_and_1(tmp_path: Path) -> None:
    def mark(path: str, body: dict[str, Any]) -> Reply:
        content = body["messages"][0]["content"]
        assert "my answer" in content
        return {"choices": [{"message": {"content": "I say 5 of 5" if "Q0" in content else "1"}}]}

    with serving(mark) as server:
        first = judged(tmp_path, server.url)
        assert sorted(item.scores["judge"] for item in first.items) == sorted(
            1.0 if "Q0" in item.prompt else 0.0 for item in first.items
        )
        custom = judged(tmp_path, server.url, prompt="{{ prompt }} {{ got }} {{ id }}", low=0.0, high=10.0)
        assert {item.scores["judge"] for item in custom.items} <= {0.5, 0.1}
        assert "allow it" in judged(tmp_path, server.url, allow=()).error
    assert server.requests[0][1]["temperature"] == 0


def test_judge_reply_without_a_mark_is_an_error(tmp_path: Path) -> None:
    with serving(lambda *_: {"choices": [{"message": {"content": "It is 77\nfine."}}]}) as server:
        assert "no number from 1 to 5 in its reply" in judged(tmp_path, server.url).error
        assert "the scale has to rise" in judged(tmp_path, server.url, low=5.0, high=5.0).error
    assert "is it up" in judged(tmp_path, f"http://127.0.0.1:{unused_port()}/v1", timeout=1.0).error


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("4", 4),
        (" 3.5\n", 3.5),
        ("**4**", 4),
        ("I give it 2.", 2),
        ("Mark: 4. So: 4.0", 4),
        ("It is 77 years old: 3", 3),  # a number off the scale is no mark
        ("4/5", 4),
        ("4 / 5", 4),
        ("**4**/5", 4),
        ("5/5", 5),
        ("Score: 2/5.", 2),
        ("Of 3 findings, 2 are right.\nScore: 4", 4),
        ("3 out of 5", 3),
        ("3.5 out of 5.0 points", 3.5),
        ("I say 2 of 5", 2),
        ("2 (on a scale from 1 to 5)", 2),
        ("On a scale of 1 to 5, I say 2.", 2),
        ("On a scale of 1-5: 3", 3),
        ("From 1 to 5: 3", 3),
        ("between 1 and 5, a 4", 4),
        ("2 on a 1-5 scale", 2),
        ("On the 1 to 5 scale: 4", 4),
        ("4 on a 5-point scale", 4),
        ("Scale: 1-5. Score: 4/5", 4),
    ],
)
def test_mark_is_read_from_a_reply_that_names_its_scale(reply: str, mark: float) -> None:
    assert _mark(reply, 1, 5, "i") == mark


def test_every_mark_of_every_scale_is_read_in_every_form() -> None:
    for low, high in ((0, 1), (1, 5), (0, 10), (1, 100), (-1, 1)):
        for form in ("{}", "{}/{high}", "{} out of {high}", "{} (from {low} to {high})", "{} on a {low}-{high} scale"):
            for mark in (low, (low + high) / 2, high):
                assert _mark(form.format(mark, low=low, high=high), low, high, "i") == mark


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("2 points are right. I say 4", "2 numbers from 1 to 5 in its reply on item i"),
        ("between 3 and 4", "no number"),
        ("3-4", "2 numbers"),
        ("3/10", "no number"),  # a mark of another scale
        ("from 1 to 5", "no number"),
        ("none", "no number"),
    ],
)
def test_reply_without_exactly_one_mark_is_refused(reply: str, message: str) -> None:
    with pytest.raises(BackendError, match=message) as refused:
        _mark(reply, 1, 5, "i")
    assert "\n" not in str(refused.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", ["1", "1.", "/", "1/", "1 - ", "scale ", " ", "-", "from 1", "1 out of "])
def test_long_reply_of_a_judge_ends(part: str) -> None:
    """Patterns that look again at every character from every other would take hours."""
    for reply in (part * (50_000 // len(part)), "1" + part * (50_000 // len(part))):
        with suppress(BackendError):
            _mark(reply, 1, 5, "i")
