"""Facts of a node -> the variables of its fabric, each with its reason; and what is wrong with the facts. Pure.

    derive(facts, "infiniband", given={"NCCL_DEBUG": Given("INFO", "your shell")})

Nothing that somebody has set is changed: not in the environment, not in the job's configuration, not in nccl.conf.
What is derived is exact (`=mlx5_0,mlx5_3`, `=eth0`): a prefix would take in a device that another node has more of.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from checks import fabric_contradictions
from checks.fabric_facts import FabricFacts, FabricKind, Interface, RdmaPort
from checks.fabric_rails import LINK_LAYERS, Rails, common_gid_index, rails_of
from checks.given import Given
from checks.selectors import exact_names, nccl_selector

NOT_FOR_JOBS = (
    "docker",
    "virbr",
    "veth",
    "cni",
    "flannel",
    "cali",
    "ifb",
    "dummy",
    "kube-",
    "nodelocaldns",
)
"""Beginnings of interface names whose addresses no other node reaches. NCCL itself leaves out docker, lo and virbr."""

CONTROL_VARIABLES: Mapping[str, tuple[str, str]] = {
    "tcpxo": ("NCCL_FASTRAK_CTRL_DEV", "NCCL_FASTRAK_IFNAME"),
    "tcpx": ("NCCL_GPUDIRECTTCPX_CTRL_DEV", "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME"),
}
"""GPUDirect-TCPX(O): the variable of the host's interface, and of the GPUs' interfaces."""


@dataclass(frozen=True)
class Setting:
    """One variable and why it has its value."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Note:
    """Something that was not set or not used, and why."""

    subject: str
    reason: str


@dataclass(frozen=True)
class Place:
    """Where a GPU sits: its NUMA node, the CPUs and the HCAs that are near it."""

    gpu: int
    address: str
    numa_node: int | None
    cpus: str
    hcas: tuple[str, ...]


@dataclass(frozen=True)
class Derivation:
    """The answer for one node."""

    node: str
    fabric: FabricKind
    settings: tuple[Setting, ...] = ()
    """Variables to add to the tasks' environment."""
    kept: tuple[Setting, ...] = ()
    """Variables of the fabric that somebody has set; the reason says who."""
    notes: tuple[Note, ...] = ()
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    """What keeps a job from running on this fabric as promised."""
    places: tuple[Place, ...] = ()

    def variables(self) -> dict[str, str]:
        return {setting.name: setting.value for setting in self.settings}


def derive(
    facts: FabricFacts, kind: FabricKind, given: Mapping[str, Given], peer: str | None = None
) -> Derivation:
    """The variables for a node. `given` is what is set already; `peer` the IPv4 address that the ranks meet at."""
    if kind == "loopback":
        kept = _kept(given)
        return Derivation(facts.node, kind, kept=kept, notes=(Note("everything", _LOOPBACK),))
    draft = _Draft(facts, given)
    interface, why = _named_interface(draft) or socket_interface(facts, peer)
    if interface is None:
        draft.notes.append(Note(_SOCKETS, why))
    else:
        draft.set("NCCL_SOCKET_IFNAME", f"={interface}", f"{why}; exact, a prefix would match others too")
        draft.set("GLOO_SOCKET_IFNAME", interface, f"{why}; Gloo takes an exact name")
    rails = Rails()
    found = kind if kind != "auto" else detect(facts, interface)
    if kind == "auto":
        draft.notes.append(Note("fabric=auto", _AUTO[found]))
    if found in ("infiniband", "roce"):
        rails = _named_rails(draft, found) or rails_of(facts, found, interface)
        draft.notes += [Note(port.name, reason) for port, reason in rails.left_out]
        if rails.chosen and (kind != "auto" or found == "infiniband"):
            _set_rails(draft, rails, found)
    elif found == "tcp" and kind == "tcp" and interface is not None:
        draft.set("UCX_NET_DEVICES", interface, f"{why}; UCX would take the fastest device of any kind")
    elif found in CONTROL_VARIABLES and interface is not None:
        _set_data_interfaces(draft, found, interface)
    _set_affinity(draft)
    errors = tuple(_ERRORS[kind](facts, rails, interface, draft)) if kind in _ERRORS else ()
    warnings = [str(one) for one in fabric_contradictions.find(facts, kind, given, rails)]
    return Derivation(
        facts.node, kind, tuple(draft.settings), _kept(given), tuple(draft.notes), tuple(warnings), errors,
        places(facts, rails.chosen),
    )  # fmt: skip


