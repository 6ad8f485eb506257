"""Tier `passive`: collect on this machine or take a bundle, judge, and say what it took. Subprocess."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from checks import bundle as bundles
from checks import captures
from checks.catalog import named
from checks.collect import collect_node
from checks.evidence import BUDGET_SECONDS, Live, Record, Recorded, run_command
from checks.expectations import Expectations
from checks.facts import Node
from checks.reading import Problem
from checks.registry import Check, judge
from checks.verdict import CheckResult, Verdict


@dataclass(frozen=True)
class Looked:
    """One node, looked at: its facts, the results, and the evidence that both came from."""

    node: Node
    expected: Expectations
    results: list[CheckResult]
    records: Mapping[str, Record]
    seconds: float


def look(
    name: str,
    expected: Expectations,
    checks: Sequence[str] = (),
    *,
    root: str = "/",
    budget: float = BUDGET_SECONDS,
) -> Looked:
    """Collect on this machine and judge. Raises ValueError for a check that does not exist."""
    chosen = _chosen(checks, expected)
    began = time.monotonic()
    runner = run_command if root == "/" else captures.nothing_runs
    with Live(root, budget=budget, runner=runner) as source:
        node = collect_node(source, name, expected)
    return Looked(node, expected, judge(node, expected, chosen), source.records, time.monotonic() - began)


def look_at(
    bundle: bundles.Bundle, expected: Expectations, checks: Sequence[str] = (), *, part: bool = False
) -> Looked:
    """Judge a bundle. Of a part of a node's evidence (a capture) only what it holds is judged."""
    chosen = _chosen(checks, expected)
    began = time.monotonic()
    node = collect_node(Recorded(bundle.records), bundle.node, expected)
    if part and not checks:
        chosen = [check for check in chosen if _has_evidence(check, bundle.records)]
    results = judge(node, expected, chosen)
    if part and not checks:
        results = [result for result in results if not _only_unrecorded(result)]
    return Looked(node, expected, results, bundle.records, time.monotonic() - began)


def opened(paths: Sequence[Path], part: str = "") -> tuple[bundles.Bundle, bool]:
    """A bundle, or captures as one; and whether it is captures. Raises BundleError."""
    if len(paths) == 1 and paths[0].is_file() and bundles.is_bundle(paths[0]):
        return bundles.read(paths[0]), False
    return captures.imported(paths, part=part), True


def _chosen(names: Sequence[str], expected: Expectations) -> list[Check]:
    chosen = named(names, "passive")
    left_out = {check.name for check in named(expected.without, None)} if expected.without else set()
    return [check for check in chosen if check.name not in left_out]


def _has_evidence(check: Check, records: Mapping[str, Record]) -> bool:
    return any(
        fnmatch.fnmatchcase(key.partition(" @")[0], pattern) for pattern in check.reads for key in records
    )


def _only_unrecorded(result: CheckResult) -> bool:
    """Not one of its findings is about something that the capture holds."""
    findings = result.read.split("; ")
    return result.verdict is Verdict.UNKNOWN and all(Problem.NOT_RECORDED in one for one in findings)
