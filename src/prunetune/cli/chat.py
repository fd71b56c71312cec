"""`prunetune chat`: a conversation with a run's model, and with its dense one beside it, streamed to the terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from prunetune.cli.chat_options import ChatOptions
from prunetune.data.batches import pad_token_id
from prunetune.data.encoding import encode_prompts
from prunetune.data.records import Message, Record
from prunetune.errors import DataError
from prunetune.evaluation.generation import generate_ids
from prunetune.evaluation.scoring_mode import evaluation_mode, max_prompt_tokens
from prunetune.evaluation.suites.open_model import reference_of_run, resolve_checkpoint
from prunetune.model.loading import load_model_and_tokenizer, pick_device, pick_dtype
from prunetune.utils.untrusted import printable, shorten

log = logging.getLogger(__name__)
SIDE_BY_SIDE_COLUMNS = 100  # a terminal that is narrower shows one answer after the other
NEW, HELP = "/new", "Ctrl-C stops an answer, Ctrl-D ends the chat, /new forgets the conversation."


@dataclass
class ChatModel:
    """A model with its side of the conversation."""

    title: str
    model: Any
    tokenizer: Any
    options: ChatOptions
    turns: list[Message] = field(default_factory=list)

    @property
    def uses_template(self) -> bool:
        """Whether questions are turns of a chat; else each is a text to be continued."""
        return self.options.template == "chat" or bool(self.options.template == "auto" and self.tokenizer.chat_template)

    def answer(self, question: str, show: Callable[[str], None]) -> str:
        """Generate the greedy answer, each part of it shown as it comes; returns how much and how fast, in words.

        Turns that no longer fit into the context are forgotten, oldest first. Ctrl-C ends the answer there. Raises
        `DataError` for a question that does not fit, or that the template refuses.
        """
        limit = max_prompt_tokens(self.model, self.options.max_new_tokens)
        system = [Message("system", self.options.system)] if self.options.system else []
        while True:
            turns = (*system, *self.turns, Message("user", question))
            record = Record(kind="completion", prompt=question, source="the question")
            if self.uses_template:
                record = Record(kind="chat", messages=turns, source="the question")
            (ids,) = encode_prompts([record], self.tokenizer)
            if len(ids) <= limit:
                break
            if not self.turns or not self.uses_template:
                raise DataError(
                    f"the question has {len(ids)} tokens, and the context leaves room for {limit}: shorten it"
                )
            del self.turns[:2]
        streamer = _Streamer(self.tokenizer, show)
        started = time.monotonic()
        with evaluation_mode(self.model):
            try:
                generate_ids(
                    self.model, self.tokenizer, [ids],
                    chats=[self.uses_template], pad_id=pad_token_id(self.tokenizer), tick=lambda _: None,
                    max_new_tokens=self.options.max_new_tokens, max_tokens=sys.maxsize, streamer=streamer,
                )  # fmt: skip
            except KeyboardInterrupt as stop:
                streamer.end()
                if stop.args:  # told to end by another process, which means the chat
                    raise
        seconds = time.monotonic() - started
        self.turns += [Message("user", question), Message("assistant", streamer.text)]
        return f"{streamer.tokens} tokens, {streamer.tokens / seconds:.1f} a second"


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers has no types here
    """Whole words as they come, without special tokens."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text, self.tokens = show, "", -1  # the prompt comes first

    def put(self, value: Any) -> None:
        self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.show(printable(text))


def chat(run: str, options: ChatOptions) -> int:
    """Ask questions from the terminal, or from a pipe, in which each line is a question of its own.

    `run`: a run, model folder, hub name or .gguf file. Returns how many questions could not be asked. Raises a
    `PrunetuneError` before the first question.
    """
    against = options.against
    named = [("pruned" if against == "dense" else shorten(run), resolve_checkpoint(run))]
    if against == "dense":
        reference, words = reference_of_run(run)
        named.append(("dense, untuned" if "untuned" in words else "dense, tuned", reference))
        log.info("dense is %s: %s", words, reference)
    elif against:
        named.append((shorten(against), resolve_checkpoint(against)))
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    models = []
    for title, name in named:
        log.info("loading %s", name)
        loaded = load_model_and_tokenizer(name, device=device, dtype=dtype, trust_remote_code=options.trust_remote_code)
        models.append(ChatModel(title, loaded.model, loaded.tokenizer, options))
    if not all(model.uses_template for model in models):
        log.info("without a chat template, what you write is continued as a text, and nothing is remembered")
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False)
    ask = (
        _ask_in_columns
        if is_interactive and len(models) > 1 and console.width >= SIDE_BY_SIDE_COLUMNS
        else _ask_in_turn
    )
    if is_interactive:
        console.print(HELP, style="dim")
    failures = 0
    for question in _typed_questions() if is_interactive else _piped_questions():
        if question.strip() == NEW or not is_interactive:
            for model in models:
                model.turns.clear()
        if question.strip() in ("", NEW):
            continue
        try:
            ask(models, question, console, is_interactive)
        except DataError as refused:
            failures += not is_interactive
            log.error("%s", refused)
    return failures


def _typed_questions() -> Iterator[str]:
    import readline  # noqa: F401 - lines that are typed can be edited, and the arrow keys bring earlier ones back

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()  # noqa: T201 - the shell's prompt begins a line
            return


def _piped_questions() -> Iterator[str]:
    getattr(sys.stdin, "reconfigure", lambda **_: None)(errors="replace")
    for line in sys.stdin:
        yield line.rstrip("\n")


def _ask_in_turn(models: Sequence[ChatModel], question: str, console: Console, is_interactive: bool) -> None:
    """One answer after the other, each under the name of its model if there are several."""
    for model in models:
        if len(models) > 1:
            console.print(f"{model.title}:", style="bold")
        speed = model.answer(question, _write)
        console.print()
        if is_interactive:
            console.print(speed, style="dim")


def _write(part: str) -> None:
    sys.stdout.write(part)
    sys.stdout.flush()


def _ask_in_columns(models: Sequence[ChatModel], question: str, console: Console, is_interactive: bool) -> None:
    """Answers side by side: their last lines while they grow, then all of them."""
    texts, speeds = ["" for _ in models], ["" for _ in models]

    def columns(max_lines: int = 0) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        table.width = console.width - 3  # the terminal writes ^C behind the last line, which must not wrap
        cells = []
        for text in texts:
            table.add_column(ratio=1)
            lines = Text(text).wrap(console, table.width // len(models) - 2)
            cells.append(Text("\n").join(lines[-max_lines:]))
        table.add_row(*(Text(model.title, style="bold") for model in models))
        table.add_row(*cells)
        table.add_row(*(Text(speed, style="dim") for speed in speeds))
        return table

    with Live(console=console, transient=True, refresh_per_second=8) as live:
        for index, model in enumerate(models):

            def show(part: str, index: int = index) -> None:
                texts[index] += part
                live.update(columns(console.height - 5))

            speeds[index] = model.answer(question, show)
    console.print(columns())
