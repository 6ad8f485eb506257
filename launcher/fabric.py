"""The fabric's variables for an attempt: asked of every node, compared, written down with the reasons. Subprocess.

One process per node looks, in the environment that the tasks will have; the tasks themselves only read the answer. So
a fabric that is not there is known before any task starts, and nodes that differ are named.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from checks.fabric_environment import derive
from checks.fabric_facts import FabricFacts, FabricKind
from checks.fabric_report import as_json, on_this_node
from checks.given import given_by, replaced
from launcher import node_environment, preflight
from launcher.allocation import Allocation
from launcher.node_environment import Group, common_variables, differing_variables
from launcher.spec import JobSpec
from launcher.verdicts import Finding

MOST_LINES = 8
"""Warnings in the batch step's log; environment.json has them all."""


@dataclass(frozen=True)
class Prepared:
    """What the nodes said."""

    variables: Mapping[str, str]
    """For every task."""
    findings: list[Finding]
    """What keeps the attempt from starting."""
    lines: Sequence[str]
    """For the batch step's log."""


def prepare(
    spec: JobSpec,
    allocation: Allocation,
    *,
    master: str,
    attempt_dir: Path,
    python: str,
    environment: Mapping[str, str],
) -> Prepared:
    """Derive the variables on every node and leave environment.json in the attempt's folder."""
    reports, complaint = _ask(spec, allocation, master, python, {**environment, **spec.environment})
    place = {node: number for number, node in enumerate(allocation.nodes)}
    groups = node_environment.grouped(sorted(reports, key=lambda report: place.get(report["node"], 0)))
    node_environment.write(attempt_dir, spec.fabric, groups)
    silent = [node for node in allocation.nodes if node not in {report["node"] for report in reports}]
    findings = [
        Finding(
            node,
            "fabric",
            "fail",
            error,
            f"fabric={spec.fabric}",
            "leave this node out, or name another fabric=",
        )
        for group in groups
        for node in group.nodes
        for error in group.report["errors"]
    ]
    findings += [
        Finding(node, "fabric", "unknown", complaint or "no answer", "a report", "")
        for node in (silent if allocation.job_id else [])
    ]
    taken_away = replaced(
        given_by(environment, "the environment of the job"),
        given_by(spec.environment, "the job's configuration"),
    )
    lines = [f"fabric {spec.fabric}: {line}" for line in taken_away]
    return Prepared(common_variables(groups), findings, [*lines, *summary(spec.fabric, groups)])


def summary(fabric: str, groups: Sequence[Group]) -> list[str]:
    """What the batch step's log says: the variables, where nodes differ, what contradicts the evidence. Pure."""
    common = common_variables(groups)
    lines = (
        [f"fabric {fabric}: {' '.join(f'{name}={value}' for name, value in common.items())}"]
        if common
        else []
    )
    for name, values in differing_variables(groups).items():
        said = "; ".join(
            f"{value or 'not set'} on {_nodes(group)}"
            for group, value in zip(groups, values.values(), strict=True)
        )
        lines.append(f"fabric {fabric}: nodes differ in {name}: {said}; each node's tasks get its own")
    warnings = [
        f"fabric {fabric}: {_nodes(group)}: {warning}"
        for group in groups
        for warning in group.report["warnings"]
    ]
    more = len(warnings) - MOST_LINES
    lines += warnings[:MOST_LINES]
    return (
        [*lines, f"fabric {fabric}: {more} more warnings in {node_environment.FILE}"] if more > 0 else lines
    )


def _nodes(group: Group) -> str:
    first = group.nodes[0]
    return first if len(group.nodes) == 1 else f"{first} and {len(group.nodes) - 1} more"


def _ask(
    spec: JobSpec, allocation: Allocation, master: str, python: str, environment: Mapping[str, str]
) -> tuple[list[dict[str, Any]], str]:
    kind = cast(FabricKind, spec.fabric_kind)
    if kind == "loopback":  # nothing is looked at, so nobody has to be asked
        given = given_by(spec.environment, "the job's configuration")
        return [
            as_json(derive(FabricFacts(node), kind, given)) for node in allocation.nodes or ("localhost",)
        ], ""
    peer = master if _is_ipv4(master) else None
    if not allocation.job_id:
        configured = frozenset(spec.environment)
        return [as_json(on_this_node(kind, environment, configured=configured))], ""
    command = [*preflight.one_per_node(allocation), python, "-m", "checks.fabric_report", f"--kind={kind}"]
    command.append(f"--configured={','.join(sorted(spec.environment))}")
    if peer is not None:
        command.append(f"--peer={peer}")
    output, complaint = preflight.output_of(command, environment)
    return preflight.reports_in(output, labelled=True), complaint


def _is_ipv4(address: str) -> bool:
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return True
