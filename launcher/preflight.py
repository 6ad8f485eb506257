"""The preflight hook: every node of the job is looked at before a task starts. Subprocess and network.

Runs `python -m checks` once per node, with the controller's own interpreter on the host, reads one JSON line from
each, and lets the nodes vote. A node that gives no answer is unknown, and unknown blocks.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checks import consensus
from checks.expectations import FABRICS
from checks.hostlist import folded
from checks.reading import counted
from checks.report import folded_table
from checks.verdict import CheckResult, Verdict
from launcher.allocation import Allocation
from launcher.spec import JobSpec
from launcher.verdicts import BLOCKING, Judged, findings_of, judged_of, silent

LOOKING_SECONDS = 16
"""What looking may take on a node, and each answer in proportion: 20 s are usual in a job. Less would take a
node for hung that is only busy with the end of somebody's job. A node that answers is not slower for it."""
DEADLINE_SECONDS = {"minimal": 60.0, "passive": 60.0, "active": 150.0}
"""A node that has not answered by then is not going to: the checks themselves take less than 6, 6 and 90 s."""

TABLE_WIDTH = 180
_IN_CHECKS = {"loopback": "none", "tcpxo": "tcpx"}
"""What `checks` calls a kind of fabric by another name."""
_LABELLED = re.compile(r"^ *(?P<task>\d+): (?P<text>.*)$")


