"""Where the nodes of one round meet: who is in which group, where its store is, and what came out. Network, subprocess.

The conductor listens on a port that the kernel chose and tells it to the agents on their command line. An agent says
its node and its ranks; when every node of a group is there, its first one opens a store and the others are told where.
Nobody waits longer than the round's deadline, whoever stops: agents, their processes, srun itself.
"""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

Start = Callable[[Sequence[str], dict[str, Any]], list[subprocess.Popen[Any]]]
"""Starts an agent on each of these nodes with these words. `checks.active` has two: srun, and this machine."""

STARTING_SECONDS = 3.0
"""srun's own start and the way back, on top of what the agents have."""


@dataclass
class _Member:
    line: TextIO
    address: str
    ranks: int
    services: Mapping[str, Any]
    """In a round of rails, by rail: on which port its server listens, and the rail's rate."""


@dataclass
class _Group:
    nodes: tuple[str, ...]
    members: dict[str, _Member] = field(default_factory=dict)
    placed: bool = False


def run_round(
    groups: Sequence[Sequence[str]],
    kind: str,
    seconds: float,
    start: Start,
    *,
    words: Mapping[str, Any],
    address: str,
) -> dict[str, dict[str, Any]]:
    """What each node of each group reported; a node without an entry never did. Takes `seconds` at most.

    `words` are for the agents: how many GPUs, which fabric, under which folder they look.
    """
    ends = time.monotonic() + seconds
    board = Board([tuple(group) for group in groups], kind)
    nodes = [node for group in groups for node in group]
    agents: list[subprocess.Popen[Any]] = []
    try:
        meeting = {"address": address, "port": board.port, "token": board.token, "kind": kind}
        agents = start(nodes, {**words, **meeting, "seconds": seconds - STARTING_SECONDS})
        board.wait(len(nodes), ends, agents)
        return dict(board.results)
    finally:
        board.close()
        for agent in agents:
            end(agent)


def end(agent: subprocess.Popen[Any]) -> None:
    """srun ends its step's tasks when it is terminated, and is not waited for when it does not end itself."""
    if agent.poll() is None:
        try:
            agent.wait(0.5)  # a step that is over takes a moment to say so
        except subprocess.TimeoutExpired:
            agent.send_signal(signal.SIGTERM)
    try:
        agent.wait(2)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()


class Board:
    """Takes connections from now on, each in a thread of its own: most only wait."""

    def __init__(self, groups: Sequence[tuple[str, ...]], kind: str) -> None:
        self.token = secrets.token_hex(16)
        self.results: dict[str, dict[str, Any]] = {}
        self._groups = {node: group for group in map(_Group, groups) for node in group.nodes}
        self._kind = kind
        self._changed = threading.Condition()
        self._socket = socket.create_server(("", 0), backlog=4096)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def wait(self, count: int, ends: float, agents: Sequence[subprocess.Popen[Any]]) -> None:
        """Until every node has reported, the deadline is there, or no agent is left that could report."""
        with self._changed:
            while len(self.results) < count and time.monotonic() < ends:
                if all(agent.poll() is not None for agent in agents):
                    return
                self._changed.wait(min(0.2, max(0.0, ends - time.monotonic())))

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, (address, *_) = self._socket.accept()
            except OSError:
                return  # closed: the round is over
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: str) -> None:
        line = connection.makefile("w", encoding="utf-8")
        heard = connection.makefile("r", encoding="utf-8", errors="replace")
        try:
            hello = json.loads(heard.readline(4096) or "null")
            if hello["token"] != self.token:
                return
            node = str(hello["node"])
            group = self._groups[node]
            _tell(line, kind=self._kind, group=group.nodes)
            with self._changed:
                services = dict(hello.get("services", {}))
                group.members[node] = _Member(line, address, int(hello["ranks"]), services)
                if self._kind == "rails":
                    self._introduce(group)
                else:
                    self._lead(group)
            while text := heard.readline(8 << 20):
                said = json.loads(text)
                if "port" in said:
                    self._place(group, int(said["port"]))
                if "result" in said:
                    with self._changed:
                        self.results[node] = _of_a_node(said["result"])
                        self._changed.notify_all()
                    _tell(line, thanks=True)
        except (OSError, ValueError, KeyError, TypeError):
            return  # a stranger, or an agent that died: its node has no result, and that is what is reported
        finally:
            _hang_up(connection)

    def _introduce(self, group: _Group) -> None:
        """Tell the two of a pair where the other one listens."""
        if group.placed or len(group.members) < len(group.nodes):
            return
        group.placed = True
        for node, partner in zip(group.nodes, reversed(group.nodes), strict=True):
            other = group.members[partner]
            _tell_of_group(
                group.members[node],
                partner=partner,
                address=_seen_by_others(other),
                services=other.services,
                first=node == group.nodes[0],
            )

    def _lead(self, group: _Group) -> None:
        if group.placed or len(group.members) < len(group.nodes):
            return
        group.placed = True
        _tell_of_group(
            group.members[group.nodes[0]],
            lead=True,
            size=sum(one.ranks for one in group.members.values()),
        )

    def _place(self, group: _Group, port: int) -> None:
        """Tell everybody where the store is: at the address that the first node's connection came from, which no name
        service has to know."""
        leader = group.members[group.nodes[0]]
        world = sum(one.ranks for one in group.members.values())
        first = 0
        for node in group.nodes:
            member = group.members[node]
            here = "localhost" if member is leader else _seen_by_others(leader)
            _tell_of_group(member, first=first, world=world, address=here, port=port)
            first += member.ranks


def _hang_up(connection: socket.socket) -> None:
    """close() alone leaves it open while a group still knows the agent's line, and the agent would wait for a word."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was quicker
    finally:
        connection.close()


def _of_a_node(result: Any) -> dict[str, Any]:
    """A report as the judges take it. Raises ValueError for another form: its node has then reported nothing."""
    if not isinstance(result, dict):
        raise ValueError("a report is an object")
    ranks = result.get("ranks", [])
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        raise ValueError("the ranks of a report are a list of objects")
    return result


def _seen_by_others(member: _Member) -> str:
    """A member on the conductor's node came over its loopback: the others find it where they found the board."""
    return "" if member.address.startswith("127.") else member.address


def _tell_of_group(member: _Member, **words: Any) -> None:
    """Whose agent is gone hears nothing; that must not cost the report of the member in whose thread we are."""
    try:
        _tell(member.line, **words)
    except (OSError, ValueError):
        return  # ValueError: the file is closed


def _tell(line: TextIO, **words: Any) -> None:
    line.write(json.dumps(words) + "\n")
    line.flush()
