"""The options of the section data: where examples come from, what their columns mean, and how they are split."""

from dataclasses import dataclass
from typing import Literal

from prunetune.config.fields import option, section, sources


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """What columns mean, for rows of no known shape: a column by its name, or a Jinja2 template as in a suite."""

    prompt: str = option("", "Column of the prompt, or a template such as '{{ title }}: {{ body }}'.")
    completion: str = option("", "Column of the answer, or a template.")
    text: str = option("", "Column of a text that is tuned on as a whole, or a template.")
    messages: str = option("", "Column of the messages of a chat, or an expression.")
    system: str = option("", "Column of the system prompt, or a template.")
    tools: str = option("", "Column of the tools of a chat, or an expression.")
    choices: str = option("", "Column of the list of choices, or an expression such as options.text or [a, b].")
    answer: str = option("", "Column of the right choice (index, letter or text), or an expression.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from and how they are split. A source is a file, a glob, a hub name or `demo`.

    A hub name is owner/name, owner/name:config@split or owner/name:config@split#revision.
    """

    train: tuple[str, ...] = sources("Sources to tune on; 'a.jsonl*2' doubles a source's weight.")
    search: tuple[str, ...] = sources("Sources for the pruning decision; default: split off train.")
    valid: tuple[str, ...] = sources("Sources that validations score during the run; default: split off train.")
    test: tuple[str, ...] = sources("Sources for the reported scores; default: split off train.")
    distill_texts: tuple[str, ...] = sources(
        "Unlabelled text for distillation: the student matches the teacher on it, so that general and domain knowledge "
        "is kept. Needs distill.teacher.",
        formerly="texts",
    )
    distill_texts_share: float = option(
        0.3, "Share of a batch's examples that are from data.distill_texts.", gt=0, le=0.9, formerly="texts_share"
    )
    guard: tuple[str, ...] = sources(
        "Sources of general knowledge that validations score, never tuned on: texts, or rows with choices."
    )
    general: tuple[str, ...] = sources(
        "Sources scored at the end beside data.test, never tuned on and kept out of the means: what the model knows "
        "outside its domain."
    )
    columns: ColumnsConfig = section(ColumnsConfig)
    bad_rows: Literal["error", "drop"] = option(
        "error", "What to do with rows that cannot be used; drop leaves them out and says how many, and why."
    )
    root: str = option(
        "", "Folder that relative sources start from; default: the folder of the recipe that names them.", is_path=True
    )
    search_share: float = option(0.1, "Share of train that becomes search, if data.search is not given.", gt=0, le=0.5)
    valid_share: float = option(0.05, "Share of train that becomes valid, if data.valid is not given.", gt=0, le=0.5)
    test_share: float = option(0.1, "Share of train that becomes test, if data.test is not given.", gt=0, le=0.5)
    group: str = option(
        "",
        "Row field whose rows stay in one split (patient, category); only texts, guard and general may lack it.",
    )
    template: Literal["auto", "chat", "raw"] = option(
        "auto", "chat: the tokenizer's template; raw: prompt then completion; auto: chat for rows with messages."
    )
    loss: Literal["assistants", "last", "all"] = option(
        "assistants",
        "Tokens of a row that are tuned on. assistants: answers, in a chat those of every turn; last: the last answer; "
        "all: every token. A message with weight 0 is left out.",
    )
    max_length: int = option(0, "Longest example in tokens; 0: the model's context.", ge=0)
    too_long: Literal["error", "truncate", "drop"] = option(
        "error", "What to do with longer examples; truncate cuts the beginning of the prompt."
    )
    overlap: Literal["error", "drop"] = option(
        "error", "What to do with rows that are in two splits; drop keeps them in the one nearer to test."
    )
