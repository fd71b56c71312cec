"""What `prunetune data` prints: what the rows of sources are read as, three of them, lengths, what is too long."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.text import Text

from prunetune.config.recipe import DataConfig
from prunetune.data.sources import read_records_with_notes
from prunetune.errors import DataError
from prunetune.utils.untrusted import printable

if TYPE_CHECKING:
    from prunetune.data.encoding import Example

SHOWN_ROWS = 3
LOSS_MARKS = "⟦⟧"  # around what the loss counts, which is also coloured in a terminal
END_OF_TEXT = "␃"  # without a model


class _Characters:
    """Stands in for the tokenizer of a model: a token is a character."""

    bos_token = bos_token_id = chat_template = None
    eos_token, eos_token_id, is_fast = END_OF_TEXT, ord(END_OF_TEXT), False

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def render_data(
    sources: Sequence[str], config: DataConfig, model: str = "", *, trust_remote_code: bool = False
) -> Iterator[Text]:
    """Lines on rows that are read as data.train would be; rows that are too long are counted and not refused."""
    from prunetune.data.encoding import encode
    from prunetune.evaluation.scoring_mode import context_length
    from prunetune.model.loading import load_meta_model, load_tokenizer

    if not sources:
        raise DataError("no source is named; name a file, a glob, a hub name, or demo")
    records, notes = read_records_with_notes(sources, config, "train")
    tokenizer: Any = _Characters()
    limit, unit = config.max_length or sys.maxsize, "characters"
    if model:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        context = context_length(load_meta_model(model, trust_remote_code=trust_remote_code))
        limit, unit = min(config.max_length or context, context), "tokens"
    config = replace(config, template=config.template if model else "raw", max_length=0)
    examples = encode(records, tokenizer, config, sys.maxsize).examples
    for written, note in notes.items():
        yield Text(printable(f"{written}: {note}"))
    for record, example in list(zip(records, examples, strict=True))[:SHOWN_ROWS]:
        row = Text(printable(f"\n{record.source}\n"), style="bold")
        choices = f"\nchoices: {', '.join(map(repr, record.choices))}" if record.choices else ""
        yield Text.assemble(row, marked_text(example, tokenizer), printable(choices))
    lengths = [len(example.token_ids) for example in examples]
    too_long = f"{sum(length > limit for length in lengths):,} are longer than {limit:,} (data.too_long)"
    half = f"{min(lengths):,} to {max(lengths):,}, half have {median(lengths):,.0f} at most"
    yield Text(f"\n{unit} of a row: {half}; {too_long if model else '--model M shows its tokens'}")


def marked_text(example: Example, tokenizer: Any) -> Text:
    """The tokens of an example, decoded; what the loss counts is marked and coloured."""
    from prunetune.data.batches import IGNORE_INDEX, collate

    batch, text = collate([example], 0), Text()
    tokens = zip(batch.input_ids[0].tolist(), (batch.labels[0] != IGNORE_INDEX).tolist(), strict=True)
    for has_loss, part in groupby(tokens, key=lambda token: token[1]):
        decoded = printable(tokenizer.decode([token for token, _ in part]))
        text.append(decoded.join(LOSS_MARKS) if has_loss else decoded, style="green" if has_loss else "")
    return text
