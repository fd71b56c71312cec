"""Whether a model folder is what was written: `SHA256SUMS`, in the form that `sha256sum -c` reads, too."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from prunetune.errors import ModelError
from prunetune.utils.files import sha256, write_text

CHECKSUM_FILE = "SHA256SUMS"
UNCHECKED_FILES = (CHECKSUM_FILE, "README.md")  # the card may be written again, by a person as well


def write_checksums(folder: Path) -> None:
    """Write the digest of every file of a finished folder, all as readable: safetensors writes for the owner alone."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in UNCHECKED_FILES)
    write_text(
        folder / CHECKSUM_FILE, "".join(f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    )
    with suppress(OSError):  # of a file system without modes
        for file in folder.rglob("*.safetensors"):
            file.chmod((folder / CHECKSUM_FILE).stat().st_mode)


def verify_checksums(folder: Path) -> bool:
    """Compare every sealed file; raises `ModelError` at the first that is missing or altered. False: not sealed."""
    if not (folder / CHECKSUM_FILE).is_file():
        return False
    for name, digest in _sums(folder / CHECKSUM_FILE).items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is missing; copy the folder again, or write the model again")
        if sha256(folder / name) != digest:
            raise ModelError(
                f"{folder}: {name} is not what was written (its SHA-256 differs from {CHECKSUM_FILE}): copy the folder again, "
                f"or remove {CHECKSUM_FILE} if the change is meant"
            )
    return True


def _sums(file: Path) -> dict[str, str]:
    """File name -> digest; raises `ModelError` on anything else."""
    try:
        lines = (line.split("  ", 1) for line in file.read_text(encoding="utf-8").splitlines())
        return {name: digest for digest, name in lines}
    except (ValueError, OSError) as broken:
        raise ModelError(f"{file} cannot be read ({broken}); copy the folder again") from broken
