"""The model card of a run on the Hugging Face hub: that of model/, which its owner may have edited, and additions."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import yaml

from prunetune.config.recipe import RunConfig
from prunetune.data.sources import hub_dataset
from prunetune.errors import ModelError
from prunetune.model.adapter_folder import CONFIG_FILE
from prunetune.model.provenance import card_metadata, hub_model, license_of_card
from prunetune.pipeline.finish import card_scores
from prunetune.report.scores import LABELS
from prunetune.runs.folder import RunFolder
from prunetune.utils.untrusted import markdown_code, markdown_text, read_text, shorten

CARD, PICTURE, ADAPTER = "README.md", "kept.png", "adapter"
HUB_METRICS = {"rouge_l": "rouge", "macro_f1": "f1"}  # the hub's names, where they are others
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
CHAT_USAGE = """
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
TEXT_USAGE = """
inputs = tokenizer("Hello", return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
"""


def render_hub_card(
    folder: RunFolder, config: RunConfig, repository: str, files: Collection[str], languages: Sequence[str]
) -> str:
    """The card in model/, with scores, data sets, languages, the picture, and code that runs as it stands.

    `files`: names of what goes. What the owner has written there stays. Raises `ModelError` for a card that the hub
    would not read.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    file = folder.model_folder / CARD
    try:
        if file.is_symlink():  # in a stranger's run it may lead anywhere, and nothing checks it
            raise ValueError("it is a link: put the file itself there")
        written = ModelCard(read_text(file))
    except (OSError, ValueError, yaml.YAMLError) as broken:
        raise ModelError(f"{file} cannot be read as a model card ({shorten(str(broken))}): correct it") from broken
    data = config.data
    trained_on = dict.fromkeys(filter(None, map(hub_dataset, (*data.train, *data.search, *data.distill_texts))))
    tested_on = list(dict.fromkeys(map(hub_dataset, data.test or data.train)))
    base = hub_model(config.model, folder.read_manifest().model.identity)
    stated = card_metadata(config.model).get("language") or []
    of_base = [code for code in (stated if isinstance(stated, list) else [stated]) if LANGUAGE.fullmatch(str(code))]
    own: dict[str, Any] = written.data.to_dict()  # type: ignore[no-untyped-call]
    metadata = {
        "language": list(languages) or own.get("language") or of_base,
        "datasets": own.get("datasets") or list(trained_on),
    }
    metadata = {key: value for key, value in metadata.items() if value}
    metadata |= {key: value for key, value in own.items() if key not in metadata}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=tested_on[0] if len(tested_on) == 1 and tested_on[0] else "private",
            dataset_name=row.task,
            dataset_config=row.task,  # by which the hub keeps tasks apart
            dataset_split="test",
            metric_type=HUB_METRICS.get(row.metric, row.metric),
            metric_name=LABELS.get(row.metric, row.metric),
            metric_value=row.scores["pruned"][0],
        )
        for row in card_scores(folder)
        if math.isfinite(row.scores.get("pruned", (math.nan,))[0])
    ]
    name = repository.partition("/")[2]
    if results and "model-index" not in metadata:
        metadata |= ModelCardData(model_name=name, eval_results=results).to_dict()  # type: ignore[no-untyped-call]
    text = re.sub(r"^# .+, tuned and pruned$", f"# {name}", written.text.strip(), count=1, flags=re.MULTILINE)
    usage = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if usage and '"PATH"' in usage[0]:
        has_template = "chat_template.jinja" in files
        code = usage[1].replace('"PATH"', f'"{repository}"') + (CHAT_USAGE if has_template else TEXT_USAGE)
        picture = f"![Share of each kind of unit that is kept, by layer]({PICTURE})\n\n" if PICTURE in files else ""
        text = f"{text[: usage.start()]}{picture}```python\n{code}```{text[usage.end() :]}"
    if f"{ADAPTER}/{CONFIG_FILE}" in files:
        text += f"\n\n## The dense model, tuned on the same rows\n\n{_adapter_usage(base, repository)}"
    lines = []
    for source in trained_on:
        licence = license_of_card(card_metadata(source, "dataset"), "its card")
        lines.append(f"- {markdown_code(source)}, licence {markdown_text(licence.id) if licence.id else 'not known'}")
    if not all(map(hub_dataset, (*data.train, *data.distill_texts))):
        lines.append("- rows that are not published")
    text += "\n\n## Data\n\nTuned on:\n\n" + "\n".join(lines)
    card = f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{text}\n"
    try:
        ModelCard(card)  # which reads model-index into results again
    except ValueError as wrong:
        raise ModelError(f"{file}: the hub would not read its metadata ({shorten(str(wrong))}): correct it") from wrong
    return card


def _adapter_usage(base: str, repository: str) -> str:
    if not base:
        return f"`{ADAPTER}/` is a LoRA adapter in PEFT's format. The model that it belongs to is not on the hub."
    return f"""`{ADAPTER}/` is a LoRA adapter in PEFT's format:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

dense = AutoModelForCausalLM.from_pretrained("{base}")
tuned = PeftModel.from_pretrained(dense, "{repository}", subfolder="{ADAPTER}")
```"""
