"""What somebody has set against what the node shows: each contradiction is one line. Pure.

The one place that judges this: `launcher env` and the controller warn with its lines, and the checks env.* fail or warn
with them. Nothing is changed here. A leftover of another cluster (an interface, a device, NCCL_NET=Socket) costs a job
its network, and says nothing while it does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from checks.fabric_facts import FabricFacts, FabricKind, RdmaPort
from checks.fabric_rails import LINK_LAYERS, Rails
from checks.given import Given
from checks.selectors import Selector, exact_names, nccl_selector

RDMA_KINDS = ("infiniband", "roce")

TRANSPORTS: Mapping[str, tuple[str, ...]] = {
    "infiniband": ("ib",),
    "roce": ("ib",),
    "efa": ("libfabric", "aws libfabric"),
    "tcp": ("socket",),
}
"""Values of NCCL_NET that fit a fabric, in small letters: NCCL compares without regard to case."""


@dataclass(frozen=True)
class Contradiction:
    """One variable against the node."""

    variable: str
    value: str
    origin: str
    what: str
    breaks: bool
    """The job would have no network, or not the one that it was promised; else it is only doubtful."""

    def __str__(self) -> str:
        return f"{self.variable}={_short(self.value)} ({self.origin}): {self.what}"


@dataclass(frozen=True)
class _Said:
    what: str
    breaks: bool = True


Judgement = Iterator[_Said]


def doubt(what: str) -> _Said:
    return _Said(what, breaks=False)


def find(
    facts: FabricFacts,
    kind: FabricKind,
    given: Mapping[str, Given],
    rails: Rails,
    variables: Collection[str] | None = None,
) -> list[Contradiction]:
    """One for each contradiction, of all variables or of some. Variables of nccl.conf count as given: NCCL reads them
    too."""
    conf = {name: Given(value, file) for name, (value, file) in facts.nccl_conf.items()}
    everything = {**conf, **given}
    return [
        Contradiction(name, one.value, one.origin, said.what, said.breaks)
        for name, check in _CHECKS.items()
        if variables is None or name in variables
        for one in [everything.get(name)]
        if one is not None and one.value
        for said in check(one.value, facts, kind, rails)
    ]


# --- interfaces -----------------------------------------------------------------------------------------------------


def _socket_interfaces(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    selector = nccl_selector(value)
    names = [one.name for one in facts.usable]
    matched = [name for name in names if selector.matches(name)]
    if not matched:
        down = [one.name for one in facts.interfaces if not one.running and selector.matches(one.name)]
        but = f" ({_names(down)} is down)" if down else ""
        yield _Said(f"no interface that is up matches{but}; there is {_names(names)}")
        return
    for word in selector.elements_without_match([(name, None) for name in names]):
        yield doubt(f"'{word}' matches no interface that is up")
    local = [name for name in matched if name.startswith(("lo", "docker", "virbr", "veth"))]
    if local and kind != "loopback":
        alone = (
            "; other nodes cannot reach them"
            if len(local) == len(matched)
            else ", which no other node reaches"
        )
        yield doubt(f"takes in {_names(local)}{alone}")


def _exact_interfaces(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    if value.startswith(("^", "=")):
        yield _Said(
            f"Gloo knows no '{value[0]}': it wants exact names, and would look for an interface of this one"
        )
        return
    names = [one.name for one in facts.usable]
    for word in exact_names(value):
        if word not in names:
            yield _Said(f"there is no interface {word} that is up; there is {_names(names)}")


def _interfaces_for_data(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    names = [one.name for one in facts.usable]
    missing = [word for word in exact_names(value) if word not in names]
    if missing:
        yield _Said(f"no interface {_names(missing)} is up; there is {_names(names)}")


# --- RDMA devices ---------------------------------------------------------------------------------------------------


def _devices(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    if kind not in (*RDMA_KINDS, "auto"):
        return
    selector = nccl_selector(value)
    matched = [
        port for port in facts.ordered_ports if port.is_active and selector.matches(port.device, port.number)
    ]
    if not matched:
        yield _Said(f"no active port matches; there is {_ports(facts.ordered_ports)}")
        return
    yield from _named_but_unusable(selector, facts)
    if kind in RDMA_KINDS:
        wrong = [port.name for port in matched if port.link_layer != LINK_LAYERS[kind]]
        if wrong:
            yield doubt(f"takes in {_names(wrong)}, which is not {LINK_LAYERS[kind]}")
    if not selector.exact and not selector.inverted:
        for element in selector.elements:
            more = [
                port.device
                for port in matched
                if port.device.startswith(element.name) and port.device != element.name
            ]
            if more and any(port.device == element.name for port in facts.ordered_ports):
                yield doubt(f"'{element.name}' is a prefix and takes in {_names(more)} too; write ={value}")


def _named_but_unusable(selector: Selector, facts: FabricFacts) -> Judgement:
    every = [(port.device, port.number) for port in facts.ordered_ports]
    active = [(port.device, port.number) for port in facts.ordered_ports if port.is_active]
    missing = selector.elements_without_match(every)
    for word in selector.elements_without_match(active):
        yield doubt(f"there is no device '{word}'" if word in missing else f"'{word}' is not active")


def _ib_disabled(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    if value.strip() not in ("", "0") and kind in RDMA_KINDS:
        yield _Said(f"turns off what fabric={kind} is")


def _gid_index(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    if not value.strip().lstrip("-").isdecimal():
        yield _Said("it is no number")
        return
    if kind not in ("roce", "auto") or int(value) < 0:
        return
    wrong = []
    for port in (port for port in rails.chosen if port.link_layer == LINK_LAYERS["roce"]):
        gid = next((one for one in port.gids if one.index == int(value)), None)
        if not port.gids:
            continue
        if gid is None:
            wrong.append(f"{port.name} has none there")
        elif not gid.is_roce_v2:
            wrong.append(f"{port.name} has {gid.kind or 'an unknown kind'} there")
        elif gid.is_link_local:
            wrong.append(f"{port.name} has a link-local address there, which no router passes on")
    if wrong:
        yield _Said(f"RoCE v2 is wanted: {', '.join(wrong)}")


def _ucx_devices(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    if value == "all" or value.startswith("^"):
        return
    active = {port.name for port in facts.ordered_ports if port.is_active}
    names = {one.name for one in facts.usable}
    missing = [word for word in exact_names(value) if word not in active | names]
    if missing:
        yield doubt(f"neither an active port nor an interface that is up: {_names(missing)}")


# --- transports -----------------------------------------------------------------------------------------------------


def _net(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    transport = value.lower()
    fits = transport in TRANSPORTS[kind] if kind in TRANSPORTS else transport not in ("socket", "ib")
    if not fits and kind not in ("auto", "loopback"):
        yield _Said(f"fabric={kind} is another transport")


def _provider(value: str, facts: FabricFacts, kind: FabricKind, rails: Rails) -> Judgement:
    if kind == "efa" and "efa" not in value.lower().split(","):
        yield _Said("libfabric then does not use EFA")


_CHECKS = {
    "NCCL_SOCKET_IFNAME": _socket_interfaces,
    "GLOO_SOCKET_IFNAME": _exact_interfaces,
    "TP_SOCKET_IFNAME": _interfaces_for_data,
    "NCCL_FASTRAK_CTRL_DEV": _interfaces_for_data,
    "NCCL_FASTRAK_IFNAME": _interfaces_for_data,
    "NCCL_GPUDIRECTTCPX_CTRL_DEV": _interfaces_for_data,
    "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": _interfaces_for_data,
    "NCCL_IB_HCA": _devices,
    "NCCL_IB_DISABLE": _ib_disabled,
    "NCCL_IB_GID_INDEX": _gid_index,
    "UCX_NET_DEVICES": _ucx_devices,
    "NCCL_NET": _net,
    "FI_PROVIDER": _provider,
}


VARIABLES = frozenset(_CHECKS)
"""All that are judged here."""


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _ports(ports: tuple[RdmaPort, ...]) -> str:
    return ", ".join(f"{port.name} {port.state or 'of unknown state'}" for port in ports) or "no RDMA device"
