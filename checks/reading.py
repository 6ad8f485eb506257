"""One answer of the machine: a text, or the reason why there is none. Pure.

Facts hold `int | Unread`, `str | Unread`, …: what could not be read stays in the fact, with its reason, up to the check
that has to say so. None of it is ever an exception.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar


class Problem(StrEnum):
    """Why there is no text."""

    MISSING = "missing"
    """No such file, command, library or device."""
    NOT_PERMITTED = "not permitted"
    TIMED_OUT = "timed out"
    UNSUPPORTED = "unsupported"
    """The driver says that it has no such value: [N/A], deprecated, N/A (no PMA)."""
    ERROR = "error"
    """Anything else, an answer that makes no sense included."""
    NOT_RECORDED = "not recorded"
    """A bundle that does not hold the answer."""


@dataclass(frozen=True)
class Unread:
    """What could not be read. `detail` is one line for people: which file, what it said."""

    problem: Problem
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.problem}: {self.detail}" if self.detail else str(self.problem)


Reading = str | Unread
"""What a Source answers where the answer is text."""

T = TypeVar("T")

NOT_A_VALUE = re.compile(
    r"\[?\s*(N/A\b.*|Not Supported|Requested functionality has been deprecated|Unknown Error|ERR!|Uninitialized|"
    r"\[?(GPU is lost|Not Found|Insufficient Permissions)\]?)\s*\]?",
    re.IGNORECASE,
)
"""What drivers print instead of a value: sysfs of hfi1 and mlx5 `N/A (no PMA)` (drivers/infiniband/core/sysfs.c,
show_pma_counter), nvidia-smi `[N/A]`, `[Not Supported]`, `Requested functionality has been deprecated` (590)."""


def parsed(reading: Reading, parse: Callable[[str], T], what: str = "") -> T | Unread:
    """`parse` of the text; Unread where there is none, or where the text is not of the form that `parse` takes."""
    if isinstance(reading, Unread):
        return reading
    text = reading.strip()
    if NOT_A_VALUE.fullmatch(text):
        return Unread(Problem.UNSUPPORTED, f"{what} says {text}".strip())
    try:
        return parse(text)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Unread(Problem.ERROR, f"{what} says {shortened(text)!r}: {error}".strip())


def integer(reading: Reading, what: str = "") -> int | Unread:
    """A whole number in decimal, or in hex after 0x."""
    return parsed(reading, _whole, what)


def _whole(text: str) -> int:
    try:
        return int(text, 0 if text.lower().startswith("0x") else 10)
    except ValueError:
        raise ValueError("no whole number") from None


def line(reading: Reading, what: str = "") -> str | Unread:
    """The first line, without spaces around it; an empty file is an error."""
    return parsed(reading, _first_line, what)


def _first_line(text: str) -> str:
    if not text:
        raise ValueError("an empty file")
    return text.splitlines()[0].strip()


def shortened(text: str, most: int = 80) -> str:
    """One line of at most `most` signs, with nothing that a terminal would act on."""
    one = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return one if len(one) <= most else one[: most - 1] + "…"


def counted(number: int, noun: str) -> str:
    """`1 port`, `2 ports`, `2 boxes`: every figure in a report is read by a person."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"
