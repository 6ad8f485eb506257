"""RoCE: addresses, frame size, flow control. Pure."""

from __future__ import annotations

import json

from checks.expectations import Expectations
from checks.facts import Interface, Node, RdmaPort
from checks.findings import Finding, blind, fail, result, warn
from checks.reading import Problem, Unread, counted
from checks.registry import check
from checks.verdict import CheckResult

ROCE_V2 = "RoCE v2"
SMALLEST_ROCE_MTU = 4200
"""An RDMA MTU of 4,096 bytes and its headers; with less the adapter takes 1,024 or 2,048 (enum ib_mtu)."""


def roce_ports(node: Node, expected: Expectations) -> list[RdmaPort]:
    """Active RoCE ports that the job will use: of a RoCE job, or where nobody said and there is no InfiniBand."""
    if isinstance(node.rdma.devices, Unread) or expected.fabric not in (None, "roce"):
        return []
    ports = [
        port
        for device in node.rdma.devices
        if device.driver != "efa"
        for port in device.ports
        if isinstance(port.state, Unread) or "ACTIVE" in port.state
    ]
    if expected.fabric is None and any(port.link_layer == "InfiniBand" for port in ports):
        return []
    return [port for port in ports if port.link_layer == "Ethernet"]


def roce_gid_indexes(port: RdmaPort) -> list[int]:
    """Indexes of RoCE v2 GIDs with an IPv4 address: what NCCL_IB_GID_INDEX may be."""
    if isinstance(port.gids, Unread):
        return []
    return [gid.index for gid in port.gids if gid.kind == ROCE_V2 and gid.ipv4]


@check("roce.gid", reads=["* /sys/class/infiniband/*/ports/*/gid*"], source="RoCE v2 over IPv4 (nccl#718)")
def gid(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every RoCE port has a RoCE v2 GID with an IPv4 address, at one index on all ports."""
    name = "roce.gid"
    ports = roce_ports(node, expected)
    if not ports:
        return []
    findings: list[Finding] = []
    common: set[int] | None = None
    for port in ports:
        if isinstance(port.gids, Unread):
            findings.append(blind(port.gids, port.device))
            continue
        kinds = [value.kind for value in port.gids if isinstance(value.kind, Unread)]
        indexes = roce_gid_indexes(port)
        if not indexes and kinds:
            findings.append(blind(kinds[0], port.device))
        elif not indexes:
            findings.append(
                fail(f"{port.device}: no RoCE v2 GID with an IPv4 address", "has its interface an address?")
            )
        else:
            common = set(indexes) if common is None else common & set(indexes)
    if not findings and not common:
        findings.append(fail("no index is RoCE v2 on all ports", "NCCL_IB_GID_INDEX cannot name one for all"))
    shown = f"index {min(common)} on {counted(len(ports), 'port')}" if common else ""
    return result(name, findings, shown, "one RoCE v2 IPv4 index")


@check(
    "roce.mtu",
    reads=["read /sys/class/net/*/mtu"],
    source="enum ib_mtu: an RDMA MTU of 4,096 wants 4,200 bytes",
)
def mtu(node: Node, expected: Expectations) -> list[CheckResult]:
    """Interfaces of RoCE ports carry jumbo frames."""
    name = "roce.mtu"
    interfaces = _roce_interfaces(node, expected)
    if isinstance(interfaces, Unread):
        return result(name, [blind(interfaces)], "", "jumbo frames")
    findings: list[Finding] = []
    for one in interfaces:
        if isinstance(one.mtu, Unread):
            findings.append(blind(one.mtu, one.name))
        elif one.mtu < SMALLEST_ROCE_MTU:
            findings.append(
                warn(f"{one.name}: MTU {one.mtu}", "9000 on every node and switch of this network")
            )
    shown = ", ".join(dict.fromkeys(f"MTU {one.mtu}" for one in interfaces))
    return result(name, findings, shown, f"MTU ≥ {SMALLEST_ROCE_MTU}") if interfaces else []


@check("roce.pfc", reads=["run dcb -j pfc show dev *"], source="dcb-pfc(8); IEEE 802.1Qbb")
def priority_flow(node: Node, expected: Expectations) -> list[CheckResult]:
    """Priority flow control is on for some priority of each RoCE interface. Networks without exist."""
    name = "roce.pfc"
    interfaces = _roce_interfaces(node, expected)
    if isinstance(interfaces, Unread):
        return result(name, [blind(interfaces)], "", "PFC on")
    findings: list[Finding] = []
    for one in interfaces:
        said = one.priority_flow
        if isinstance(said, Unread):
            # A tool that few images hold must not keep every RoCE job from starting.
            missing = said.problem is Problem.MISSING
            findings.append(
                warn(f"{one.name}: {said}", "install iproute2's dcb") if missing else blind(said, one.name)
            )
            continue
        try:
            priorities = json.loads(said)["prio-pfc"]
            on = any(priorities.values() if isinstance(priorities, dict) else priorities)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            findings.append(blind(Unread(Problem.ERROR, f"dcb said {said[:60]!r}: {error}"), one.name))
            continue
        if not on:
            findings.append(
                warn(f"{one.name}: PFC is off", "lossy RoCE is slow under load unless ECN is tuned for it")
            )
    return (
        result(name, findings, f"on at {counted(len(interfaces), 'interface')}", "on") if interfaces else []
    )


def _roce_interfaces(node: Node, expected: Expectations) -> list[Interface] | Unread:
    ports = roce_ports(node, expected)
    if not ports or isinstance(node.rdma.devices, Unread):
        return []
    if isinstance(node.interfaces, Unread):
        return node.interfaces
    names = {
        name
        for device in node.rdma.devices
        if device.name in {port.device for port in ports}
        for name in device.interfaces
    }
    return [one for one in node.interfaces if one.name in names]
