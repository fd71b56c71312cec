"""A whole evaluation: the scores of each kind of task, and that batches, caches and order do not change them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from prunetune.config.recipe import DataConfig, EvaluateConfig
from prunetune.data.records import Record
from prunetune.errors import DataError
from prunetune.evaluation.generation import generate_ids
from prunetune.evaluation.item_subset import make_ids_unique, stable_sample
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import evaluate
from prunetune.evaluation.suites.local import LocalModel
from prunetune.evaluation.suites.protocol import GenerationSettings
from prunetune.evaluation.suites.run import argmax_unless_nan
from support.evaluation import characters, choice, question, speaker, text

CONFIG = EvaluateConfig(max_new_tokens=6)


def scored(records: list[Record], model: Any = None, config: EvaluateConfig = CONFIG, **data: Any) -> Evaluation:
    return evaluate(speaker() if model is None else model, characters(), records, DataConfig(**data), config)


def mixed() -> list[Record]:
    return [make(index) for index in range(6) for make in (choice, question, text)]


def test_each_kind_gets_its_scores() -> None:
    tasks = scored(mixed()).tasks
    assert set(tasks) == {"organ", "open", "prose"}
    assert set(tasks["organ"].scores) == {"accuracy", "macro_f1", "nll"}
    assert set(tasks["open"].scores) == {"rouge_l", "exact_match", "nll"}
    assert set(tasks["prose"].scores) == {"perplexity", "bits_per_byte"}
    assert all(score.n == 6 for result in tasks.values() for score in result.scores.values())
    assert all(len(result.items) == 6 for result in tasks.values())


def test_general_tasks_are_scored_and_in_no_mean() -> None:
    model, school = speaker(), [choice(index, task="school") for index in range(6)]
    alone = evaluate(model, characters(), mixed(), DataConfig(), CONFIG)
    both = evaluate(model, characters(), mixed(), DataConfig(), CONFIG, general=school)
    assert {name for name, result in both.tasks.items() if result.general} == {"school"}
    assert both.tasks["school"].scores["accuracy"].n == 6
    assert (both.mean("accuracy"), both.mean("nll")) == (alone.mean("accuracy"), alone.mean("nll"))
    assert Evaluation.from_json(both.to_json()).mean("nll") == alone.mean("nll")
    with pytest.raises(DataError, match=r"'organ' is in the rows of data\.test and of data\.general"):
        evaluate(model, characters(), mixed(), DataConfig(), CONFIG, general=[choice(9)])


def test_items_hold_prompt_and_answer() -> None:
    tasks = scored(mixed()).tasks
    first = next(item for item in tasks["organ"].items if item.id == "c0")
    assert (first.prompt, first.expected) == ("Where is case 0 ", "heart")
    assert first.got in ("heart", "head", "lung", "x")
    assert first.correct == (first.got == "heart") == bool(first.scores["accuracy"])
    written = next(item for item in tasks["open"].items if item.id == "q1")
    assert written.expected == "answer 1"
    assert written.correct is False
    assert all(item.correct is None for item in tasks["prose"].items)


def test_model_that_knows_the_answer_scores_one() -> None:
    model = speaker()
    model.lm_head = torch.nn.Linear(48, model.config.vocab_size, bias=True)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    token = characters()("x", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.lm_head.bias[token] = 20.0
    result = scored([choice(3), choice(7)], model).tasks["organ"]
    assert result.scores["accuracy"].value == result.scores["macro_f1"].value == 1.0
    answer = question(0, completion="xxxxxx")
    assert scored([answer], model).tasks["open"].scores["exact_match"].value == 1.0


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = speaker()
    torch.nn.init.zeros_(model.lm_head.weight)
    tasks = scored(mixed(), model).tasks
    assert tasks["prose"].scores["perplexity"].value == pytest.approx(model.config.vocab_size, rel=1e-4)
    assert tasks["open"].scores["nll"].value == pytest.approx(math.log(model.config.vocab_size), rel=1e-4)
    assert tasks["organ"].items[0].got == "heart"  # ties go to the first choice


def test_batch_composition_and_pass_size_do_not_change_scores() -> None:
    model = speaker("gemma3_text")
    whole = scored(mixed(), model)
    small = scored(mixed()[::-1], model, EvaluateConfig(max_new_tokens=6, max_tokens=1))
    for task, result in whole.tasks.items():
        assert [item.id for item in small.tasks[task].items] == [item.id for item in result.items]
        for ours, theirs in zip(result.items, small.tasks[task].items, strict=True):
            assert ours.got == theirs.got
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)


def test_evaluation_repeats_and_round_trips() -> None:
    evaluation = scored(mixed())
    assert scored(mixed()).to_json() == evaluation.to_json()
    assert Evaluation.from_json(evaluation.to_json()).to_json() == evaluation.to_json()


def test_limit_and_generate_limit_take_a_stable_sample() -> None:
    records = [question(index) for index in range(30)]
    config = EvaluateConfig(limit=10, generate_limit=4, max_new_tokens=4)
    few = scored(records, config=config).tasks["open"]
    assert (few.scores["nll"].n, few.scores["rouge_l"].n) == (10, 4)
    chosen = {record.id for record in stable_sample(records, 10)}
    assert {item.id for item in few.items} == chosen
    assert {record.id for record in stable_sample(records[::-1], 12)} > chosen
    assert len(stable_sample(records, 0)) == 30
    none = scored(records, config=EvaluateConfig(limit=3, generate_limit=0)).tasks["open"]
    assert set(none.scores) == {"nll"}


def test_macro_f1_needs_one_label_set() -> None:
    records = [choice(0), choice(1, choices=("yes", "no"))]
    assert set(scored(records).tasks["organ"].scores) == {"accuracy", "nll"}
    reordered = [choice(0), choice(1, choices=("head", "x", "lung", "heart"))]
    assert "macro_f1" in scored(reordered).tasks["organ"].scores


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_answer_has_the_same_nll_with_and_without_choices(family: str) -> None:
    records = [choice(index) for index in range(6)]
    with_choices = scored(records, speaker(family)).tasks["organ"]
    plain = scored([replace(record, choices=(), answer=None) for record in records], speaker(family)).tasks["organ"]
    assert "accuracy" not in plain.scores
    for ours, theirs in zip(with_choices.items, plain.items, strict=True):
        assert ours.scores["nll"] == pytest.approx(theirs.scores["nll"], abs=1e-5)
        assert ours.scores["tokens"] == theirs.scores["tokens"]


def test_module_modes_are_restored_and_no_gradient_is_left() -> None:
    model = speaker().train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    scored(mixed(), model)
    assert [module.training for module in model.modules()] == before
    model.lm_head = None
    with pytest.raises(TypeError):
        scored(mixed(), model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_continues_after_an_evaluation() -> None:
    model = speaker("gemma3_text")
    scored(mixed(), model)
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_nan_is_reported_and_not_hidden() -> None:
    model = speaker()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    evaluation = scored([choice(0), choice(1), text(0), text(1)], model)
    assert math.isnan(evaluation.mean_accuracy())
    assert math.isnan(evaluation.tasks["organ"].scores["macro_f1"].value)
    assert math.isnan(evaluation.tasks["prose"].scores["perplexity"].value)
    assert evaluation.tasks["organ"].items[0].correct is None
    json.loads(evaluation.to_json(), parse_constant=lambda name: pytest.fail(name))


def test_progress_ends_at_its_total() -> None:
    updates: list[tuple[str, int, int]] = []
    evaluate(speaker(), characters(), mixed(), DataConfig(), CONFIG, progress=lambda *update: updates.append(update))
    for task in ("organ", "open", "prose"):
        counts = [(done, total) for name, done, total in updates if name == task]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(DataError, match="no test records"):
        scored([])
    with pytest.raises(DataError, match="has no tokens"):
        scored([choice(0, choices=("a", ""))])


@pytest.mark.parametrize("too_long", ["error", "truncate", "drop"])
def test_rows_longer_than_the_context_are_scored_without_their_beginning(too_long: str) -> None:
    """`data.too_long` and `data.max_length` apply to rows for tuning only; `eval` has neither."""
    records = [question(0, prompt="long " * 100), question(1)]
    result = scored(records, too_long=too_long, max_length=4).tasks["open"]
    assert sorted(item.id for item in result.items) == ["q0", "q1"]
    cut = scored([question(0, prompt=records[0].prompt[-(256 - 1 - 1 - len("answer 0")) :])]).tasks["open"].items[0]
    long = next(item for item in result.items if item.id == "q0")
    assert long.scores["nll"] == pytest.approx(cut.scores["nll"], rel=1e-5)
    assert result.scores["rouge_l"].n == 2


def test_texts_longer_than_the_context_are_scored_whole() -> None:
    long = Record(kind="text", completion="the quick fox " * 50, task="prose", id="t0")
    (item,) = scored([long]).tasks["prose"].items
    assert item.scores["tokens"] == item.scores["bytes"] == len(long.completion)


def test_generation_leaves_room_within_the_context() -> None:
    model = speaker(max_position_embeddings=64)
    positions: list[int] = []

    def record_positions(_: Any, __: Any, named: dict[str, Any]) -> None:
        if "position_ids" in named:  # generation steps; plain scoring leaves positions to the model
            positions.append(int(named["position_ids"].max()))

    model.register_forward_pre_hook(record_positions, with_kwargs=True)
    scored([question(0, prompt="p" * 40)], model, EvaluateConfig(max_new_tokens=128))
    assert 48 < max(positions) < 64


@pytest.mark.parametrize("length", [30, 31, 32, 200])
def test_long_prompt_keeps_its_start_token_and_is_cut_as_in_a_suite(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, record = speaker(max_position_embeddings=64), question(0, prompt="x" * (length - 1) + "y", completion="a")
    prompts = record_prompts(monkeypatch)
    scored([record], model, EvaluateConfig(max_new_tokens=33), too_long="truncate")
    LocalModel(model, characters()).run_requests(
        "generate", [record], GenerationSettings(max_new_tokens=33), lambda _: None
    )
    of_run, of_suite = prompts
    assert of_run == of_suite
    assert len(of_run) == min(32, length + 1)
    assert of_run[0] == characters().bos_token_id
    assert characters().decode(of_run[-1:]) == "y"


def record_prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The prompts of all generations from this call on, in order."""
    prompts: list[tuple[int, ...]] = []

    def spied(model: Any, tokenizer: Any, batch: list[tuple[int, ...]], **how: Any) -> list[str]:
        prompts.extend(map(tuple, batch))
        return generate_ids(model, tokenizer, batch, **how)

    monkeypatch.setattr("prunetune.evaluation.suites.local.generate_ids", spied)
    return prompts


def test_repeated_ids_are_made_unique() -> None:
    assert make_ids_unique(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
    twice = scored([question(0), question(1, id="q0")]).tasks["open"]
    assert sorted(item.id for item in twice.items) == ["q0", "q0#2"]


def test_ties_go_to_the_first_choice() -> None:
    assert argmax_unless_nan([-2.0, -1.0, -1.0]) == 1
    assert argmax_unless_nan([-2.0, math.nan]) is None
