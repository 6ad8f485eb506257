"""Reads the tables of benchmark files and says what in them cannot be. Pure.

A table with a column "tokens/s per GPU" is looked at row by row. Model, sequence length and GPU are what the row says
(`model=llama_8b`, `sequence_length=4096`, a column "sequence"), else the nearest text above the table that says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from recipes.lib.flops import flops_per_token, peak_flops
from recipes.lib.model_sizes import SIZES

MATRIX_RATE = {"H200": 790e12}
"""FLOP/s in bfloat16 that a large matrix product was measured to reach, on a GPU that does nothing else."""
HIGHEST_MFU = {"H200": 0.68}
"""By formula F, from that rate and the time of what is no matrix product: above it, a clock or a count is wrong."""
NAMES = {"Llama-3-8B": "llama_8b", "Llama-3.2-1B": "llama_1b", "Llama-3-70B": "llama_70b"}
FACTS = {
    "model": r"model=(\w+)|\b(Llama-3(?:\.2)?-\d+B)\b",
    "sequence": r"sequence(?:_length=| length |s? of |[ =])([\d,]{3,})",
    "gpu": r"\b([HAB]\d00)s?\b",
}
RATE_COLUMN = re.compile(r"tok(?:ens)?/s per GPU")
MFU_COLUMN = re.compile(r"\bMFU\b")
MATRIX_COLUMN = re.compile(r"of the matrix rate")


@dataclass(frozen=True)
class Row:
    """A line of a table that has a rate."""

    line: int
    cells: dict[str, str]
    """By heading."""
    facts: dict[str, str] = field(default_factory=dict)
    """Model, sequence and GPU, as far as anything says them."""

    def cell(self, heading: re.Pattern[str]) -> str:
        """The first cell whose heading matches; empty where there is none."""
        return next((text for name, text in self.cells.items() if heading.search(name)), "")


def rows(markdown: str) -> Iterator[Row]:
    """Every row with a rate per GPU, with the facts that hold for it."""
    facts: dict[str, str] = {}
    head: list[str] = []
    for number, line in enumerate(markdown.splitlines(), start=1):
        if not line.startswith("|"):
            head = []
            facts |= _facts(line)
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not head:
            head = cells
        elif not set("".join(cells)) <= set("-: "):
            row = dict(zip(head, cells, strict=False))
            if any(RATE_COLUMN.search(name) for name in head):
                of_columns = {name: row[name].replace(",", "") for name in FACTS if row.get(name)}
                yield Row(number, row, facts | _facts(line) | of_columns)


def problems(markdown: str) -> list[str]:
    """What cannot be, one line each; none for a file without such tables."""
    return [f"line {row.line}: {problem}" for row in rows(markdown) for problem in _problems(row)]


def _problems(row: Row) -> Iterator[str]:
    text = row.cell(RATE_COLUMN)
    found = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]
    if not found:
        return
    rate = found[0]
    if len(found) >= 3 and not found[1] <= rate <= found[2]:
        yield f"{rate:,.0f} is not between {found[1]:,.0f} and {found[2]:,.0f}"
    missing = [name for name in FACTS if name not in row.facts]
    if missing:
        yield f"nothing says which {' and '.join(missing)} {rate:,.0f} tokens/s are of"
        return
    gpu, size = row.facts["gpu"], SIZES.get(row.facts["model"])
    peak = peak_flops(gpu)
    if size is None or peak is None:
        yield f"{row.facts['model']} or {gpu} is not known here"
        return
    flops = flops_per_token(size, int(row.facts["sequence"]))
    mfu = rate * flops.full / peak
    low_precision = re.search(r"float8|fp8", " ".join(row.cells.values()), re.IGNORECASE)
    said = _percent(row.cell(MFU_COLUMN))
    # float8 has twice the rate: a percentage of bfloat16's peak would mix two things.
    times = 2 if low_precision else 1
    if low_precision and said is not None:
        yield "work in float8 has no MFU: the peak is bfloat16's"
    elif said is not None and abs(said - mfu) > _rounding(row.cell(MFU_COLUMN)) + 0.002 * mfu:
        yield f"{rate:,.0f} tokens/s are {mfu:.1%} MFU, not {said:.1%}"
    measured = MATRIX_RATE.get(gpu, peak) * times
    if rate * flops.causal > measured:
        yield f"{rate:,.0f} tokens/s are more arithmetic than a large matrix product does on an {gpu}"
    elif mfu > HIGHEST_MFU.get(gpu, 1.0) * times:
        yield f"{rate:,.0f} tokens/s are {mfu:.1%} MFU, and the bound is {HIGHEST_MFU.get(gpu, 1.0):.0%}"
    share = _percent(row.cell(MATRIX_COLUMN))
    if share is not None and abs(share - rate * flops.full / measured) > 0.01:
        yield f"{rate:,.0f} tokens/s are {rate * flops.full / measured:.1%} of the matrix rate, not {share:.1%}"


def _facts(text: str) -> dict[str, str]:
    found = {}
    for name, pattern in FACTS.items():
        matches = re.findall(pattern, text)
        if matches:
            last = matches[-1]
            word = "".join(last) if isinstance(last, tuple) else last
            found[name] = NAMES.get(word, word.replace(",", ""))
    return found


def _percent(text: str) -> float | None:
    match = re.search(r"(\d+(?:\.\d+)?)%", text)
    return float(match[1]) / 100 if match else None


def _rounding(text: str) -> float:
    """Half of the last digit that a percentage shows."""
    match = re.search(r"\d+(?:\.(\d+))?%", text)
    assert match is not None
    return 0.5 * 10 ** -(2 + len(match[1] or ""))
