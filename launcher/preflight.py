"""The preflight hook: every node of the job is looked at before a task starts. Subprocess and network.

Runs `python -m checks` once per node, with the controller's own interpreter on the host, and reads one JSON line from
each. A node that gives no answer is unknown, and unknown blocks.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.allocation import Allocation
from launcher.spec import JobSpec

DEADLINE_SECONDS = 60.0
"""A node that has not answered by then is not going to: the checks themselves take less than 6 s."""

BLOCKING = frozenset({"fail", "unknown"})


@dataclass(frozen=True)
class Finding:
    """A check that blocks: on which node, what was read, what was expected, what to do."""

    node: str
    check: str
    verdict: str
    read: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        advice = f"; {self.remedy}" if self.remedy else ""
        return f"{self.node}: {self.check} {self.verdict}: {self.read}, expected {self.expected}{advice}"


def run(
    spec: JobSpec,
    allocation: Allocation,
    *,
    master: str,
    attempt_dir: Path,
    python: str,
    environment: Mapping[str, str],
) -> list[Finding]:
    """Check every node and return what blocks, [] when all is well. The whole report is left in preflight.json."""
    folder = attempt_dir / "preflight"
    folder.mkdir()
    with _listening() as port:
        checks = [python, "-m", "checks", "--tier=minimal", "--json", f"--gpus={spec.gpus_per_node}"]
        command = [*checks, f"--writable={folder}", f"--master={master}:{port}"]
        if allocation.job_id:
            command = [*one_per_node(allocation), *command]
        output, complaint = output_of(command, environment)
    reports = [json.loads(line) for line in output.splitlines() if line.startswith('{"node"')]
    findings = blocking_findings(reports, allocation.nodes if allocation.job_id else (), complaint)
    written = {path.name.removeprefix("node-") for path in folder.iterdir()}
    findings += [
        Finding(report["node"], "run_dir", "fail", "its file is not seen on the first node", "a shared folder",
                "run_root must be on a file system that every node mounts")
        for report in reports
        if report["node"] not in written and not any(f.node == report["node"] for f in findings)
    ]  # fmt: skip
    (attempt_dir / "preflight.json").write_text(json.dumps(reports, indent=1))
    return findings


def blocking_findings(reports: list[dict[str, Any]], nodes: tuple[str, ...], complaint: str) -> list[Finding]:
    """The blocking checks of all reports, and one finding for each node that did not report. Pure."""
    findings = [
        Finding(
            report["node"], item["check"], item["verdict"], item["read"], item["expected"], item["remedy"]
        )
        for report in reports
        for item in report["checks"]
        if item["verdict"] in BLOCKING
    ]
    answered = {report["node"] for report in reports}
    silent = [node for node in nodes if node not in answered]
    findings += [
        Finding(node, "report", "unknown", complaint or "no answer", "a report", "") for node in silent
    ]
    if not reports and not silent:
        findings.append(Finding("localhost", "report", "unknown", complaint or "no answer", "a report", ""))
    return findings


def one_per_node(allocation: Allocation) -> list[str]:
    nodes = len(allocation.nodes)
    return [
        "srun",
        f"--nodes={nodes}",
        f"--nodelist={','.join(allocation.nodes)}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--overlap",  # a step that lost a node holds the CPUs of the others for a minute after its end
        "--mpi=none",
        "--export=ALL",
        "--input=none",
    ]


def output_of(command: list[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """What the checks printed, and the last line of complaint (their non-zero status alone is not one)."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DEADLINE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return text, f"no answer within {DEADLINE_SECONDS:.0f} s"
    lines = [
        line for line in done.stderr.splitlines() if "Exited with exit code" not in line and line.strip()
    ]
    return done.stdout, lines[-1].strip() if lines else ""


@contextmanager
def _listening() -> Iterator[int]:
    """A port on this node that accepts and closes connections: what the other nodes' checks connect to."""
    with socket.create_server(("", 0), backlog=1024) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return  # closed below: the preflight is over
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # close() alone does not wake a thread that waits in accept()
