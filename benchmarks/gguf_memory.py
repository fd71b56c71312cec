"""C2: peak memory of writing a run as GGUF and reading it back, over the size of the file.

    python benchmarks/gguf_memory.py RUN [--dtype f16]

The peak is the largest resident set while the file is written and read back (the kernel's high-water mark, reset
beforehand); mapped pages of the files count, though the kernel can drop them. Python with its libraries, which
`ratio` leaves out, is in `ratio_with_libraries`. The check in llama.cpp runs in processes of its own: not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import transformers.modeling_rope_utils  # noqa: F401 - part of the libraries, not of the writing

from prunetune.export.gguf.write import DTYPES, verify_tensors, write_gguf
from prunetune.export.source import ExportSource


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (highest)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dtype", default="f16", choices=DTYPES)
    args = parser.parse_args()
    source = ExportSource.open(args.run)
    libraries = resident("VmRSS")
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        made, _ = write_gguf(source, file, args.dtype)
        peaks["write"] = resident("VmHWM")
        verify_tensors(source, file, made)
        peaks["write and read back"] = resident("VmHWM")
        size = file.stat().st_size
    for name, peak in peaks.items():
        print(json.dumps({
            "run": args.run.name, "dtype": args.dtype, "stage": name, "written_mb": round(size / 1e6),
            "libraries_mb": round(libraries / 1e6), "peak_mb": round(peak / 1e6),
            "ratio": round((peak - libraries) / size, 3), "ratio_with_libraries": round(peak / size, 3),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
