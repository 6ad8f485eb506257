"""InfiniBand, RoCE and EFA: devices, ports, counters, addresses, and their way to the GPUs. Pure."""

from __future__ import annotations

import re

from checks.collect_network import EFA_PROVIDER
from checks.collect_pci import is_for_rdma, is_gpu
from checks.expectations import Expectations
from checks.facts import Counter, Node, RdmaDevice, RdmaPort
from checks.findings import Finding, blind, by_administrator, fail, result, warn
from checks.judge_gpu import without_gpus
from checks.kernel_log import invalid_contexts
from checks.reading import Problem, Unread, counted
from checks.registry import check
from checks.selectors import nccl_selector
from checks.verdict import CheckResult, Verdict

ABI = "Documentation/ABI/stable/sysfs-class-infiniband"
LAYERS = {"infiniband": "InfiniBand", "roce": "Ethernet"}
ACTIVE, LINK_UP, DISABLED = 4, 5, 3


def without_rdma(node: Node, expected: Expectations) -> bool:
    """Nobody wants RDMA here, or nobody said and nothing shows an RDMA device."""
    if expected.fabric is not None:
        return expected.without_rdma
    devices = node.rdma.devices
    none = devices == () or (isinstance(devices, Unread) and devices.problem is Problem.MISSING)
    return none and (isinstance(node.pci, Unread) or not any(map(is_for_rdma, node.pci)))


def devices_of(node: Node, expected: Expectations, name: str) -> tuple[RdmaDevice, ...] | list[CheckResult]:
    """The RDMA devices to judge, or the results where there are none to look at."""
    if without_rdma(node, expected):
        return []
    if isinstance(node.rdma.devices, Unread):
        return result(name, [blind(node.rdma.devices)], "", "RDMA devices")
    return node.rdma.devices or []


def ports_of(devices: tuple[RdmaDevice, ...], expected: Expectations) -> list[RdmaPort]:
    """Ports of the job's fabric: a RoCE card for storage is no part of an InfiniBand job, and the other way round."""
    layer = LAYERS.get(expected.fabric or "")
    return [
        port
        for device in devices
        for port in device.ports
        if layer is None or isinstance(port.link_layer, Unread) or port.link_layer == layer
    ]


@check("rdma.devices", reads=["list /sys/class/infiniband"], source=ABI)
def devices(node: Node, expected: Expectations) -> list[CheckResult]:
    """The node has RDMA devices of the job's fabric, as many as it has rails."""
    name = "rdma.devices"
    if expected.without_rdma:
        return []
    device = f"{expected.fabric} device" if expected.fabric else "RDMA device"
    wish = f"at least {counted(expected.rails or 1, device)}"
    if without_rdma(node, expected):
        say = "say --fabric=tcp where that is right"
        return [CheckResult(name, Verdict.WARN, "no RDMA device", wish, say)]
    found = node.rdma.devices
    if isinstance(found, Unread):
        if found.problem is Problem.MISSING:
            return result(
                name, [fail("no RDMA device", "is its driver loaded? leave this node out")], "", wish
            )
        return result(name, [blind(found)], "", wish)
    unread = [device.driver for device in found if isinstance(device.driver, Unread)]
    if expected.fabric == "efa" and unread:
        return result(name, [blind(unread[0], "driver")], "", wish)
    if expected.fabric == "efa":
        count = sum(device.driver == "efa" for device in found)
    else:
        # A device whose ports nobody tells of (`ibstat -l`) is there; rdma.port misses its ports.
        portless = {device.name for device in found if not device.ports}
        count = len(portless | {port.device for port in ports_of(found, expected)})
    findings = []
    if count < (expected.rails or 1):
        findings.append(
            fail(f"{count} of {counted(len(found), 'RDMA device')}", "leave this node out, or say --rails=N")
        )
    return result(name, findings, f"{count}: {' '.join(device.name for device in found)}", wish)


