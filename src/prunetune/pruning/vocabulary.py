"""Vocabulary pruning: which tokens stay, and tokenizer, configuration and embeddings without the others.

Pure functions over a tokenizer's JSON, as `tokenizers` writes it, and over a model's tensors. Kept tokens are numbered
anew in their old order, and nothing else about them changes.

**BPE.** A text is merged pair by pair, the pair of lowest rank first. Whatever ends as token t was merged within t's
own letters, in the order in which t alone is merged, because a pair across its border was never chosen. So t is kept
with the tokens that merging t alone makes, and every merge stays whose two parts and result are kept. Of a text whose
tokens are all kept, no merge that was performed is then gone, and one that is gone was never chosen while it was there.
So the text gets the same tokens. Any other text is written in other kept tokens, at worst in bytes or letters, and
decodes to the same.

**Unigram.** The best segmentation of a text, if its pieces are kept, is still possible, and no other is new: it stays
the best. The piece of the lowest score stays, too, as the score of an unknown letter is counted from it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import ConfigError, ModelError

ROWS_MULTIPLE = 64  # of embedding rows: matrices of such a width are multiplied fast
GENERAL_SHARE = 0.25  # of merges, or of Unigram pieces, that `auto` keeps beside what the data uses
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
TOKEN_ID_KEYS = re.compile(r".*token_ids?|.*token_index|(begin_)?suppress_tokens|bad_words_ids|force_words_ids")
UNMAPPED_KEYS = ("forced_decoder_ids", "sequence_bias")  # hold token ids in forms of their own
SUPPORTED_MODELS = ("BPE", "Unigram")


@dataclass(frozen=True)
class KeptVocabulary:
    """The tokens that stay; the new id of each is its position."""

    kept: tuple[int, ...]  # old ids, rising
    rows: int  # rows of the embedding; kept tokens beyond them had no row before either
    original_rows: int
    original_params: int  # of the whole model

    @cached_property
    def new_ids(self) -> Mapping[int, int]:
        """{old id: new id}."""
        return {old: new for new, old in enumerate(self.kept)}

    def gather(self, tensor: Tensor) -> Tensor:
        """The kept rows of a tensor [original_rows, ...]: [rows, ...]."""
        index = torch.tensor(self.kept[: self.rows], device=tensor.device)
        return tensor.index_select(0, index)

    def to_json(self) -> str:
        """As JSON text, which `from_json` reads."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> KeptVocabulary:
        """Read what `to_json` wrote; raises `ValueError`, `KeyError` or `TypeError` on anything else."""
        values = json.loads(text)
        return cls(tuple(values.pop("kept")), **values)


# -- which tokens stay -------------------------------------------------------------------------------------------------


def choose_tokens(
    tokenizer: Mapping[str, Any],
    size: str,
    *,
    counts: Mapping[int, int],
    named_ids: Collection[int],
    rows: int,
    params: int,
) -> KeptVocabulary:
    """The tokens to keep of a tokenizer (its JSON) whose model has so many embedding rows and parameters.

    First come those that have to stay: added and special tokens, `named_ids` (of configurations), and the bytes or
    letters that any text can be written in. Then those that the data uses, by `counts`, the most frequent first; then
    those of the lowest merge rank, or the highest Unigram score, because a tokenizer's own order is that of frequency
    in what it was trained on. `size` is `auto` (all that the data uses, and a quarter of the others), a number of rows,
    or a share of them. It is rounded up to a multiple of 64.

    Raises `ModelError` for a tokenizer that cannot be pruned, and `ConfigError` for a size that is too small.
    """
    raise_if_not_prunable(tokenizer)
    pieces = _Pieces(tokenizer)
    added = {token["id"] for token in tokenizer.get("added_tokens") or ()}
    required = pieces.alphabet | pieces.special_ids() | added | set(named_ids)
    rowless = {token for token in added if token >= rows}  # in the tokenizer only; they stay there
    kept = {token for token in pieces.with_parts(required) if token < rows}
    available = len({token for token in pieces.ids | required if token < rows})

    used = [token for token in sorted(counts, key=lambda token: (-counts[token], token)) if token < rows]
    general = pieces.general_order()
    if size == "auto":
        general_share = general[: math.ceil(GENERAL_SHARE * len(general))]
        kept |= {token for token in pieces.with_parts([*used, *general_share]) if token < rows}
        wanted = len(kept)
    else:
        number = float(size)
        wanted = math.ceil(number * rows if number <= 1 else number)
    target = min(available, ROWS_MULTIPLE * math.ceil(wanted / ROWS_MULTIPLE))
    if len(kept) > target:
        raise ConfigError(
            f"budget.vocab {size}: {len(kept):,} tokens have to stay (special and added tokens, and the bytes or "
            f"letters that any text can be written in): set {len(kept)} or more, or auto"
        )
    for token in [*used, *general]:
        if len(kept) == target:
            break
        parts = pieces.with_parts([token]) - kept
        if token < rows and len(kept) + len(parts) <= target:
            kept |= parts
    return KeptVocabulary((*sorted(kept), *sorted(rowless)), len(kept), rows, params)


