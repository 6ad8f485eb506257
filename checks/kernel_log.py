"""What the kernel log says of GPUs and network adapters. Pure.

Lines come as `dmesg`, `dmesg -T` and `journalctl -k` print them; what stands before the message does not matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from checks import aer

Action = Literal["isolate", "reboot", "reset", "watch", "unknown"]

ACTIONS: dict[int, Action] = {
    54: "isolate",
    **dict.fromkeys((79, 151, 168), "reboot"),
    **dict.fromkeys((46, 48, 62, 64, 74, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158), "reset"),
    **dict.fromkeys((167, 169, 171, 172), "reset"),
    **dict.fromkeys((13, 31, 43, 63, 92, 94), "watch"),
}
"""What NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html) asks for. 48 and 74 have
workflows that begin with a reset. 154 says it in its own text, and 144 to 150 whether they are fatal. For the last
four it names no action: 171 and 172 are what 48 is and tell DRAM from SRAM, 167 is a fatal time-out on PCIe as 158 is
one of the GPU, 169 halts a micro-controller as 62 does."""

NVLINK5 = range(144, 151)
"""`NVRM: Xid (PCI:0018:01:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6 …)`: what the catalogue's decoding
table calls fatal wants a reset, what it calls non-fatal nothing at once."""
FATAL = re.compile(r"\b(non[- ]?)?fatal\b", re.IGNORECASE)

XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)(?: [^)]*)?\): (\d+),? ?(.*)")
"""kernel-open/nvidia/nv.c and nvidia-modeset print through `NVRM: Xid (PCI:%04x:%02x:%02x): %d, …`; where an instance
of a GPU in MIG mode is meant, `(PCI:%04x:%02x:%02x GPU-I:%02u GPU-CI:%02u)` (src/nvidia, nvErrorLog)."""

ANY_XID = re.compile(r"NVRM: Xid\b.*")

FALLEN = re.compile(r"NVRM: (?:The NVIDIA )?GPU (?:at )?(?:PCI:)?([0-9a-fA-F:.]+[0-9a-fA-F])")
"""Without an Xid, where the driver notices it elsewhere: `NVRM: GPU 0000:91:00.0: GPU has fallen off the bus.`, or, in
three lines, `NVRM: The NVIDIA GPU 0000:b3:00.0`, `NVRM: (PCI ID: 10de:26b5) installed in this system has`,
`NVRM: fallen off the bus and is not responding to commands.` (kernel-open/nvidia/nv.c, nv-pci.c; NVSentinel#155)."""
FALLEN_LINES = 3

NOT_STARTED = re.compile(
    r"(?:NVRM: GPU (?:PCI:)?(?=\S+: (?:RmInitAdapter|rm_init_adapter) failed)"
    r"|nvidia: probe of (?=\S+ failed with error)|nvidia (?=\S+: probe with driver nvidia failed with error))"
    r"([0-9a-fA-F:.]+[0-9a-fA-F])"
)
"""kernel-open/nvidia/nv.c, nv_start_device: `NVRM: GPU 0000:9b:00.0: RmInitAdapter failed! (0x62:0x55:1860)` and
`…: rm_init_adapter failed, device minor number 3`. Or the kernel itself (drivers/base/dd.c, call_driver_probe), before
and since 6.6: `nvidia: probe of 0000:9b:00.0 failed with error -1`, `nvidia 0000:9b:00.0: probe with driver nvidia
failed with error -1`."""

LIMITED = re.compile(
    r"(\S+) ([0-9a-f:]+\.[0-7]):? ?(?:\S* )?[\d.]+ Gb/s available PCIe bandwidth, limited by (.*)"
)
"""drivers/pci/pci.c, __pcie_print_link_status."""

INVALID_CONTEXT = re.compile(
    r"(nvidia-peermem|nv_peer_mem|nvidia_peermem|nv_get_p2p)\S*.*invalid context", re.IGNORECASE
)

_KINDS = r"nvrm|nvidia|nvswitch|peermem|nv_peer_mem|mlx[45]|bnxt|\befa\b|PCIe bandwidth|infiniband"
KEPT_LINES = rf"(?i)^(?!.*command line:).*(?:{_KINDS}|{aer.KEPT_LINES})"
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
    healed: bool = False
    """The driver has said since then (Xid 154) that this GPU wants nothing any more."""


def xids(log: str) -> list[Xid]:
    """One for each GPU and number, in the order of their first appearance. Of 154 a GPU's last one counts."""
    found: dict[tuple[str, int, Action | None], Xid] = {}
    for line in log.splitlines():
        match = XID.search(line)
        if match is None:
            continue
        number, address = int(match[2]), match[1].lower()
        action = action_of(number, match[3])
        key = (address, number, action)
        if number == 154:
            found = {
                known: replace(one, healed=one.healed or action is None) if known[0] == address else one
                for known, one in found.items()
                if known[:2] != (address, 154)
            }
        before = found.get(key)
        found[key] = Xid(*key, match[3] if before is None else before.text, before.count + 1 if before else 1)
    return list(found.values())


def strange_xids(log: str) -> list[str]:
    """Lines about an Xid of which the number or the GPU cannot be read."""
    return [match[0] for line in log.splitlines() if (match := ANY_XID.search(line)) and not XID.search(line)]


def fallen(log: str) -> list[str]:
    """GPUs that the driver calls fallen off the bus outside of an Xid, as `0000:b3:00.0`."""
    found: dict[str, None] = {}
    address, left = "", 0
    for line in log.splitlines():
        if ANY_XID.search(line):
            continue
        if match := FALLEN.search(line):
            address, left = match[1].lower(), FALLEN_LINES
        if left and re.search(r"fallen off the bus", line):
            found[address] = None
        left -= 1 if left else 0
    return list(found)


def not_started(log: str) -> list[str]:
    """GPUs that the driver tried to start and could not."""
    return list(
        dict.fromkeys(match[1].lower() for line in log.splitlines() if (match := NOT_STARTED.search(line)))
    )


def action_of(number: int, text: str) -> Action | None:
    if number in NVLINK5:
        severity = FATAL.search(text)
        if severity is None:
            return "unknown"
        return "watch" if severity[1] else "reset"
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
    return "isolate"  # one that a later driver has: whatever it is, the driver wants something


def limited_links(log: str, *drivers: str) -> list[str]:
    """Devices (of these drivers) that got less PCIe bandwidth than they could use: `0000:1a:00.0: limited by …`."""
    return [
        f"{match[2]}: limited by {match[3].strip()}"
        for line in log.splitlines()
        if (match := LIMITED.search(line)) and (not drivers or match[1] in drivers)
    ]


def invalid_contexts(log: str) -> int:
    """How often GPUDirect RDMA was refused a page of GPU memory."""
    return sum(bool(INVALID_CONTEXT.search(line)) for line in log.splitlines())
