"""Accuracies that need no language model, for each task of a domain over ALL its test rows, as JSON of numbers alone.

    python benchmarks/quality/floors.py DATA benchmarks/quality/results/floors.json

chance, majority and longest are those of `prunetune.evaluation.floors`, from the test rows themselves. "words" is a bag
of words: logistic regression on TF-IDF of words and pairs of words, fitted on the train rows, its C chosen on valid; it
answers with the likeliest label among the row's choices. It is left out where right answers are no labels of train.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record
from prunetune.data.sources import SplitName, read_records
from prunetune.evaluation.floors import cheap_floors
from prunetune.utils.environment import installed_commit
from prunetune.utils.files import write_text

DOMAINS = ("legal", "healthcare", "general")
STRENGTHS = (1.0, 10.0, 100.0)  # values of C to choose from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="its domains are folders of tasks")
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    made = {"date": date.today().isoformat(), "commit": installed_commit()}
    found = {"made": made, "domains": {name: floors_of_domain(arguments.data / name) for name in DOMAINS}}
    write_text(arguments.results, json.dumps(found, indent=1) + "\n")


def floors_of_domain(folder: Path) -> dict[str, dict[str, float]]:
    """{task: {"rows": of test, "tuned": whether it has train rows, floor: accuracy}} of the tasks with choices."""
    found = {}
    for file in sorted(folder.glob("*/test.jsonl")):
        train, valid, test = (rows_of(file, split) for split in ("train", "valid", "test"))
        if floors := cheap_floors(test):
            if {row.completion for row in test} <= {row.completion for row in train}:
                floors["words"] = bag_of_words(train, valid, test)
            rounded = {name: round(value, 5) for name, value in floors.items()}
            found[file.parent.name] = {"rows": len(test), "tuned": bool(train), **rounded}
    return found


def rows_of(test_file: Path, split: SplitName) -> Sequence[Record]:
    """The rows of another split of the same task, none where it has none."""
    file = test_file.with_name(f"{split}.jsonl")
    return read_records([str(file)], DataConfig(), split) if file.exists() else ()


def bag_of_words(train: Sequence[Record], valid: Sequence[Record], test: Sequence[Record]) -> float:
    """Accuracy (0..1) on test of the classifier that is the best on valid."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    inputs, labels = vectorizer.fit_transform([row.prompt for row in train]), [row.completion for row in train]
    models = [LogisticRegression(C=strength, max_iter=1000).fit(inputs, labels) for strength in STRENGTHS]

    def accuracy(model: LogisticRegression, rows: Sequence[Record]) -> float:
        probabilities = model.predict_proba(vectorizer.transform([row.prompt for row in rows]))
        right = 0
        for row, values in zip(rows, probabilities, strict=True):
            by_label = dict(zip(model.classes_, values, strict=True))
            right += row.completion == max(row.choices, key=lambda choice: by_label.get(choice, 0.0))
        return right / len(rows)

    return accuracy(max(models, key=lambda model: accuracy(model, valid)), test)


if __name__ == "__main__":
    main()
