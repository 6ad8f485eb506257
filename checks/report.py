"""Results as people and programs read them. Pure."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from checks.facts import Node
from checks.hostlist import folded
from checks.pairs import Blame
from checks.reading import counted, shortened
from checks.verdict import CheckResult, Verdict, worst

COLUMNS = ("check", "verdict", "read", "expected", "what to do")
NARROWEST = 100
MOST_READINGS = 4
"""Rows of one check and verdict; more become one row with an example."""


def json_line(
    node: str,
    results: Sequence[CheckResult],
    traits: Mapping[str, str] | None = None,
    blames: Mapping[str, Sequence[Blame]] | None = None,
) -> str:
    """One line that a program reads: the launcher takes one from each node, and may compare their traits.

    `blames` are those of the job, by check; the line holds the ones that name this node, of the checks that were made.
    """
    line: dict[str, object] = {"node": node, "checks": [asdict(result) for result in results]}
    if traits is not None:
        line["traits"] = traits
    if blames is not None:
        made = {result.check for result in results}
        line["blames"] = [
            {"check": check, **asdict(one)}
            for check, each in blames.items()
            for one in each
            if check in made and node in one.nodes
        ]
    return json.dumps(line)


def table(results: Sequence[CheckResult], *, width: int = 120) -> str:
    """Check, verdict, what was read, what was expected, what to do; long cells are wrapped to the width."""
    rows = [
        (r.check, r.verdict.value, _plain(r.read), _plain(r.expected), _plain(r.remedy) if r.verdict.blocks or
         r.verdict is Verdict.WARN else "")
        for r in results
    ]  # fmt: skip
    return _wrapped([COLUMNS, *rows], max(width, NARROWEST))


def summary(results: Sequence[CheckResult], what: str, seconds: float | None = None) -> str:
    """`pass: 31 checks on n1 in 1.2 s: 30 pass, 1 not permitted`"""
    counts = [
        f"{sum(r.verdict is v for r in results)} {v.value}"
        for v in Verdict
        if any(r.verdict is v for r in results)
    ]
    took = f" in {seconds:.1f} s" if seconds is not None else ""
    whole, each = worst(r.verdict for r in results).value, ", ".join(counts) or "none"
    return f"{whole}: {counted(len(results), 'check')} on {what}{took}: {each}"


def costs(node: Node) -> str:
    """`it took gpu 1.2 s (0.15 s a GPU), rdma 1.1 s, …`: side by side, so their sum is more than the whole."""
    each = sorted(node.seconds.items(), key=lambda one: -one[1])
    texts = [f"{subject} {seconds:.2f} s" for subject, seconds in each if seconds >= 0.01]
    if node.gpus.gpus and "gpu" in node.seconds:
        share = node.seconds["gpu"] / len(node.gpus.gpus)
        texts = [f"{text} ({share:.2f} s a GPU)" if text.startswith("gpu ") else text for text in texts]
    return f"it took {', '.join(texts) or 'no time'}"


def folded_table(reports: Mapping[str, Sequence[CheckResult]], *, width: int = 120) -> str:
    """Many nodes: equal results in one row with their nodes folded, passes of all nodes only counted."""
    groups: dict[CheckResult, list[str]] = {}
    for node, results in reports.items():
        for result in results:
            if result.verdict is not Verdict.PASS:
                groups.setdefault(result, []).append(node)
    shown = _merged(groups)
    order = (Verdict.FAIL, Verdict.UNKNOWN, Verdict.WARN, Verdict.NOT_PERMITTED)
    shown.sort(key=lambda one: (order.index(one[0].verdict), one[0].check))
    if not shown:
        return f"every check passes on {folded(reports)}"
    rows = [("nodes", *COLUMNS)]
    rows += [
        (folded(nodes), r.check, r.verdict.value, _plain(r.read), _plain(r.expected), _plain(r.remedy))
        for r, nodes in shown
    ]
    return _wrapped(rows, max(width, NARROWEST))


def nodes_summary(reports: Mapping[str, Sequence[CheckResult]], seconds: float | None = None) -> str:
    """The whole verdict, and the words that leave the bad nodes out."""
    whole = worst(one.verdict for found in reports.values() for one in found)
    bad = [node for node, found in reports.items() if worst(one.verdict for one in found).blocks]
    took = f" in {seconds:.1f} s" if seconds is not None else ""
    line = f"{whole.value}: {counted(len(reports), 'node')} ({folded(reports)}){took}"
    return f"{line}\nleave out: sbatch --exclude={folded(bad)}" if bad else line


def _merged(groups: Mapping[CheckResult, list[str]]) -> list[tuple[CheckResult, list[str]]]:
    """One row in place of many that differ only in what each node read, so that a report stays readable."""
    alike: dict[tuple[str, Verdict, str], list[tuple[CheckResult, list[str]]]] = {}
    for result, nodes in groups.items():
        alike.setdefault((result.check, result.verdict, result.expected), []).append((result, nodes))
    rows = []
    for members in alike.values():
        if len(members) <= MOST_READINGS:
            rows += members
            continue
        example, _ = max(members, key=lambda one: len(one[1]))
        read = f"{counted(len(members), 'different reading')}, as: {example.read}"
        rows.append((replace(example, read=read), [node for _, nodes in members for node in nodes]))
    return rows


def _plain(text: str) -> str:
    return shortened(text, 2000)


def _wrapped(rows: Sequence[Sequence[str]], width: int) -> str:
    columns = len(rows[0])
    natural = [max(len(row[column]) for row in rows) for column in range(columns)]
    room = width - 2 * (columns - 1)
    # The last three columns are prose; they share what the short ones leave, each by how much it has to say.
    fixed = sum(natural[:-3])
    prose = natural[-3:]
    left = max(room - fixed, 45)
    if sum(prose) > left:
        least = [min(one, 15) for one in prose]
        spare = left - sum(least)
        wish = [one - small for one, small in zip(prose, least, strict=True)]
        prose = [small + spare * more // max(sum(wish), 1) for small, more in zip(least, wish, strict=True)]
    widths = [*natural[:-3], *prose]
    lines = []
    for row in rows:
        cells = [
            textwrap.wrap(cell, max(size, 8), break_long_words=True) or [""]
            for cell, size in zip(row, widths, strict=True)
        ]
        for line in range(max(map(len, cells))):
            parts = [
                (cell[line] if line < len(cell) else "").ljust(size)
                for cell, size in zip(cells, widths, strict=True)
            ]
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