@check(
    "rdma.port", reads=["read /sys/class/infiniband/*/ports/*/state"], source=f"{ABI}: 4: ACTIVE, 5: LinkUp"
)
def port_state(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every port of the job's fabric is active."""
    name = "rdma.port"
    found = devices_of(node, expected, name)
    if isinstance(found, list):
        return found
    ports = ports_of(found, expected)
    findings: list[Finding] = []
    others: list[Finding] = []
    up = 0
    findings += [
        blind(Unread(Problem.MISSING, "a device without ports"), device.name)
        for device in found
        if not device.ports
    ]
    for port in ports:
        is_rail = _is_named(node, port)
        where = f"{port.device}:{port.port}"
        state, physical = _number(port.state), _number(port.phys_state)
        unknown = [value for value in (port.link_layer, state, physical) if isinstance(value, Unread)]
        if unknown:
            findings.append(blind(unknown[0], where))
        # mlx5 has been seen to say `4: ACTIVE` for the physical state of a port that works.
        elif state == ACTIVE and (physical == LINK_UP or "ACTIVE" in str(port.phys_state)):
            up += is_rail
        elif physical == DISABLED:
            findings.append(
                warn(f"{where} is disabled", "somebody turned it off: compare with the other nodes")
            )
        else:
            text, remedy = f"{where} is {port.state}, {port.phys_state}", "cable, transceiver or switch"
            if is_rail:
                findings.append(fail(text, f"{remedy}: leave this node out"))
            else:
                others.append(warn(f"{text}; NCCL_IB_HCA does not name it", remedy))
    if expected.rails and up >= expected.rails:
        # Enough rails are up; what else is not plugged in is not this job's.
        findings = [warn(one.text, one.remedy) if one.verdict is Verdict.FAIL else one for one in findings]
    elif expected.rails and not findings:
        findings.append(fail(f"{up} of {counted(expected.rails, 'rail')} active", "leave this node out"))
    findings += others
    if not ports:
        findings.append(fail("no port of this fabric", "leave this node out"))
    return result(name, findings, f"{counted(up, 'port')} active", "4: ACTIVE, 5: LinkUp")


def _is_named(node: Node, port: RdmaPort) -> bool:
    """Whether the port is one of the job's rails, where NCCL_IB_HCA says which are; a node has others for storage."""
    value = "" if isinstance(node.environment, Unread) else node.environment.get("NCCL_IB_HCA", "")
    return not value or nccl_selector(value).matches(port.device, port.port)


@check(
    "rdma.rate", reads=["read /sys/class/infiniband/*/ports/*/rate"], source=f"{ABI}; equal rails of one node"
)
def rate(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every active port runs at its board's full rate and on all of its lanes."""
    name = "rdma.rate"
    found = devices_of(node, expected, name)
    if isinstance(found, list):
        return found
    boards = {device.name: device.board for device in found}
    ports = [
        port
        for port in ports_of(found, expected)
        if not isinstance(port.state, str) or "ACTIVE" in port.state
    ]
    best: dict[object, float] = {}
    for port in ports:
        if isinstance(port.gigabits, float):
            board = (boards[port.device], port.link_layer)
            best[board] = max(best.get(board, 0.0), port.gigabits)
    fast = sum(port.gigabits == best.get((boards[port.device], port.link_layer)) for port in ports)
    findings: list[Finding] = []
    for port in ports:
        gigabits = port.gigabits
        if isinstance(gigabits, Unread):
            findings.append(blind(gigabits, port.device))
        elif gigabits < best[(boards[port.device], port.link_layer)]:
            top = best[(boards[port.device], port.link_layer)]
            text = f"{port.device}: {gigabits:g} Gb/s, others of its kind {top:g}"
            if not _is_named(node, port):
                findings.append(warn(f"{text}; NCCL_IB_HCA does not name it", "cable or transceiver"))
            elif expected.rails and fast >= expected.rails:
                # Enough rails are as fast as they can be: the others may be for storage, on a slower network.
                findings.append(warn(f"{text}; enough rails are faster", "cable or transceiver"))
            else:
                findings.append(fail(text, "cable or transceiver: leave this node out"))
        elif port.link_layer == "InfiniBand" and "(1X" in str(port.rate):
            findings.append(
                fail(f"{port.device}: one lane, {port.rate}", "cable or transceiver: leave this node out")
            )
    rates = ", ".join(dict.fromkeys(str(port.rate) for port in ports))
    return result(name, findings, rates, "equal on equal boards") if ports else []


@check(
    "rdma.counters",
    reads=[
        "read /sys/class/infiniband/*/ports/*/counters/*",
        "list /sys/class/infiniband/*/ports/*/*counters",
    ],
    source="growth: link_downed fails; symbol_error > 10/s warns, > 120 fails; link_error_recovery > 5/min (AZ, SI)",
)
def counters(node: Node, expected: Expectations) -> list[CheckResult]:
    """No error counter of a port grows while nothing runs. Their levels are as old as the node and mean nothing."""
    name = "rdma.counters"
    found = devices_of(node, expected, name)
    if isinstance(found, list):
        return found
    ports = ports_of(found, expected)
    findings = [
        finding
        for port in ports
        for one in port.counters
        for finding in _growth(one, f"{port.device}:{port.port}")
    ]
    for port in ports:
        names = {one.name for one in port.counters}
        # EFA has no counters/, nor have some Ethernet drivers; every InfiniBand port has (its standard demands them).
        without = port.link_layer == "InfiniBand" and not names & {"counters", "link_downed"}
        if without or not names:
            findings.append(blind(Unread(Problem.MISSING, "no counters"), f"{port.device}:{port.port}"))
    seconds = max((one.seconds for port in ports for one in port.counters), default=0.0)
    return result(
        name, findings, f"no growth in {seconds:.1f} s on {counted(len(ports), 'port')}", "no growth"
    )


def _growth(counter: Counter, where: str) -> list[Finding]:
    for value in (counter.first, counter.second):
        if isinstance(value, Unread):
            return [blind(value, f"{where} {counter.name}")]
    assert isinstance(counter.first, int)
    assert isinstance(counter.second, int)
    grown = counter.second - counter.first
    if grown <= 0:
        return []  # a counter that went back was cleared by somebody
    # Never less than the second that was watched: growth in no time would be an infinite rate.
    seconds = max(counter.seconds, 1.0)
    text = f"{where}: {counter.name} grew by {grown}"
    remedy = "cable, transceiver or switch port: leave this node out"
    fails = {
        "link_downed": True,
        "symbol_error": grown > 120,
        "link_error_recovery": grown / seconds * 60 > 5 and grown > 1,
        "local_ack_timeout_err": grown / seconds > 1,
    }
    return [fail(text, remedy) if fails.get(counter.name, False) else warn(text, remedy)]


@check(
    "rdma.flap",
    reads=["read /sys/class/net/*/carrier_changes"],
    source="net/core/net-sysfs.c, carrier_changes",
)
def flap(node: Node, expected: Expectations) -> list[CheckResult]:
    """No interface of an RDMA device, and none with the default route, lost its carrier while it was watched."""
    name = "rdma.flap"
    if isinstance(node.interfaces, Unread):
        return result(name, [blind(node.interfaces)], "", "no change")
    devices = () if isinstance(node.rdma.devices, Unread) else node.rdma.devices
    wanted = {interface for device in devices for interface in device.interfaces}
    watched = [one for one in node.interfaces if one.name in wanted or one.default_route]
    findings: list[Finding] = []
    for one in watched:
        before, after = one.carrier_changes
        if isinstance(before, Unread) or isinstance(after, Unread):
            findings += [
                blind(value, one.name) for value in one.carrier_changes if isinstance(value, Unread)
            ][:1]
        elif after > before:
            findings.append(
                fail(
                    f"{one.name}: {counted(after - before, 'carrier change')}",
                    "cable, transceiver or switch port",
                )
            )
    return (
        result(name, findings, f"no change on {counted(len(watched), 'interface')}", "no change")
        if watched
        else []
    )


@check("rdma.verbs", reads=["list /dev/infiniband"], source="drivers/infiniband/core/uverbs_main.c")
def verbs(node: Node, expected: Expectations) -> list[CheckResult]:
    """The character devices through which a program reaches the adapters are there, one for each."""
    name = "rdma.verbs"
    found = devices_of(node, expected, name)
    if isinstance(found, list):
        return found
    files = node.rdma.verbs
    if isinstance(files, Unread):
        return result(name, [blind(files, "/dev/infiniband")], "", "uverbs files")
    findings = []
    if len(files) < len(found):
        text = f"{counted(len(files), 'uverbs file')} for {counted(len(found), 'device')}"
        findings.append(fail(text, "load ib_uverbs; hand /dev/infiniband on to the container"))
    return result(name, findings, counted(len(files), "uverbs file"), counted(len(found), "uverbs file"))


# --- EFA --------------------------------------------------------------------------------------------------


@check("efa.libfabric", reads=["run *fi_info -p efa"], source="fi_info(1): `provider: efa`, `fabric: efa`")
def libfabric(node: Node, expected: Expectations) -> list[CheckResult]:
    """libfabric finds the EFA devices, which NCCL reaches through it alone."""
    name = "efa.libfabric"
    devices = node.rdma.devices
    present = not isinstance(devices, Unread) and any(device.driver == "efa" for device in devices)
    if expected.fabric != "efa" and not present:
        return []
    said = node.rdma.libfabric
    if isinstance(said, Unread):
        return result(
            name,
            [blind(said, "fi_info -p efa, on PATH and at the EFA installer's place")],
            "",
            "provider: efa",
        )
    domains = set(re.findall(r"^\s*domain:\s*(\S+)", said, re.MULTILINE))
    findings = []
    tool = node.rdma.libfabric_tool
    if not EFA_PROVIDER.search(said):
        remedy = "install the EFA software into the container"
        findings.append(fail(f"{tool} names no provider efa", remedy))
    return result(name, findings, f"{counted(len(domains), 'domain')}, says {tool}", "provider: efa")


# --- GPUDirect RDMA ---------------------------------------------------------------------------------------


def _no_gpudirect(node: Node, expected: Expectations) -> bool:
    return without_gpus(node, expected) or without_rdma(node, expected)


@check(
    "gdr.support",
    reads=["read /proc/modules", "read /proc/driver/nvidia/version"],
    source="NVIDIA GPUDirect RDMA: nvidia-peermem, or open kernel modules and Linux ≥ 5.12 for dma-buf",
)
def gpudirect(node: Node, expected: Expectations) -> list[CheckResult]:
    """Adapters can reach GPU memory: nvidia_peermem is loaded, or driver and kernel do dma-buf."""
    name = "gdr.support"
    if _no_gpudirect(node, expected):
        return []
    ways = (("nvidia_peermem", node.rdma.peermem), ("dma-buf", node.rdma.dmabuf))
    working = [way for way, works in ways if works is True]
    findings: list[Finding] = []
    if not working:
        findings = [blind(works, way) for way, works in ways if isinstance(works, Unread)]
        findings = findings or [
            fail("neither nvidia_peermem nor dma-buf", by_administrator("modprobe nvidia_peermem"))
        ]
    return result(name, findings, " and ".join(working), "nvidia_peermem or dma-buf")


@check("gdr.log", reads=["run dmesg"], source="nvidia-peermem's own messages")
def gpudirect_log(node: Node, expected: Expectations) -> list[CheckResult]:
    """The kernel log has no refusal of GPU memory to an adapter."""
    name = "gdr.log"
    if _no_gpudirect(node, expected):
        return []
    log = node.host.kernel_log
    if isinstance(log, Unread):
        return result(name, [blind(log, "kernel log")], "", "no invalid context")
    times = invalid_contexts(log)
    findings = (
        [
            fail(
                f"invalid context, {counted(times, 'time')}",
                by_administrator("reload nvidia_peermem, or reboot the node"),
            )
        ]
        if times
        else []
    )
    return result(name, findings, "no refusal", "no invalid context")


@check(
    "gdr.affinity",
    reads=["read /sys/bus/pci/devices/*/numa_node", "read /sys/class/infiniband/*/device/numa_node"],
    source="Documentation/ABI/testing/sysfs-bus-pci, numa_node",
)
def affinity(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every GPU has an RDMA device on its own NUMA node."""
    name = "gdr.affinity"
    if _no_gpudirect(node, expected) or node.host.virtual is True:
        return []
    found = devices_of(node, expected, name)
    if isinstance(found, list):
        return found
    wish = "an RDMA device on each GPU's NUMA node"
    if isinstance(node.pci, Unread):
        return result(name, [blind(node.pci)], "", wish)
    findings: list[Finding] = []
    near: set[int] = set()
    for device in found:
        if isinstance(device.numa_node, Unread):
            findings.append(blind(device.numa_node, device.name))
        else:
            near.add(device.numa_node)
    gpus = [device for device in node.pci if is_gpu(device)]
    for gpu in gpus:
        if isinstance(gpu.numa_node, Unread):
            findings.append(blind(gpu.numa_node, gpu.address))
        elif gpu.numa_node not in near:
            findings.append(
                warn(f"{gpu.address} on NUMA node {gpu.numa_node} has none", "its traffic crosses the CPUs")
            )
    return (
        result(name, findings, f"{counted(len(gpus), 'GPU')}, RDMA on NUMA nodes {sorted(near)}", wish)
        if gpus
        else []
    )


def _number(state: str | Unread) -> int | Unread:
    """The number of `4: ACTIVE` (drivers/infiniband/core/sysfs.c, state_show)."""
    if isinstance(state, Unread):
        return state
    match = re.match(r"(\d+):", state)
    return int(match[1]) if match else Unread(Problem.ERROR, f"state {state!r}")
