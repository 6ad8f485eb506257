"""What `lspci -vvv` says of Access Control Services and of devices that fell off the bus. Pure."""

from __future__ import annotations

import re

from checks.facts import Acs
from checks.reading import Problem, Unread

DEVICE = re.compile(r"^(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) (.*)$")
"""The head of a device's paragraph, with the domain where there are several (pciutils, lspci.c show_slot_name)."""

KEPT_LINES = r"^\S|ACSCtl:|<access denied>|Capabilities: \[[0-9a-f]{2}\]"
"""All that is looked at: the whole output is a megabyte."""


def parse_lspci(text: str) -> Acs | Unread:
    """Which bridges have ACS on. `readable` is false where an ordinary user saw `<access denied>` instead."""
    bridges = 0
    enabled: list[str] = []
    redirecting: list[str] = []
    fallen: list[str] = []
    denied = told = False
    address, is_bridge, devices = "", False, 0
    for line in text.splitlines():
        head = DEVICE.match(line)
        if head:
            devices += 1
            address = f"{head[1] or '0000'}:{head[2]}"
            is_bridge = "bridge" in head[3].partition(":")[0].lower()
            bridges += is_bridge
            if "(rev ff)" in head[3]:
                fallen.append(address)
        elif "<access denied>" in line:
            denied = True
        elif line.lstrip().startswith("ACSCtl:"):
            told = True
            if is_bridge and "SrcValid+" in line:
                enabled.append(address)
            if is_bridge and "ReqRedir+" in line:
                redirecting.append(address)
        elif line.lstrip().startswith("Capabilities: ["):
            told = True
    if not devices:
        return Unread(Problem.ERROR, "lspci: no device in its output")
    if not told and not denied:
        return Unread(Problem.ERROR, "lspci: no capabilities in its output: was it lspci -vvv?")
    readable = told and not denied
    return Acs(tuple(enabled), tuple(redirecting), bridges, readable, tuple(fallen))
