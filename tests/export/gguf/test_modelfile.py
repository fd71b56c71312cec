"""A Modelfile follows Ollama's grammar, and its Go template writes what the model's own template writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

from prunetune import export_run
from prunetune.export.gguf import llamacpp
from prunetune.export.gguf.modelfile import CHAT_FORMS, find_chat_form, format_modelfile, run_commands
from support.data import subwords
from support.export import reference_here, run_folder

# docs/modelfile.md of Ollama: INSTRUCTION arguments; texts in single or triple quotes; # begins a comment.
INSTRUCTIONS = {"FROM", "TEMPLATE", "SYSTEM", "PARAMETER", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES"}
NAMES = {"num_ctx", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "stop", "seed", "num_predict"}
LINE = re.compile(r'(?:#[^\n]*|([A-Z]+) (?:(\w+) )?("""(?:.|\n)*?"""|"[^"\n]*"|[^"\s][^\n]*))\n')
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "{{ d }}"},
    ],
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *CHATS[1]]


def parse(modelfile: str) -> list[tuple[str, str, str]]:
    """(instruction, parameter's name or "", text) of every line; fails on what the grammar does not have."""
    at, found = 0, []
    while at < len(modelfile):
        line = LINE.match(modelfile, at)
        assert line, modelfile[at:]
        at = line.end()
        instruction, name, text = line.groups()
        if instruction:
            assert instruction in INSTRUCTIONS
            assert (name in NAMES) if instruction == "PARAMETER" else not name
            quotes = '"""' if text.startswith('"""') else '"' if text.startswith('"') else ""
            found.append((instruction, name or "", text.removeprefix(quotes).removesuffix(quotes)))
    return found


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few forms that are written."""
    loop = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}((?:(?!\{\{).)*)", template, re.DOTALL)
    assert loop
    choice = re.compile(r'\{\{ if eq \.Role "(\w+)" \}\}(\w+)\{\{ else \}\}(\w+)\{\{ end \}\}')
    turns = []
    for message in messages:
        turn = choice.sub(lambda match, role=message["role"]: match[2] if role == match[1] else match[3], loop[1])
        turn = turn.replace("{{ .Role }}", message["role"])
        assert turn.count("{{") == 1
        turns.append(turn.replace("{{ .Content }}", message["content"]))
    return "".join(turns) + loop[2]


def tokenizer_of(template: str, bos: str) -> PreTrainedTokenizerFast:
    tokenizer = subwords()
    tokenizer.chat_template, tokenizer.bos_token = template, bos
    return tokenizer  # type: ignore[no-any-return]


TEMPLATES = {
    name: getattr(chat_template_utils, name)
    for name in ("qwen2_5_chat_template", "qwen3_chat_template", "llama3_chat_template", "gemma3_chat_template",
                 "gemma_chat_template", "phi3_chat_template", "phi3_5_chat_template")
    if hasattr(chat_template_utils, name)
}  # fmt: skip
STARTS = {"llama3": "<|begin_of_text|>", "gemma3": "<bos>", "gemma": "<bos>"}


def case(name: str) -> PreTrainedTokenizerFast:
    return tokenizer_of(TEMPLATES[name], STARTS.get(name.partition("_chat")[0], "<s>"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_template_writes_what_the_models_own_template_writes(name: str) -> None:
    tokenizer = case(name)
    found = find_chat_form(tokenizer)
    assert found is not None
    form, added = CHAT_FORMS[found[0]], found[1]
    for messages in [*CHATS, *([WITH_SYSTEM] if form.has_system else [])]:
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        has_system = messages[0]["role"] == "system"
        # Ollama puts the SYSTEM of a Modelfile before a chat that has none.
        asked = messages if has_system or not added else [{"role": "system", "content": added}, *messages]
        assert render_go(form.go_template(), asked) == own.removeprefix(str(tokenizer.bos_token))


@pytest.fixture
def source(tmp_path: Path) -> Callable[[Any, str], Any]:
    """What a Modelfile is made of: a folder with generation settings, and a tokenizer."""

    def make(tokenizer: Any, settings: str = "{}") -> Any:
        (tmp_path / "generation_config.json").write_text(settings)
        config = SimpleNamespace(max_position_embeddings=128)
        return SimpleNamespace(tokenizer=tokenizer, folder=tmp_path, config=config)

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_modelfile_follows_the_grammar(name: str, source: Callable[..., Any]) -> None:
    text, note = format_modelfile(source(case(name)), "a b.gguf")
    lines = parse(text)
    assert lines[0] == ("FROM", "", "./a b.gguf")
    assert [line[0] for line in lines].count("TEMPLATE") == 1
    assert ("PARAMETER", "num_ctx", "128") in lines
    assert ("PARAMETER", "temperature", "0") in lines
    assert note == ""


def test_sampling_of_the_checkpoint_becomes_parameters(source: Callable[..., Any]) -> None:
    settings = '{"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": "x", "repetition_penalty": 1.1}'
    lines = parse(format_modelfile(source(case("qwen3_chat_template"), settings), "a.gguf")[0])
    named = {name: text for kind, name, text in lines if kind == "PARAMETER" and name != "stop"}
    assert named == {"temperature": "0.7", "top_k": "20", "repeat_penalty": "1.1", "num_ctx": "128"}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}",
    ],
)
def test_unknown_template_is_said_and_not_guessed(template: str, source: Callable[..., Any]) -> None:
    text, note = format_modelfile(source(tokenizer_of(template, "<s>")), "a.gguf")
    assert "TEMPLATE" not in [line[0] for line in parse(text)]
    assert "none that is known here" in note


def test_texts_of_a_strangers_template_begin_no_line_of_their_own(source: Callable[..., Any]) -> None:
    attack = 'x"""\nPARAMETER num_ctx 9\nFROM evil\n"""'
    template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n{{ attack }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    for text in (attack, 'y"', '"z', "line\nFROM evil"):
        modelfile, _ = format_modelfile(source(tokenizer_of(template.replace("{{ attack }}", text), "<s>")), "a.gguf")
        lines = parse(modelfile)
        assert [line[0] for line in lines].count("FROM") == 1
        assert ("PARAMETER", "num_ctx", "9") not in lines


def test_export_writes_the_modelfile_and_says_how_to_open_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "reference_continuations", reference_here)
    run, _ = run_folder(tmp_path / "run", case("llama3_chat_template"), layout="uniform")
    result = export_run(run, "gguf")
    modelfile = result.path.with_suffix(".Modelfile")
    lines = parse(modelfile.read_text())
    assert lines[0] == ("FROM", "", f"./{result.path.name}")
    assert result.commands == run_commands(result.path, modelfile)
    assert f"llama-server -m {result.path}" in str(result)
    assert str(result).endswith(f"\n{result.path}")
    result.path.unlink()
    modelfile.write_text("mine")
    again = export_run(run, "gguf")
    assert modelfile.read_text() == "mine"
    assert "was kept" in again.notes[-1]
