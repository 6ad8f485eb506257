"""What the nodes' reports mean for a run: what blocks it, and which nodes it has to do without. Pure.

Three rules. A check that blocks on every node is no node's fault: the profile expects what the cluster does not have,
or all of it is broken, and a run that excluded everybody would leave nothing to run on. A check that blocks on some
nodes is theirs, whether it failed or could not look: a node that hides what its neighbours show is not like them, and
another one costs less than a run that stands still until somebody reads its log. And of a node that did not answer,
nothing is known, which blocks as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.outcome import MOST_EVIDENCE, Outcome

BLOCKING = frozenset({"fail", "unknown"})
LAUNCH_FAILED_ON = re.compile(
    r"(?:launch|Launch)\b.* failed on node (?P<node>[\w.-]+)|Node failure on (?P<down>[\w.-]+)"
)


@dataclass(frozen=True)
class Finding:
    """A check that blocks: on which node, what was read, what was expected, what to do."""

    node: str
    check: str
    verdict: str
    read: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        advice = f"; {self.remedy}" if self.remedy else ""
        return f"{self.node}: {self.check} {self.verdict}: {self.read}, expected {self.expected}{advice}"


@dataclass(frozen=True)
class Judged:
    """What was found on all nodes together."""

    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def shared(self) -> dict[str, list[Finding]]:
        """By check, the findings of those that block on every node, of two or more."""
        by_check: dict[str, list[Finding]] = {}
        for finding in self.own:
            by_check.setdefault(finding.check, []).append(finding)
        return {
            check: found
            for check, found in by_check.items()
            if len(self.nodes) > 1 and {each.node for each in found} >= set(self.nodes)
        }

    @property
    def own(self) -> tuple[Finding, ...]:
        """Without the votes that nobody won: those say that nodes differ, and of none that it is wrong."""
        return tuple(finding for finding in self.findings if finding not in self.ties)

    @property
    def ties(self) -> tuple[Finding, ...]:
        return tuple(
            finding
            for finding in self.findings
            if finding.check.startswith("same.") and finding.verdict == "unknown"
        )

    @property
    def suspects(self) -> tuple[str, ...]:
        """The nodes to do without, worst first: fail before unknown. Whether all of them is another question."""
        order = sorted(self.own, key=lambda one: one.verdict != "fail")
        return tuple(dict.fromkeys(finding.node for finding in order))

    def of(self, node: str) -> tuple[Finding, ...]:
        """What made a node a suspect, fail before unknown."""
        own = (finding for finding in self.own if finding.node == node)
        return tuple(sorted(own, key=lambda one: one.verdict != "fail"))


def findings_of(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The checks of the reports that block."""
    return [
        Finding(
            report["node"], item["check"], item["verdict"], item["read"], item["expected"], item["remedy"]
        )
        for report in reports
        for item in report["checks"]
        if item["verdict"] in BLOCKING
    ]


def silent(
    reports: Sequence[Mapping[str, Any]], nodes: Sequence[str], complaint: str
) -> list[dict[str, Any]]:
    """A report for each node that gave none."""
    answered = {report["node"] for report in reports}
    missing = [node for node in nodes if node not in answered]
    if not reports and not nodes:
        missing = ["localhost"]
    check = {"check": "report", "verdict": "unknown", "read": complaint or "no answer", "expected": "a report",
             "remedy": ""}  # fmt: skip
    return [{"node": node, "checks": [check]} for node in missing]


def outcome_of(judged: Judged, failed_earlier: Mapping[str, str]) -> Outcome | None:
    """The end of an attempt that the preflight did not let start; None where it may.

    `failed_earlier` names, by check, another node on which it blocked before in this run: a job of one node has no
    other nodes to compare with, but its next attempt is on another one.
    """
    findings = judged.findings
    if not findings:
        return None
    evidence = tuple(str(finding) for finding in findings[:MOST_EVIDENCE])
    for finding in findings:
        if match := LAUNCH_FAILED_ON.search(finding.read):
            node = match["node"] or match["down"]
            return Outcome(
                "node_failure", f"preflight: no task starts on {node}", node=node, evidence=evidence
            )
    for check, (first, *_) in judged.shared.items():
        where = f"on all {len(judged.nodes)} nodes: {check} {first.verdict}"
        reason = f"preflight: {where}: {first.read}, expected {first.expected}; {_way_out(check)}"
        return Outcome("hardware", reason, evidence=evidence)
    if len(judged.nodes) == 1:
        for finding in findings:
            other = failed_earlier.get(finding.check, finding.node)
            if other != finding.node:
                reason = f"preflight: {finding}; {other} failed it before, {_way_out(finding.check)}"
                return Outcome("hardware", reason, evidence=evidence)
    suspects = judged.suspects
    if not suspects:
        first = judged.ties[0]
        differ = ", ".join(
            dict.fromkeys(f"{each.node} {each.read}" for each in judged.ties if each.check == first.check)
        )
        return Outcome(
            "hardware",
            f"preflight: {first.check} differs, and there is no majority: {differ}",
            evidence=evidence,
        )
    first = judged.of(suspects[0])[0]
    more = f" (and {', '.join(suspects[1:])})" if len(suspects) > 1 else ""
    return Outcome(
        "hardware", f"preflight: {first}{more}", node=suspects[0], evidence=evidence, suspects=suspects
    )


def _way_out(check: str) -> str:
    return (
        "checks.without= leaves out what these nodes cannot show, preflight=minimal everything else"
        if "." in check
        else "no node is to blame"
    )