def raise_if_not_prunable(tokenizer: Mapping[str, Any]) -> None:
    """Raises `ModelError` for a kind of tokenizer without which texts could not be written in kept tokens only."""
    model = tokenizer["model"]
    if model["type"] not in SUPPORTED_MODELS:
        raise ModelError(
            f"budget.vocab: a {model['type']} tokenizer cannot be pruned, as words without their token would be "
            f"unknown: {' and '.join(SUPPORTED_MODELS)} tokenizers can; leave budget.vocab out"
        )
    if marks := [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]:
        raise ModelError(f"budget.vocab: a BPE tokenizer with {marks[0]} cannot be pruned: leave budget.vocab out")


class _Pieces:
    """The pieces of a BPE or Unigram model, and what each is built from."""

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        model = tokenizer["model"]
        self._tokenizer, self._model = tokenizer, model
        self._is_bpe = model["type"] == "BPE"
        vocab = model["vocab"]
        self._id: dict[str, int] = dict(vocab) if self._is_bpe else {entry[0]: i for i, entry in enumerate(vocab)}
        self._text = {token: text for text, token in self._id.items()}
        self._rank = {tuple(pair): rank for rank, pair in enumerate(model["merges"])} if self._is_bpe else {}
        self._parts: dict[int, frozenset[int]] = {}
        self.ids = set(self._id.values())
        has_bytes = model.get("byte_fallback") and all(piece in self._id for piece in BYTE_PIECES)
        letters = BYTE_PIECES if has_bytes else [text for text in self._id if len(text) == 1]
        self.alphabet = {self._id[text] for text in letters}
        if not self._is_bpe:
            self.alphabet.add(min(range(len(vocab)), key=lambda index: vocab[index][1]))

    def special_ids(self) -> set[int]:
        """The ids that the tokenizer's own settings name: the unknown token, padding, what the template adds."""
        named = {self._id.get(self._model.get("unk_token"), self._model.get("unk_id"))}

        def note(token: int) -> int:
            named.add(token)
            return token

        rewrite_settings(self._tokenizer, note)
        return named - {None}

    def general_order(self) -> list[int]:
        """All pieces that texts are built from, the one that the tokenizer's training found most frequent first."""
        if self._is_bpe:
            return [self._id[text] for text in dict.fromkeys(left + right for left, right in self._rank)]
        scores = [entry[1] for entry in self._model["vocab"]]
        return sorted(range(len(scores)), key=lambda index: -scores[index])

    def with_parts(self, tokens: Iterable[int]) -> set[int]:
        """The tokens and, of a BPE, all that the tokenizer makes on the way to each."""
        return {part for token in tokens for part in (token, *self._parts_of(token))}

    def _parts_of(self, token: int) -> frozenset[int]:
        """What merging the token's own letters makes; nothing where that does not end in the token.

        No text then gets the token by merging: it is an added one, or one that `ignore_merges` looks up whole.
        """
        if not self._is_bpe or token not in self._text:
            return frozenset()
        if token not in self._parts:
            symbols = list(self._text[token])
            made = set(symbols)
            while pairs := [pair for pair in itertools.pairwise(symbols) if pair in self._rank]:
                best = min(pairs, key=self._rank.__getitem__)
                index = next(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == best)
                symbols[index : index + 2] = ["".join(best)]
                made.add(symbols[index])
            is_built = len(symbols) == 1 and made <= self._id.keys()
            self._parts[token] = frozenset(self._id[text] for text in made) if is_built else frozenset()
        return self._parts[token]


# -- tokenizer, configuration, model -----------------------------------------------------------------------------------


def prune_tokenizer(tokenizer: Mapping[str, Any], vocabulary: KeptVocabulary) -> dict[str, Any]:
    """The tokenizer's JSON with the kept tokens under their new ids; merges and scores keep their order and values."""
    new_ids, model = vocabulary.new_ids, dict(tokenizer["model"])
    if model["type"] == "BPE":
        kept = {text: new_ids[token] for text, token in model["vocab"].items() if token in new_ids}
        model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
        model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept.keys()]
    else:
        model["vocab"] = [entry for token, entry in enumerate(model["vocab"]) if token in new_ids]
        model["unk_id"] = new_ids.get(model["unk_id"])
    return {**rewrite_settings(tokenizer, new_ids.__getitem__), "model": model}


