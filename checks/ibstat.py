"""What `ibstat` and `ibstatus` print, as the files of sysfs that they read. Pure; for importing captures only.

`ibstat` (rdma-core, infiniband-diags/ibstat.c) translates the files into words and leaves out how many lanes there are:
`State: Active` is `4: ACTIVE`, `Rate: 400` is `400 Gb/sec (4X NDR)`. `ibstatus` prints the files themselves.
`ibstat -l` names devices and `ibstat -s` leaves their ports out: such a capture says nothing about ports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from checks.collect_network import INFINIBAND
from checks.evidence import Record

STATES = {"Down": "1: DOWN", "Initializing": "2: INIT", "Armed": "3: ARMED", "Active": "4: ACTIVE"}
PHYSICAL = {
    "No state change": "0: <unknown>",
    "Sleep": "1: Sleep",
    "Polling": "2: Polling",
    "Disabled": "3: Disabled",
    "PortConfigurationTraining": "4: PortConfigurationTraining",
    "LinkUp": "5: LinkUp",
    "LinkErrorRecovery": "6: LinkErrorRecovery",
    "PhyTest": "7: Phy Test",
}
"""port_state_str and port_phy_state_str of ibstat.c -> drivers/infiniband/core/sysfs.c, state_show, phys_state_show."""

DEVICE = re.compile(r"^(?:CA|Switch|Router|iWARP RNIC|\?\?\?):? '([^']+)'$")
PORT = re.compile(r"^\s*Port (\d+):$")
STATUS = re.compile(r"^Infiniband device '([^']+)' port (\d+) status:$")
"""infiniband-diags/scripts/ibstatus."""
BROKEN = re.compile(r"^ibpanic: .*stat of IB device '([^']+)' failed")
LISTED = re.compile(
    r"(?:mlx[45]|bnxt_re|hfi1|qib|irdma|qedr|hns|mana|erdma|efa|siw|rxe|rdmap|rocep|ibp|ibs|roceo|ibo)\w*"
)
"""What devices are called by drivers and by rdma-core's rename rule (kernel-boot/rdma_rename.c)."""
VALUE = re.compile(r"^\s*([\w ]+?):\s+(\S.*?)\s*$")


@dataclass
class _Device:
    values: dict[str, str] = field(default_factory=dict)
    ports: dict[str, dict[str, str]] = field(default_factory=dict)


def looks_like(text: str) -> bool:
    rows = [row.strip() for row in text.splitlines() if row.strip()]
    return any(DEVICE.match(row) or STATUS.match(row) for row in rows) or (
        bool(rows) and all(LISTED.fullmatch(row) for row in rows)
    )


def records(text: str) -> dict[str, Record]:
    """Answers about every device and, where they are told, its ports."""
    found: dict[str, _Device] = {}
    into: dict[str, str] = {}
    device = _Device()
    for row in text.splitlines():
        if head := DEVICE.match(row.strip()):
            device = found.setdefault(head[1], _Device())
            into = device.values
        elif head := STATUS.match(row.strip()):
            into = found.setdefault(head[1], _Device()).ports.setdefault(head[2], {})
        elif port := PORT.match(row):
            into = device.ports.setdefault(port[1], {})
        elif failed := BROKEN.match(row):
            found.setdefault(failed[1], _Device())  # there, and without a port that could be told of
        elif LISTED.fullmatch(row.strip()):
            found.setdefault(row.strip(), _Device())
        elif value := VALUE.match(row):
            into[value[1]] = value[2]
    answers: dict[str, Record] = {f"list {INFINIBAND}": {"value": sorted(found)}}
    told = any(one.ports for one in found.values())
    for name, one in found.items():
        answers |= _of_device(f"{INFINIBAND}/{name}", one, told)
    return answers


def _of_device(folder: str, device: _Device, told: bool) -> dict[str, Record]:
    answers: dict[str, Record] = {}
    if firmware := device.values.get("Firmware version"):
        answers[f"read {folder}/fw_ver"] = {"value": firmware}
    # Ports are compared with those of equal boards, of which ibstat tells the type and ibstatus nothing.
    kind = device.values.get("CA type")
    unknown: Record = {"problem": "not recorded", "detail": "ibstatus tells no board"}
    answers[f"read {folder}/board_id"] = {"value": kind} if kind else unknown
    if not told:
        return answers
    ports = dict(device.ports)
    if (many := device.values.get("Number of ports", "")).isdigit():
        # Ports of a switch begin at 0, of everything else at 1; what is cut off is there and not told of.
        ports = {str(number): ports.get(str(number), {}) for number in range(1, int(many) + 1)} | ports
    answers[f"list {folder}/ports"] = {"value": sorted(ports, key=int)}
    for number, values in ports.items():
        answers |= _of_port(f"{folder}/ports/{number}", values)
    return answers


def _of_port(folder: str, values: dict[str, str]) -> dict[str, Record]:
    rate = re.fullmatch(r"([\d.]+)( \(FDR10\))?", values.get("Rate", ""))
    files = {
        "state": values.get("state") or STATES.get(values.get("State", ""), values.get("State")),
        "phys_state": values.get("phys state")
        or PHYSICAL.get(values.get("Physical state", ""), values.get("Physical state")),
        "rate": values.get("rate") or (f"{rate[1]} Gb/sec{rate[2] or ''}" if rate else values.get("Rate")),
        # Before there was RoCE there was no such file: libibumad says `IB` then.
        "link_layer": {"IB": "InfiniBand"}.get(
            layer := values.get("link_layer") or values.get("Link layer", ""), layer
        ),
    }
    return {
        f"read {folder}/{name}": {"value": text}
        if text
        else {"problem": "error", "detail": f"no {name} in this output of ibstat: is it cut off?"}
        for name, text in files.items()
    }
