"""Which way the messages really go: from NCCL's own log, or, for gloo, from this process's open connections.

What NCCL would choose is a guess; what it did choose stands in its log (NCCL_DEBUG=INFO). The forms of the lines are
those of NCCL 2.18 to 2.30: src/init.cc, src/enqueue.cc, src/transport/{p2p,shm,net,nvls,net_ib/init,net_socket}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from recipes.lib.distributed import World

_CHANNEL = re.compile(
    r"Channel \d+(?:/\d+)? : (\d+)\[\w+\] -> (\d+)\[\w+\] (?:\[(?:send|receive)\] )?via (\S+(?: pointer\S*)?)"
)
_CHOICE = re.compile(
    r"NCCL INFO (\w+): (\d+) Bytes -> Algo (\w+) proto (\w+) channel\{Lo\.\.Hi\}=\{(\d+)\.\.(\d+)\}"
)
_VERSION = re.compile(r"NCCL version (\S+)")
_NETWORK = re.compile(r"Using network (.+)")
_DEVICES = re.compile(r"NET/(?:IB|Socket|OFI)\S* ?: ?Using ?(\[.*)")
_PLUGIN = re.compile(r"Loaded net plugin (.+)")
_NVLS = re.compile(r"NVLS multicast support is (not )?available")


@dataclass(frozen=True)
class NcclLog:
    """What one rank's log says."""

    version: str = ""
    network: str = ""
    """IB, Socket, or what a plugin calls itself."""
    devices: str = ""
    """The network devices that it may use: "[0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>"."""
    plugin: str = ""
    multicast: bool = False
    """Whether NVLink's switch can add and copy (NVLS)."""
    ways: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    """From rank to rank: P2P/CUMEM, SHM/direct/direct, NET/IB/0/GDRDMA, ..."""
    choices: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    """For an operation and its bytes: "RING/SIMPLE, 16 channels". Rank 0's log alone has them."""
    warnings: tuple[str, ...] = ()


def parse_nccl_log(lines: Iterable[str]) -> NcclLog:
    """Read a log. Pure. A line that is not known says nothing."""
    found: dict[str, str] = {}
    ways, choices = dict[tuple[int, int], str](), dict[tuple[str, int], str]()
    warnings, multicast = list[str](), False
    for line in lines:
        if channel := _CHANNEL.search(line):
            # The first way that is named: later channels differ in nothing but the card's number.
            ways.setdefault((int(channel[1]), int(channel[2])), channel[3])
        elif choice := _CHOICE.search(line):
            count = int(choice[6]) - int(choice[5]) + 1
            text = f"{choice[3]}/{choice[4]}, {count} channel{'s' if count > 1 else ''}"
            choices[choice[1], int(choice[2])] = text
        elif nvls := _NVLS.search(line):
            multicast = nvls[1] is None
        elif "NCCL WARN" in line:
            warnings.append(line.strip())
        else:
            for name, pattern in _SINGLE.items():
                if said := pattern.search(line):
                    found.setdefault(name, said[1].strip())
    return NcclLog(**found, multicast=multicast, ways=ways, choices=choices, warnings=tuple(warnings))


_SINGLE = {"version": _VERSION, "network": _NETWORK, "devices": _DEVICES, "plugin": _PLUGIN}


def logged_call(collective: str, size: int, ranks: int) -> tuple[str, int]:
    """How NCCL's log names a call: its own word, and bytes, of one rank's part where it gathers or scatters. Pure."""
    name = "".join(word.capitalize() for word in collective.split("_"))
    return name, size // ranks if name in ("AllGather", "ReduceScatter") else size


def kind_of_way(way: str) -> str:
    """P2P, SHM or NET/IB, NET/Socket, ...: without card and memory. Pure."""
    parts = way.split("/")
    return "/".join(parts[:2]) if parts[0] == "NET" else parts[0]


@contextlib.contextmanager
def nccl_log(*, choices: bool = False) -> Iterator[Path]:
    """Let NCCL log into the file that this gives. Enter it before the process group starts: NCCL looks only then.

    `choices` adds a line on rank 0 for every call, with algorithm and protocol; small messages feel it. NCCL's
    warnings are lost in a file: where an error leaves the context, they go to stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nccl.log"
        # A cluster profile's NCCL_DEBUG=WARN would leave nothing to read.
        os.environ["NCCL_DEBUG"] = "INFO"
        os.environ["NCCL_DEBUG_SUBSYS"] = "INIT,NET,P2P,SHM,ENV" + (",TUNING" if choices else "")
        os.environ["NCCL_DEBUG_FILE"] = str(file)
        try:
            yield file
        except BaseException:
            for line in read_nccl_log(file).warnings:
                print(line, file=sys.stderr, flush=True)
            raise


def read_nccl_log(file: Path) -> NcclLog:
    """What the log says up to now; nothing where NCCL was not used."""
    if not file.exists():
        return NcclLog()
    return parse_nccl_log(file.read_text(errors="replace").splitlines())


def ways_of_all(world: World, log: Path) -> dict[str, Any]:
    """The library and every way that is in use, from all ranks and on all of them: lines of a report by their names.

    Call it after the first messages: connections are made when they are first needed.
    """
    if world.device.type == "cuda":
        read = read_nccl_log(log)
        mine: dict[str, Any] = {**dataclasses.asdict(read), "library": f"NCCL {read.version}"}
    else:
        mine = {"library": "gloo", "ways": {}, "devices": " ".join(interfaces_in_use(os.environ))}
    found = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine)
    ways = {pair: way for each in found for pair, way in each["ways"].items()}
    return {
        **found[0],
        "ways": [{"from": a, "to": b, "way": way} for (a, b), way in sorted(ways.items())],
        "choices": [
            {"operation": op, "bytes": size, "choice": text}
            for (op, size), text in found[0].get("choices", {}).items()
        ],
        "devices_by_rank": [each["devices"] for each in found],
    }


def interfaces_in_use(environment: Mapping[str, str]) -> list[str]:
    """The network interfaces on which this process holds connections to other ranks.

    Without the connection to the store, which is made before gloo chooses.
    """
    store = environment.get("MASTER_PORT", "")
    owners = {
        _plain(address.address): name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
    }
    found = set()
    for connection in psutil.Process().net_connections("tcp"):
        ends = [end for end in (connection.laddr, connection.raddr) if end]
        if connection.status != psutil.CONN_ESTABLISHED or any(str(end.port) == store for end in ends):
            continue
        address = _plain(connection.laddr.ip)
        found.add(f"{owners.get(address, 'unknown')} ({address})")
    return sorted(found)


def _plain(address: str) -> str:
    """Without the interface (fe80::1%eth0) and the form of IPv4 in IPv6."""
    return address.partition("%")[0].removeprefix("::ffff:")
