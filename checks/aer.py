"""PCI Express errors in the kernel log: Advanced Error Reporting, and what firmware reports in its place. Pure.

Who handles the errors decides what the log holds. The kernel itself (drivers/pci/pcie/aer.c), by version:

    pcieport 0000:00:1c.0: AER: Corrected error received: id=00e0                                          to 4.x
    pcieport 0000:00:1c.0: PCIe Bus Error: severity=Corrected, type=Physical Layer, id=00e0(Receiver ID)
    pcieport 0000:b7:02.0: AER: Multiple Corrected error received: 0000:b8:00.0                           5.0 to 6.7
    nvme 0000:b8:00.0: AER: PCIe Bus Error: severity=Uncorrected (Non-Fatal), type=Transaction Layer, (Requester ID)
    pcieport 0000:b7:02.0: AER: Correctable error message received from 0000:b8:00.0                      since 6.8

The kernel on behalf of firmware (aer.c, pci_print_aer; drivers/firmware/efi/cper.c, cper_print_pcie):

    {7}[Hardware Error]:  Error 0, type: corrected
    {7}[Hardware Error]:   section_type: PCIe error
    {7}[Hardware Error]:   device_id: 0000:09:00.0
    igb 0000:09:00.0: AER: aer_status: 0x00000001, aer_mask: 0x00002000
    igb 0000:09:00.0: AER: aer_uncor_severity: 0x00062030                          only where it was not corrected

And Downstream Port Containment (drivers/pci/pcie/dpc.c), which shuts a link after an uncorrectable error:

    pcieport 0000:00:01.4: DPC: containment event, status:0x1f01 source:0x0000
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Severity = Literal["corrected", "non-fatal", "fatal"]

KEPT_LINES = r"\b(?:AER|DPC)\b|Bus Error: severity|\[Hardware Error\]|\baer_(?:status|uncor)"
"""All that is looked at, and what a person would read with it."""

_ADDRESS = r"([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])"
_SEVERITY = r"(Correct(?:ed|able)|Uncorrect(?:ed|able) \((?:Non-)?Fatal\))"
BUS_ERROR = re.compile(rf"{_ADDRESS}: (?:AER: )?(?:PCIe|CXL) Bus Error: severity={_SEVERITY}")
ANY_BUS_ERROR = re.compile(r"(?:PCIe|CXL) Bus Error.*")
RECEIVED = re.compile(
    rf"{_ADDRESS}: (?:AER: )?(?:Multiple )?{_SEVERITY} error (?:message )?received"
    rf"(?:: id=([0-9a-f]{{4}})|(?::| from) {_ADDRESS})"
)
STATUS = re.compile(rf"{_ADDRESS}: (?:AER: )?aer_status: 0x([0-9a-f]{{8}}), aer_mask: 0x([0-9a-f]{{8}})")
UNCORRECTED = re.compile(rf"{_ADDRESS}: (?:AER: )?aer_uncor_severity: 0x([0-9a-f]{{8}})")
CONTAINED = re.compile(rf"{_ADDRESS}\S*: DPC:? containment event")
RECORD = re.compile(r"(\{\d+\})\[Hardware Error\]: +(.*)")
RECORD_SEVERITY = re.compile(r"Error \d+, type: (\w+)")
RECORDED: dict[str, Severity] = {"corrected": "corrected", "recoverable": "non-fatal", "fatal": "fatal"}
"""drivers/firmware/efi/cper.c, cper_severity_str; its `info` is no error."""


@dataclass(frozen=True)
class AerError:
    """Errors of one severity that one device saw."""

    address: str
    severity: Severity
    count: int


def aer_errors(log: str) -> list[AerError]:
    """In the order of their first appearance. One error is told in several lines: of their kinds the most counts."""
    found: dict[tuple[str, Severity], Counter[str]] = {}

    def add(address: str, severity: Severity, kind: str) -> None:
        found.setdefault((address, severity), Counter())[kind] += 1

    corrected: list[str] = []
    status: dict[str, int] = {}
    records: dict[str, dict[str, str]] = {}
    for line in log.splitlines():
        if match := BUS_ERROR.search(line):
            add(match[1], _severity(match[2]), "kernel")
        elif match := RECEIVED.search(line):
            source = match[4] or _address(match[1], int(match[3], 16))
            # Some ports lose the device's address on its way (aer.c, is_error_source): then it is known by the port.
            add(match[1] if source.endswith(":00:00.0") else source, _severity(match[2]), "received")
        elif match := CONTAINED.search(line):
            add(match[1], "fatal", "containment")
        elif match := STATUS.search(line):
            # Corrected, unless the line about its severity follows.
            corrected += [match[1]] if match[1] in status else []
            status[match[1]] = int(match[2], 16) & ~int(match[3], 16)
        elif (match := UNCORRECTED.search(line)) and match[1] in status:
            is_fatal = status.pop(match[1]) & int(match[2], 16)
            add(match[1], "fatal" if is_fatal else "non-fatal", "firmware")
        elif match := RECORD.search(line):
            address, of = _taken(records.setdefault(match[1], {}), match[2])
            if of is not None:
                add(address, of, "record")
    for address in (*corrected, *status):
        add(address, "corrected", "firmware")
    return [AerError(*key, max(kinds.values())) for key, kinds in found.items()]


def strange_errors(log: str) -> list[str]:
    """Bus errors of which the device or the severity cannot be read."""
    return [
        match[0]
        for line in log.splitlines()
        if (match := ANY_BUS_ERROR.search(line)) and not BUS_ERROR.search(line)
    ]


def _taken(record: dict[str, str], text: str) -> tuple[str, Severity | None]:
    """A line of a firmware's record: severity, kind of section, device, in this order; with the last it is whole."""
    if severity := RECORD_SEVERITY.match(text):
        record.clear()
        record["severity"] = severity[1]
    elif text.startswith("section_type: "):
        record["section"] = text.removeprefix("section_type: ").strip()
    elif (device := re.match(rf"device_id: {_ADDRESS}", text)) and record.get("section") == "PCIe error":
        return device[1], RECORDED.get(record.get("severity", ""))
    return "", None


def _severity(text: str) -> Severity:
    if text.startswith("Correct"):
        return "corrected"
    return "non-fatal" if "Non-Fatal" in text else "fatal"


def _address(port: str, requester: int) -> str:
    """The device of a requester ID (bus, device, function), in the domain of the port that received its message."""
    domain = port.partition(":")[0]
    return f"{domain}:{requester >> 8:02x}:{requester >> 3 & 31:02x}.{requester & 7}"
