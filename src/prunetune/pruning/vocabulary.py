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

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import ConfigError, ModelError

ROWS_MULTIPLE = 64  # of embedding rows: matrices of such a width are multiplied fast
# What `auto` keeps beside what the data uses: a share of the merges or Unigram pieces, and at least so many of them.
GENERAL_SHARE, GENERAL_TOKENS = 0.25, 2**15
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Keys under which configurations and tokenizers name token ids, alone or in lists; the last four are a tokenizer's.
ID_KEYS = re.compile(r".*token_ids?|.*token_index|(begin_)?suppress_tokens|(bad|force)_words_ids|ids|pad_id|sep|cls")
UNMAPPED_KEYS = ("forced_decoder_ids", "sequence_bias")  # hold token ids in forms of their own


@dataclass(frozen=True)
class KeptVocabulary:
    """The tokens that stay; the new id of each is its position."""

    kept: tuple[int, ...]  # old ids, rising
    rows: int  # of the embedding; kept tokens beyond them had no row before either
    original_rows: int
    original_params: int  # of the whole model

    @cached_property
    def new_ids(self) -> Mapping[int, int]:
        """{old id: new id}."""
        return {old: new for new, old in enumerate(self.kept)}

    def gather(self, tensor: Tensor) -> Tensor:
        """The kept rows of a tensor [original_rows, ...]: [rows, ...]."""
        return tensor.index_select(0, torch.tensor(self.kept[: self.rows], device=tensor.device))


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
    in what it was trained on. `size` is `auto` (all that the data uses, and the first quarter of that order, at least
    32,768 tokens), a number of rows, or a share of them. It is rounded up to a multiple of 64.

    Raises `ModelError` for a tokenizer that cannot be pruned, and `ConfigError` for a size that is too small.
    """
    pieces = _Pieces(tokenizer["model"])
    settings = {name: tokenizer.get(name) for name in ("post_processor", "padding")}
    added = {token["id"] for token in tokenizer.get("added_tokens") or ()}
    required = pieces.alphabet | token_ids_in(settings) | added | set(named_ids)
    available = sum(token < rows for token in pieces.ids | required)
    used = sorted(counts, key=lambda token: (-counts[token], token))
    if size == "auto":
        general = max(GENERAL_TOKENS, math.ceil(GENERAL_SHARE * len(pieces.by_frequency)))
        required |= {*used, *pieces.by_frequency[:general]}
    kept = {token for token in pieces.with_parts(required) if token < rows}
    wanted = len(kept) if size == "auto" else math.ceil(float(size) * (rows if float(size) <= 1 else 1))
    target = min(available, ROWS_MULTIPLE * math.ceil(wanted / ROWS_MULTIPLE))
    if len(kept) > target:
        raise ConfigError(
            f"budget.vocab {size}: {len(kept):,} tokens have to stay (special and added tokens, and the bytes or "
            f"letters that any text can be written in): set {len(kept)} or more, or auto"
        )
    for token in (*used, *pieces.by_frequency):
        if token < rows and token not in kept and len(kept) < target:
            parts = pieces.with_parts([token]) - kept
            kept |= parts if len(kept) + len(parts) <= target else set()
    rowless = {token for token in added if token >= rows}  # only the tokenizer has them, and keeps them
    return KeptVocabulary((*sorted(kept), *sorted(rowless)), len(kept), rows, params)


class _Pieces:
    """The pieces of a BPE or Unigram model, and what each is built from; raises `ModelError` for other models."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        kind, vocab = model["type"], model["vocab"]
        affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
        if kind not in ("BPE", "Unigram") or affixes:
            raise ModelError(
                f"budget.vocab: a {kind} tokenizer{f' with {affixes[0]}' if affixes else ''} cannot be pruned so that "
                "any text can still be written; BPE and Unigram tokenizers can be: leave budget.vocab out"
            )
        if kind == "BPE":
            self._id: dict[str, int] = dict(vocab)
            self._rank = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
            self.by_frequency = [self._id[text] for text in dict.fromkeys("".join(pair) for pair in self._rank)]
        else:
            self._id, self._rank = {text: token for token, (text, _) in enumerate(vocab)}, {}
            self.by_frequency = sorted(range(len(vocab)), key=lambda token: -vocab[token][1])
        self.ids = set(self._id.values())
        self._text = {token: text for text, token in self._id.items()}
        has_bytes = model.get("byte_fallback") and all(piece in self._id for piece in BYTE_PIECES)
        letters = BYTE_PIECES if has_bytes else [text for text in self._id if len(text) == 1]
        unknown = self._id.get(str(model.get("unk_token")), model.get("unk_id"))
        self.alphabet = {self._id[text] for text in letters} | ({unknown} if unknown is not None else set())
        if kind == "Unigram":
            self.alphabet.add(self.by_frequency[-1])

    def with_parts(self, tokens: Iterable[int]) -> set[int]:
        """The tokens and, of a BPE model, all that merging the letters of each makes on the way to it.

        A token that its letters do not merge to has no parts: no text gets it by merging. It is an added token, or one
        that `ignore_merges` looks up whole.
        """
        closed: set[int] = set()
        for token in tokens:
            if token in closed:
                continue
            closed.add(token)
            symbols = list(self._text.get(token, "")) if self._rank else []
            made = set(symbols)
            while pairs := [pair for pair in itertools.pairwise(symbols) if pair in self._rank]:
                best = min(pairs, key=self._rank.__getitem__)
                index = next(i for i, pair in enumerate(itertools.pairwise(symbols)) if pair == best)
                symbols[index : index + 2] = ["".join(best)]
                made.add(symbols[index])
            if len(symbols) == 1 and made <= self._id.keys():
                closed |= {self._id[text] for text in made}
        return closed


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
    added = [{**token, "id": new_ids[token["id"]]} for token in tokenizer.get("added_tokens") or ()]
    settings = {name: tokenizer.get(name) for name in ("post_processor", "padding")}
    return {**tokenizer, **map_token_ids(settings, new_ids.__getitem__), "added_tokens": added, "model": model}


