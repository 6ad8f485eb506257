"""environment.json of an attempt: which variables the nodes' evidence led to, and why. File system.

Nodes that agree share one entry. Values on which all nodes agree are in the environment that every task starts with;
where nodes differ (another node type, a port that is down), each task takes its own node's values from here.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "environment.json"


@dataclass(frozen=True)
class Group:
    """Nodes whose evidence led to the same."""

    nodes: tuple[str, ...]
    report: Mapping[str, Any]
    """A Derivation as JSON, without the node."""

    def variables(self) -> dict[str, str]:
        return {setting["name"]: setting["value"] for setting in self.report["settings"]}


def grouped(reports: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The reports of all nodes with equal ones folded, the largest group first. Pure."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for report in reports:
        same = {key: value for key, value in report.items() if key != "node"}
        groups.setdefault(json.dumps(same, sort_keys=True), ([], same))[0].append(report["node"])
    ordered = sorted(groups.values(), key=lambda group: -len(group[0]))
    return [Group(tuple(nodes), report) for nodes, report in ordered]


def common_variables(groups: Sequence[Group]) -> dict[str, str]:
    """What every node says with the same value. Pure."""
    every = [group.variables() for group in groups]
    return {
        name: value
        for name, value in (every[0] if every else {}).items()
        if all(variables.get(name) == value for variables in every)
    }


def differing_variables(groups: Sequence[Group]) -> dict[str, dict[str, str]]:
    """Variable -> first node of each group -> its value (empty: not derived there), where nodes differ. Pure."""
    common = common_variables(groups)
    names = [name for group in groups for name in group.variables() if name not in common]
    return {
        name: {group.nodes[0]: group.variables().get(name, "") for group in groups}
        for name in dict.fromkeys(names)
    }


def write(attempt_dir: Path, fabric: str, groups: Sequence[Group]) -> None:
    """Leave what was found in the attempt's folder, before any task starts."""
    content = {
        "fabric": fabric,
        "differing": sorted(differing_variables(groups)),
        "nodes": [{"nodes": list(group.nodes), **group.report} for group in groups],
    }
    temporary = attempt_dir / f"{FILE}.tmp"
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, attempt_dir / FILE)


def apply(attempt_dir: Path, environment: MutableMapping[str, str]) -> None:
    """In a task: add this node's values of the variables on which nodes differ. What is set already stays."""
    content = json.loads((attempt_dir / FILE).read_text())
    if not content["differing"]:
        return
    node = environment.get("SLURMD_NODENAME", socket.gethostname())
    report = next((entry for entry in content["nodes"] if node in entry["nodes"]), None)
    if report is None:
        raise LookupError(f"{attempt_dir / FILE}: nothing about node {node}")
    for setting in report["settings"]:
        if setting["name"] in content["differing"]:
            environment.setdefault(setting["name"], setting["value"])
