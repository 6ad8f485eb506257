"""The preflight's facts of a node, as those that a fabric's variables are derived from. Asks a Source.

What the preflight collects is used as it is (RDMA ports, interfaces, PCI devices); what only a fabric is about (the
routes, NCCL's configuration files, interfaces that no check looks at) is read here. On a bundle it answers the same.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping
from typing import TypeVar

from checks import facts
from checks.collect_network import NET, collect_interfaces, collect_rdma
from checks.collect_pci import FOLDER as PCI
from checks.collect_pci import collect_pci, is_gpu
from checks.evidence import Live, Source
from checks.fabric_facts import FabricFacts, Gid, Gpu, Interface, RdmaPort, Route
from checks.given import parse_nccl_conf
from checks.reading import Problem, Unread

ROUTES = "/proc/net/route"
LOOPBACK_KIND = 772
UP = 0x1
"""IFF_UP in /sys/class/net/NAME/flags."""

T = TypeVar("T")


class Glance(Live):
    """This machine without a second look: counters that grow are the preflight's business, and cost a second."""

    def wait(self, seconds: float) -> None:
        pass


def read_facts(source: Source, name: str, environment: Mapping[str, str]) -> FabricFacts:
    """Collect what is needed, and no more. `environment` says where NCCL's configuration files are."""
    rdma = collect_rdma(source)
    return facts_of(name, rdma, collect_interfaces(source, rdma), collect_pci(source), source, environment)


def facts_of(
    name: str,
    rdma: facts.Rdma,
    interfaces: tuple[facts.Interface, ...] | Unread,
    pci: tuple[facts.PciDevice, ...] | Unread,
    source: Source,
    environment: Mapping[str, str],
) -> FabricFacts:
    """What a preflight has collected on the node, with the rest read from the same source."""
    sieve = _Known()
    devices = sieve.known(pci, ())
    routes = sieve.known(source.read(ROUTES), "")
    try:
        parsed = parse_routes(routes)
    except ValueError as error:
        sieve.unread.append(f"{ROUTES}: {error}")
        parsed = []
    return FabricFacts(
        node=name,
        ports=tuple(sieve.ports(rdma, {device.address: device for device in devices})),
        interfaces=tuple(sieve.interfaces(interfaces, source)),
        routes=tuple(parsed),
        gpus=tuple(sieve.gpu(device, source) for device in devices if is_gpu(device)),
        nccl_conf=parse_nccl_conf(sieve.nccl_conf(source, environment)),
        unread=tuple(dict.fromkeys(sieve.unread)),
    )


def collected(node: facts.Node) -> FabricFacts:
    """What the checks have of a node, for judging variables against it. Which routes and other interfaces it has was
    not collected, and is held against nobody: an interface that is up counts as one that is routed."""
    sieve = _Known()
    devices = {device.address: device for device in sieve.known(node.pci, ())}
    interfaces = [
        Interface(one.name, one.state in ("up", "unknown"), one.master or "")
        for one in sieve.known(node.interfaces, ())
    ]
    return FabricFacts(
        node=node.name,
        ports=tuple(sieve.ports(node.rdma, devices)),
        interfaces=tuple(interfaces),
        routes=tuple(Route(one.name, "0.0.0.0/0") for one in interfaces if one.running and one.name != "lo"),
        unread=tuple(dict.fromkeys(sieve.unread)),
    )


