"""A suite on a model: batches change no score, answers are cached, and a failing task does not stop the others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from prunetune.data.records import Message, Record
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites import LocalModel, evaluate_suite, load_prompts, parse_suite
from prunetune.evaluation.suites.cache import AnswerStore, CachedBackend, cache_key, folder_hash
from prunetune.evaluation.suites.endpoint import Endpoint
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.local import truncate_at_stop
from prunetune.evaluation.suites.open_model import CheckpointBackend
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.evaluation.suites.protocol import GenerationSettings, RequestKind
from support.data import write_lines
from support.endpoint import Reply, serving
from support.evaluation import characters, speaker
from support.suites import ALL, ScriptedBackend, model_folder, suite_in

FULL = {**ALL, "letters": {"data": "chosen.jsonl", "scorer": "accuracy", "lettered": True}}


def on_cpu(folder: Path, store: AnswerStore) -> CachedBackend:
    return CachedBackend(CheckpointBackend(str(folder), EvalOptions(device="cpu", dtype="float32"), store), store)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_batched_equals_one_by_one(tmp_path: Path, family: str) -> None:
    suite, model = suite_in(tmp_path, FULL), speaker(family)
    batched = evaluate_suite(LocalModel(model, characters()), suite)
    single = evaluate_suite(LocalModel(model, characters(), max_tokens=1), suite)
    for name, result in batched.tasks.items():
        assert not result.error
        for ours, theirs in zip(result.items, single.tasks[name].items, strict=True):
            assert (ours.id, ours.got, ours.correct) == (theirs.id, theirs.got, theirs.correct)
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
        for metric, score in result.scores.items():
            assert score.value == pytest.approx(single.tasks[name].scores[metric].value, rel=1e-4)


def test_evaluation_repeats_to_the_byte(tmp_path: Path) -> None:
    suite, model = suite_in(tmp_path, FULL), speaker()
    first = evaluate_suite(LocalModel(model, characters()), suite)
    again = evaluate_suite(LocalModel(model, characters()), suite, prompts=load_prompts(suite))
    assert first.to_json() == again.to_json()
    assert Evaluation.from_json(first.to_json()).to_json() == first.to_json()


def test_second_evaluation_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, folder, store = (
        suite_in(tmp_path, FULL),
        model_folder(tmp_path / "model"),
        AnswerStore(tmp_path / "cache"),
    )
    first = on_cpu(folder, store)
    evaluation = evaluate_suite(first, suite)
    assert (first.cache_hits, first.cache_misses > 20) == (0, True)
    monkeypatch.setattr(
        "prunetune.evaluation.suites.open_model.load_model_and_tokenizer",
        lambda *_, **__: pytest.fail("weights were read"),
    )
    second = on_cpu(folder, store)
    assert evaluate_suite(second, suite).to_json() == evaluation.to_json()
    assert (second.cache_hits, second.cache_misses) == (first.cache_misses, 0)


def test_cache_asks_the_backend_only_for_new_requests(tmp_path: Path) -> None:
    store, scripted = AnswerStore(tmp_path / "cache"), ScriptedBackend()
    records = [Record(kind="completion", prompt=f"p{n}", completion="c") for n in range(4)]
    cached = CachedBackend(scripted, store)
    cached.run_requests("generate", records[:2], GenerationSettings(), lambda _: None)
    assert cached.run_requests("generate", records, GenerationSettings(), lambda _: None) == ["c"] * 4
    assert scripted.calls == 4
    for how in (
        GenerationSettings(max_new_tokens=3),
        GenerationSettings(stop=("x",)),
        GenerationSettings(template="chat"),
    ):
        cached.run_requests("generate", records[:1], how, lambda _: None)
    assert scripted.calls == 7
    cached.run_requests("nll", records[:1], GenerationSettings(max_new_tokens=3), lambda _: None)
    cached.run_requests("nll", records[:1], GenerationSettings(max_new_tokens=4), lambda _: None)
    assert scripted.calls == 8
    scripted.fingerprint = "another"
    cached.run_requests("generate", records[:1], GenerationSettings(), lambda _: None)
    scripted.fingerprint = ""
    cached.run_requests("generate", records[:1], GenerationSettings(), lambda _: None)
    assert scripted.calls == 10


KEYS_OF_0_1_0 = {
    "loglikelihood": "fa6cde625a0e3864e2fb35b0b82d6f8649b0efd495cd8e491b0ada96031d1e5d",
    "generate": "d756e97025aca4dbbd07897d1ef5c1b37462fd4608cf4e9c79c52d2cbcf8dd31",
    "nll": "16d37757a59034b5996f1c472b2f765fc82bc89b2a95cc4611d0d6f12a621e98",
}
CHAT_KEYS_OF_0_1_0 = {
    "loglikelihood": "a9a64e2783a5cada28bfe296e249c611f70a2179dfde725b5bf6d23a1a8c1c21",
    "generate": "f20fda438de0e1ff8d2991410d6ac973edbcce919a6b35d2ac903034a6dbe375",
    "nll": "32c7165afe6e0f33025cc712242115f62fd5bc3218f47303c5313f64490d2218",
}


@pytest.mark.parametrize("kind", get_args(RequestKind))
def test_cache_keys_are_those_of_0_1_0(kind: RequestKind) -> None:
    """The keys were written at commit 03ca826, which named the kinds choose, write and weigh."""
    choices = Record(kind="completion", prompt="Where? ", completion="heart", choices=("heart", "head"), answer=0)
    chat = Record(kind="chat", messages=(Message("user", "föx"),), completion="yes")
    settings = GenerationSettings(template="raw", max_new_tokens=7, stop=("\n",))
    assert cache_key("model cpu", kind, choices, settings) == KEYS_OF_0_1_0[kind]
    assert cache_key("model cpu", kind, chat, settings) == CHAT_KEYS_OF_0_1_0[kind]


def test_answers_before_an_interrupt_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.evaluation.suites.cache.ANSWERS_PER_WRITE", 2)
    scripted, store = ScriptedBackend(), AnswerStore(tmp_path / "cache")
    records = [Record(kind="completion", prompt=f"p{n}", completion="c") for n in range(5)]

    def stop(record: Record) -> str:
        if record.prompt == "p3":
            raise KeyboardInterrupt
        return record.completion

    scripted.write = stop
    with pytest.raises(KeyboardInterrupt):
        CachedBackend(scripted, store).run_requests("generate", records, GenerationSettings(), lambda _: None)
    scripted.write, scripted.calls = (lambda record: record.completion), 0
    assert (
        CachedBackend(scripted, store).run_requests("generate", records, GenerationSettings(), lambda _: None)
        == ["c"] * 5
    )
    assert scripted.calls == 3


def test_folder_hash_depends_on_contents(tmp_path: Path) -> None:
    folder, store = model_folder(tmp_path / "model"), AnswerStore(tmp_path / "cache")
    before = folder_hash(folder, store)
    assert folder_hash(folder, store) == before == folder_hash(folder, AnswerStore(tmp_path / "other"))
    (folder / "README.md").write_text("a card")
    assert folder_hash(folder, store) == before
    hashes = {before}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
        hashes.add(folder_hash(folder, store))
    assert len(hashes) == 4


def test_folder_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = model_folder(tmp_path / "model"), AnswerStore(tmp_path / "cache")
    before = folder_hash(folder, store)
    monkeypatch.setattr("prunetune.evaluation.suites.cache.sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert folder_hash(folder, store) == before


def answer_file(store: AnswerStore) -> Path:
    """The one file of answers."""
    (file,) = (file for file in store.folder.iterdir() if file.name != "files.jsonl")
    return file


@pytest.mark.parametrize("damage", ["garbage", "folder", "cut"])
def test_broken_cache_costs_the_answers_in_it_only(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, settings = AnswerStore(tmp_path / "cache"), GenerationSettings()
    records = [Record(kind="completion", prompt=f"p{n}", completion="c") for n in range(3)]
    CachedBackend(ScriptedBackend(), store).run_requests("generate", records, settings, lambda _: None)
    file = answer_file(store)
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(b"\xff no lines \x00" * 40 if damage == "garbage" else whole[:-9])
    for lost in ({"garbage": 3, "folder": 3, "cut": 1}[damage], 3 if damage == "folder" else 0):
        cached = CachedBackend(ScriptedBackend(), store)
        assert cached.run_requests("generate", records, settings, lambda _: None) == ["c"] * 3
        assert cached.cache_misses == lost
    assert ("cannot be read" in caplog.text) == (damage == "folder")


DAMAGED = [None, 5, [], math.nan, "x", [[1]], [["a", "b"]], [1, 2, 3], [[1, 2]], {}, [True, 1, 1]]


@pytest.mark.parametrize("kind", get_args(RequestKind))
def test_damaged_answer_is_asked_again_and_replaced(kind: RequestKind, tmp_path: Path) -> None:
    record = Record(kind="completion", prompt="p", completion="c", choices=("c", "d"), answer=0)
    store, scripted, settings = AnswerStore(tmp_path / "cache"), ScriptedBackend(), GenerationSettings()
    (whole,) = CachedBackend(scripted, store).run_requests(kind, [record], settings, lambda _: None)
    name, key = answer_file(store).stem, cache_key(scripted.fingerprint, kind, record, settings)
    for number, damage in enumerate(DAMAGED):
        if {"generate": "x", "nll": [1, 2, 3]}.get(kind) == damage:
            continue
        store.put(name, {key: damage})
        asked = scripted.calls
        for _ in range(2):
            answers = CachedBackend(scripted, store).run_requests(kind, [record], settings, lambda _: None)
            assert answers == [whole], damage
        assert scripted.calls == asked + 1, f"{number}: once, and then kept"


def test_damaged_digest_is_computed_again(tmp_path: Path) -> None:
    folder, store = model_folder(tmp_path / "model"), AnswerStore(tmp_path / "cache")
    whole = folder_hash(folder, store)
    for damage in ("", "0" * 63, 5, None, ["0" * 64]):
        store.put("files", dict.fromkeys(store.get("files"), damage))
        assert folder_hash(folder, store) == whole


def test_cache_stores_many_answers_and_nan(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "deep" / "cache")
    store.put("many", {f"k{n}": str(n) for n in range(1200)})
    assert store.get("many") == {f"k{n}": str(n) for n in range(1200)}
    scripted = ScriptedBackend()
    scripted._weigh = lambda record: [math.nan, 1, 1]  # type: ignore[method-assign]
    for _ in range(2):
        (answer,) = CachedBackend(scripted, store).run_requests(
            "nll", [Record(kind="text", completion="c")], GenerationSettings(), print
        )
        assert math.isnan(answer[0])
    assert scripted.calls == 1


def test_answers_of_two_processes_are_all_kept(tmp_path: Path) -> None:
    records = [Record(kind="completion", prompt=f"p{n}", completion="c") for n in range(4)]
    one, other = (CachedBackend(ScriptedBackend(), AnswerStore(tmp_path / "cache")) for _ in range(2))
    for backend, own in ((one, records[:2]), (other, records[2:])):
        backend.run_requests("generate", own, GenerationSettings(), lambda _: None)
    third = CachedBackend(ScriptedBackend(), AnswerStore(tmp_path / "cache"))
    third.run_requests("generate", records, GenerationSettings(), lambda _: None)
    assert third.cache_hits == 4


def test_failing_task_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b'{"prompt": "caf\xff", "completion": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    write_lines(tmp_path / "hollow.jsonl", {"prompt": "p", "completion": " "})
    bad: dict[str, Any] = {
        "unknown": {"data": "open.jsonl", "scorer": "rogue"},
        "missing": {"data": "nowhere.jsonl", "scorer": "rouge"},
        "binary": {"data": "binary.jsonl", "scorer": "rouge"},
        "empty": {"data": "empty.jsonl", "scorer": "rouge"},
        "hollow": {"data": "hollow.jsonl", "scorer": "rouge"},
        "code": {"data": "open.jsonl", "scorer": {"python": {"function": "os:system"}}},
        "judge": {"data": "open.jsonl", "scorer": {"judge": {"url": "http://127.0.0.1:9/v1", "model": "m"}}},
    }
    evaluation = evaluate_suite(ScriptedBackend(), suite_in(tmp_path, {**bad, **ALL}, strict=False))
    errors = {name: result.error for name, result in evaluation.tasks.items()}
    assert all("\n" not in error for error in errors.values())
    assert [name for name, error in errors.items() if not error] == list(ALL)
    assert "did you mean rouge" in errors["unknown"]
    assert "no such file" in errors["missing"]
    assert "binary.jsonl:1: not UTF-8" in errors["binary"]
    assert "needs at least one row" in errors["empty"]
    assert "hollow.jsonl:1: completion is empty" in errors["hollow"]
    assert "allow it with --allow-code" in errors["code"]
    assert "allow it with --allow-judge" in errors["judge"]
    loaded = Evaluation.from_json(evaluation.to_json())
    assert loaded.tasks["missing"].error == errors["missing"]
    assert evaluation.tasks["organ"].scores["accuracy"].value == evaluation.tasks["open"].scores["rouge_l"].value == 1.0


def test_bug_in_one_task_keeps_its_traceback_and_the_others_scores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(ScriptedBackend):
        def _choose(self, record: Record) -> list[list[float]]:
            raise AttributeError("no such attribute")

    evaluation = evaluate_suite(Faulty(), suite_in(tmp_path, ALL))
    assert {name for name, result in evaluation.tasks.items() if result.error} == {"organ"}
    assert "AttributeError: no such attribute; this is a bug" in evaluation.tasks["organ"].error
    assert "Traceback" in caplog.text

    class Exhausted(ScriptedBackend):
        def _choose(self, record: Record) -> list[list[float]]:
            raise MemoryError

    with pytest.raises(MemoryError):
        evaluate_suite(Exhausted(), suite_in(tmp_path, ALL))


def test_choices_are_compared_as_the_task_says(tmp_path: Path) -> None:
    class FixedLikelihoodBackend(ScriptedBackend):
        def _choose(self, record: Record) -> list[list[float]]:
            return [[-3.0, 1], [-4.0, 2]]  # sum: the first; mean: the second; per character: 3 / 2 and 4 / 10

    write_lines(tmp_path / "two.jsonl", {"prompt": "p", "choices": ["ab", "abcdefghij"], "answer": 1})
    for likelihood, score in (("sum", 0.0), ("mean", 1.0), ("characters", 1.0)):
        task = {"data": "two.jsonl", "scorer": "accuracy", "likelihood": likelihood}
        evaluation = evaluate_suite(FixedLikelihoodBackend(), parse_suite({"tasks": {"t": task}}, folder=tmp_path))
        assert evaluation.tasks["t"].scores["accuracy"].value == score


def test_nll_of_a_text_counts_every_token_and_byte(tmp_path: Path) -> None:
    model = speaker(max_position_embeddings=16)
    torch.nn.init.zeros_(model.lm_head.weight)
    evaluation = evaluate_suite(LocalModel(model, characters()), suite_in(tmp_path, {"prose": ALL["prose"]}))
    bits = math.log2(model.config.vocab_size)  # of one token, which is one byte
    result = evaluation.tasks["prose"]
    assert result.scores["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
    assert result.scores["perplexity"].value == pytest.approx(model.config.vocab_size, rel=1e-4)
    assert all(item.scores["bytes"] == item.scores["tokens"] == len(item.prompt.encode()) for item in result.items)
    assert max(item.scores["tokens"] for item in result.items) > 16


def test_windows_of_a_long_text_continue_each_other() -> None:
    local = LocalModel(speaker(max_position_embeddings=8), characters())
    windows = local._windows(Record(kind="text", completion="abcdefghijklmnopq"))
    assert [len(window.token_ids) for window in windows] == [8, 8, 4]
    targets = [token for window in windows for token in window.token_ids[1:]]
    assert targets == characters()("abcdefghijklmnopq", add_special_tokens=False)["input_ids"]
    assert windows[1].token_ids[0] == windows[0].token_ids[-1]


def test_long_prompt_keeps_its_end_and_its_start_token(caplog: pytest.LogCaptureFixture) -> None:
    local = LocalModel(speaker(max_position_embeddings=32), characters())
    record = Record(kind="completion", prompt="x" * 100 + "yz", completion="a", choices=("a", "bcd"), answer=0)
    ((first, *_, last),) = local._prompts([record], [3], GenerationSettings())
    assert first == 1
    assert characters().decode([last]) == "z"
    answers = local.run_requests("loglikelihood", [record], GenerationSettings(), lambda _: None)
    assert [tokens for _, tokens in answers[0]] == [1, 3]
    assert "1 prompts lost their beginning: the model's context is 32" in caplog.text


def test_answer_ends_before_its_first_stop() -> None:
    assert truncate_at_stop("yes\nno. end", ("\n", "end")) == "yes"
    assert truncate_at_stop("yes", ("\n",)) == "yes"
    assert truncate_at_stop(" yes ", ()) == "yes"
    assert truncate_at_stop("\n\nParis\n\nQ", ("\n\n",)) == ""


@pytest.mark.parametrize("text", ["\n\nParis\n\nQ", "Paris\n\nQ", " Paris\n", "\n\n"])
@pytest.mark.parametrize("stop", [(), ("\n\n",), ("\n", "Q")])
def test_local_model_ends_its_answer_as_a_server_does(text: str, stop: tuple[str, ...]) -> None:
    """A stop string before the answer ends it, before white space is stripped."""
    model, tokenizer = speaker(), characters()
    answer_ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    model.generate = lambda ids, **_: torch.cat([ids, answer_ids], dim=1)
    record, settings = Record(kind="completion", prompt="Capital?", completion="Paris"), GenerationSettings(stop=stop)
    (answer,) = LocalModel(model, tokenizer).run_requests("generate", [record], settings, lambda _: None)

    def served(path: str, body: dict[str, Any]) -> Reply:
        cut = min([text.find(end) for end in body.get("stop", []) if end in text], default=len(text))
        return {"choices": [{"text": text[:cut]}]}

    with serving(served) as server:
        endpoint = Endpoint(EndpointClient(server.url), "m")
        assert endpoint.run_requests("generate", [record], settings, lambda _: None) == [answer]


def test_chat_rows_are_rendered_with_roles(tmp_path: Path) -> None:
    from support.data import subwords
    from support.models import tiny

    write_lines(
        tmp_path / "chat.jsonl",
        {"messages": [{"role": "user", "content": "which"}, {"role": "assistant", "content": "yes"}]},
    )
    tasks = {"t": {"data": "chat.jsonl", "scorer": ["exact_match", "nll"], "max_new_tokens": 4}}
    evaluation = evaluate_suite(LocalModel(tiny(vocab_size=320), subwords()), suite_in(tmp_path, tasks))
    assert evaluation.tasks["t"].error == ""
    assert evaluation.tasks["t"].items[0].prompt == "user: which"


def test_nan_scores_are_reported(tmp_path: Path) -> None:
    model = speaker()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    evaluation = evaluate_suite(LocalModel(model, characters()), suite_in(tmp_path, ALL))
    assert math.isnan(evaluation.tasks["organ"].scores["accuracy"].value)
    assert math.isnan(evaluation.tasks["prose"].scores["perplexity"].value)
    assert evaluation.tasks["organ"].items[0].correct is None


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    updates: list[tuple[str, int, int]] = []
    suite = suite_in(tmp_path, ALL)
    evaluate_suite(LocalModel(speaker(), characters()), suite, progress=lambda *update: updates.append(update))
    for name in ALL:
        counts = [(done, total) for task, done, total in updates if task == name]
        assert counts[-1][0] == counts[-1][1]
