"""Which RDMA ports carry the ranks' traffic, which do not and why, and the GID index that they share. Pure.

A node has more ports than rails: storage and management cards, ports of accelerated networking, ports that are down.
NCCL left to itself takes every active one, of either link layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checks.fabric_facts import FabricFacts, FabricKind, RdmaPort

LINK_LAYERS = {"infiniband": "InfiniBand", "roce": "Ethernet"}


@dataclass(frozen=True)
class Rails:
    """The ports that are used, and those that are not with the reason."""

    chosen: tuple[RdmaPort, ...] = ()
    left_out: tuple[tuple[RdmaPort, str], ...] = ()
    reason: str = ""

    def device_names(self, facts: FabricFacts) -> list[str]:
        """As NCCL_IB_HCA names them: the port only where the device has another one that is not used."""
        names = []
        for port in self.chosen:
            every = [other for other in facts.ports if other.device == port.device]
            whole = all(other in self.chosen for other in every)
            names.append(port.device if whole else port.name)
        return list(dict.fromkeys(names))


def rails_of(facts: FabricFacts, kind: FabricKind, interface: str | None) -> Rails:
    """The ports of an InfiniBand or RoCE fabric. `interface` carries the node's own traffic."""
    wanted = LINK_LAYERS[kind]
    sieve = _Sieve(list(facts.ordered_ports))
    sieve.drop(lambda port: port.link_layer != wanted, lambda port: f"{port.link_layer}, not {wanted}")
    sieve.drop(
        lambda port: not port.is_active, lambda port: f"not active: {port.state or 'state unreadable'}"
    )
    if kind == "roce":
        sieve.drop(_has_no_routable_gid, "no RoCE v2 GID with an IPv4 address")
        if not all(_carries(facts, port, interface) for port in sieve.ports):
            sieve.drop(
                lambda port: _carries(facts, port, interface),
                f"carries the node's own traffic ({interface})",
            )
    best = max((port.gbps for port in sieve.ports if port.gbps is not None), default=0.0)
    sieve.drop(
        lambda port: port.gbps is not None and port.gbps < best,
        lambda port: f"{port.gbps:g} Gb/s, others {best:g}: storage, management, or a degraded link",
    )
    if _every_gpu_has_a_port(facts, sieve.ports):
        sieve.drop(
            lambda port: not any(_share_a_switch(gpu.pci_path, port.pci_path) for gpu in facts.gpus),
            "shares no PCIe switch with a GPU, as the others do: storage or management",
        )
    return Rails(tuple(sieve.ports), tuple(sieve.left_out), _summary(sieve.ports, wanted))


class _Sieve:
    """The ports that are left, and why the others are not."""

    def __init__(self, ports: list[RdmaPort]) -> None:
        self.ports = ports
        self.left_out: list[tuple[RdmaPort, str]] = []

    def drop(self, condition: Callable[[RdmaPort], bool], reason: str | Callable[[RdmaPort], str]) -> None:
        dropped = [port for port in self.ports if condition(port)]
        self.left_out += [(port, reason if isinstance(reason, str) else reason(port)) for port in dropped]
        self.ports = [port for port in self.ports if port not in dropped]


def common_gid_index(ports: Sequence[RdmaPort]) -> tuple[int | None, str]:
    """The lowest GID index that is RoCE v2 with an IPv4 address on every port; None with the reason.

    NCCL_IB_GID_INDEX is one number for all ports. Without it NCCL (from 2.21) looks for such an entry on each port.
    """
    if any(not port.gids for port in ports):
        unknown = ", ".join(port.name for port in ports if not port.gids)
        return None, f"the GID table of {unknown} could not be read; NCCL looks for the index on each port"
    candidates = [{gid.index for gid in port.gids if gid.is_roce_v2 and gid.is_ipv4} for port in ports]
    common = set.intersection(*candidates)
    if not common:
        each = ", ".join(f"{port.name} {min(found)}" for port, found in zip(ports, candidates, strict=True))
        return (
            None,
            f"RoCE v2 with IPv4 has another index on each port ({each}); NCCL looks for it on each port",
        )
    return min(
        common
    ), f"RoCE v2 with an IPv4 address on {'all ' if len(ports) > 1 else ''}{len(ports)} ports"


def _has_no_routable_gid(port: RdmaPort) -> bool:
    return bool(port.gids) and not any(gid.is_roce_v2 and gid.is_ipv4 for gid in port.gids)


def _carries(facts: FabricFacts, port: RdmaPort, interface: str | None) -> bool:
    """Whether the interface is on this card, itself or as a bond of it."""
    names = {one.name for one in facts.interfaces if interface in (one.name, one.master)}
    return interface is not None and bool(names & set(port.netdevs))


def _every_gpu_has_a_port(facts: FabricFacts, ports: Sequence[RdmaPort]) -> bool:
    """In a virtual machine no path shows a switch; then nothing is concluded from paths."""
    return bool(facts.gpus) and all(
        any(_share_a_switch(gpu.pci_path, port.pci_path) for port in ports) for gpu in facts.gpus
    )


def _share_a_switch(one: Sequence[str], other: Sequence[str]) -> bool:
    """The same root port: what is below one together is below one switch. Without a bridge nothing is shared."""
    return len(one) > 1 and len(other) > 1 and one[0] == other[0]


def _summary(ports: Sequence[RdmaPort], wanted: str) -> str:
    rates = sorted({port.gbps for port in ports if port.gbps is not None})
    speed = f" at {rates[0]:g} Gb/s" if len(rates) == 1 else ""
    return f"{len(ports)} active {wanted} port{'s'[: len(ports) != 1]}{speed}"
