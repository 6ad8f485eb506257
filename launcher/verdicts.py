"""What the nodes' reports mean for a run: what blocks it, and which nodes it has to do without. Pure.

Three rules. A check that blocks on every node is no node's fault: the profile expects what the cluster does not have,
or all of it is broken, and a run that excluded everybody would leave nothing to run on. A check that blocks on some
nodes is theirs, whether it failed or could not look: a node that hides what its neighbours show is not like them, and
another one costs less than a run that stands still until somebody reads its log. And of a node that did not answer,
nothing is known, which blocks as well.

What two nodes are to blame for together (a bad link, or a pair of which nobody can say which one it is) costs the
fewest nodes that leave no such pair: one end of each is enough. Which end is a guess; pairs of earlier attempts help.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checks import covering
from checks.pairs import Blame
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
class BadLink:
    """Two nodes that a check of the network blames together."""

    check: str
    blame: Blame

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.blame.nodes

    def __str__(self) -> str:
        ends, rails = self.nodes, ", ".join(self.blame.rails)
        where = f" ({rails})" if rails else ""
        if self.blame.kind == "link":
            return f"the link {' - '.join(ends)}{where} is bad: {self.blame.why}"
        return f"{' or '.join(ends)} or what connects them{where}: {self.blame.why}"


@dataclass(frozen=True)
class Judged:
    """What was found on all nodes together."""

    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]
    """Of single nodes."""
    links: tuple[BadLink, ...] = ()
    """Of pairs of nodes: what their nodes report of them is not among the findings."""
    earlier: tuple[frozenset[str], ...] = ()
    """Pairs of earlier attempts of the run."""

    @property
    def blocks(self) -> bool:
        """Whether no task may start."""
        return bool(self.findings or self.links)

    @property
    def ends(self) -> tuple[str, ...]:
        """The fewest nodes without which no bad link is left between two others."""
        doubts = {node: sum(node in pair for pair in self.earlier) for node in self.nodes}
        out = [finding.node for finding in self.own]
        return covering.cover(self.nodes, [link.nodes for link in self.links], out=out, doubts=doubts)

    @property
    def nobody_passes(self) -> str:
        """Why the links are no node's fault, where no pair of nodes has passed; "" where some have."""
        if covering.nobody_passes(self.nodes, [link.blame for link in self.links]):
            return f"not one of the {len(self.nodes)} nodes passes with another"
        here = {node for link in self.links if link.blame.kind == "undetermined" for node in link.nodes}
        other = next((pair for pair in self.earlier if not pair & here), None)
        if here >= set(self.nodes) and other:
            return f"{' - '.join(sorted(other))} did not pass in an earlier attempt either"
        return ""

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
        ends = () if self.nobody_passes else self.ends
        return tuple(dict.fromkeys((*(finding.node for finding in order), *ends)))

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


def judged_of(
    nodes: Sequence[str],
    reports: Sequence[Mapping[str, Any]],
    *,
    over_links: bool = False,
    earlier: Sequence[frozenset[str]] = (),
) -> Judged:
    """Findings of nodes apart from those of pairs of nodes, which block unless the run may go on `over_links`."""
    blames = {
        (said["check"], Blame(said["kind"], tuple(said["nodes"]), said["why"], tuple(said["rails"])))
        for report in reports
        for said in report.get("blames", ())
    }
    links = [BadLink(check, blame) for check, blame in blames if covering.between([blame])]
    links.sort(key=lambda link: ([*nodes].index(link.nodes[0]) if link.nodes[0] in nodes else 0, str(link)))
    alone = {
        (check, node)
        for check, blame in blames
        for node in blame.nodes
        if blame.kind != "once" and not covering.between([blame])
    }
    shared = {(link.check, node) for link in links for node in link.nodes} - alone
    findings = [one for one in findings_of(reports) if (one.check, one.node) not in shared]
    return Judged(tuple(nodes), tuple(findings), () if over_links else tuple(links), tuple(earlier))


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
    if not judged.blocks:
        return None
    ends = judged.ends
    of_links = [f"{_end_of(link, ends)}: {link.check} link: {link}" for link in judged.links]
    evidence = (*map(str, findings), *of_links)[:MOST_EVIDENCE]
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
    if judged.links and not judged.own:
        return _outcome_of_links(judged, evidence)
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


def _outcome_of_links(judged: Judged, evidence: tuple[str, ...]) -> Outcome:
    """The end of an attempt in which pairs of nodes are all that blocks."""
    first, *others = judged.links
    more = f" (and {len(others)} more)" if others else ""
    if why := judged.nobody_passes:
        reason = f"preflight: {first}{more}; {why}: network, firewall or the job's variables; {OVER_LINKS}"
        return Outcome("hardware", reason, evidence=evidence)
    ends = judged.ends
    left = f"leaving out {', '.join(ends)} leaves no such pair"
    return Outcome(
        "hardware",
        f"preflight: {first}{more}; {left}; {OVER_LINKS}",
        node=ends[0],
        evidence=evidence,
        suspects=ends,
    )


OVER_LINKS = "`python -m launcher resume checks.links=go_on` runs over it"


def _end_of(link: BadLink, ends: Sequence[str]) -> str:
    return next((node for node in link.nodes if node in ends), link.nodes[0])


def _way_out(check: str) -> str:
    return (
        "checks.without= leaves out what these nodes cannot show, preflight=minimal everything else"
        if "." in check
        else "no node is to blame"
    )