class _Known:
    """Facts without their gaps, which are kept: a gap is no absence, except where the machine has no such thing."""

    def __init__(self) -> None:
        self.unread: list[str] = []

    def known(self, value: T | Unread, otherwise: T) -> T:
        if not isinstance(value, Unread):
            return value
        if value.problem not in (Problem.MISSING, Problem.UNSUPPORTED, Problem.NOT_RECORDED):
            self.unread.append(str(value))
        return otherwise

    def ports(self, rdma: facts.Rdma, pci: Mapping[str, facts.PciDevice]) -> list[RdmaPort]:
        return [
            self._port(device, port, pci) for device in self.known(rdma.devices, ()) for port in device.ports
        ]

    def _port(
        self, device: facts.RdmaDevice, port: facts.RdmaPort, pci: Mapping[str, facts.PciDevice]
    ) -> RdmaPort:
        card = pci.get(self.known(device.pci, ""))
        return RdmaPort(
            device=device.name,
            number=port.port,
            state=self.known(port.state, "").partition(":")[2].strip(),  # "4: ACTIVE"
            link_layer=self.known(port.link_layer, ""),
            gbps=self.known(port.gigabits, None),
            driver=self.known(device.driver, ""),
            netdevs=device.interfaces,
            gids=tuple(
                Gid(gid.index, gid.gid, self.known(gid.kind, "")) for gid in self.known(port.gids, ())
            ),
            pci_path=self._path(card),
            numa_node=self._numa_node(device.numa_node),
        )

    def interfaces(self, collected: tuple[facts.Interface, ...] | Unread, source: Source) -> list[Interface]:
        """Those that the preflight looks at, and the bridges and pairs that it does not: NCCL sees them too."""
        found = {one.name: self._interface(one, source) for one in self.known(collected, ())}
        for name in self.known(source.list(NET), ()):
            state = source.read(f"{NET}/{name}/operstate") if name not in found else ""
            if isinstance(state, str) and state:
                found[name] = Interface(name, self._running(name, state.strip(), source), physical=False)
        return [found[name] for name in sorted(found)]

    def _interface(self, one: facts.Interface, source: Source) -> Interface:
        running = self._running(one.name, self.known(one.state, ""), source)
        return Interface(one.name, running, one.master or "", physical=isinstance(one.pci, str))

    def _running(self, name: str, state: str, source: Source) -> bool:
        """lo and tunnels say "unknown" while they work (kernel Documentation/networking/operstates.rst)."""
        if state != "unknown":
            return state == "up"
        flags = self.known(source.read(f"{NET}/{name}/flags"), "").strip()
        return bool(int(flags, 16) & UP) if flags.startswith("0x") else False

    def gpu(self, device: facts.PciDevice, source: Source) -> Gpu:
        cpus = self.known(source.read(f"{PCI}/{device.address}/local_cpulist"), "").strip()
        return Gpu(device.address, self._numa_node(device.numa_node), cpus, self._path(device))

    def _path(self, device: facts.PciDevice | None) -> tuple[str, ...]:
        return () if device is None else (*self.known(device.parents, ()), device.address)

    def _numa_node(self, number: int | Unread) -> int | None:
        """-1 is the kernel's word for unknown, as on every virtual machine without a firmware table."""
        known: int | None = number if isinstance(number, int) else None
        return known if known is not None and known >= 0 else None

    def nccl_conf(self, source: Source, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        """The files in NCCL's order: its own file replaces the one in the home folder, /etc/nccl.conf comes last."""
        home = environment.get("HOME", "")
        own = environment.get("NCCL_CONF_FILE", "") or (f"{home}/.nccl.conf" if home else "")
        return [(file, self.known(source.read(file), "")) for file in (own, "/etc/nccl.conf") if file]


def parse_routes(text: str) -> list[Route]:
    """/proc/net/route, without rejecting routes (flag 0x200) and those that are down (flag 1 missing).

    Addresses are hexadecimal in the byte order of the CPU (net/ipv4/fib_trie.c, fib_route_seq_show). Raises ValueError
    for a line of another form.
    """
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            raise ValueError(f"not a route: {line.strip()[:80]}")
        flags = int(fields[3], 16)
        if flags & 0x1 and not flags & 0x200:
            network = ipaddress.IPv4Network((_address(fields[1]), str(_address(fields[7]))))
            found.append(Route(fields[0], str(network), int(fields[6])))
    return found


def _address(text: str) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(text, 16).to_bytes(4, sys.byteorder))