def rails_and_gid(
    facts: FabricFacts, kind: FabricKind, given: Mapping[str, Given]
) -> tuple[Rails, str | None]:
    """The RDMA ports that the ranks' traffic takes, and on RoCE the GID index; no ports on any other fabric."""
    draft = _Draft(facts, given)
    interface, _ = _named_interface(draft) or socket_interface(facts)
    found = kind if kind != "auto" else detect(facts, interface)
    if found not in LINK_LAYERS:
        return Rails(), None
    rails = _named_rails(draft, found) or rails_of(facts, found, interface)
    if rails.chosen:
        _set_rails(draft, rails, found)
    return rails, draft.value("NCCL_IB_GID_INDEX") if found == "roce" else None


def detect(facts: FabricFacts, interface: str | None) -> FabricKind:
    """What the evidence looks like where nobody has named the fabric. GPUDirect-TCPX(O) has to be named."""
    if any(port.is_active and port.link_layer == "InfiniBand" for port in facts.ordered_ports):
        return "infiniband"
    if any(port.driver == "efa" for port in facts.ordered_ports):
        return "efa"
    return "roce" if rails_of(facts, "roce", interface).chosen else "tcp"


_AUTO: Mapping[str, str] = {
    "infiniband": "there is an active InfiniBand port; name it (fabric=infiniband), and a job without one is stopped",
    "efa": "there is an EFA device; name it (fabric=efa), and a job without one is stopped",
    "roce": "there are RDMA ports on Ethernet; NCCL chooses, until you say fabric=roce or fabric=tcp",
    "tcp": "there is no active RDMA port; NCCL uses sockets",
}
_SOCKETS = "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
_LOOPBACK = "fabric=loopback: all ranks are on one machine, and the fabric's file names lo"


# --- the interface for sockets --------------------------------------------------------------------------------------


def socket_interface(facts: FabricFacts, peer: str | None = None) -> tuple[str | None, str]:
    """The interface that other nodes are reached through, and why; None with the reason that none is.

    The way to the address that the ranks meet at counts most, then the default route, then the only one there is.
    A host's own name is no evidence: on many systems it leads to 127.0.1.1.
    """
    usable = {one.name for one in facts.usable if reachable_by_others(one)}
    if peer is not None and not ipaddress.IPv4Address(peer).is_loopback:
        address = ipaddress.IPv4Address(peer)
        routes = [route for route in facts.routes if address in route.network]
        if routes:
            best = min(routes, key=lambda route: (-route.network.prefixlen, route.metric))
            if best.interface in usable:
                return best.interface, f"the way to {peer}, where the ranks meet, leads through it"
            return None, f"the way to {peer} leads through {best.interface}, which is not usable"
        return None, f"there is no route to {peer}, where the ranks meet"
    defaults = sorted(
        (route.metric, route.interface) for route in facts.routes if route.destination == "0.0.0.0/0"
    )
    defaults = [(metric, name) for metric, name in defaults if name in usable]
    if defaults:
        best_metric, name = defaults[0]
        equal = {other for metric, other in defaults if metric == best_metric}
        if len(equal) > 1:
            return None, f"the default route leads through {_and(sorted(equal))} alike"
        return name, "the default route leads through it"
    if len(usable) == 1:
        return next(iter(usable)), "no other interface is up and reaches further than this node"
    if not usable:
        return None, f"no interface is up and reaches further than this node; there is {_interfaces(facts)}"
    return None, f"there is no default route, and {_and(sorted(usable))} could be meant"


