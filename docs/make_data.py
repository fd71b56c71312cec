"""Write docs/guides/data.md, with a row of every shape as it is read: `python docs/make_data.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunetune.cli.data_view import marked_text
from prunetune.config.recipe import DataConfig
from prunetune.data.encoding import encode
from prunetune.data.sources import SourceRow

TARGET = Path(__file__).parent / "guides" / "data.md"
TEMPLATE = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
PARTS = ["heart", "lung"]
CHAT = [{"role": "user", "content": "Which part?"}, {"role": "assistant", "content": "heart"}]
SHAREGPT = [{"from": "human", "value": "Which part?"}, {"from": "gpt", "value": "heart"}]
# A row of every shape, under the name by which people know it.
ROWS: dict[str, dict[str, Any]] = {
    "prompt and completion": {"prompt": "Which part?", "completion": " heart"},
    "choices": {"prompt": "Which part?", "choices": [" heart", " lung"], "answer": 0},
    "text": {"text": "The heart beats."},
    "chat (OpenAI, TRL)": {"messages": CHAT},
    "chat with a system column": {"messages": CHAT, "system": "Be brief."},
    "chat as JSON text": {"messages": json.dumps(CHAT)},
    "parts of content": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Which part?"}]}, CHAT[1]]},
    "ShareGPT": {"conversations": SHAREGPT, "id": "c0"},
    "TRL, conversational": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "Alpaca": {"instruction": "Name the part.", "input": "It beats.", "output": "heart"},
    "Dolly": {"instruction": "Name the part.", "context": "", "response": "heart", "category": "qa"},
    "question and answer": {"question": "Which part?", "answer": "heart"},
    "question in a context": {"context": "It beats.", "question": "Which part?", "answer": "heart"},
    "OpenOrca": {"id": "1", "system_prompt": "Be brief.", "question": "Which part?", "response": "heart"},
    "maths with solutions": {"problem": "1 + 1", "solution": "It is 2.", "answer": "2"},
    "MedMCQA": {"question": "Which part?", "opa": "heart", "opb": "lung", "cop": 0, "subject_name": "Anatomy"},
    "MMLU": {"question": "Which part?", "choices": PARTS, "answer": 0, "subject": "anatomy"},
    "MMLU as CSV": {"question": "Which part?", "A": "heart", "B": "lung", "answer": "A"},
    "ARC, CommonsenseQA": {
        "question": "Which part?",
        "choices": {"label": ["A", "B"], "text": PARTS},
        "answerKey": "A",
    },
    "MedQA": {"question": "Which part?", "options": {"A": "heart", "B": "lung"}, "answer_idx": "A"},
    "preference": {"prompt": "Which part?", "chosen": "heart", "rejected": "lung"},
    "preference, conversational": {"prompt": "Which part?", "chosen": CHAT, "rejected": [CHAT[0]]},
    "labelled for KTO": {"prompt": "Which part?", "completion": " heart", "label": True},
}
INTRODUCTION = """\
<!-- Written by docs/make_data.py; change it there. -->
# Data

A source is a file, a glob, a Hugging Face data set (`owner/name`, `owner/name:config`, `owner/name@split`) or
`demo`. See what it is read as before you tune on it:

```bash
prunetune data tickets.jsonl
prunetune data tickets.jsonl --model Qwen/Qwen3-0.6B --data.max-length 1024
```

This prints a line on each source, three rows, and how long rows are. What the loss counts stands between ⟦ and ⟧,
in colour on a terminal. With `--model`, rows are the model's tokens, decoded again, and rows beyond its context are
counted.

## Formats

| format | endings | |
|---|---|---|
| JSON lines, JSON | `.jsonl`, `.ndjson`, `.json` | one object a line, or a list of objects (or `{"data": [...]}`) |
| CSV | `.csv`, `.tsv` | the first line names the columns and tells what separates them: comma, semicolon, bar or tab |
| Excel | `.xlsx` | as CSV. One sheet holds the rows, and it needs `pip install openpyxl` |
| Parquet, Arrow | `.parquet`, `.arrow`, `.feather` | columns of any nesting |

Text formats may be compressed: `.gz`, `.zst`, `.bz2`, as in `rows.jsonl.gz`. They are UTF-8 or, with a byte order
mark, UTF-16. Other text is read as Windows-1252 (or Latin-1), and a warning names a line. Line ends of Windows
become those of Unix. Two columns of one name are refused.

## Shapes of rows

