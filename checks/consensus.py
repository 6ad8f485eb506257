"""Each node's evidence against the majority's: who is different is named. Pure.

A node is reduced to traits, short texts that equal nodes have in common (`driver` -> `590.48.01`): 2 KB, whatever the
node has. Comparing costs the same for each node, however many there are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from checks.facts import Node
from checks.judge_roce import roce_gid_indexes
from checks.reading import Unread, shortened
from checks.verdict import CheckResult, Verdict

Traits = Mapping[str, str]

BREAKS = (
    "driver",
    "cuda",
    "gpus",
    "gpu_memory",
    "nvlink",
    "rdma",
    "gid",
    "mtu",
    "gpudirect",
    "nccl",
    "torch",
)
"""Traits that a job does not survive, or runs slower by far, when one node differs. The others are warnings."""

WHY = {
    "driver": "CUDA and NCCL behave as the oldest driver does",
    "gid": "NCCL_IB_GID_INDEX cannot name one index for all (nccl#718)",
    "gpudirect": "one node without it slows every collective (nccl-tests#152)",
    "nccl": "NCCL refuses to join different versions",
}
OFFSET_WARN, OFFSET_FAIL = 1.0, 60.0


def traits_of(node: Node) -> dict[str, str]:
    """What should be equal on the nodes of one job."""
    found: dict[str, Callable[[], str]] = {
        "driver": lambda: _text(node.versions.get("driver")),
        "cuda": lambda: _text(node.versions.get("cuda")),
        "gpus": lambda: (
            _counted(_text(gpu.name) for gpu in node.gpus.gpus) if node.gpus.gpus else _text(node.gpus.count)
        ),
        "gpu_memory": lambda: _counted(_gibibytes(gpu.memory_total) for gpu in node.gpus.gpus),
        "nvlink": lambda: _counted(_links(gpu.nvlinks) for gpu in node.gpus.gpus),
        "mig": lambda: _counted(_text(gpu.mig) for gpu in node.gpus.gpus),
        "rdma": lambda: _rdma(node),
        "firmware": lambda: _of_devices(
            node, lambda device: f"{_text(device.board)} {_text(device.firmware)}"
        ),
        "gid": lambda: _gids(node),
        "mtu": lambda: _mtu(node),
        "gpudirect": lambda: f"peermem {_text(node.rdma.peermem)}, dma-buf {_text(node.rdma.dmabuf)}",
        "nccl": lambda: " ".join(_text(node.versions.get(f"nvidia-nccl-cu{major}")) for major in (12, 13)),
        "torch": lambda: _text(node.versions.get("torch")),
        "memory": lambda: _gibibytes(node.host.memory),
        "shm": lambda: next(
            (_gibibytes(one.size) for one in node.file_systems if one.path == "/dev/shm"), "none"
        ),
        "limits": lambda: _limits(node),
        "governor": lambda: _text(node.host.governors),
        "clock_source": lambda: _text(node.host.clock_source),
        "variables": lambda: _variables(node),
    }
    traits = {name: shortened(make(), 400) for name, make in found.items()}
    taken = {"driver", "cuda", "torch", "nvidia-nccl-cu12", "nvidia-nccl-cu13"}
    return traits | {
        name.replace(" ", "_"): _text(value) for name, value in node.versions.items() if name not in taken
    }


def compared(traits: Mapping[str, Traits]) -> dict[str, list[CheckResult]]:
    """For each node its results: one for each trait in which it is not like most, or one pass."""
    results: dict[str, list[CheckResult]] = {node: [] for node in traits}
    total = len(traits)
    for trait in dict.fromkeys(name for one in traits.values() for name in one):
        counts = Counter(one.get(trait, "not told") for one in traits.values())
        if len(counts) == 1:
            continue
        value, most = counts.most_common(1)[0]
        majority = most * 2 > total
        breaks = trait in BREAKS
        for node, one in traits.items():
            own = one.get(trait, "not told")
            if majority and own == value:
                continue
            results[node].append(
                _different(trait, own, value, f"{most} of {total}", majority=majority, breaks=breaks)
            )
    passed = CheckResult(
        "same", Verdict.PASS, f"{len(next(iter(traits.values()), {}))} traits", "like the majority"
    )
    return {node: found or [passed] for node, found in results.items()}


def _different(trait: str, own: str, value: str, share: str, *, majority: bool, breaks: bool) -> CheckResult:
    name = f"same.{trait}"
    if majority:
        verdict = Verdict.FAIL if breaks else Verdict.WARN
        return CheckResult(
            name, verdict, own, f"{value}, as on {share} nodes", WHY.get(trait, "make it like the others")
        )
    # Nobody can say which half is wrong: leaving out either would be a guess.
    verdict = Verdict.UNKNOWN if breaks else Verdict.WARN
    return CheckResult(
        name, verdict, own, "equal on all nodes; there is no majority", WHY.get(trait, "make them equal")
    )


def clock_result(offset: float, uncertainty: float) -> CheckResult:
    """This node's clock against node 0's. `uncertainty` is half of the round trip: the offset may be all network."""
    certain = max(0.0, abs(offset) - uncertainty)
    verdict = (
        Verdict.FAIL if certain > OFFSET_FAIL else Verdict.WARN if certain > OFFSET_WARN else Verdict.PASS
    )
    # Passing nodes say the same, so that a report folds them.
    read = (
        f"within {OFFSET_WARN:g} s" if verdict is Verdict.PASS else f"{offset:+.1f} s (± {uncertainty:.1f} s)"
    )
    return CheckResult(
        "clock.offset",
        verdict,
        read,
        f"within {OFFSET_WARN:g} s of node 0",
        "ask an administrator to start chronyd on it",
    )


# --- traits -----------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    if isinstance(value, Unread):
        return value.problem.value  # its detail may hold a path or an address of this node alone
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values)
    return ", ".join(f"{count} × {value}" for value, count in sorted(counts.items())) or "none"


def _gibibytes(value: int | Unread) -> str:
    return _text(value) if isinstance(value, Unread) else f"{value / (1 << 30):.0f} GiB"


def _links(links: object) -> str:
    if not isinstance(links, tuple):
        return _text(links)
    up = [link for link in links if link.active is True]
    return (
        f"{len(up)} of {len(links)} at {'/'.join(sorted({_text(link.speed) for link in up})) or 'none'} MB/s"
    )


def _of_devices(node: Node, text: Callable[..., str]) -> str:
    devices = node.rdma.devices
    return _text(devices) if isinstance(devices, Unread) else _counted([text(device) for device in devices])


def _rdma(node: Node) -> str:
    devices = node.rdma.devices
    if isinstance(devices, Unread):
        return _text(devices)
    return _counted(
        [
            f"{_text(port.rate)} {_text(port.link_layer)} {_text(port.state)}"
            for one in devices
            for port in one.ports
        ]
    )


def _gids(node: Node) -> str:
    devices = node.rdma.devices
    if isinstance(devices, Unread):
        return _text(devices)
    ports = [port for one in devices for port in one.ports if port.link_layer == "Ethernet"]
    return _counted([" ".join(map(str, roce_gid_indexes(port))) or "none" for port in ports])


def _mtu(node: Node) -> str:
    if isinstance(node.interfaces, Unread):
        return _text(node.interfaces)
    devices = () if isinstance(node.rdma.devices, Unread) else node.rdma.devices
    wanted = {name for device in devices for name in device.interfaces}
    return _counted([_text(one.mtu) for one in node.interfaces if one.name in wanted or one.default_route])


def _limits(node: Node) -> str:
    limits = node.host.limits
    if isinstance(limits, Unread):
        return _text(limits)
    return ", ".join(f"{name} {limits.get(name, '?')}" for name in ("Max locked memory", "Max open files"))


def _variables(node: Node) -> str:
    if isinstance(node.environment, Unread):
        return _text(node.environment)
    prefixes = ("NCCL_", "GLOO_", "UCX_", "FI_")
    own = re.compile(rf"\b{re.escape(node.name)}\b")  # NCCL_HOSTID=n1 on n1 is no difference
    return (
        " ".join(
            f"{name}={own.sub('{node}', value)}"
            for name, value in node.environment.items()
            if name.startswith(prefixes)
        )
        or "none"
    )
