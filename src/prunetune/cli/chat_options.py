"""The options of `prunetune chat`; its flags are derived from these fields, and nothing heavy is imported for them."""

from dataclasses import dataclass
from typing import Literal

from prunetune.config.fields import option


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How questions are asked, and how models are opened."""

    against: str = option(
        "", "A second model that answers, too; dense: the run's dense model, tuned if it has that one."
    )
    system: str = option("", "A system message before the conversation.")
    max_new_tokens: int = option(256, "Longest answer in tokens.", ge=1)
    template: Literal["auto", "chat", "raw"] = option(
        "auto",
        "chat: the tokenizer's template; raw: the text is continued as it is, as rows with prompts are tuned on; auto: "
        "chat if there is a template.",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Arithmetic; auto: bfloat16 where the hardware has it, else float32."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
