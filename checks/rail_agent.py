"""A node's part in a round of rails: ib_write_bw to its partner and from it, on every RDMA port at once. Subprocess.

The ports are those that NCCL is told to use (`checks.fabric_environment`), so what is measured is what carries the job.
First the pair's second node sends, then its first. Each direction has half of the time, and what hangs is killed: a
partner that never comes costs that and no more.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from checks import perftest
from checks.evidence import Record, Runner, Source, closed, run_command
from checks.fabric_environment import rails_and_gid
from checks.fabric_facts import FabricKind, RdmaPort
from checks.fabric_reading import Glance, read_facts
from checks.given import given_by
from checks.reading import Problem, Unread

SYSFS = "/sys/class/infiniband"
LOOKING_SECONDS = 8.0
"""For sysfs, of a node on which every rank has just been killed."""
TRY_AGAIN_SECONDS = 0.2
"""The partner's server may not be listening yet."""


class Rails:
    """The ports of this node that are measured, with a TCP port for each on which its server will listen."""

    def __init__(self, root: str, kind: FabricKind, environment: Mapping[str, str]) -> None:
        with Glance(root, budget=LOOKING_SECONDS) as source:
            facts = read_facts(source, "", environment)
            rails, self.gid = rails_and_gid(facts, kind, given_by(environment, "the job"))
            self.unread = "; ".join(facts.unread)
            self.ports = {name_of(port): port for port in rails.chosen}
            self.cpus = {name: near(source, port.device) for name, port in self.ports.items()}
        # Bound until the round is over, so that nobody else gets the number; perftest binds beside it, because
        # both say SO_REUSEADDR (its src/perftest_communication.c, ethernet_server_connect) and this one never listens.
        self._held = {name: _bound() for name in self.ports}

    @property
    def services(self) -> dict[str, dict[str, Any]]:
        """What the partner has to know."""
        return {
            name: {"port": int(held.getsockname()[1]), "rate": self.ports[name].gbps}
            for name, held in self._held.items()
        }

    def close(self) -> None:
        for held in self._held.values():
            held.close()


def name_of(port: RdmaPort) -> str:
    """As NCCL_IB_HCA has it: a rail is a device, except where it is another port of one."""
    return port.device if port.number == 1 else port.name


def near(source: Source, device: str) -> frozenset[int]:
    """The CPUs beside the card: a process on the other socket measures the link between the sockets."""
    text = source.read(f"{SYSFS}/{device}/device/local_cpulist")
    try:
        return frozenset() if isinstance(text, Unread) else frozenset(cpus_in(text))
    except ValueError:
        return frozenset()  # no list: the process stays where it is, as it would without this


def cpus_in(text: str) -> list[int]:
    """The kernel's list format, `0-3,8`. Raises ValueError. Pure."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def measured(
    rails: Rails, place: Mapping[str, Any], *, board: str, ends: float, runner: Runner = run_command
) -> dict[str, Any]:
    """What each rail came to, with what ib_write_bw printed, as it was. `place` is the board's word on the partner."""
    if not rails.ports and rails.unread:
        return closed(Unread(Problem.TIMED_OUT, f"which ports there are could not be read: {rails.unread}"))
    found: dict[str, Any] = {}

    def measure(name: str) -> None:
        found[name] = _one(rails, name, place, board=board, ends=ends, runner=runner)

    threads = [threading.Thread(target=measure, args=(name,), daemon=True) for name in rails.ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()) + 1.0)
    late = closed(Unread(Problem.TIMED_OUT, "ib_write_bw could not be ended in time"))
    return {name: found.get(name, {"partner": place["partner"], "sent": late}) for name in rails.ports}


def _one(
    rails: Rails, name: str, place: Mapping[str, Any], *, board: str, ends: float, runner: Runner
) -> dict[str, Any]:
    port, there = rails.ports[name], place["services"].get(name)
    if there is None:
        missing = Unread(Problem.MISSING, f"{place['partner']} has no rail {name}")
        return {"partner": place["partner"], "rate": port.gbps, "sent": closed(missing)}
    rates = [rate for rate in (port.gbps, there["rate"]) if rate is not None]
    record: dict[str, Any] = {"partner": place["partner"], "rate": min(rates, default=None)}
    cpus = rails.cpus[name] & os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)  # of this thread, and so of what it starts
    words = {"gid": rails.gid}
    server = perftest.command(port.device, port.number, service=rails.services[name]["port"], **words)
    client = perftest.command(
        port.device, port.number, service=int(there["port"]), partner=place["address"] or board, **words
    )
    half = time.monotonic() + (ends - time.monotonic()) / 2
    if place["first"]:
        record["served"] = closed(runner(server, half - time.monotonic()))
        record["sent"] = _sent(client, ends, runner)
    else:
        record["sent"] = _sent(client, half, runner)
        record["served"] = closed(runner(server, ends - time.monotonic()))
    return record


def _sent(command: Sequence[str], ends: float, runner: Runner) -> Record:
    """The client's answer, once the partner's server listens."""
    while True:
        answer = runner(command, max(0.1, ends - time.monotonic()))
        nobody_there = isinstance(answer, Unread) and perftest.NO_CONNECTION in answer.detail
        if not nobody_there or time.monotonic() + TRY_AGAIN_SECONDS >= ends:
            return closed(answer)
        time.sleep(TRY_AGAIN_SECONDS)


def _bound() -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("", 0))
    return one