def _named_interface(draft: _Draft) -> tuple[str, str] | None:
    """The one interface that somebody has named for NCCL or for Gloo: the other variable then follows."""
    usable = [one.name for one in draft.facts.usable]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        one = draft.somebodys(variable)
        if one is not None and one.value:
            wanted = one.value if variable.startswith("NCCL") else f"={one.value}"
            matched = [name for name in usable if nccl_selector(wanted).matches(name)]
            if len(matched) == 1:
                return matched[0], f"{variable} names it ({one.origin})"
    return None


def reachable_by_others(interface: Interface) -> bool:
    """Whether another node could reach an address of it."""
    return interface.name != "lo" and not interface.master and not interface.name.startswith(NOT_FOR_JOBS)


# --- RDMA, data interfaces, affinity --------------------------------------------------------------------------------


class _Draft:
    """Settings as they are found, without those that somebody else has made."""

    def __init__(self, facts: FabricFacts, given: Mapping[str, Given]) -> None:
        self.facts, self.given = facts, given
        self.settings: list[Setting] = []
        self.notes: list[Note] = []

    def somebodys(self, name: str) -> Given | None:
        """What somebody has set, in the environment or in a file of NCCL's."""
        if name in self.given:
            return self.given[name]
        return Given(*self.facts.nccl_conf[name]) if name in self.facts.nccl_conf else None

    def set(self, name: str, value: str, reason: str) -> None:
        one = self.somebodys(name)
        if one is None:
            self.settings.append(Setting(name, value, reason))
        elif name not in self.given and one.value:
            passed_on = f"{one.origin} says so; passed on, because a container does not see that file"
            self.settings.append(Setting(name, one.value, passed_on))

    def value(self, name: str) -> str | None:
        """What the tasks will see."""
        one = self.somebodys(name)
        found = next((setting.value for setting in self.settings if setting.name == name), None)
        return one.value if one is not None else found


def _named_rails(draft: _Draft, kind: FabricKind) -> Rails | None:
    """The ports that somebody's NCCL_IB_HCA takes: the other variables then follow."""
    one = draft.somebodys("NCCL_IB_HCA")
    if one is None or not one.value:
        return None
    selector = nccl_selector(one.value)
    ports = [
        port for port in draft.facts.ordered_ports if port.is_active and port.link_layer == LINK_LAYERS[kind]
    ]
    named = tuple(port for port in ports if selector.matches(port.device, port.number))
    return Rails(named, reason=f"NCCL_IB_HCA names these ports ({one.origin})") if named else None


def _set_rails(draft: _Draft, rails: Rails, kind: FabricKind) -> None:
    names = rails.device_names(draft.facts)
    draft.set("NCCL_IB_HCA", f"={','.join(names)}", rails.reason)
    draft.set("UCX_NET_DEVICES", ",".join(port.name for port in rails.chosen), rails.reason)
    if kind == "roce":
        index, reason = common_gid_index(rails.chosen)
        if index is None:
            draft.notes.append(Note("NCCL_IB_GID_INDEX", reason))
        else:
            draft.set("NCCL_IB_GID_INDEX", str(index), reason)
            draft.set("UCX_IB_GID_INDEX", str(index), reason)


def _set_data_interfaces(draft: _Draft, kind: FabricKind, control: str) -> None:
    control_variable, data_variable = CONTROL_VARIABLES[kind]
    draft.set(control_variable, control, "the host's own interface")
    data = [
        one.name
        for one in draft.facts.usable
        if one.physical and reachable_by_others(one) and one.name != control
    ]
    if data:
        draft.set(
            data_variable, ",".join(data), f"every other interface with a device behind it ({len(data)})"
        )


def _set_affinity(draft: _Draft) -> None:
    """Azure's and Oracle's images set the same in /etc/nccl.conf (azhpc-images ndv5.sh, oci-hpc nccl-conf/h100)."""
    nodes = sorted({gpu.numa_node for gpu in draft.facts.gpus if gpu.numa_node is not None})
    if len(nodes) > 1:
        reason = "NCCL's threads run near their GPU, whatever CPUs a rank was given"
        draft.set("NCCL_IGNORE_CPU_AFFINITY", "1", f"GPUs are on NUMA nodes {_and(nodes)}: {reason}")


