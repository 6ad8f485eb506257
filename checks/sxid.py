"""What NVSwitches report in the kernel log: SXids, fatal to their fabric or not. Pure.

The driver prints three lines for an error (NVIDIA's open kernel modules, src/common/nvswitch/kernel: error_nvswitch.c
and the macros NVSWITCH_REPORT_FATAL and NVSWITCH_REPORT_NONFATAL):

    nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 30 LTSSM Fault Up
    nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Severity 1 Engine instance 30 Sub-engine instance 00
    nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Data {0x50610002, 0x10100030, …}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Action = Literal["reboot", "reset", "watch", "nothing", "unknown"]

GUIDE = "NVIDIA Fabric Manager User Guide (DU-09883-001), appendix D, NVSwitch SXid errors"

ALWAYS_FATAL = frozenset({10003, 12020, 22003, 22011, *range(23001, 23018)})
"""D.6, fatal to the whole fabric; and 10003 of D.7, which is never to occur and is fatal if it does."""

FATAL = frozenset(
    {11001, 11009, 11013, 11018, 11019, 11020, 12001, 12002, 12022, 12024, 12025, 12026, 12027, 12030, 12031, 12032,
     14017, 15001, 15006, 15009, 15010, 15012, 15013, 19047, 19048, 19054, 19056, 19058, 19060, 19061, 19063, 19064,
     19066, 19067, 19069, 19070, 20034, 22012, 24004, 24005, 24006, 24007}
)  # fmt: skip
"""D.5, fatal to what uses the port: a node's GPUs. What the line itself says counts for more."""

STALLING = frozenset({11004, 12028, 19084})
"""D.4 calls them non-fatal, and says of the first two that GPU access will hang, of the third to reset everything."""

NON_FATAL = frozenset(
    {11012, 11021, 11022, 11023, 12021, 12023, 15008, 15011, 19049, 19055, 19057, 19059, 19062, 19065, 19068, 19071,
     20001, 20009, 20012, 24001, 24002, 24003, 10001, 10002, 10004}
)  # fmt: skip
"""The rest of D.4 and D.7: corrected by the switch, retried, or a warning of heat."""

HARMLESS = frozenset({22013, 10005})
"""D.4: "can be safely ignored"; D.7: the end of a thermal event."""

SXID = re.compile(r"\bSXid \((?:PCI:)?([0-9a-fA-F:.]+)\): 0*(\d+),? ?(.*)")
ANY_SXID = re.compile(r"\bSXid\b.*")
LINK = re.compile(r"\bLink 0*(\d+)")
SAID = re.compile(r"(Non-?fatal|Fatal)\b|Severity (\d)\b|(Data) \{", re.IGNORECASE)
"""NVSWITCH_ERROR_SEVERITY_NONFATAL is 0, _FATAL 1 (ctrl_dev_nvswitch.h)."""


@dataclass(frozen=True)
class Sxid:
    """All reports of one number by one switch."""

    switch: str
    number: int
    action: Action
    links: tuple[int, ...]
    count: int


def sxids(log: str) -> list[Sxid]:
    """One for each switch and number, in the order of their first appearance."""
    lines: dict[tuple[str, int], list[str]] = {}
    for line in log.splitlines():
        if match := SXID.search(line):
            lines.setdefault((match[1].lower(), int(match[2])), []).append(match[3].strip())
    return [_summed(switch, number, said) for (switch, number), said in lines.items()]


def strange_sxids(log: str) -> list[str]:
    """Lines about an SXid of which the number or the switch cannot be read."""
    return [
        match[0] for line in log.splitlines() if (match := ANY_SXID.search(line)) and not SXID.search(line)
    ]


def _summed(switch: str, number: int, lines: list[str]) -> Sxid:
    said = [SAID.match(line) for line in lines]
    reports = [line for line, match in zip(lines, said, strict=True) if match is None or match[1]]
    severities = [match for match in said if match is not None and match[2]]
    fatal = [
        (match[1] or "").lower() == "fatal" or match[2] == "1" for match in said if match and not match[3]
    ]
    links = dict.fromkeys(int(link) for line in lines for link in LINK.findall(line))
    action = action_of(number, any(fatal) if fatal else None)
    # Of an error whose first line was lost the second tells how often it was.
    return Sxid(switch, number, action, tuple(links), len(reports) or len(severities) or 1)


def action_of(number: int, fatal: bool | None) -> Action:
    """What an error asks for; `fatal` is what its line says, None where it says nothing."""
    if number in ALWAYS_FATAL:
        return "reboot"
    if number in STALLING or (number in FATAL if fatal is None else fatal):
        return "reset"
    if number in HARMLESS:
        return "nothing"
    return "watch" if fatal is False or number in NON_FATAL else "unknown"
