"""Other people's captures as bundles: a sysfs tree, `lspci -vvv`, a kernel log, an nvidia-smi session. File system.

The collectors then run on them as they run on a bundle. What a capture does not hold stays unrecorded.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checks import nvidia_smi
from checks.bundle import Bundle, BundleError, make
from checks.collect import collect_node
from checks.collect_network import collect_rdma
from checks.evidence import Live, Record, closed, matching_lines
from checks.expectations import Expectations
from checks.kernel_log import KEPT_LINES as KERNEL_LINES
from checks.lspci import DEVICE
from checks.lspci import KEPT_LINES as LSPCI_LINES
from checks.reading import Problem, Reading, Unread

KERNEL_LINE = re.compile(
    r"^(?:<\d+>)?\[[^\]]{4,}\] "  # dmesg, dmesg -T
    r"|^[a-z]+ *:[a-z]+ *: "  # dmesg --decode
    r"|^\d+,\d+,\d+,\S*;"  # /dev/kmsg (Documentation/ABI/testing/dev-kmsg)
    r"|\bkernel: |^NVRM: "  # syslog, journalctl
)


def imported(paths: Sequence[Path], *, part: str = "") -> Bundle:
    """One bundle of all captures, each of a kind that is seen from its content. Raises BundleError."""
    records: dict[str, Record] = {}
    for path in paths:
        records |= _of(path, part)
    return make(paths[0].name, Expectations(), records)


def _of(path: Path, part: str) -> dict[str, Record]:
    if path.is_dir():
        return _of_folder(path)
    if path.exists() and not path.is_file():
        raise BundleError(f"{path}: neither a file nor a folder")
    try:
        text = path.read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    if nvidia_smi.looks_like(text):
        try:
            return nvidia_smi.records(text, part)
        except ValueError as error:
            raise BundleError(f"{path}: {error}") from None
    rows = [row for row in text.splitlines() if row.strip()][:400]
    if rows and DEVICE.match(rows[0]):
        return {"run lspci -vvv": closed(matching_lines(text, LSPCI_LINES))}
    if rows and sum(bool(KERNEL_LINE.search(row)) for row in rows) * 2 >= len(rows):
        return {"run dmesg": closed(matching_lines(text, KERNEL_LINES))}
    raise BundleError(
        f"{path}: not a capture that is known: a bundle, a folder of sysfs, or the output of "
        "lspci -vvv, dmesg, nvidia-smi -q or nvidia-smi nvlink -s"
    )


def _of_folder(path: Path) -> dict[str, Record]:
    """A root with sys/ in it, a copy of /sys, or the folder /sys/class/infiniband itself."""
    if (path / "sys").is_dir():
        return _collected(path)
    with tempfile.TemporaryDirectory(prefix="capture") as folder:
        root = Path(folder)
        if (path / "class" / "infiniband").is_dir():
            (root / "sys").symlink_to(path.resolve())
        elif any(path.glob("*/ports/*/state")):
            (root / "sys" / "class").mkdir(parents=True)
            (root / "sys" / "class" / "infiniband").symlink_to(path.resolve())
        else:
            raise BundleError(f"{path}: no sys/, no class/infiniband/ and no */ports/*/state in this folder")
        return _collected(root)


def _collected(root: Path) -> dict[str, Record]:
    """What the collectors read there. What is not there was not captured: it is left out, and unrecorded."""
    with Live(str(root), budget=60.0, runner=nothing_runs) as source:
        if (root / "proc").is_dir():
            collect_node(source, root.name, Expectations())
        else:
            collect_rdma(source)
        return {key: record for key, record in source.records.items() if _captured(key, record)}


def _captured(key: str, record: Record) -> bool:
    """Of this machine nothing; of the capture what is there, and what is missing in the folder of a port."""
    missing = record.get("problem") == Problem.MISSING and "/ports/" not in key
    return not missing and not key.startswith(NOT_OF_FILES)


NOT_OF_FILES = (
    "nvml",
    "run ",
    "resolve ",
    "connect ",
    "ipv4 ",
    "clock",
    "python",
    "user",
    "packages ",
    "environment ",
    "written ",
)
"""Answers of the machine that imports, not of the one that was captured."""


def nothing_runs(argv: Sequence[str], seconds: float) -> Reading:
    return Unread(Problem.MISSING, f"{argv[0]} does not run under a captured root")