def map_token_ids(values: Mapping[str, Any], new_id: Callable[[int], int]) -> dict[str, Any]:
    """Values of config.json, generation_config.json or a tokenizer's settings with other token ids, at any depth.

    Raises `ModelError` for values that hold ids in a form that is not known here.
    """

    def rewrite(value: Any, is_id: bool) -> Any:
        if isinstance(value, Mapping):
            return map_token_ids(value, new_id)
        if isinstance(value, list | tuple):
            return type(value)(rewrite(entry, is_id) for entry in value)
        return new_id(value) if is_id and type(value) is int and value >= 0 else value

    if held := [key for key in UNMAPPED_KEYS if values.get(key)]:
        raise ModelError(f"budget.vocab: {held[0]} in generation_config.json is not supported: remove it there")
    return {key: rewrite(value, bool(ID_KEYS.fullmatch(str(key)))) for key, value in values.items()}


def token_ids_in(values: Mapping[str, Any]) -> set[int]:
    """All token ids that such values name."""
    named: list[int] = []
    map_token_ids(values, lambda token: named.append(token) or token)  # type: ignore[func-returns-value]
    return set(named)


def prune_config(values: Mapping[str, Any], vocabulary: KeptVocabulary) -> dict[str, Any]:
    """The values of a configuration with new token ids and the new `vocab_size`, in nested configurations too."""

    def with_size(values: Mapping[str, Any]) -> dict[str, Any]:
        changed = {key: with_size(value) if isinstance(value, dict) else value for key, value in values.items()}
        is_size = values.get("vocab_size") == vocabulary.original_rows
        return changed | ({"vocab_size": vocabulary.rows} if is_size else {})

    return with_size(map_token_ids(values, lambda token: vocabulary.new_ids.get(token, token)))


def vocabulary_tensors(model: Any) -> dict[str, nn.Parameter]:
    """The weight of the input embedding, and weight and bias of the head, by name: tensors [vocabulary, ...].

    Raises `ModelError` for a model with further embeddings of tokens.
    """
    if getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
        raise ModelError(
            f"budget.vocab: {model.config.model_type} has embeddings of tokens in every layer, and they cannot be "
            "pruned: leave budget.vocab out"
        )
    holders = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"{name}.{attribute}": getattr(module, attribute)
        for name, module in model.named_modules()
        for attribute in ("weight", "bias")
        if any(module is holder for holder in holders) and getattr(module, attribute, None) is not None
    }


def prune_model(model: Any, vocabulary: KeptVocabulary) -> None:
    """Keep the rows of the tokens that stay, in place; a tied head stays tied, and the configuration follows.

    Works on the meta device. Raises `ModelError` for a model with further embeddings of tokens.
    """
    tensors = vocabulary_tensors(model)
    pruned = {id(tensor): nn.Parameter(vocabulary.gather(tensor.data), False) for tensor in tensors.values()}
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, pruned[id(tensor)])
    for module in model.modules():
        for size in ("vocab_size", "num_embeddings", "out_features"):
            if getattr(module, size, None) == vocabulary.original_rows:
                setattr(module, size, vocabulary.rows)
    embedding, text_config = model.get_input_embeddings(), model.config.get_text_config()
    embedding.padding_idx = vocabulary.new_ids.get(embedding.padding_idx)
    for config in (model.config, *([text_config] if text_config is not model.config else [])):
        for key, value in prune_config(vars(config), vocabulary).items():
            setattr(config, key, value)
