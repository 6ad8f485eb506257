"""The checks without which no job should start a task: GPUs present, names resolve, master reachable, folder writable.

File system and network. Each returns a CheckResult and never raises for what it finds on the node.
"""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

from checks.reading import counted
from checks.verdict import CheckResult, Verdict

CONNECT_SECONDS = 5.0
"""A reachable node accepts within milliseconds; a firewall that drops packets answers never."""


def gpus_present(
    wanted: int, *, device_folder: Path = Path("/dev"), visible: str | None = None
) -> CheckResult:
    """At least `wanted` GPU device files (/dev/nvidia0, …), narrowed by CUDA_VISIBLE_DEVICES where the job sets it.

    The device files are what the driver made and what the container runtime passed on; a GPU that fell off the bus
    loses its entry after the driver reloads, and one that Slurm withholds is not in CUDA_VISIBLE_DEVICES.
    """
    try:
        devices = sorted(entry for entry in os.listdir(device_folder) if re.fullmatch(r"nvidia\d+", entry))
    except OSError as error:
        return CheckResult(
            "gpus", Verdict.UNKNOWN, f"{device_folder}: {error.strerror}", counted(wanted, "GPU")
        )
    read = counted(len(devices), "device file")
    count = len(devices)
    if visible is not None:
        listed = [item for item in visible.split(",") if item.strip()]
        count = min(count, len(listed))
        read += f", CUDA_VISIBLE_DEVICES={visible}"
    verdict = Verdict.PASS if count >= wanted else Verdict.FAIL
    return CheckResult(
        "gpus", verdict, read, f"at least {counted(wanted, 'GPU')}", "leave this node out: sbatch --exclude"
    )


def name_resolves(host: str) -> CheckResult:
    """The master's name or address resolves on this node."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        remedy = "ask for a DNS or /etc/hosts entry, or set NodeAddr in slurm.conf"
        return CheckResult("name", Verdict.FAIL, f"{host}: {error}", "an address", remedy)
    return CheckResult("name", Verdict.PASS, f"{host} is {answers[0][4][0]}", "an address")


def reachable(host: str, port: int) -> CheckResult:
    """A TCP connection to the batch node is accepted within CONNECT_SECONDS."""
    started = time.monotonic()
    expected = f"connects within {CONNECT_SECONDS:.0f} s"
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
            milliseconds = (time.monotonic() - started) * 1000
    except OSError as error:
        remedy = "the first node's address is wrong for this node, or a firewall drops the connection"
        return CheckResult("master", Verdict.FAIL, f"{host}:{port}: {error}", expected, remedy)
    return CheckResult("master", Verdict.PASS, f"{host}:{port} in {milliseconds:.1f} ms", expected)


def writable(folder: Path, *, node: str) -> CheckResult:
    """A file written in the shared folder by this node; it stays, so that the first node can see that it arrived."""
    marker = folder / f"node-{node}"
    try:
        with open(marker, "w") as file:
            file.write(node)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "run_root must be on a file system that every node mounts read-write"
        return CheckResult("run_dir", Verdict.FAIL, f"{folder}: {error.strerror}", "writable", remedy)
    return CheckResult("run_dir", Verdict.PASS, f"wrote {marker.name}", "writable")
