"""Publish the model of a finished run on the Hugging Face hub, with its card and a picture of what was kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunetune.config.recipe import RunConfig
from prunetune.data.sources import Source, hub_dataset
from prunetune.errors import HIDDEN, ConfigError, ModelError
from prunetune.evaluation.suites.open_model import resolve_checkpoint
from prunetune.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from prunetune.model.checksums import CHECKSUM_FILE, verify_checksums
from prunetune.model.provenance import HISTORY_FILE, hub_model, public_model_name, read_history
from prunetune.pipeline.hub_card import ADAPTER, CARD, LANGUAGE, PICTURE, render_hub_card
from prunetune.pipeline.result import RunResult
from prunetune.report import formatting
from prunetune.report.figures import kept_units_png
from prunetune.runs.folder import RunFolder, open_run
from prunetune.utils.failures import reading_model_files
from prunetune.utils.files import atomic_folder, explain_write_errors, sha256
from prunetune.utils.untrusted import parse_json, read_text, shorten

log = logging.getLogger(__name__)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
MOST_TEXT = 2**20  # bytes of a file that is searched for paths; tokenizers and weights are larger


@dataclass(frozen=True)
class PushedModel:
    """What was sent, or would be."""

    repository: str
    where: str  # the address of the commit, or the folder of a dry run
    is_public: bool
    sizes: Mapping[str, int]  # bytes of each file

    def __str__(self) -> str:
        lines = [f"{formatting.size(size):>10}  {name}" for name, size in sorted(self.sizes.items())]
        return "\n".join([*lines, f"{self.repository} ({'public' if self.is_public else 'private'}): {self.where}"])


def push_run(
    run: Path,
    repository: str,
    *,
    public: bool = False,
    dry_run: Path | None = None,
    adapter: bool = False,
    languages: Sequence[str] = (),
) -> PushedModel:
    """Send a run's model to the hub as OWNER/NAME, in one commit; private, unless it is there already or `public`.

    Sent are the files that SHA256SUMS of the run's model/ names, the card with the run's scores, and kept.png; with
    `adapter`, the dense tuned model as a LoRA adapter in adapter/. `languages`: codes such as "en"; default: those of
    the base model's card. With `dry_run`, nothing is sent, and the files are written to dry_run/OWNER/NAME.

    Raises a `PrunetuneError`: before anything is sent for a file that names a path of this computer.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        assert repository.count("/") == 1
    except (HFValidationError, AssertionError):
        raise ConfigError(
            f"{shorten(repository)!r} is no name on the hub: write OWNER/NAME, such as me/support"
        ) from None
    if wrong := [code for code in languages if not LANGUAGE.fullmatch(code)]:
        raise ConfigError(f"language {shorten(wrong[0])!r} is no code: write en, de or zh-Hant, or multilingual")
    folder, config = open_run(run)
    files = _model_files(folder)
    if adapter:
        files |= _adapter_files(folder)
    if picture := kept_units_png(RunResult(run).plan):
        files[PICTURE] = picture
    card = render_hub_card(folder, config, repository, files, languages)
    digests = {
        name: hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
        for name, content in sorted(files.items())
    }
    files[CHECKSUM_FILE] = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    files[CARD] = card.encode()
    _raise_if_private(folder, config, files)
    sizes = {name: _size(content) for name, content in files.items()}
    if dry_run is None:
        url, is_public = _send(repository, files, card, public=public)
        return PushedModel(repository, url, is_public, sizes)
    target = dry_run / repository
    if target.exists():
        raise ConfigError(f"{target} exists already: remove it, or name another folder with --dry-run")
    with explain_write_errors(target), atomic_folder(target) as partial:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                shutil.copyfile(content, partial / name)
    return PushedModel(repository, str(target), public, sizes)


