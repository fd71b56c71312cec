"""Files and folders that are whole or absent: written beside their place, then moved into it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunetune.errors import RunFolderError

PARTIAL = ".partial"


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends well.

    A killed process leaves at most a `.partial` folder, which the next attempt clears.
    """
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            _sync(file)
    _sync(partial)
    if path.exists():
        # A folder cannot be replaced by one in a single step: the old one steps aside first.
        aside = path.with_name(path.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        partial.rename(path)
        shutil.rmtree(aside)
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
    """The file's digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SUMS = "SHA256SUMS"


def write_sums(folder: Path, pattern: str) -> None:
    """Keep the digests of the files of a folder in it; `sha256sum -c` reads them, too."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.glob(pattern))]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def changed_file(folder: Path) -> str:
    """The first file that is not what `write_sums` saw; "" where all are, or nothing was kept."""
    sums = folder / SUMS
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    for line in lines:
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            return name
    return ""


def need_space(folder: Path, needed: int) -> None:
    """Refuse before anything is written where the disk cannot hold `needed` bytes; raises `RunFolderError`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunFolderError(
            f"{folder}: the disk has {free / 1e9:.2f} GB free and the run writes up to {needed / 1e9:.2f} GB: "
            "free some room or choose another folder with --out"
        )


def is_disk_full(error: OSError) -> bool:
    """No space, or no quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
