"""The tokenizer's keys of a GGUF file: copied from the base model's GGUF if there is one, else from tokenizer.json.

llama.cpp does not read the pattern that splits a text before merging; it has a list of named patterns. So the pattern
is looked up, and one that is not in the table is refused: with a wrong name the tokenizer would be almost right.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from prunetune.errors import ModelError
from prunetune.export.source import ExportSource
from prunetune.model.loading import gguf_file
from prunetune.utils.failures import reading_model_files
from prunetune.utils.untrusted import parse_json, read_text

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# (Patterns that split a text one after another, whether whole words are looked up before merging)
# -> the name for tokenizer.ggml.pre.
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",  # also StarCoder 2, Granite 3, Command R
    ((CL100K % "{1,3}",), True): "llama-bpe",  # Llama 3, SmolLM3
    ((CL100K % "{1,3}",), False): "dbrx",  # OLMo 2, Phi-4
    ((CL100K % "",), False): "qwen2",  # Qwen 2 and 3
    ((O200K % ("", "", ""),), True): "tekken",  # Mistral NeMo
    ((O200K % (SHORT, SHORT, "{1,3}"),), False): "gpt-4o",
}


def add_tokenizer(writer: gguf.GGUFWriter, source: ExportSource) -> str:
    """Write the keys; returns a note on their origin. Raises `ModelError` if llama.cpp cannot open the tokenizer."""
    base = gguf_file(source.base) if source.base else None
    if base is None or not base.is_file():
        return _write_from_tokenizer_json(writer, source)
    with reading_model_files(f"{base}: cannot be read as GGUF", "check the file or fetch it again"):
        reader = gguf.GGUFReader(base)
    fields = {name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    tokens = len(fields["tokenizer.ggml.tokens"].data)
    if tokens != source.config.vocab_size:
        raise ModelError(f"{base} has {tokens} tokens and the model {source.config.vocab_size}: name the right base")
    for name, field in fields.items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    return f"tokenizer keys of {base.name}"


def _write_from_tokenizer_json(writer: gguf.GGUFWriter, source: ExportSource) -> str:
    file = source.folder / "tokenizer.json"
    with reading_model_files(f"{file} cannot be read, and GGUF needs it", "save a fast tokenizer into the folder"):
        values = parse_json(read_text(file))
        kind = values["model"]["type"]
    if kind != "BPE":
        raise ModelError(f"{file}: a {kind} tokenizer cannot be written as GGUF: export onnx")
    is_sentencepiece = bool(values["model"].get("byte_fallback"))  # ▁ for a space
    pre_tokenizer = "default" if is_sentencepiece else pre_tokenizer_name(values, file)
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    # The token and its type for each row of the embedding; an added token without a row is left out.
    rows = source.config.vocab_size
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [int(gguf.TokenType.UNUSED)] * rows
    added = {token["id"]: token for token in values.get("added_tokens", ())}
    vocabulary = {index: token for token, index in values["model"]["vocab"].items()}
    if max(vocabulary, default=0) >= rows:
        raise ModelError(
            f"{source.folder}: the tokenizer has {max(vocabulary) + 1} tokens, the embedding {rows} rows: put the "
            "tokenizer of this model into the folder"
        )
    vocabulary |= {index: token["content"] for index, token in added.items() if index < rows}
    for index, token in vocabulary.items():
        tokens[index] = token
        types[index] = int(gguf.TokenType.NORMAL)
        if is_sentencepiece and len(token) == 6 and token.startswith("<0x"):
            types[index] = int(gguf.TokenType.BYTE)
        if index in added:
            special = added[index]["special"]
            types[index] = int(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if is_sentencepiece:
        ranks: dict[str, int] = {}  # SentencePiece merges the pair with the best score first: minus the rank
        for rank, merge in enumerate(values["model"]["merges"]):
            ranks.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1), rank)
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
        steps = json.dumps([values.get("normalizer"), values.get("pre_tokenizer")])
        prefixes = ('"Prepend"', '"prepend_scheme": "first"', '"prepend_scheme": "always"')
        writer.add_add_space_prefix(any(prefix in steps for prefix in prefixes))
    special = gguf.SpecialVocab(source.folder, load_merges=not is_sentencepiece, n_vocab=len(tokens))
    if not is_sentencepiece and not special.merges:
        raise ModelError(
            f"{file} has no merges, and llama.cpp opens no byte-level tokenizer without them: save one that has them "
            "into the folder, or export onnx"
        )
    special.add_to_gguf(writer, quiet=True)
    rowless = [token["content"] for token in values.get("added_tokens", ()) if token["id"] >= len(tokens)]
    left_out = f"; left out, as the embedding has no row for it: {', '.join(map(repr, rowless))}" if rowless else ""
    return f"tokenizer keys made from tokenizer.json, pre-tokenizer {pre_tokenizer}{left_out}"


def pre_tokenizer_name(values: Mapping[str, Any], file: Path) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits texts; raises `ModelError` if it has none."""
    pre_tokenizer = values.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    name = PRE_TOKENIZERS.get((patterns, bool(values["model"].get("ignore_merges"))))
    if name is None:
        raise ModelError(
            f"{file} splits texts by {patterns or 'nothing'}, for which llama.cpp has no name known here: "
            "start the run from the model's GGUF, whose tokenizer keys are copied, or export onnx"
        )
    return name


def _patterns(step: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns of one step; of an unknown step its type, which is not in the table."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return (GPT2,) if step.get("use_regex", True) else ()
    if kind == "Digits" and step.get("individual_digits"):
        return (DIGIT,)
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return (str(step["pattern"].get("Regex", step["pattern"])),)
    return (str(kind),)
