"""Tokenizers of every prunable kind, trained on the spot, and texts in twelve scripts, code, emoji and controls."""

import json
import random
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prunetune.pruning.vocabulary import BYTE_PIECES

SCRIPTS = {
    "latin": "the quick brown fox jumps over lazy dogs while naïve façades coöperate daily",
    "greek": "η γρήγορη αλεπού πηδάει πάνω από το τεμπέλικο σκυλί",
    "cyrillic": "быстрая лиса прыгает через ленивую собаку каждый день",
    "arabic": "الثعلب السريع يقفز فوق الكلب الكسول كل يوم",
    "hebrew": "השועל המהיר קופץ מעל הכלב העצלן בכל יום",
    "devanagari": "तेज़ लोमड़ी आलसी कुत्ते के ऊपर कूदती है",
    "thai": "สุนัขจิ้งจอก กระโดด ข้าม สุนัข ขี้เกียจ",
    "chinese": "敏捷的 狐狸 跳过 懒狗 每天 都是 如此",
    "japanese": "すばやい きつね が なまけもの の 犬 を 飛び越える",
    "korean": "빠른 여우가 게으른 개를 뛰어넘는다 매일",
    "georgian": "სწრაფი მელა ხტება ზარმაცი ძაღლის თავზე",
    "amharic": "ፈጣኑ ቀበሮ ሰነፉን ውሻ ዘለለ በየቀኑ",
    "code": "def f(x): return {x[0] : x ** 2 for _ in range(10)} != None; // \\n <tag/> a_b",
    "emoji": "😀 👩‍👩‍👧 🇩🇪 ✅ 🤖 🧑🏽‍🚀 ♥️",
    "controls": "\t \r\n \x00 \x07 \x1b[0m \u200b \u202e \ufeff \x7f",
}
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
KINDS = ("byte-level", "ignore-merges", "byte-fallback", "unigram-bytes", "unigram")


def corpus(seed: int = 0, count: int = 400, *, scripts: tuple[str, ...] = tuple(SCRIPTS)) -> list[str]:
    """Random texts of words and letters, each of one script or of several."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        chosen = rng.sample(scripts, min(len(scripts), rng.choice((1, 1, 3))))
        words = [word for script in chosen for word in SCRIPTS[script].split(" ")]
        picked = [rng.choice(words) for _ in range(rng.randint(1, 12))]
        picked = ["".join(rng.sample(word, len(word))) if rng.random() < 0.2 else word for word in picked]
        texts.append(rng.choice(("", " ", "  ")) + rng.choice((" ", " ", "  ", "\n", "")).join(picked))
    return texts


@cache
def backend(kind: str, size: int = 900) -> str:
    """The JSON of a tokenizer of about `size` tokens, with a template that begins with <s>."""
    texts = corpus(1, 1500)
    if kind in ("byte-level", "ignore-merges"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, first = sorted(pre_tokenizers.ByteLevel.alphabet()), SPECIAL if kind == "byte-level" else ()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(first), initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "byte-fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*SPECIAL, *BYTE_PIECES], max_token_length=12, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    values = json.loads(tokenizer.to_str())
    if kind == "byte-fallback":  # the bytes are plain pieces, as in Llama's tokenizer
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in SPECIAL]
    if kind == "unigram-bytes":
        values["model"]["vocab"] += [[piece, 0.0] for piece in BYTE_PIECES]
        values["model"]["byte_fallback"] = True
    if kind == "ignore-merges":  # and one token that no merge makes
        values["model"]["ignore_merges"] = True
        values["model"]["vocab"]["Ġwhole"] = len(values["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.add_special_tokens(list(SPECIAL))  # with ignore-merges they come last, as in Llama 3
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A </s> $B", special_tokens=ids)
    return str(tokenizer.to_str())


def fast(kind: str, size: int = 900) -> Any:
    """The tokenizer as transformers opens it, with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend(kind, size)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
    )
