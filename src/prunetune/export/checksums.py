"""Checksums of a model folder: `SHA256SUMS`, in the format of `sha256sum -c`, written and verified."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from prunetune.errors import ModelError
from prunetune.utils.files import sha256, write_text

CHECKSUM_FILE = "SHA256SUMS"
UNCHECKED_FILES = (CHECKSUM_FILE, "README.md")  # the card may be edited later


def write_checksums(folder: Path) -> None:
    """Write the digest of every file of a finished folder.

    Weights get the file mode of the others: safetensors writes files that only the owner can read.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in UNCHECKED_FILES)
    lines = (f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    write_text(folder / CHECKSUM_FILE, "".join(lines))
    with suppress(OSError):  # a file system without modes
        for file in folder.rglob("*.safetensors"):
            file.chmod((folder / CHECKSUM_FILE).stat().st_mode)


def verify_checksums(folder: Path) -> bool:
    """Compare every file with its digest; raises `ModelError` at the first that is missing or changed.

    False if the folder has no checksums.
    """
    if not (folder / CHECKSUM_FILE).is_file():
        return False
    for name, digest in _read_digests(folder / CHECKSUM_FILE).items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is missing; copy the folder again, or write the model again")
        if sha256(folder / name) != digest:
            raise ModelError(
                f"{folder}: {name} is not what was written (its SHA-256 differs from {CHECKSUM_FILE}): "
                f"copy the folder again, or remove {CHECKSUM_FILE} if you changed the file yourself"
            )
    return True


def _read_digests(file: Path) -> dict[str, str]:
    """File name -> digest; raises `ModelError` if the file has another format."""
    try:
        lines = (line.split("  ", 1) for line in file.read_text(encoding="utf-8").splitlines())
        return {name: digest for digest, name in lines}
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({error}); copy the folder again") from error
