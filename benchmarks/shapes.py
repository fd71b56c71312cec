"""How many shapes of packed rows a run records on a GPU, and how much of its rows is padding: what `data.packs` weighs.

    python benchmarks/shapes.py recipes/legal.yaml [recipes/healthcare.yaml] --data DATA --model MODEL.gguf

Needs no GPU: it packs the batches that the run's steps would see. A shape's first pass runs as it comes and its second
is recorded, a quarter and a third of a second for SmolLM2-135M (`benchmarks/steps.py`), where a row takes some 6
microseconds a token. Prints JSON, one line a recipe.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunetune.config.recipe import RunConfig, load_recipe
from prunetune.data.batches import BatchStream, PackedBatch, group_for_packing, pack_examples, unlabelled_examples
from prunetune.data.encoding import Example
from prunetune.pipeline.prepare import RunContext, prepare
from prunetune.train.schedule import build_schedule
from prunetune.utils.console import make_console
from prunetune.utils.determinism import derive_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    told = parser.parse_args()
    for recipe in told.recipes:
        with tempfile.TemporaryDirectory() as place:
            config = load_recipe(recipe, {"model": told.model, "out": f"{place}/run", "data": {"root": told.data}})
            print(json.dumps({"recipe": recipe.name} | counts(config)), flush=True)


def counts(config: RunConfig) -> dict[str, object]:
    """Over all steps, those of the search twice."""
    setting = prepare(config, resume=False, console=make_console(1), changeable=())
    seen, real, whole = Counter[tuple[object, ...]](), 0, 0
    for kind, batch in passes(setting):
        for row in rows(batch, config):
            seen[kind, *row.shape_key] += 1
            real += int(row.unpadded_length)
            whole += row.input_ids.numel()
    recorded = sum(count > 1 for count in seen.values())
    return {"shapes": len(seen), "recorded": recorded, "tokens": real, "padding": round(1 - real / whole, 3)}


def passes(setting: RunContext) -> Iterator[tuple[str, Sequence[Example]]]:
    """What a run's passes see, in their order."""
    config, schedule = setting.config, build_schedule(setting.config)
    train = stream(setting, "train", config.train.batch_size)
    search = stream(setting, "search", config.search.batch_size)
    for index in range(config.search.init_batches):
        yield "slopes", search.batch_at(index)
    for step in range(schedule.steps):
        if step < schedule.search:
            yield "slopes", search.batch_at(step)
        yield ("tune gated" if step < schedule.settle else "tune"), train.batch_at(step)


def stream(setting: RunContext, split: str, size: int) -> BatchStream:
    """With the texts of a teacher."""
    examples, texts = setting.encoded[split].examples, setting.encoded.get("texts")
    if texts:
        examples += unlabelled_examples(texts.examples, examples, setting.config.data.distill_texts_share)
    return BatchStream(examples, size, derive_seed(setting.config.seed, split))


def rows(batch: Sequence[Example], config: RunConfig) -> Iterator[PackedBatch]:
    for part in group_for_packing(batch, config.train.micro_tokens):
        yield pack_examples(part, 0, max_sequences=len(batch))


if __name__ == "__main__":
    main()
