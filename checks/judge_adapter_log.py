"""What mlx5 adapters report of themselves in the kernel log. Pure.

    mlx5_core 0000:5c:00.0: mlx5_pcie_event:299:(pid 268269): Detected insufficient power on the PCIe slot (27W).
    mlx5_core 0000:5c:00.0: Port module event[error]: module 0, Cable error, High Temperature
    mlx5_core 0000:5c:00.0: device's health compromised - reached miss count

Each has a line that ends it: `PCIe slot advertised sufficient power (75W).`, `Port module event: module 0, Cable
plugged`, `health recovery succeeded` (drivers/net/ethernet/mellanox/mlx5/core: events.c and health.c).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from checks.expectations import Expectations
from checks.facts import Node
from checks.findings import Finding, blind, by_administrator, fail, result, times, warn
from checks.reading import Problem, Unread
from checks.registry import check
from checks.verdict import CheckResult

Kind = Literal["power", "module", "health"]

LINE = re.compile(r"\bmlx5_core ([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\b[^:]*: (.*)")
BEGINS: dict[Kind, re.Pattern[str]] = {
    "power": re.compile(r"Detected (insufficient power on the PCIe slot \(\d+W\))"),
    "module": re.compile(r"Port module event\[error\]: (module \d+, .*\S)"),
    "health": re.compile(r"(device's health compromised|Fatal error \d+ detected)"),
}
ENDS: dict[Kind, re.Pattern[str]] = {
    "power": re.compile(r"PCIe slot advertised sufficient power"),
    "module": re.compile(r"Port module event: module \d+, Cable plugged"),
    "health": re.compile(r"health recovery succeeded"),
}


@dataclass(frozen=True)
class Complaint:
    """One kind of trouble of one adapter that nothing has ended since."""

    address: str
    kind: Kind
    text: str
    count: int


def complaints(log: str) -> list[Complaint]:
    """In the order of their first appearance; the last text of each counts."""
    found: dict[tuple[str, Kind], Complaint] = {}
    for address, said in _of_adapters(log):
        for kind, begins in BEGINS.items():
            key = (address, kind)
            if match := begins.search(said):
                before = found.get(key)
                found[key] = Complaint(address, kind, match[1], before.count + 1 if before else 1)
            elif ENDS[kind].search(said):
                found.pop(key, None)
    return list(found.values())


def _of_adapters(log: str) -> Iterator[tuple[str, str]]:
    for line in log.splitlines():
        if match := LINE.search(line):
            yield match[1], match[2]


@check(
    "rdma.log",
    reads=["run dmesg"],
    source="drivers/net/ethernet/mellanox/mlx5/core, events.c and health.c; gpud's infiniband component",
)
def adapter_log(node: Node, expected: Expectations) -> list[CheckResult]:
    """No RDMA adapter has reported in the kernel log that its firmware, its cable or its slot is in trouble."""
    name, wish = "rdma.log", "no complaint of an adapter"
    devices, log = node.rdma.devices, node.host.kernel_log
    # A captured log alone: nobody says which devices there are.
    log_alone = isinstance(devices, Unread) and devices.problem is Problem.NOT_RECORDED
    if expected.without_rdma or (not log_alone and (isinstance(devices, Unread) or not devices)):
        return []
    if isinstance(log, Unread):
        return result(name, [blind(log, "kernel log")], "", wish)
    adapters = set() if isinstance(devices, Unread) else {device.pci for device in devices}
    findings = [_finding(one) for one in complaints(log) if log_alone or one.address in adapters]
    return [] if log_alone and not findings else result(name, findings, "none in the kernel log", wish)


def _finding(one: Complaint) -> Finding:
    text = f"{one.address}: {one.text}{times(one.count)}"
    if one.kind == "health":
        return fail(text, by_administrator("reset the adapter, or reboot the node"))
    if one.kind == "module":
        return warn(
            text, "rdma.port says whether the link is up now; a transceiver that repeats it is suspect"
        )
    # Some adapters say it at every boot and are as fast as others: the measurement decides.
    return warn(text, "compare with the other nodes; net.rails of the tier active says whether it is slow")
