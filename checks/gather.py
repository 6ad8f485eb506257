"""Under srun: every node checks itself, the first one collects the reports and prints one table. Network.

    srun --ntasks-per-node=1 python -m checks

The first node listens before it looks at itself. The others connect when they are done: a connection needs no shared
folder (whose listing may be a minute old over NFS), shows that the first node can be reached, and compares clocks. The
port follows from the job and step, so that nobody has to be told; where it is taken, the next of a few is.
One exchange is four lines of JSON: token, time, report, thanks. A report is data and never a command; whoever answers
with another step's token is not listened to.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from checks import consensus, report
from checks.expectations import Expectations
from checks.hostlist import expanded
from checks.passive import Looked
from checks.verdict import EXIT_CODES, CheckResult, Verdict, worst

DEADLINE_SECONDS = 20.0
"""From its own start each node waits so long for the others: srun starts a thousand tasks within seconds."""

PORTS = range(20000, 32768)
"""Below the ports that the kernel gives away by itself."""

CANDIDATES = 6
MOST_BYTES = 4 << 20
NEIGHBOURS = 8
"""A node resolves the names of so many nodes after it: each name is looked up often, and each node asks little."""


@dataclass(frozen=True)
class Step:
    """The srun step that this process is a task of."""

    token: str
    nodes: tuple[str, ...]
    place: int
    """This node's place among them."""
    local: int
    """This task's place on its node: the first one checks it."""

    @property
    def name(self) -> str:
        return self.nodes[self.place]

    @property
    def ports(self) -> list[int]:
        seed = int(hashlib.sha256(self.token.encode()).hexdigest()[:12], 16)
        return [PORTS[(seed + 977 * one) % len(PORTS)] for one in range(CANDIDATES)]

    @property
    def neighbours(self) -> tuple[str, ...]:
        around = self.nodes[self.place + 1 :] + self.nodes[: self.place]
        return around[:NEIGHBOURS]


def step_of(environment: Mapping[str, str]) -> Step | None:
    """The step of several nodes that srun started this process in; None for any other start."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_NODEID", "SLURM_LOCALID")
    if any(name not in environment for name in names):
        return None
    try:
        nodes = tuple(expanded(environment["SLURM_STEP_NODELIST"]))
        place, local = int(environment["SLURM_NODEID"]), int(environment["SLURM_LOCALID"])
    except ValueError:
        return None  # not Slurm's: somebody set them by hand
    if len(nodes) < 2 or not 0 <= place < len(nodes):
        return None
    # The launcher's ports make a token that another user's process cannot simply guess.
    secret = [
        environment.get(name, "") for name in (*names[:2], "SLURM_STEP_LAUNCHER_PORT", "SLURM_SRUN_COMM_PORT")
    ]
    token = hashlib.sha256(".".join(secret).encode()).hexdigest()
    return Step(token, nodes, place, local)


Look = Callable[[str, Expectations], Looked]
"""Looks at this node under the name that Slurm gives it."""


def check_together(step: Step, look: Look, expected: Expectations, *, deadline: float, width: int) -> int:
    """This node's part, and its exit status: the first node's says what was found on all nodes."""
    if step.local:
        return 0
    ends = time.monotonic() + deadline
    expected = replace(expected, peers=step.neighbours)
    if step.place == 0:
        return _first(step, look, expected, ends, deadline, width)
    own = _own_report(step, look, expected)
    trouble = deliver(step, own, ends)
    if trouble:
        print(f"{step.name}: the first node was not told: {trouble}", file=sys.stderr)
        print(report.json_line(step.name, [_result(one) for one in own["results"]]), file=sys.stderr)
        return EXIT_CODES[Verdict.FAIL]
    return 0


def _own_report(step: Step, look: Look, expected: Expectations) -> dict[str, Any]:
    looked = look(step.name, expected)
    return {
        "node": step.name,
        "results": [asdict(result) for result in looked.results],
        "traits": consensus.traits_of(looked.node),
        "seconds": round(looked.seconds, 3),
    }


# --- the first node ---------------------------------------------------------------------------------------


def _first(step: Step, look: Look, expected: Expectations, ends: float, deadline: float, width: int) -> int:
    began = time.monotonic()
    server = Server(step)
    reports = {step.name: _own_report(step, look, expected)}
    reports |= server.wait(set(step.nodes) - {step.name}, ends)
    results = judged_together(step.nodes, reports, deadline)
    print(report.folded_table(results, width=width))
    print(report.nodes_summary(results, time.monotonic() - began))
    return EXIT_CODES[worst(one.verdict for found in results.values() for one in found)]


def judged_together(
    nodes: tuple[str, ...], reports: Mapping[str, Mapping[str, Any]], deadline: float
) -> dict[str, list[CheckResult]]:
    """Every node's own results, its clock, and how it compares; for a node that never answered, that. Pure."""
    same = consensus.compared({node: one["traits"] for node, one in reports.items()})
    results: dict[str, list[CheckResult]] = {}
    for node in nodes:
        one = reports.get(node)
        if one is None:
            remedy = "the node, its network, or srun: leave it out"
            results[node] = [
                CheckResult("report", Verdict.UNKNOWN, f"no answer within {deadline:g} s", "a report", remedy)
            ]
            continue
        results[node] = [_result(found) for found in one["results"]] + same[node]
        if "offset" in one:
            results[node].append(consensus.clock_result(one["offset"], one["uncertainty"]))
    return results


