"""Other people's captures as bundles: a sysfs tree, `lspci -vvv`, a kernel log, nvidia-smi, ibstat. File system.

The collectors then run on them as they run on a bundle. What a capture does not hold stays unrecorded.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checks import ibstat, nvidia_smi
from checks.bundle import Bundle, BundleError, contents, is_bundle, make
from checks.capture_text import decoded
from checks.collect import collect_node
from checks.collect_network import collect_rdma
from checks.evidence import Live, Record, closed, matching_lines
from checks.expectations import Expectations
from checks.kernel_log import KEPT_LINES as KERNEL_LINES
from checks.lspci import DEVICE
from checks.lspci import KEPT_LINES as LSPCI_LINES
from checks.lspci_links import link_records
from checks.reading import Problem, Reading, Unread

KERNEL_LINE = re.compile(
    # dmesg, dmesg -d, dmesg -T (day and month in the user's language), dmesg -e (util-linux, sys-utils/dmesg.c,
    # print_record). A log of fabric manager has [Feb 25 2025 13:59:45] there, and nothing of the kernel in it.
    r"^(?:<\d+>)?\[(?: *[<+]? *\d+\.\d+(?: <[ \d.]+)?>?"
    r"|\S+ +\S+ +\d+ [\d:]{8} \d{4}|[A-Z][a-z]{2} *\d+ [\d:]+)\]"
    r"|^\d{4}-\d\d-\d\dT[\d:]+,\d+[+-][\d:]+ "  # dmesg --time-format=iso
    r"|^[a-z]+ *:[a-z]+ *: "  # dmesg --decode
    r"|^\d+,\d+,\d+,\S*;"  # /dev/kmsg (Documentation/ABI/testing/dev-kmsg)
    r"|\bkernel(?:\[\d+\])?: |^\s*NVRM: "  # syslog, journalctl
)


SYSLOG_LINE = re.compile(
    r"^(?:[A-Z][a-z]{2} [ \d]\d [\d:]{8}|\d{4}-\d\d-\d\dT\S+) \S+ [\w()@./-]+(?:\[\d+\])?: "
)
"""/var/log/messages and journalctl (RFC 3164, journalctl -o short-iso), where the kernel's lines are some of many."""

PROMPT = re.compile(r"^(?:\S+@\S+\s*)?[$#](?:\s|$)|^\S+@\S+[$#](?:\s|$)")
"""`root@node:~# dmesg -T`, copied with its output."""

DRIVER_LINE = re.compile(r"NVRM: Xid\b|\bSXid \(")
"""Lines of the kernel in whatever else: `dmesg -t` has no times, `grep -n` puts numbers before them."""


def imported(paths: Sequence[Path], *, part: str = "") -> Bundle:
    """One bundle of all captures, each of a kind that is seen from its content. Raises BundleError."""
    records: dict[str, Record] = {}
    # Folders last: where a tool's text and the file that it read are both there, the file counts.
    for path in sorted(paths, key=Path.is_dir):
        records |= _of(path, part)
    return make(paths[0].name, Expectations(), records)


def _of(path: Path, part: str) -> dict[str, Record]:
    if path.is_dir():
        return _of_folder(path)
    if path.exists() and not path.is_file():
        raise BundleError(f"{path}: neither a file nor a folder")
    try:
        text = decoded(contents(path))
    except ValueError as error:
        raise error if isinstance(error, BundleError) else BundleError(f"{path}: {error}") from None
    if is_bundle(path):
        raise BundleError(f"{path}: a bundle beside captures: judge it alone, or with other bundles")
    if nvidia_smi.looks_like(text):
        try:
            answers = nvidia_smi.records(text, part)
        except ValueError as error:
            raise BundleError(f"{path}: {error}") from None
        # nvidia-bug-report.sh puts the kernel's log and `nvidia-smi -q` into one file.
        has_log = (
            {"run dmesg": closed(matching_lines(text, KERNEL_LINES))} if DRIVER_LINE.search(text) else {}
        )
        return {**answers, **has_log}
    rows = [row for row in text.splitlines() if row.strip()][:400]
    if any(DEVICE.match(row) for row in rows):
        return {"run lspci -vvv": closed(matching_lines(text, LSPCI_LINES)), **link_records(text)}
    if ibstat.looks_like(text):
        return ibstat.records(text)
    if _is_kernel_log(text):
        return {"run dmesg": closed(matching_lines(text, KERNEL_LINES))}
    raise BundleError(
        f"{path}: not a capture that is known: a bundle, a folder of sysfs, or the output of "
        "lspci -vvv, dmesg, nvidia-smi -q, nvidia-smi nvlink -s, ibstat or ibstatus"
    )


def _is_kernel_log(text: str) -> bool:
    """Half of its first lines are of a log, and somewhere the kernel has written; or the driver reports an error."""
    if DRIVER_LINE.search(text):
        return True
    rows = [row for row in text.splitlines() if row.strip() and not PROMPT.match(row)]
    first = rows[:400]
    known = sum(bool(KERNEL_LINE.search(row) or SYSLOG_LINE.match(row)) for row in first)
    return bool(first) and known * 2 >= len(first) and any(KERNEL_LINE.search(row) for row in rows)


def _of_folder(path: Path) -> dict[str, Record]:
    """A root with sys/ in it, a copy of /sys, or the folder /sys/class/infiniband itself."""
    if (path / "sys").is_dir():
        return _collected(path)
    with tempfile.TemporaryDirectory(prefix="capture") as folder:
        root = Path(folder)
        if (path / "class" / "infiniband").is_dir():
            (root / "sys").symlink_to(path.resolve())
        elif any(path.glob("*/ports/*/state")):
            devices = root / "sys" / "class" / "infiniband"
            devices.mkdir(parents=True)
            # Who copied the folder may have left notes in it, and an archiver files of its own.
            for device in (one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")):
                (devices / device.name).symlink_to(device.resolve())
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
        found = {key: record for key, record in source.records.items() if _captured(key, record)}
    # Where it lay while it was read is nothing that a reader could look at.
    return {
        key: {**record, "detail": record["detail"].replace(str(root), "")} if "detail" in record else record
        for key, record in found.items()
    }


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
