"""Texts compare as readers would."""

from __future__ import annotations

import pytest

from prunetune.evaluation.text import exact_match, rouge_l


def test_case_and_white_space_do_not_matter() -> None:
    assert exact_match("The  Heart\n", " the heart")
    assert not exact_match("the heart", "the heart.")


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    same, half, none = rouge_l(["a b c d", "a b c d", "a b c d"], ["a b c d", "a x c y", "w x y z"])
    assert same == 1.0
    assert half == pytest.approx(0.5)
    assert none == 0.0
    assert rouge_l(["something"], [""]) == [0.0]
