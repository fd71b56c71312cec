"""Hub models at a revision, owner/name@revision: fetched into the hub's cache, and opened as a folder."""

import re
from functools import cache
from pathlib import Path

from prunetune.utils.failures import reading_model_files
from prunetune.utils.hub_access import hub_failure

NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)@([\w./-]+)")
# What is read of a model; not weights in other formats, nor copies of them in subfolders.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "README.md", "LICENSE*")


def split_revision(name: str) -> tuple[str, str]:
    """(hub name, revision) of owner/name@revision; the revision is empty where none is named."""
    match = NAME.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


@cache
def fetch_revision(name: str) -> Path:
    """The folder of a hub model at a branch, tag or commit; raises `ModelError` where the hub does not give it.

    What is in the cache is not fetched again; without a network, the cache alone is asked.
    """
    from huggingface_hub import snapshot_download

    reason = hub_failure()  # without the hub, the cache is read at once
    repository, revision = split_revision(name)
    next_step = f"correct name and revision, or fetch it first: hf download {repository} --revision {revision}"
    with reading_model_files(f"model {name}: not to be had from the hub{reason and f' ({reason})'}", next_step):
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=list(FILES), ignore_patterns=["*/*"]
            )
        )
