"""Results as people read them: tables of text, sizes and times with their units. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns under their headings, numbers to the right; the first column to the left."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def size_text(size: float) -> str:
    """ "4 B", "64 KiB", "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if round(size) < 1024:
            return f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} GiB"


def time_text(seconds: float) -> str:
    """ "12.3 us", "4.56 ms", "1.23 s"."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _three_digits(value: float) -> str:
    """4, 1.33, 171, 1020: without an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