A row is told by its columns, in upper or lower case. If they are not simply `prompt`, `completion`, `messages` or
`text`, a run says in one line what they are read as. A column that is not read is named once, with its count: `not
used: label (12 rows)`.

"""
AFTER = """
A line end is put between prompt and answer where neither has white space there. If the columns are `prompt` and
`completion`, or a template, nothing is added. Letters count choices from A, numbers from 0. A letter or number that
is the text of a choice means that choice. Of `chosen` and `rejected`, `chosen` is tuned on. OpenAI's older `functions`
and `function_call` count as tools and calls.

## Other columns

`data.columns` says what columns mean. Each entry is the name of a column or a Jinja2 template, as in a
[suite](evaluate.md). `choices` and `answer` may be expressions:

```yaml
data:
  train: tickets.csv
  columns: {prompt: "Ticket: {{ subject }}\\n{{ body }}\\nTeam:", completion: " {{ team }}"}
```

It holds for rows that have one of these columns. Rows without any of them are read by their shape.

## Splits, weights and mixtures

`file*2` counts every row of a file double, and `file*0.5` half.

Splits that are not given are split off train. The same seed gives the same splits, whatever the order of rows. Rows
that share a question, or the value of the field named by `data.group`, are in one split. A question is the same with
a completion, with choices and as a user's only message. With two lists of choices it is two.

The same question in two given splits is an error. With `data.overlap: drop` it is kept in test, else in valid, else
in search, and dropped from the others. `data.distill_texts` may repeat train, but what is split off train is left out
of it. The manifest has the SHA-256 of every split.

`task` and `id` of a row are optional. Without `task`, rows of a file `X/train.jsonl` are task X, and rows of any
other file have the file's name as task. In CSV, `choices` and `messages` hold JSON. Digits that could be both an
index and the text of a choice are refused.

## What the loss counts

The loss counts on answers only, and on all of a `text`. In a chat it counts on the answer of every turn. `data.loss:
last` counts a chat's last answer only, `all` every token. An assistant message with `weight: 0` is read and not tuned
on.

Rows with `messages` use the tokenizer's chat template, which also writes their `tools` and `tool_calls`. Such rows
are refused if the template writes no tools. With `data.template: chat`, prompts use the template too. Such an answer
ends where the template ends a turn, in scores and when the model is served. Without a template, the completion
follows the prompt directly, so begin it with the space that belongs between them.

## Rows that cannot be used

A row without an answer, a line of broken JSON or an image stops a run before it begins. The error says how many
rows there are and shows the first three, with [`report.samples: off`](security.md#rows-of-your-data) only their lines.
`data.bad_rows: drop` leaves them out and says the same in a warning.
Rows that the model's chat template refuses are counted in the same way. Correct or remove them: `drop` does not see
them. A name, a system message or reasoning that the template leaves out is named in a warning.

## The legal and healthcare sets

[recipes/legal.yaml](../../recipes/legal.yaml) and [recipes/healthcare.yaml](../../recipes/healthcare.yaml) name their
files from `data.root`. A clone holds a made-up sample in the same folders and columns, which needs no network:

```bash
prunetune run recipes/legal.yaml --data.root examples/data --train.steps 20 --out runs/sample
```

Scores on it say nothing about a model. Our figures are from public sets: opinions, bills, contracts, medical questions
and abstracts. `python benchmarks/data/build.py --out DATA` fetches them from their owners and picks the rows that we
used. Then `--data.root DATA` takes them. [benchmarks/data](../../benchmarks/data/README.md) has their licences and
owners.
"""


def tokenizer() -> Any:
    """A token a byte, and a small chat template."""
    special = {token: index for index, token in enumerate(("<start>", "<end>", "</s>"))}
    letters = {letter: index + len(special) for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=special | letters, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(special))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")  # noqa: S106
    wrapped.chat_template = TEMPLATE
    return wrapped


def page() -> str:
    """The text of the page."""
    lines = ["| known as | a row | is read as | as a model sees it |", "|---|---|---|---|"]
    made = tokenizer()
    for name, fields in ROWS.items():
        row = SourceRow(fields, "row", "row", "task")
        shaped = row.shaped()
        (example,) = encode([row.to_record(shaped=shaped)], made, DataConfig(), 1000).examples
        unused = f"; not used: {', '.join(shaped.unused)}" if shaped.unused else ""
        seen = marked_text(example, made).plain.replace("\n", "⏎")
        cells = (name, f"`{json.dumps(fields)}`", f"`{shaped.shape}{unused}`", f"`{seen}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return INTRODUCTION + "\n".join(lines) + "\n" + AFTER


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