class Server:
    """Takes reports from now on, in a thread of its own."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._reports: dict[str, dict[str, Any]] = {}
        self._arrived = threading.Condition()
        self._socket = _listening(step.ports)
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()

    def wait(self, nodes: set[str], ends: float) -> dict[str, dict[str, Any]]:
        with self._arrived:
            self._arrived.wait_for(lambda: nodes <= self._reports.keys(), max(0.0, ends - time.monotonic()))
            return {node: one for node, one in self._reports.items() if node in nodes}

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._take, sock=self._socket, limit=MOST_BYTES, backlog=4096)
        async with server:
            await server.serve_forever()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if (await reader.readline()).decode(errors="replace").strip() != self._step.token:
                return
            writer.write(json.dumps({"token": self._step.token, "time": time.time()}).encode() + b"\n")
            await writer.drain()
            one = json.loads(await reader.readline())
            # Everything that is used later is looked at now: a report of another form is no report.
            [_result(found) for found in one["results"]]
            dict(one["traits"])
            with self._arrived:
                self._reports[str(one["node"])] = one
                self._arrived.notify_all()
            writer.write(b"{}\n")
            await writer.drain()
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"a report could not be read: {error}", file=sys.stderr)
        finally:
            writer.close()


def _listening(ports: list[int]) -> socket.socket:
    for port in ports:
        try:
            return socket.create_server(("", port), backlog=4096)
        except OSError:
            continue  # taken by somebody else: the others try the same ports in the same order
    raise OSError(f"none of the ports {ports} is free on this node")


# --- every other node -------------------------------------------------------------------------------------


def deliver(step: Step, own: dict[str, Any], ends: float) -> str:
    """Hand the report to the first node; the reason where that cannot be done before the deadline."""
    trouble, address = "no time was left", ""
    while time.monotonic() < ends:
        try:
            # Once: a thousand nodes that ask slurmctld five times a second would end it.
            address = address or address_of(step.nodes[0])
        except OSError as error:
            trouble = str(error)
            time.sleep(2.0)
            continue
        for port in step.ports:
            try:
                _exchange(step, (address, port), own, max(0.1, min(5.0, ends - time.monotonic())))
            except (OSError, ValueError, KeyError) as error:
                trouble = f"{step.nodes[0]}:{port}: {error}"
            else:
                return ""
        time.sleep(0.2)  # the first node may not have started yet
    return trouble


def _exchange(step: Step, address: tuple[str, int], own: dict[str, Any], seconds: float) -> None:
    with (
        socket.create_connection(address, timeout=seconds) as connection,
        connection.makefile("rwb") as line,
    ):
        asked = time.time()
        line.write(step.token.encode() + b"\n")
        line.flush()
        hello = json.loads(line.readline(4096) or b"null")
        answered = time.time()
        if not isinstance(hello, dict) or hello.get("token") != step.token:
            raise ValueError("somebody else listens there")
        own = {
            **own,
            "offset": round((asked + answered) / 2 - float(hello["time"]), 6),
            "uncertainty": round((answered - asked) / 2, 6),
        }
        line.write(json.dumps(own).encode() + b"\n")
        line.flush()
        if not line.readline(64):
            raise ValueError("the report was not taken")


def address_of(node: str) -> str:
    """Where a node is reached: its name where that resolves, else what Slurm knows as its address."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        command = ["scontrol", "show", "node", node]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except subprocess.TimeoutExpired:
            raise OSError(f"{node} does not resolve, and Slurm does not answer") from None
        known = re.search(r"NodeAddr=(\S+)", said.stdout)
        if known is None:
            raise OSError(f"{node} does not resolve, and Slurm does not know its address") from None
        return known[1]
    return node


def _result(found: Mapping[str, Any]) -> CheckResult:
    return CheckResult(**{**found, "verdict": Verdict(found["verdict"])})
