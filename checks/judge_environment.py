"""Variables that contradict the machine, or each other. Pure."""

from __future__ import annotations

from checks.expectations import Expectations
from checks.facts import Node, RdmaPort
from checks.findings import Finding, blind, fail, result, warn
from checks.judge_roce import roce_gid_indexes
from checks.reading import Problem, Unread
from checks.registry import check
from checks.selectors import exact_names, nccl_selector
from checks.verdict import CheckResult

NCCL = "docs.nvidia.com/deeplearning/nccl, Environment Variables"
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
READS = ["environment *"]


@check("env.interface", reads=[*READS, "list /sys/class/net"], source=NCCL)
def interface(node: Node, expected: Expectations) -> list[CheckResult]:
    """Interfaces that variables name exist and are up."""
    name = "env.interface"
    if isinstance(node.environment, Unread):
        return result(name, [blind(node.environment)], "", "existing interfaces")
    named = {
        variable: node.environment[variable] for variable in INTERFACES if node.environment.get(variable)
    }
    if isinstance(node.interfaces, Unread):
        return result(name, [blind(node.interfaces)] if named else [], "none named", "existing interfaces")
    states = {one.name: one.state for one in node.interfaces}
    findings: list[Finding] = []
    for variable, value in named.items():
        if variable.startswith("NCCL_"):
            chosen = [one for one in states if nccl_selector(value).matches(one)]
        else:
            chosen = [one for one in states if one in exact_names(value)]
        if not chosen:
            findings.append(fail(f"{variable}={value}: no such interface", f"one of {' '.join(states)}"))
        elif all(states[one] == "down" for one in chosen):
            findings.append(fail(f"{variable}={value}: {' '.join(chosen)} is down", "name one that is up"))
    shown = ", ".join(f"{variable}={value}" for variable, value in named.items())
    return result(name, findings, shown or "none named", "existing interfaces")


@check("env.hca", reads=[*READS, "list /sys/class/infiniband"], source=NCCL)
def adapter(node: Node, expected: Expectations) -> list[CheckResult]:
    """RDMA devices that NCCL_IB_HCA names exist, and NCCL_IB_GID_INDEX names a RoCE v2 GID on RoCE."""
    name = "env.hca"
    if isinstance(node.environment, Unread):
        return result(name, [blind(node.environment)], "", "existing devices")
    named, index = node.environment.get("NCCL_IB_HCA"), node.environment.get("NCCL_IB_GID_INDEX")
    if not named and not index:
        return result(name, [], "none named", "existing devices")
    devices = node.rdma.devices
    if isinstance(devices, Unread):
        if devices.problem is not Problem.MISSING:
            return result(name, [blind(devices)], "", "existing devices")
        devices = ()
    findings: list[Finding] = []
    ports = [port for device in devices for port in device.ports]
    if named:
        names = [device.name for device in devices]
        selector = nccl_selector(named)
        chosen = [one for one in names if selector.matches(one)]
        ports = [port for port in ports if selector.matches(port.device, port.port)]
        if not chosen:
            findings.append(
                fail(f"NCCL_IB_HCA={named}: no such device", f"one of {' '.join(names) or 'none'}")
            )
    if index:
        findings += _gid_findings(index, ports)
    return result(
        name, findings, f"NCCL_IB_HCA={named or ''} NCCL_IB_GID_INDEX={index or ''}", "existing devices"
    )


def _gid_findings(index: str, ports: list[RdmaPort]) -> list[Finding]:
    if index.lstrip("-").isdigit():
        wrong = [
            port.device
            for port in ports
            if port.link_layer == "Ethernet" and int(index) >= 0 and int(index) not in roce_gid_indexes(port)
        ]
    else:
        return [fail(f"NCCL_IB_GID_INDEX={index} is no number", "leave it unset")]
    if not wrong:
        return []
    return [fail(f"NCCL_IB_GID_INDEX={index} is no RoCE v2 IPv4 GID of {' '.join(wrong)}", "leave it unset")]


@check("env.conflict", reads=READS, source=NCCL)
def conflict(node: Node, expected: Expectations) -> list[CheckResult]:
    """No variable turns off what the job's fabric is for."""
    name = "env.conflict"
    if isinstance(node.environment, Unread):
        return result(name, [blind(node.environment)], "", "no contradiction")
    environment = node.environment
    rdma = expected.fabric in ("infiniband", "roce")
    no_device = node.rdma.devices == () or (
        isinstance(node.rdma.devices, Unread) and node.rdma.devices.problem is Problem.MISSING
    )
    net = environment.get("NCCL_NET", "").lower()
    rules = (
        (rdma and environment.get("NCCL_IB_DISABLE") == "1", fail, "NCCL_IB_DISABLE=1 on an RDMA fabric"),
        (rdma and net == "socket", fail, "NCCL_NET=Socket on an RDMA fabric"),
        (net == "ib" and no_device, fail, "NCCL_NET=IB without an RDMA device"),
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
    findings = [verdict(text, "unset it") for applies, verdict, text in rules if applies]
    count = sum(variable.startswith(("NCCL_", "GLOO_", "UCX_")) for variable in environment)
    return result(name, findings, f"{count} variables of NCCL, Gloo and UCX", "no contradiction")


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
