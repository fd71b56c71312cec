"""Accuracies that need no model, against numbers computed by hand."""

from __future__ import annotations

import pytest

from prunetune.evaluation.floors import cheap_floors
from support.evaluation import choice, question


def test_majority_of_fixed_labels_is_of_labels_in_any_order() -> None:
    rows = [
        choice(0, choices=("yes", "no"), answer=0, completion="yes"),
        choice(1, choices=("no", "yes"), answer=1, completion="yes"),
        choice(2, choices=("yes", "no"), answer=1, completion="no"),
        choice(3, choices=("no", "yes"), answer=1, completion="yes"),
    ]
    assert cheap_floors(rows) == {"chance": 0.5, "majority": 0.75, "longest": 0.75}


def test_majority_of_other_choices_is_of_positions_and_ties_share_the_longest() -> None:
    rows = [
        choice(0, choices=("a", "bb"), answer=1, completion="bb"),
        choice(1, choices=("cc", "dd"), answer=1, completion="dd"),
        choice(2, choices=("e", "f", "gg", "h"), answer=0, completion="e"),
    ]
    floors = cheap_floors(rows)
    assert floors["chance"] == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert floors["majority"] == pytest.approx(2 / 3)
    assert floors["longest"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_rows_without_choices_have_no_floors() -> None:
    assert cheap_floors([question(0)]) == {}
