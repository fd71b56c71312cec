"""Numbers as text: counts, sizes, shares, durations. Each function returns "n/a" for None."""

import math

NOT_KNOWN = "n/a"
MINUS = "\N{MINUS SIGN}"


def count(value: float | None) -> str:
    """1536 -> "1,536"."""
    return NOT_KNOWN if value is None else with_minus_sign(f"{round(value):,}")


def short(value: float | None) -> str:
    """134515008 -> "134.5M"."""
    if value is None:
        return NOT_KNOWN
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f}{unit}" if value / size < 10 else f"{value / size:.1f}{unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes -> "269.1 MB" (powers of ten, as disks and downloads are sold)."""
    if value is None:
        return NOT_KNOWN
    for unit_size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit_size:
            return f"{value / unit_size:.1f} {unit}"
    return f"{value:.0f} B"


def share(value: float | None, digits: int = 0) -> str:
    """0.341 -> "34%"."""
    return NOT_KNOWN if value is None else with_minus_sign(f"{100 * value:.{digits}f}%")


def ratio(value: float | None) -> str:
    """1.384 -> "1.38×"."""
    return NOT_KNOWN if value is None else f"{value:.2f}×"


def decimal(value: float | None) -> str:
    """Three decimals below 10, fewer above."""
    if value is None or not math.isfinite(value):
        return NOT_KNOWN
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return with_minus_sign(f"{value:,.{digits}f}")


def signed_decimal(value: float | None) -> str:
    """As `decimal`, with its sign always shown."""
    if value is None or not math.isfinite(value):
        return NOT_KNOWN
    return f"+{decimal(value)}" if value > 0 else decimal(value)


def milliseconds(seconds: float | None) -> str:
    """0.0214 -> "21.40 ms"."""
    return NOT_KNOWN if seconds is None else f"{decimal(1000 * seconds)} ms"


def scientific(value: float) -> str:
    """2.4e-06 -> "2.4e-6"."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}" if value else "0"


def duration(seconds: float | None) -> str:
    """3725 -> "1 h 02 min"."""
    if seconds is None:
        return NOT_KNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def truncated(label: str, max_length: int = 22) -> str:
    """The label, or its beginning and "…", at most `max_length` characters."""
    return label if len(label) <= max_length else f"{label[: max_length - 1]}…"


def with_minus_sign(text: str) -> str:
    """A typographic minus in front of a negative number, and none in front of a zero."""
    if text.startswith("-"):
        return MINUS + text[1:] if any(digit in "123456789" for digit in text) else text[1:]
    return text
