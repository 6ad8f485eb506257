"""What a node's networks are, as facts: RDMA ports, network interfaces, routes, GPUs. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FabricKind = Literal["auto", "infiniband", "roce", "efa", "tcpx", "tcpxo", "tcp", "loopback"]
"""What carries the traffic between nodes; `auto` is for evidence to say, `loopback` is all ranks on one machine."""


@dataclass(frozen=True)
class Gid:
    """One entry of a port's GID table: an address that RDMA packets may leave from."""

    index: int
    address: str
    """Eight groups of four hexadecimal digits, as sysfs has them."""
    kind: str
    """`RoCE v2`, `IB/RoCE v1`; empty where the kernel does not say."""

    @property
    def is_roce_v2(self) -> bool:
        return self.kind == "RoCE v2"

    @property
    def is_ipv4(self) -> bool:
        return ipaddress.IPv6Address(self.address).ipv4_mapped is not None

    @property
    def is_link_local(self) -> bool:
        return ipaddress.IPv6Address(self.address).is_link_local


@dataclass(frozen=True)
class RdmaPort:
    """One port of a device under /sys/class/infiniband. EFA devices are there too."""

    device: str
    number: int
    state: str
    """`ACTIVE`, `DOWN`, `INIT`, …; empty where it could not be read."""
    link_layer: str
    """`InfiniBand`, `Ethernet`; EFA has neither and says `Unknown`."""
    gbps: float | None = None
    driver: str = ""
    """`mlx5_core`, `efa`, …; empty where there is no such link, as in a capture of the class folder alone."""
    netdevs: tuple[str, ...] = ()
    """Network interfaces of the same card."""
    gids: tuple[Gid, ...] = ()
    pci_path: tuple[str, ...] = ()
    """PCI addresses from the root port down to the card itself; empty where unknown."""
    numa_node: int | None = None

    @property
    def name(self) -> str:
        return f"{self.device}:{self.number}"

    @property
    def is_active(self) -> bool:
        return self.state == "ACTIVE"


@dataclass(frozen=True)
class Interface:
    """One entry of /sys/class/net."""

    name: str
    running: bool
    """Up, with a carrier: what NCCL looks for (IFF_RUNNING)."""
    master: str = ""
    """The bond or bridge that it is a part of: its own traffic goes through that."""
    physical: bool = True
    """Whether a device is behind it; false for bridges, bonds, tunnels and virtual pairs."""


@dataclass(frozen=True)
class Route:
    """One IPv4 route."""

    interface: str
    destination: str
    """`0.0.0.0/0` is the default route."""
    metric: int = 0

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.destination)


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, in the order of PCI addresses."""

    address: str
    numa_node: int | None = None
    cpus: str = ""
    """CPUs near it, as the kernel lists them: `0-55,112-167`."""
    pci_path: tuple[str, ...] = ()


@dataclass(frozen=True)
class FabricFacts:
    """Everything that the fabric's variables are derived from."""

    node: str
    ports: tuple[RdmaPort, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    nccl_conf: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Variables of NCCL's configuration files: name to value and file. NCCL reads them where the environment is
    silent, so a variable that we set would override its administrator."""
    unread: tuple[str, ...] = ()
    """What could not be read, and why: an absence there is no evidence."""

    @property
    def ordered_ports(self) -> tuple[RdmaPort, ...]:
        """The ports by number, as people count: mlx5_2 before mlx5_10."""
        return tuple(sorted(self.ports, key=_by_number))

    def interface(self, name: str) -> Interface | None:
        return next((one for one in self.interfaces if one.name == name), None)

    @property
    def usable(self) -> tuple[Interface, ...]:
        """Interfaces that NCCL and Gloo can bind to: running and with an IPv4 route of their own; and lo."""
        routed = {route.interface for route in self.routes} | {"lo"}
        return tuple(one for one in self.interfaces if one.running and one.name in routed)


def _by_number(port: RdmaPort) -> tuple[str, int, int]:
    digits = re.search(r"\d+$", port.device)
    return (port.device.rstrip("0123456789"), int(digits[0]) if digits else -1, port.number)
