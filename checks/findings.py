"""From what was found on each GPU, port or folder to one result of a check. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from checks.reading import Problem, Unread
from checks.registry import ADVICE
from checks.verdict import CheckResult, Verdict

MOST_SHOWN = 4
_ORDER = (Verdict.FAIL, Verdict.UNKNOWN, Verdict.WARN, Verdict.NOT_PERMITTED)


@dataclass(frozen=True)
class Finding:
    verdict: Verdict
    text: str
    remedy: str = ""


def fail(text: str, remedy: str = "") -> Finding:
    return Finding(Verdict.FAIL, text, remedy)


def warn(text: str, remedy: str = "") -> Finding:
    return Finding(Verdict.WARN, text, remedy)


def by_administrator(what: str) -> str:
    """What to do where a user can do no more than stay away from the node, and tell somebody."""
    return f"leave this node out; an administrator has to {what}"


def times(count: int) -> str:
    """` (3 times)` after what was seen more than once."""
    return f" ({count} times)" if count > 1 else ""


def blind(value: Unread, what: str = "") -> Finding:
    """What could not be looked at."""
    verdict = Verdict.NOT_PERMITTED if value.problem is Problem.NOT_PERMITTED else Verdict.UNKNOWN
    return Finding(verdict, f"{what}: {value}" if what else str(value), ADVICE[value.problem])


def result(name: str, findings: Iterable[Finding], healthy: str, expected: str) -> list[CheckResult]:
    """The worst findings, or a pass that says what was read."""
    found = list(dict.fromkeys(findings))
    for verdict in _ORDER:
        worst = [finding for finding in found if finding.verdict is verdict]
        if worst:
            texts = [finding.text for finding in worst]
            more = f" and {len(texts) - MOST_SHOWN} more" if len(texts) > MOST_SHOWN else ""
            remedies = dict.fromkeys(finding.remedy for finding in worst if finding.remedy)
            return [
                CheckResult(
                    name, verdict, "; ".join(texts[:MOST_SHOWN]) + more, expected, "; ".join(remedies)
                )
            ]
    return [CheckResult(name, Verdict.PASS, healthy, expected)]
