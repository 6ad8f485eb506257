"""Variables that contradict the machine, or each other. Pure.

What a variable of a fabric has to be is judged in `checks.fabric_contradictions`, for `launcher env` too; here it
becomes a verdict.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from checks import fabric_contradictions
from checks.expectations import Expectations
from checks.fabric_environment import rails_and_gid
from checks.fabric_facts import FabricKind
from checks.fabric_reading import collected
from checks.facts import Node
from checks.findings import Finding, blind, fail, result, warn
from checks.given import given_by
from checks.reading import Problem, Unread, counted
from checks.registry import check
from checks.verdict import CheckResult

NCCL = "docs.nvidia.com/deeplearning/nccl, Environment Variables"
INTERFACES = (
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
    "NCCL_FASTRAK_CTRL_DEV",
    "NCCL_FASTRAK_IFNAME",
    "NCCL_GPUDIRECTTCPX_CTRL_DEV",
    "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME",
)
DEVICES = ("NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "UCX_NET_DEVICES")
TRANSPORTS = ("NCCL_IB_DISABLE", "NCCL_NET", "FI_PROVIDER")
"""Together all of `fabric_contradictions.VARIABLES`, each in one check."""
READS = ["environment *"]


def _named(node: Node, variables: Collection[str]) -> dict[str, str]:
    environment = {} if isinstance(node.environment, Unread) else node.environment
    return {name: environment[name] for name in variables if environment.get(name)}


def _contradictions(
    node: Node, expected: Expectations, variables: Collection[str], remedy: str
) -> list[Finding]:
    # `none` is a job within one machine, whose fabric the variables call loopback.
    kinds: dict[str | None, FabricKind] = {None: "auto", "none": "loopback"}
    kind = kinds.get(expected.fabric) or cast(FabricKind, expected.fabric)
    given = given_by({} if isinstance(node.environment, Unread) else node.environment, "environment")
    facts = collected(node)
    rails, _ = rails_and_gid(facts, kind, given)
    return [
        (fail if one.breaks else warn)(str(one), remedy)
        for one in fabric_contradictions.find(facts, kind, given, rails, variables)
    ]


@check("env.interface", reads=[*READS, "list /sys/class/net"], source=NCCL)
def interface(node: Node, expected: Expectations) -> list[CheckResult]:
    """Interfaces that variables name exist and are up."""
    name = "env.interface"
    if isinstance(node.environment, Unread):
        return result(name, [blind(node.environment)], "", "existing interfaces")
    named = _named(node, INTERFACES)
    if isinstance(node.interfaces, Unread):
        return result(name, [blind(node.interfaces)] if named else [], "none named", "existing interfaces")
    findings = [
        blind(one.state, one.name)
        for one in node.interfaces
        if named and isinstance(one.state, Unread) and one.state.problem is not Problem.NOT_RECORDED
    ]
    findings += _contradictions(node, expected, INTERFACES, "name one that is up, or unset it")
    shown = ", ".join(f"{variable}={value}" for variable, value in named.items())
    return result(name, findings, shown or "none named", "existing interfaces")


@check("env.hca", reads=[*READS, "list /sys/class/infiniband"], source=NCCL)
def adapter(node: Node, expected: Expectations) -> list[CheckResult]:
    """RDMA devices that variables name exist, and NCCL_IB_GID_INDEX names a RoCE v2 GID on RoCE."""
    name = "env.hca"
    if isinstance(node.environment, Unread):
        return result(name, [blind(node.environment)], "", "existing devices")
    named = _named(node, DEVICES)
    if not named:
        return result(name, [], "none named", "existing devices")
    devices = node.rdma.devices
    if isinstance(devices, Unread):
        if devices.problem is not Problem.MISSING:
            return result(name, [blind(devices)], "", "existing devices")
        devices = ()
    findings = [
        blind(port.state, port.device)
        for device in devices
        for port in device.ports
        if isinstance(port.state, Unread)
    ]
    findings += _contradictions(node, expected, DEVICES, "name one that is there, or unset it")
    return result(
        name, findings, " ".join(f"{key}={value}" for key, value in named.items()), "existing devices"
    )


@check("env.conflict", reads=READS, source=NCCL)
def conflict(node: Node, expected: Expectations) -> list[CheckResult]:
    """No variable turns off what the job's fabric is for."""
    name = "env.conflict"
    if isinstance(node.environment, Unread):
        return result(name, [blind(node.environment)], "", "no contradiction")
    environment = node.environment
    no_device = node.rdma.devices == () or (
        isinstance(node.rdma.devices, Unread) and node.rdma.devices.problem is Problem.MISSING
    )
    rdma = expected.fabric in ("infiniband", "roce")
    net = environment.get("NCCL_NET", "").lower()
    # What contradicts another variable, or a node of which nobody has said which fabric it has.
    rules = (
        (net == "ib" and no_device and expected.fabric is None, fail, "NCCL_NET=IB without an RDMA device"),
        (
            net == "ib" and environment.get("NCCL_IB_DISABLE") == "1",
            fail,
            "NCCL_NET=IB and NCCL_IB_DISABLE=1",
        ),
        (environment.get("NCCL_P2P_DISABLE") == "1", warn, "NCCL_P2P_DISABLE=1 turns NVLink off"),
        (environment.get("NCCL_SHM_DISABLE") == "1", warn, "NCCL_SHM_DISABLE=1"),
        (
            environment.get("CUDA_LAUNCH_BLOCKING") == "1",
            warn,
            "CUDA_LAUNCH_BLOCKING=1 makes every kernel wait",
        ),
        (
            rdma and environment.get("NCCL_NET_GDR_LEVEL") in ("LOC", "0"),
            warn,
            "NCCL_NET_GDR_LEVEL=LOC: no GPUDirect",
        ),
    )
    findings = _contradictions(node, expected, TRANSPORTS, "unset it")
    findings += [verdict(text, "unset it") for applies, verdict, text in rules if applies]
    count = sum(variable.startswith(("NCCL_", "GLOO_", "UCX_")) for variable in environment)
    return result(name, findings, f"{counted(count, 'variable')} of NCCL, Gloo and UCX", "no contradiction")


@check("env.files", reads=READS, source=f"{NCCL}; stale topology files (azurehpc-health-checks#142)")
def files(node: Node, expected: Expectations) -> list[CheckResult]:
    """Files that variables name exist."""
    name = "env.files"
    if isinstance(node.environment, Unread):
        return result(name, [blind(node.environment)], "", "existing files")
    findings: list[Finding] = []
    for named, exists in node.named_files.items():
        if isinstance(exists, Unread):
            findings.append(blind(exists, named))
        elif not exists:
            findings.append(fail(f"{named}: no such file", "unset it, or mount it into the container"))
    return result(name, findings, " ".join(node.named_files) or "none named", "existing files")
