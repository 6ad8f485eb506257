"""What a check says: a verdict with the evidence that it read. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Ordered from good to bad. A check that could not look says UNKNOWN, and UNKNOWN blocks.

    NOT_PERMITTED is evidence that only root may read: reported, and blocking only where the caller demands it.
    """

    PASS = "pass"
    NOT_PERMITTED = "not permitted"
    WARN = "warn"
    UNKNOWN = "unknown"
    FAIL = "fail"

    @property
    def blocks(self) -> bool:
        return self in (Verdict.UNKNOWN, Verdict.FAIL)


EXIT_CODES = {
    Verdict.PASS: 0,
    # A user cannot become root: what only root may read must not make every run of theirs a warning.
    Verdict.NOT_PERMITTED: 0,
    Verdict.FAIL: 1,
    Verdict.WARN: 2,
    Verdict.UNKNOWN: 3,
}
"""Exit status of `python -m checks`; 64 is a usage error (sysexits.h EX_USAGE)."""


@dataclass(frozen=True)
class CheckResult:
    """One check on one node: what was read, what was expected, and what to do about a difference."""

    check: str
    verdict: Verdict
    read: str
    expected: str
    remedy: str = ""


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of the whole: fail over unknown over warn over pass. No check at all is UNKNOWN, and so is nothing
    but what only root may read: a node that nobody could look at has not passed."""
    found = set(verdicts)
    order = [Verdict.FAIL, Verdict.UNKNOWN, Verdict.WARN, Verdict.PASS]
    return next((verdict for verdict in order if verdict in found), Verdict.UNKNOWN)
