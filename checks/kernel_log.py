"""What the kernel log says of GPUs and network adapters. Pure.

Lines come as `dmesg`, `dmesg -T` and `journalctl -k` print them; what stands before the message does not matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Action = Literal["isolate", "reboot", "reset", "watch"]

ACTIONS: dict[int, Action] = {
    54: "isolate",
    **dict.fromkeys((79, 151, 168), "reboot"),
    **dict.fromkeys((48, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158), "reset"),
    **dict.fromkeys((13, 31, 43, 63, 92, 94), "watch"),
}
"""What NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors) asks for. 154 says it in its own text."""

XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+),? ?(.*)")
"""kernel-open/nvidia/nv.c and nvidia-modeset print through `NVRM: Xid (PCI:%04x:%02x:%02x): %d, …`."""

SXID = re.compile(r"SXid \(PCI:([0-9a-fA-F:.]+)\): (\d+),? ?(.*)")
"""`nvidia-nvswitch3: SXid (PCI:0000:85:00.0): 20034, Fatal, Link 30 …` (linux_nvswitch.c)."""

LIMITED = re.compile(
    r"\S+ ([0-9a-f:]+\.[0-7]):? ?(?:\S* )?[\d.]+ Gb/s available PCIe bandwidth, limited by (.*)"
)
"""drivers/pci/pci.c, __pcie_print_link_status."""

INVALID_CONTEXT = re.compile(
    r"(nvidia-peermem|nv_peer_mem|nvidia_peermem|nv_get_p2p)\S*.*invalid context", re.IGNORECASE
)

_KINDS = r"nvrm|nvidia|nvswitch|peermem|nv_peer_mem|mlx[45]|bnxt|\befa\b|PCIe bandwidth|AER:|infiniband"
KEPT_LINES = rf"(?i)^(?!.*command line:).*(?:{_KINDS})"
"""All that is looked at, and what a person would ask for next. The rest of a kernel log is nobody's business, and the
kernel's command line, which names drivers too, may hold what is secret."""


@dataclass(frozen=True)
class Xid:
    address: str
    """As printed: `0000:9b:00`."""
    number: int
    action: Action | None
    """None: the catalogue asks for nothing."""
    text: str
    count: int = 1


def xids(log: str) -> list[Xid]:
    """One for each GPU and number, in the order of their first appearance."""
    found: dict[tuple[str, int, Action | None], Xid] = {}
    for line in log.splitlines():
        match = XID.search(line)
        if match is None:
            continue
        number = int(match[2])
        action = action_of(number, match[3])
        key = (match[1].lower(), number, action)
        before = found.get(key)
        found[key] = Xid(*key, match[3] if before is None else before.text, before.count + 1 if before else 1)
    return list(found.values())


def action_of(number: int, text: str) -> Action | None:
    if number != 154:
        return ACTIONS.get(number)
    # `GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)`
    said = text.lower().rpartition(" to ")[2]
    if "none" in said:
        return None
    if "reboot" in said:
        return "reboot"
    if "reset" in said or "drain" in said:
        return "reset"
    return "watch"


def fatal_sxids(log: str) -> list[str]:
    """NVSwitch errors that say of themselves that they are fatal (`Fatal`, not `Non-fatal`)."""
    return [
        f"{match[1].lower()}: SXid {match[2]}"
        for line in log.splitlines()
        if (match := SXID.search(line)) and match[3].lower().startswith("fatal")
    ]


def limited_links(log: str) -> list[str]:
    """Adapters that got less PCIe bandwidth than they could use: `0000:1a:00.0: 126.024 Gb/s … limited by …`."""
    return [
        f"{match[1]}: limited by {match[2].strip()}"
        for line in log.splitlines()
        if (match := LIMITED.search(line))
    ]


def invalid_contexts(log: str) -> int:
    """How often GPUDirect RDMA was refused a page of GPU memory."""
    return sum(bool(INVALID_CONTEXT.search(line)) for line in log.splitlines())
