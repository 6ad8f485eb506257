"""How ranks find each other: the master's address, its port, and each rank's number. File system and network.

The master's address is the first node's NodeAddr, resolved once by the controller. Its port is bound by rank 0's own
process (port 0, so the kernel picks a free one) and published in the attempt's folder by rename: two jobs on one node
can never want the same port, and a reader never sees half a file. Nothing falls back to localhost: with a fallback N
nodes become N worlds of one and hang (pith-train#91).
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.spec import UserError

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 0.5
PAUSE_SHARE = 0.05
"""Between two looks for the address, of the time waited so far: so much longer does the meeting take at most."""


class RendezvousError(Exception):
    """Ranks could not find each other: who waited, for what, how long."""


@dataclass(frozen=True)
class Endpoint:
    address: str
    port: int


@dataclass(frozen=True)
class Rank:
    """Which process this is, as torch's `env://` names it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int

    def environment(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "NODE_RANK": str(self.node_rank),
            "GROUP_RANK": str(self.node_rank),
        }


def rank_from_environment(environment: Mapping[str, str]) -> Rank:
    """This process's rank from Slurm's step variables, submitit's local ones, or torchrun's.

    Torchrun's come first: its workers run inside a Slurm step whose SLURM_PROCID numbers the agents, not the workers.
    Raises RendezvousError when none of the three is there, instead of assuming a world of one.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Rank(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]),
            local_world_size=int(environment["LOCAL_WORLD_SIZE"]),
            node_rank=int(environment.get("GROUP_RANK", environment.get("NODE_RANK", "0"))),
        )
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        world_size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
        return Rank(
            rank=int(environment["SLURM_PROCID"]),
            world_size=world_size,
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world_size=world_size // nodes,
            node_rank=int(environment["SLURM_NODEID"]),
        )
    if "SUBMITIT_LOCAL_GLOBALID" in environment:
        world_size = int(environment["SUBMITIT_LOCAL_NTASKS"])
        return Rank(
            rank=int(environment["SUBMITIT_LOCAL_GLOBALID"]),
            world_size=world_size,
            local_rank=int(environment["SUBMITIT_LOCAL_LOCALID"]),
            local_world_size=world_size,
            node_rank=0,
        )
    raise RendezvousError(
        "no rank in the environment: neither torchrun's RANK, Slurm's SLURM_PROCID, nor submitit's"
    )


def resolve(host: str) -> str:
    """The IP address of a host name. Raises UserError with the resolver's words; an address is returned as it is."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"the first node's address {host!r} does not resolve on {socket.gethostname()}: {error}"
        ) from error
    return str(answers[0][4][0])


def publish(path: Path, endpoint: Endpoint) -> None:
    """Write the endpoint beside `path` and rename it into place: complete or invisible."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"address": endpoint.address, "port": endpoint.port}))
    os.replace(temporary, path)


def wait_for(path: Path, *, deadline_seconds: float) -> Endpoint:
    """Wait until rank 0 has published its endpoint. Raises RendezvousError after the deadline.

    Looks through the folder's listing: asking NFS for a name that did not exist caches the "no" for up to a minute.
    So the folder should hold little else. Looks get rarer, or a thousand waiting ranks would keep the file server busy.
    """
    began = time.monotonic()
    path.parent.mkdir(exist_ok=True)
    while path.name not in os.listdir(path.parent):
        waited = time.monotonic() - began
        if waited > deadline_seconds:
            raise RendezvousError(
                f"{socket.gethostname()}: rank 0 published no address in {path} within {deadline_seconds:.0f} s; "
                "its log says why it did not start"
            )
        time.sleep(min(LONGEST_PAUSE_SECONDS, max(SHORTEST_PAUSE_SECONDS, waited * PAUSE_SHARE)))
    fields = json.loads(path.read_text())
    return Endpoint(fields["address"], fields["port"])
