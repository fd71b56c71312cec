"""What the rows of a source are read as, in one line: shapes, the columns that they are from, columns not used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from prunetune.data.shapes import ShapedRow
from prunetune.utils.untrusted import shorten


@dataclass
class SourceNotes:
    """Counts over the rows of one source."""

    shapes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    # Shape -> field of its canonical rows -> the columns it is from, in order; rows may lack some.
    reads: dict[str, dict[str, dict[str, None]]] = field(default_factory=dict)

    def add(self, row: ShapedRow) -> None:
        """Count a row."""
        self.shapes[row.shape] += 1
        self.unused.update(row.unused)
        for name, columns in row.reads.items():
            self.reads.setdefault(row.shape, {}).setdefault(name, {}).update(dict.fromkeys(columns))

    @property
    def is_plain(self) -> bool:
        """Whether all columns have the names of the fields that they become, and all are used."""
        return not self.unused and not any(map(self._from, self.shapes))

    def line(self) -> str:
        """Such as "alpaca rows; prompt from instruction + input, completion from output; not used: label (12 rows)"."""
        parts = []
        for shape, count in self.shapes.items():
            number = f"{count:,} " if len(self.shapes) > 1 else ""
            choice = " (chosen is tuned on)" if shape == "preference" else ""
            parts += [f"{number}{shape} rows{choice}", self._from(shape)]
        if self.unused:
            parts.append("not used: " + ", ".join(f"{shorten(name)} ({n:,} rows)" for name, n in self.unused.items()))
            if set(self.shapes) == {"text"}:
                parts.append("an answer belongs into completion, or into choices and answer")
        return "; ".join(filter(None, parts))

    def _from(self, shape: str) -> str:
        reads = {name: list(columns) for name, columns in self.reads.get(shape, {}).items()}
        return ", ".join(f"{name} from {' + '.join(columns)}" for name, columns in reads.items() if columns != [name])