def places(facts: FabricFacts, ports: Sequence[RdmaPort]) -> tuple[Place, ...]:
    """Every GPU with the HCAs that share most of its PCI path, or its NUMA node where the path says nothing."""
    found = []
    for index, gpu in enumerate(facts.gpus):
        shared = {port.device: _shared(gpu.pci_path, port.pci_path) for port in ports}
        most = max(shared.values(), default=0)
        near = [device for device, depth in shared.items() if most > 0 and depth == most]
        if not near and gpu.numa_node is not None:
            near = [port.device for port in ports if port.numa_node == gpu.numa_node]
        found.append(Place(index, gpu.address, gpu.numa_node, gpu.cpus, tuple(dict.fromkeys(near))))
    return tuple(found)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many bridges two PCI paths have in common, from the root port down."""
    return next(
        (depth for depth, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


# --- what makes a fabric unusable -----------------------------------------------------------------------------------

_Complaints = Callable[[FabricFacts, Rails, "str | None", _Draft], list[str]]


def _no_rails(wanted: str, kind: str) -> _Complaints:
    def complaints(facts: FabricFacts, rails: Rails, interface: str | None, draft: _Draft) -> list[str]:
        if rails.chosen:
            return []
        unread = f"; not read: {'; '.join(facts.unread)}" if facts.unread else ""
        return [f"fabric={kind}: {wanted} on this node; there is {_ports(facts)}{unread}"]

    return complaints


def _no_efa(facts: FabricFacts, rails: Rails, interface: str | None, draft: _Draft) -> list[str]:
    if any(port.driver == "efa" and port.is_active for port in facts.ordered_ports):
        return []
    return [f"fabric=efa: no active EFA device on this node; there is {_ports(facts)}"]


def _no_socket(facts: FabricFacts, rails: Rails, interface: str | None, draft: _Draft) -> list[str]:
    if interface is not None or draft.value("NCCL_SOCKET_IFNAME") is not None:
        return []
    reason = next(note.reason for note in draft.notes if note.subject == _SOCKETS)
    return [
        f"fabric=tcp: no interface can be chosen: {reason}; "
        "name it with env.NCCL_SOCKET_IFNAME= and env.GLOO_SOCKET_IFNAME="
    ]


def _no_data(kind: FabricKind) -> _Complaints:
    def complaints(facts: FabricFacts, rails: Rails, interface: str | None, draft: _Draft) -> list[str]:
        named = exact_names(draft.value(CONTROL_VARIABLES[kind][1]) or "")
        if any(one.name in named for one in facts.usable):
            return []
        return [f"fabric={kind}: no interface for the GPUs is up on this node; there is {_interfaces(facts)}"]

    return complaints


_ERRORS: Mapping[str, _Complaints] = {
    "infiniband": _no_rails("no active InfiniBand port", "infiniband"),
    "roce": _no_rails("no active RDMA port on Ethernet", "roce"),
    "efa": _no_efa,
    "tcpx": _no_data("tcpx"),
    "tcpxo": _no_data("tcpxo"),
    "tcp": _no_socket,
}


def _kept(given: Mapping[str, Given]) -> tuple[Setting, ...]:
    return tuple(Setting(name, one.value, one.origin) for name, one in sorted(given.items()))


def _ports(facts: FabricFacts) -> str:
    return (
        ", ".join(
            f"{port.name} {port.state or 'of unknown state'} ({port.link_layer})"
            for port in facts.ordered_ports
        )
        or "no RDMA device"
    )


def _interfaces(facts: FabricFacts) -> str:
    return ", ".join(f"{one.name}{'' if one.running else ' (down)'}" for one in facts.interfaces) or "none"


def _and(items: Sequence[object]) -> str:
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
