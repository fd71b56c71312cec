"""A Modelfile beside a .gguf file, for Ollama: template, stop words, parameters (its docs/modelfile.md, template.md).

Ollama's templates are Go's, and are not made from Jinja by translation. Each known way to write a chat is tried: it is
taken if it writes the same texts as the tokenizer's own template.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.data.chat_template import TurnEnd
from prunetune.errors import DataError
from prunetune.export.source import ExportSource
from prunetune.utils.untrusted import parse_json, printable, read_text

Messages = Sequence[Mapping[str, str]]
# The texts must not be white space, which templates strip, and no word that a template writes itself.
SYSTEM = {"role": "system", "content": "Probe zero."}
CHAT = [
    {"role": "user", "content": "Probe one?"}, {"role": "assistant", "content": "Probe two!"},
    {"role": "user", "content": "Probe three?"},
]  # fmt: skip
# Ollama's parameter -> the key of generation_config.json.
PARAMETERS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repeat_penalty": "repetition_penalty"}
QUOTES = '"""'
MOST_CONTEXT = 8192  # tokens: Ollama allocates the cache of all of them at once


@dataclass(frozen=True)
class ChatForm:
    """How a family of templates writes a turn; `{role}` stands for its role."""

    begin: str
    end: str
    assistant: str = "assistant"  # the role's name in turns
    has_system: bool = True  # else a system message is a user's turn here, and part of the first one in the original

    def render(self, messages: Messages) -> str:
        """The messages, and the beginning of an answer."""
        names = {"assistant": self.assistant} | ({} if self.has_system else {"system": "user"})
        turns = [(names.get(turn["role"], turn["role"]), turn["content"]) for turn in messages]
        text = "".join(f"{self.begin.replace('{role}', role)}{content}{self.end}" for role, content in turns)
        return text + self.begin.replace("{role}", self.assistant)

    def go_template(self) -> str:
        """The same as Ollama reads it."""
        role = "{{ .Role }}"
        if not self.has_system:
            role = f'{{{{ if eq .Role "assistant" }}}}{self.assistant}{{{{ else }}}}user{{{{ end }}}}'
        turn = f"{self.begin.replace('{role}', role)}{{{{ .Content }}}}{self.end}"
        return f"{{{{ range .Messages }}}}{turn}{{{{ end }}}}{self.begin.replace('{role}', self.assistant)}"


CHAT_FORMS: Mapping[str, ChatForm] = {
    "ChatML": ChatForm("<|im_start|>{role}\n", "<|im_end|>\n"),
    "Llama 3": ChatForm("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "Gemma": ChatForm("<start_of_turn>{role}\n", "<end_of_turn>\n", assistant="model", has_system=False),
    "Phi-3": ChatForm("<|{role}|>\n", "<|end|>\n"),
    "Granite": ChatForm("<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>\n"),
}


def find_chat_form(tokenizer: Any) -> tuple[str, str] | None:
    """The name of the form that writes what the template does, and the system text that the template adds by itself."""

    def render(messages: Messages) -> str:
        """The text of a chat; "" if the template writes none, as some do for a system message."""
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except Exception:  # whatever the template of a stranger raises
            return ""

    plain, with_system = render(CHAT), render([SYSTEM, *CHAT])
    for name, form in CHAT_FORMS.items():
        own, own_with_system = form.render(CHAT), form.render([SYSTEM, *CHAT])
        # The start of a text is added by the runtime, unless it begins a turn.
        start = "" if own.startswith(tokenizer.bos_token or "") else str(tokenizer.bos_token)
        if form.has_system and with_system.removeprefix(start) != own_with_system:
            continue
        text = plain.removeprefix(start)
        added = text.removesuffix(own).removeprefix(form.begin.replace("{role}", "system")).removesuffix(form.end)
        if text == (form.render([{"role": "system", "content": added}, *CHAT]) if added else own):
            return name, added
    return None


def format_modelfile(source: ExportSource, file_name: str) -> tuple[str, str]:
    """The Modelfile of a .gguf file in the same folder, and a note if it lacks the model's chat template."""
    tokenizer, settings, lines, note = source.tokenizer, {}, [f"FROM {_quote(f'./{file_name}')}"], ""
    if (file := source.folder / "generation_config.json").is_file():
        settings = parse_json(read_text(file))
    stops = {tokenizer.eos_token: None}
    if not tokenizer.chat_template:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    elif form := find_chat_form(tokenizer):
        lines.append(f"TEMPLATE {_quote(CHAT_FORMS[form[0]].go_template())}")
        lines += [f"SYSTEM {_quote(form[1])}"] if _is_quotable(form[1]) else []
    else:
        note = "the Modelfile has no TEMPLATE: the model's chat template is none that is known here; write one by hand"
        lines.append("# TEMPLATE: the model's chat template is none that prunetune knows in Ollama's language.")
    if tokenizer.chat_template:
        try:
            stops[TurnEnd.of(tokenizer).stop] = None
        except DataError:  # the template writes no chat of two turns
            note = note or "the Modelfile has no stop word of a turn: the chat template does not write one"
    lines += [f"PARAMETER stop {_quote(stop)}" for stop in stops if _is_quotable(stop)]
    lines.append(f"PARAMETER num_ctx {min(source.config.max_position_embeddings, MOST_CONTEXT)}")
    sampled = {name: settings[key] for name, key in PARAMETERS.items() if isinstance(settings.get(key), int | float)}
    if not settings.get("do_sample"):
        sampled = {"temperature": 0}  # as the model was scored
    lines += [f"PARAMETER {name} {value}" for name, value in sampled.items()]
    return printable("\n".join(lines) + "\n"), note


def run_commands(path: Path, modelfile: Path) -> tuple[str, ...]:
    """How llama.cpp, Ollama and LM Studio open the file."""
    file, beside = shlex.quote(str(path)), shlex.quote(str(modelfile))
    name = (
        "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in path.stem).strip("-") or "model"
    )
    return (
        f"llama-server -m {file}",
        f"ollama create {name.lower()} -f {beside} && ollama run {name.lower()}",
        f"lms import --symbolic-link {file}  # LM Studio",
    )


def _is_quotable(text: str | None) -> bool:
    return bool(text) and QUOTES not in str(text) and '"' not in (str(text)[0], str(text)[-1])


def _quote(text: str) -> str:
    return f'"{text}"' if '"' not in text and "\n" not in text else f"{QUOTES}{text}{QUOTES}"
