"""The table of all checks: name, subject, tier, what each reads, and where its threshold comes from. Pure.

A check is a function from (what is known of a node, Expectations) to its results; the decorator puts it into the
table. Modules named `judge*.py` hold them. A tier that works (`active`) adds its own to the same
table with its own kind of evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from checks.expectations import Expectations
from checks.reading import Problem, Unread
from checks.verdict import CheckResult, Verdict

Tier = Literal["minimal", "passive", "active"]
TIERS: tuple[str, ...] = get_args(Tier)

Judge = Callable[[Any, Expectations], list[CheckResult]]
"""The first argument is a `facts.Node`; for tier `active`, a `measured.Measured`."""


@dataclass(frozen=True)
class Check:
    name: str
    """`subject.what`."""
    tier: Tier
    reads: tuple[str, ...]
    """Evidence keys, as glob patterns: without them the check is unknown. `python -m checks list` shows them."""
    source: str
    """Who says that this threshold is right."""
    summary: str
    judge: Judge

    @property
    def subject(self) -> str:
        return self.name.partition(".")[0]


CHECKS: dict[str, Check] = {}


def check(
    name: str, *, reads: Iterable[str], source: str, tier: Tier = "passive"
) -> Callable[[Judge], Judge]:
    """Enter the function below into the table; its docstring's first line is its summary."""

    def enter(judge: Judge) -> Judge:
        assert name not in CHECKS, name
        assert judge.__doc__, f"{name} needs a docstring"
        CHECKS[name] = Check(name, tier, tuple(reads), source, judge.__doc__.splitlines()[0], judge)
        return judge

    return enter


def unread(name: str, value: Unread, expected: str, remedy: str = "") -> CheckResult:
    """The result of a check that could not look."""
    verdict = Verdict.NOT_PERMITTED if value.problem is Problem.NOT_PERMITTED else Verdict.UNKNOWN
    return CheckResult(name, verdict, str(value), expected, remedy or ADVICE[value.problem])


ADVICE = {
    Problem.MISSING: "is the driver loaded, the tool installed, the folder mounted into the container?",
    Problem.NOT_PERMITTED: "only root may read it: ask an administrator to run the same command",
    Problem.TIMED_OUT: "what hangs here will hang the job: leave this node out",
    Problem.UNSUPPORTED: "the driver has no such value",
    Problem.ERROR: "look at it by hand; the format may be new",
    Problem.NOT_RECORDED: "the bundle does not hold it; collect again on the node",
}


def judge(node: Any, expectations: Expectations, checks: Iterable[Check]) -> list[CheckResult]:
    """Every check's results, in order. Not permitted becomes unknown where the expectations demand permission."""
    results = [result for one in checks for result in one.judge(node, expectations)]
    if expectations.demand_permission:
        results = [
            replace(r, verdict=Verdict.UNKNOWN) if r.verdict is Verdict.NOT_PERMITTED else r for r in results
        ]
    return results