def _model_files(folder: RunFolder) -> dict[str, Path | bytes]:
    """The model's files as they were written, so that no file that was put beside them goes along."""
    model = Path(resolve_checkpoint(str(folder.path)))
    if not verify_checksums(model):
        raise ModelError(f"{model} has no {CHECKSUM_FILE}, which says what belongs to the model: put it back")
    lines = read_text(model / CHECKSUM_FILE).splitlines()
    files: dict[str, Path | bytes] = {name: model / name for _, name in (line.split("  ", 1) for line in lines)}
    if HISTORY_FILE in files:
        runs = [asdict(run) | {"model": public_model_name(run.model)} for run in read_history(str(model))]
        files[HISTORY_FILE] = _json(runs)
    return files


def _adapter_files(folder: RunFolder) -> dict[str, Path | bytes]:
    place = folder.dense_tuned_adapter
    if not place.is_dir():
        raise ModelError(
            f"{folder.path}: the run has no adapter of a dense tuned model (evaluate.dense_tuned, lora.quantize): "
            "push without --adapter"
        )
    verify_checksums(place)
    if links := [file for file in (place / CONFIG_FILE, place / WEIGHTS_FILE) if file.is_symlink()]:
        raise ModelError(f"{links[0]} is a link, which may lead anywhere: put the file itself there")
    files: dict[str, Path | bytes] = {f"{ADAPTER}/{WEIGHTS_FILE}": place / WEIGHTS_FILE}
    with reading_model_files(f"{place}: {CONFIG_FILE}", "push without --adapter"):
        config = dict(parse_json(read_text(place / CONFIG_FILE)))
        base = hub_model(str(config.get("base_model_name_or_path")), folder.read_manifest().model.identity)
        files[f"{ADAPTER}/{CONFIG_FILE}"] = _json(config | {"base_model_name_or_path": base or None})
    return files


# -- what must not go, and what goes -----------------------------------------------------------------------------------


def _raise_if_private(folder: RunFolder, config: RunConfig, files: Mapping[str, Path | bytes]) -> None:
    """Raise `ModelError` for a path of this computer in a file of text, of which the user may have edited the card."""
    data = config.data
    sources = [*data.train, *data.search, *data.valid, *data.test, *data.distill_texts, *data.guard, *data.general]
    paths = [Source.parse(source).path for source in sources if not hub_dataset(source)]
    is_on_hub = hub_model(config.model, folder.read_manifest().model.identity)
    paths += [str(folder.path.resolve()), "" if is_on_hub else config.model]
    paths += [f"{home}/" if (home := str(Path.home())) != "/" else ""]
    private = [path for path in paths if "/" in path]
    for name, content in files.items():
        if _size(content) > MOST_TEXT:
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if shown := [path for path in private if path.encode() in text]:
            raise ModelError(
                f"{folder.model_folder / name} names {shorten(shown[0])}, which is on this computer: take it out "
                f"({CARD} may be edited freely), and push again"
            )


def _send(repository: str, files: Mapping[str, Path | bytes], card: str, *, public: bool) -> tuple[str, bool]:
    """Make the repository if it is not there, and commit the files: (address of the commit, is it public)."""
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

    api = HfApi()
    try:
        api.whoami()  # raises without a token, before anything is made
        ModelCard(card).validate()  # by the hub itself
        try:
            is_public = not api.model_info(repository).private
        except RepositoryNotFoundError:
            api.create_repo(repository, private=not public)
            is_public = public
        if is_public and not public:
            raise ConfigError(f"{repository} is public on the hub: push with --public, or name another")
        log.info("sending %d files, %s", len(files), formatting.size(sum(map(_size, files.values()))))
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repository, operations, commit_message="Tuned and pruned by prunetune")
    except LocalTokenNotFoundError as missing:
        raise ConfigError(f"the hub takes nothing without a token: {LOG_IN}") from missing
    except (OSError, ValueError, httpx2.HTTPError) as failed:
        status = getattr(getattr(failed, "response", None), "status_code", 0)
        steps = {401: LOG_IN, 403: f"use a token that may write to {repository}", 404: "check the name of its owner"}
        reason = shorten(str(failed).replace(get_token() or "\0", HIDDEN), 300)
        raise ConfigError(
            f"{repository}: not pushed ({reason}); {steps.get(status, 'check the network, and push again')}"
        ) from failed
    return str(commit.commit_url), is_public


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
