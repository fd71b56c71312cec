"""Checksums of a model folder: `SHA256SUMS`, in the format of `sha256sum -c`, written and verified.

Verified wherever a folder's weights are read: by runs, `eval`, `check`, `bench` and `export`.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from prunetune.errors import ModelError
from prunetune.utils.files import sha256, write_text

CHECKSUM_FILE = "SHA256SUMS"
UNCHECKED_FILES = (CHECKSUM_FILE, "README.md")  # the card may be edited later
# Names of files that transformers would read as part of a model; others (a licence, a picture) may be added.
MODEL_FILES = ("*.safetensors", "*.bin", "*.pt", "*.json", "*.py", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_verified: dict[Path, list[tuple[object, ...]]] = {}  # folder -> its files' identities when this process verified it


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
    """Compare every file with its digest; raises `ModelError` at the first that is changed, missing or added.

    A process hashes a folder once, and again when a file in it has been replaced or written to. False if the folder has
    no checksums.
    """
    if not (folder / CHECKSUM_FILE).is_file():
        return False
    file = folder / CHECKSUM_FILE
    try:
        lines = (line.split("  ", 1) for line in file.read_text(encoding="utf-8").splitlines())
        digests = {name: digest for digest, name in lines}
        if outside := [name for name in digests if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"{outside[0]} lies outside the folder")
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({error}); copy the folder again") from error
    if missing := [name for name in digests if not (folder / name).is_file()]:
        raise ModelError(f"{folder}: {missing[0]} is missing; copy the folder again, or write the model again")
    found = (file.relative_to(folder).as_posix() for pattern in MODEL_FILES for file in folder.rglob(pattern))
    if added := sorted(name for name in found if name not in digests and not name.startswith(".")):
        raise ModelError(
            f"{folder}: {added[0]} was not written with the model (it is not in {CHECKSUM_FILE}): remove it, or remove "
            f"{CHECKSUM_FILE} if you added the file yourself"
        )
    stats = [(folder / name).stat() for name in (CHECKSUM_FILE, *digests)]
    identities: list[tuple[object, ...]] = [
        (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats
    ]
    if _verified.get(folder.resolve()) == identities:
        return True
    with ThreadPoolExecutor() as threads:
        written = dict(zip(digests, threads.map(sha256, [folder / name for name in digests]), strict=True))
    for name, digest in digests.items():
        if written[name] != digest:
            raise ModelError(
                f"{folder}: {name} is not what was written (its SHA-256 differs from {CHECKSUM_FILE}): "
                f"copy the folder again, or remove {CHECKSUM_FILE} if you changed the file yourself"
            )
    _verified[folder.resolve()] = identities
    return True
