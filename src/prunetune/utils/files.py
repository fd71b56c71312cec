"""Files and folders that are written whole or not at all, checks of disk and permissions, digests."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunetune.errors import ConfigError, RunFolderError
from prunetune.utils.failures import is_disk_full, is_permission_denied
from prunetune.utils.untrusted import shorten

PARTIAL = ".partial"


def expand_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user's text names, `~` expanded; raises `ConfigError` where no file can have that name."""
    shown = shorten(str(name))
    try:
        path = Path(name).expanduser()
        path.stat()
    except RuntimeError as unknown:
        raise ConfigError(f"{shown}: there is no such user; write the path in full") from unknown
    except ValueError as unwritable:  # a null byte, half of a surrogate pair
        raise ConfigError(f"{shown!r}: no file can have such a name; correct it") from unwritable
    except OSError as refused:
        if refused.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{shown}: no file can have so long a name; shorten it") from refused
    return path  # where something else is wrong, whoever opens it says so


def home_folder() -> Path | None:
    """$PRUNETUNE_HOME: what is known of runs and suites of all folders; None where it is not set."""
    home = os.environ.get("PRUNETUNE_HOME")
    return expand_path(home) if home else None


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: written under another name first, then renamed.

    A device, a pipe, an open descriptor (/dev/fd/3) and the target of a link are written into and stay what they are.
    Raises `RunFolderError` where the reader of a pipe has ended.
    """
    if not _is_replaceable(path):
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
        except BrokenPipeError as gone:
            raise RunFolderError(f"{path}: its reader ended before all was written; name a file instead") from gone
        return
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk needs the space
        raise


def _is_replaceable(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or not path.exists())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` when the block ends without an error.

    A block that fails leaves nothing; a killed process leaves a `.partial` folder, which the next attempt removes.
    """
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            _sync(file)
    _sync(partial)
    if path.exists():
        # A folder cannot be replaced in a single step: the old one is renamed first.
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The file's SHA-256 digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, by which a file that holds both is known to be what was written."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Check that the disk can hold what will be written; raises `RunFolderError`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise RunFolderError(
            f"{folder}: the disk has {free / 1e9:.2f} GB free and the run writes up to {needed_bytes / 1e9:.2f} GB: "
            "free some space or choose another folder with --out"
        )


STANDARD_OUTPUT = Path("-")


def check_writable(path: Path | None, flag: str) -> None:
    """Check that a file named by `flag` can be written, before anything is computed; raises `ConfigError`.

    None, and "-" for standard output, are no files.
    """
    if path is None or path == STANDARD_OUTPUT:
        return
    target = Path(os.path.realpath(path))  # of a link that leads nowhere yet, the file that will be made
    if path.is_dir() or not (path.exists() or target.parent.is_dir()):
        raise ConfigError(f"{flag} {path}: name a file in a folder that exists")
    expand_path(path.with_name(path.name + PARTIAL))
    if not path.exists() or _is_replaceable(path):
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{flag} {path}: its folder cannot be written to; name a file in another one")
    elif not os.access(path, os.W_OK):
        raise ConfigError(f"{flag} {path}: it cannot be written to; name another file")


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission in the block into a `RunFolderError` that names `path`."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            reason, remedy = "the disk is full", "free some space, or name another place with --out"
        elif is_permission_denied(error):
            reason, remedy = "no permission to write there", "change its permissions, or name another place with --out"
        else:
            raise
        raise RunFolderError(f"{path}: {reason}, and nothing was kept: {remedy}") from error
