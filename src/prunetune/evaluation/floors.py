"""The accuracies that need no model: chance, always one answer, always the longest option."""

from collections import Counter
from collections.abc import Sequence

from prunetune.data.records import Record


def cheap_floors(records: Sequence[Record]) -> dict[str, float]:
    """Accuracies (0..1) on the rows with choices of one task, from these rows alone; {} without such a row.

    - chance: the mean of 1 / number of choices.
    - majority: the most frequent right answer, if all rows have the same choices; else the most frequent position.
    - longest: the choice with the most characters; the longest of equal length share the row.
    """
    rows = [record for record in records if record.choices and record.answer is not None]
    if not rows:
        return {}
    same_choices = len({frozenset(row.choices) for row in rows}) == 1
    answers = Counter(row.completion if same_choices else row.answer for row in rows)
    lengths = [[len(choice) for choice in row.choices] for row in rows]
    longest = [
        (row.answer or 0, [i for i, n in enumerate(ns) if n == max(ns)]) for row, ns in zip(rows, lengths, strict=True)
    ]
    return {
        "chance": sum(1 / len(row.choices) for row in rows) / len(rows),
        "majority": max(answers.values()) / len(rows),
        "longest": sum((answer in picked) / len(picked) for answer, picked in longest) / len(rows),
    }