def run(
    spec: JobSpec,
    allocation: Allocation,
    *,
    master: str,
    attempt_dir: Path,
    python: str,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Judged:
    """Check every node and say what blocks. The whole report is left in preflight.json, a table in the log."""
    began = time.monotonic()
    folder = attempt_dir / "preflight"
    folder.mkdir()
    nodes = allocation.nodes if allocation.job_id else ()
    tier = "minimal" if spec.preflight == "minimal" else "passive"
    with _listening() as port:
        words = [f"--writable={folder}", f"--master={master}:{port}", *expectations(spec)]
        if tier == "passive":
            words.append(f"--budget={LOOKING_SECONDS}")
        # What the profile sets for the tasks can contradict a node, and says which of its ports are the job's.
        reports = _ask(tier, words, allocation, python, {**environment, **spec.environment})
    _look_for_markers(reports, folder)
    if tier == "passive":
        _vote(reports)
    if spec.preflight == "full" and not findings_of(reports):
        reports += _under_load(spec, allocation, python, environment)
    judged = judged_of(
        nodes or tuple(report["node"] for report in reports[:1]),
        reports,
        over_links=spec.checks.links == "go_on",
        earlier=pairs_earlier(attempt_dir.parent, attempt_dir),
    )
    seconds = time.monotonic() - began
    _write(attempt_dir / "preflight.json", spec, reports, judged, seconds)
    if tier != "minimal":
        _tell(reports, seconds, say)
    for finding in judged.findings if tier == "minimal" else ():
        say(f"preflight: {finding}")
    if spec.checks.links == "go_on":
        for link in judged_of(judged.nodes, reports).links:
            say(f"preflight: {link}; the run goes on over it, as checks.links=go_on says")
    return judged


def expectations(spec: JobSpec) -> list[str]:
    """What a node of this job should be, as words for `python -m checks`. Pure."""
    words = [f"--gpus={spec.gpus_per_node}"]
    fabric = _IN_CHECKS.get(spec.fabric_kind, spec.fabric_kind)
    if fabric in FABRICS:  # `auto` expects nothing: a device that is not there is a warning
        words.append(f"--fabric={fabric}")
    if "exclusive" not in spec.sbatch:
        words.append("--shared")
    if spec.checks.sku:
        words.append(f"--sku={spec.checks.sku}")
    if spec.checks.rails is not None:
        words.append(f"--rails={spec.checks.rails}")
    return [*words, *(f"--without={name}" for name in spec.checks.without)]


def failed_earlier(run_dir: Path, attempt_dir: Path) -> dict[str, str]:
    """By check, a node on which it blocked in an earlier attempt of the run."""
    return {
        one["check"]: one["node"]
        for content in _records_of_others(run_dir, attempt_dir)
        for one in content["findings"]
    }


def pairs_earlier(run_dir: Path, attempt_dir: Path) -> list[frozenset[str]]:
    """Pairs of nodes that earlier attempts of the run blamed together."""
    return [
        frozenset(link["nodes"])
        for content in _records_of_others(run_dir, attempt_dir)
        for link in content["links"]
    ]


def _records_of_others(run_dir: Path, attempt_dir: Path) -> list[dict[str, Any]]:
    """What the preflights of the run's other attempts left, oldest first."""
    paths = sorted(run_dir.glob("attempt-*/preflight.json"))
    return [json.loads(path.read_text()) for path in paths if path.parent != attempt_dir]


def _ask(
    tier: str, words: Sequence[str], allocation: Allocation, python: str, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One report of each node."""
    command = [python, "-m", "checks", f"--tier={tier}", "--json", *words]
    nodes = allocation.nodes if allocation.job_id else ()
    if nodes:
        command = [*one_per_node(allocation), *command]
    output, complaint = output_of(command, environment, DEADLINE_SECONDS[tier])
    reports = reports_in(output, labelled=bool(nodes))
    return reports + silent(reports, nodes, complaint)


def reports_in(output: str, *, labelled: bool) -> list[dict[str, Any]]:
    """The reports in what the checks printed; what else they printed is passed over. Pure.

    srun passes a line on in pieces of 1 KB (its IO message), and pieces of several tasks mix. With --label each piece
    is a line with its task's number, so that a task's text can be put together again.
    """
    texts: dict[str, str] = {"": output}
    if labelled:
        texts = {}
        for line in output.splitlines():
            if match := _LABELLED.match(line):
                texts[match["task"]] = texts.get(match["task"], "") + match["text"]
    reports = []
    for text in texts.values():
        start = 0
        # Of the checks under load one task reports for all nodes.
        while (start := text.find('{"node"', start)) >= 0:
            try:
                report, start = json.JSONDecoder().raw_decode(text, start)
            except json.JSONDecodeError:
                break  # cut off: the node is then one that gave no report, and that blocks
            reports.append(report)
    return reports


def _look_for_markers(reports: list[dict[str, Any]], folder: Path) -> None:
    """A node whose file does not arrive writes to another folder of the same name."""
    written = {path.name.removeprefix("node-") for path in folder.iterdir()}
    for report in reports:
        blocked = any(item["verdict"] in BLOCKING for item in report["checks"])
        if report["node"] not in written and not blocked:
            missing = CheckResult("run_dir", Verdict.FAIL, "its file is not seen on the first node", "a shared folder",
                                  "run_root must be on a file system that every node mounts")  # fmt: skip
            report["checks"].append(asdict(missing))


def _vote(reports: list[dict[str, Any]]) -> None:
    """Add to each report how its node compares with most.

    A node that is known to be bad by itself has no vote: of two nodes it would make a tie out of its own fault.
    """
    known = {finding.node for finding in findings_of(reports)}
    traits = {
        report["node"]: report["traits"]
        for report in reports
        if "traits" in report and report["node"] not in known
    }
    if len(traits) > 1:
        same = consensus.compared(traits)
        for report in reports:
            report["checks"] += [asdict(result) for result in same.get(report["node"], [])]


def _under_load(
    spec: JobSpec,
    allocation: Allocation,
    python: str,
    environment: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The checks that load GPUs and network, in the environment of the tasks, once a node has passed the others."""
    return _ask("active", expectations(spec), allocation, python, {**environment, **spec.environment})


def _results(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[CheckResult]]:
    found: dict[str, list[CheckResult]] = {}
    for report in reports:
        results = [CheckResult(**{**item, "verdict": Verdict(item["verdict"])}) for item in report["checks"]]
        found.setdefault(report["node"], []).extend(results)
    return found


def _tell(reports: Sequence[Mapping[str, Any]], seconds: float, say: Callable[[str], None]) -> None:
    results = _results(reports)
    for line in folded_table(results, width=TABLE_WIDTH).splitlines():
        say(f"preflight: {line}")
    count = sum(map(len, results.values()))
    nodes = f"{counted(len(results), 'node')} ({folded(results)})"
    say(f"preflight: {counted(count, 'result')} of {nodes} in {seconds:.1f} s")


def _write(
    path: Path, spec: JobSpec, reports: Sequence[Mapping[str, Any]], judged: Judged, seconds: float
) -> None:
    content = {
        "preflight": spec.preflight,
        "seconds": round(seconds, 3),
        "expected": expectations(spec),
        "suspects": judged.suspects,
        "findings": [asdict(finding) for finding in judged.findings],
        "links": [{"check": link.check, **asdict(link.blame)} for link in judged.links],
        "nodes": reports,
    }
    path.write_text(json.dumps(content, indent=1))


def one_per_node(allocation: Allocation) -> list[str]:
    """srun's words for one task on each node, whose output `reports_in` reads."""
    nodes = len(allocation.nodes)
    return [
        "srun",
        f"--nodes={nodes}",
        f"--nodelist={','.join(allocation.nodes)}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--overlap",  # a step that lost a node holds the CPUs of the others for a minute after its end
        "--kill-on-bad-exit=0",  # a warning is status 2; where slurm.conf says KillOnBadExit=1 it would end the others
        "--mpi=none",
        "--export=ALL",
        "--input=none",
        "--label",  # see reports_in
        # Of the checks under load one task works on long after the others, which a site's WaitTime would end.
        "--wait=0",
    ]


def output_of(command: list[str], environment: Mapping[str, str], deadline: float = 60.0) -> tuple[str, str]:
    """What the checks printed, and the last line of complaint (their non-zero status alone is not one)."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return text, f"no answer within {deadline:.0f} s"
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