def rewrite_settings(tokenizer: Mapping[str, Any], new_id: Callable[[int], int]) -> dict[str, Any]:
    """The tokenizer's JSON with other ids wherever it names one outside its vocabulary."""

    def rewrite(value: Any, kind: str = "") -> Any:
        if isinstance(value, list):
            return [rewrite(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        kind = value.get("type", kind) if isinstance(value.get("type", kind), str) else kind
        changed = {key: rewrite(entry) for key, entry in value.items()}
        if kind in ("BertProcessing", "RobertaProcessing"):
            changed |= {key: [value[key][0], new_id(value[key][1])] for key in ("sep", "cls")}
        if kind == "TemplateProcessing":
            changed["special_tokens"] = {
                name: {**token, "ids": [new_id(token_id) for token_id in token["ids"]]}
                for name, token in value["special_tokens"].items()
            }
        return changed

    changed = {**tokenizer, "post_processor": rewrite(tokenizer.get("post_processor"))}
    changed["added_tokens"] = [
        {**token, "id": new_id(token["id"])} for token in tokenizer.get("added_tokens") or () if isinstance(token, dict)
    ]
    if padding := tokenizer.get("padding"):
        changed["padding"] = {**padding, "pad_id": new_id(padding["pad_id"])}
    return changed


def rewrite_config(values: Mapping[str, Any], new_id: Callable[[int], int]) -> dict[str, Any]:
    """The values of config.json or generation_config.json with other token ids, in nested configurations too.

    Raises `ModelError` for values that hold ids in a form that is not known here.
    """
    if held := [key for key in UNMAPPED_KEYS if values.get(key)]:
        raise ModelError(f"budget.vocab: {held[0]} in generation_config.json is not supported: remove it there")

    def rewrite(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(rewrite(entry) for entry in value)
        return new_id(value) if type(value) is int and value >= 0 else value

    changed = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = rewrite_config(value, new_id)
        changed[key] = rewrite(value) if TOKEN_ID_KEYS.fullmatch(str(key)) else value
    return changed


def token_ids_in(values: Mapping[str, Any]) -> set[int]:
    """All token ids that the values of a configuration name."""
    named = set()

    def note(token: int) -> int:
        named.add(token)
        return token

    rewrite_config(values, note)
    return named


def prune_config(values: Mapping[str, Any], vocabulary: KeptVocabulary) -> dict[str, Any]:
    """The values of a configuration with new token ids and the new `vocab_size`, in nested configurations too."""

    def with_size(values: Mapping[str, Any]) -> dict[str, Any]:
        changed = {key: with_size(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        return changed | (
            {"vocab_size": vocabulary.rows} if values.get("vocab_size") == vocabulary.original_rows else {}
        )

    return with_size(rewrite_config(values, lambda token: vocabulary.new_ids.get(token, token)))


def vocabulary_tensors(model: Any) -> dict[str, Tensor]:
    """The weight of the input embedding, and weight and bias of the head, by name: tensors [vocabulary, ...].

    Raises `ModelError` for a model with further embeddings of tokens.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    holders = (model.get_input_embeddings(), model.get_output_embeddings())
    named = {name: module for name, module in model.named_modules() if any(module is holder for holder in holders)}
    others = [
        name
        for name, module in model.named_modules()
        if name not in named and isinstance(module, nn.Embedding) and "per_layer" in name
    ]
    if others or getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
        raise ModelError(
            f"budget.vocab: {model.config.model_type} has embeddings in every layer ({(others or ['per layer'])[0]}), "
            "and they cannot be pruned: leave budget.vocab out"
        )
    tensors = {f"{name}.weight": module.weight for name, module in named.items()}
    tensors |= {
        f"{name}.bias": module.bias for name, module in named.items() if getattr(module, "bias", None) is not None
    }
    if odd := [name for name, tensor in tensors.items() if tensor.shape[0] != rows]:
        raise ModelError(f"budget.vocab: {odd[0]} has {tensors[odd[0]].shape[0]} rows and the embedding {rows}")
    return tensors


def prune_model(model: Any, vocabulary: KeptVocabulary) -> None:
    """Keep the rows of the tokens that stay, in place; a tied head stays tied, and the configuration follows.

    Works on the meta device. Raises `ModelError` for a model with further embeddings of tokens.
    """
    pruned: dict[int, nn.Parameter] = {}
    for name, tensor in vocabulary_tensors(model).items():
        if id(tensor) not in pruned:
            pruned[id(tensor)] = nn.Parameter(vocabulary.gather(tensor.data), requires_grad=tensor.requires_grad)
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, attribute, pruned[id(tensor)])
        for size in ("num_embeddings", "out_features"):
            if hasattr(module, size):
                setattr(module, size, vocabulary.rows)
        if getattr(module, "padding_idx", None) is not None:
            module.padding_idx = vocabulary.new_ids.get(module.padding_idx)
    for module in model.modules():
        if getattr(module, "vocab_size", None) == vocabulary.original_rows:
            module.vocab_size = vocabulary.rows
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        for key, value in prune_config(vars(config), vocabulary).items():
            setattr(config, key, value)
    if (generation := getattr(model, "generation_config", None)) is not None:
        for key, value in prune_config(vars(generation), vocabulary).items():
            setattr(generation, key, value)
