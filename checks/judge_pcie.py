"""What joins GPUs and network adapters to the host: PCIe links, their errors, and what is in the way of peers. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable

from checks.aer import Severity, aer_errors, strange_errors
from checks.collect_pci import is_adapter, is_gpu
from checks.expectations import Expectations
from checks.facts import Node, PciDevice
from checks.findings import Finding, blind, fail, result, warn
from checks.judge_gpu import IDLE, gpus_of, without_gpus
from checks.kernel_log import limited_links
from checks.reading import Problem, Unread, counted, shortened
from checks.registry import check
from checks.verdict import CheckResult, Verdict

RDMA_DRIVERS = ("mlx5_core", "mlx4_core", "bnxt_en", "ice", "efa")
"""Kernel drivers whose lines in the log are about adapters that do RDMA."""


@check(
    "pcie.gpu",
    reads=["nvml nvmlDeviceGetCurrPcieLinkWidth *", "nvml nvmlDeviceGetCurrPcieLinkGeneration *"],
    source="NVML: maximum that GPU and system can do together",
)
def pcie_gpu(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every GPU's PCIe link has its full width and generation."""
    name = "pcie.gpu"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    findings: list[Finding] = []
    for gpu in gpus:
        idle = isinstance(gpu.clock_reasons, int) and bool(gpu.clock_reasons & IDLE)
        pairs = (
            ("width", gpu.pcie_width, gpu.pcie_width_max, fail),
            # Some GPUs lower the generation while they idle (nvmlDeviceGetCurrPcieLinkGeneration).
            ("generation", gpu.pcie_generation, gpu.pcie_generation_max, warn if idle else fail),
        )
        for what, now, most, verdict in pairs:
            if isinstance(now, Unread) or isinstance(most, Unread):
                findings += [
                    blind(one, f"GPU {gpu.index} {what}") for one in (now, most) if isinstance(one, Unread)
                ][:1]
            elif now < most:
                findings.append(
                    verdict(f"GPU {gpu.index}: PCIe {what} {now} of {most}", "reseat it, or its riser")
                )
    shown = next((f"generation {gpu.pcie_generation}, width {gpu.pcie_width}" for gpu in gpus), "")
    return result(name, findings, f"{shown} on {counted(len(gpus), 'GPU')}", "full width and generation")


@check(
    "pcie.path",
    reads=["read /sys/bus/pci/devices/*/current_link_*", "link /sys/bus/pci/devices/*"],
    source="drivers/pci/pci-sysfs.c: each link against what both of its ends can do",
)
def pcie_path(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every PCIe link from the root to a GPU or RDMA adapter runs as fast as its two ends can."""
    name = "pcie.path"
    if expected.gpus == 0 and expected.without_rdma:
        return []
    if isinstance(node.pci, Unread):
        return result(name, [blind(node.pci)], "", "every link at its best")
    known = {device.address: device for device in node.pci}
    ends = [device for device in node.pci if is_gpu(device) or is_adapter(device)]
    if not ends:
        return []
    findings: list[Finding] = []
    for end in ends:
        if isinstance(end.parents, Unread):
            findings.append(blind(end.parents, end.address))
            continue
        # Root port - switch's upper port, switch's lower port - device: inside a switch there is no link.
        chain: list[PciDevice | None] = [known.get(address) for address in (*end.parents, end.address)]
        # The last pair is the device's own; behind a hypervisor it may have no port above it.
        chain = [None, *chain] if len(chain) % 2 else chain
        for upper, lower in zip(chain[::2], chain[1::2], strict=True):
            findings += _link_findings(upper, lower) if lower else []
        # A guest's device may have no link of its own; on metal every device has one.
        hidden = isinstance(end.width, Unread) and end.width.problem is Problem.MISSING
        if isinstance(end.width, Unread) and not (hidden and node.host.virtual is True):
            findings.append(blind(end.width, end.address))
    return result(
        name,
        findings,
        f"{counted(len(ends), 'device')} at {'its' if len(ends) == 1 else 'their'} best",
        "width and speed of both ends",
    )


def _link_findings(upper: PciDevice | None, lower: PciDevice) -> list[Finding]:
    """The link between two devices; without the port above, against what the lower one can do alone."""
    if lower.width == 0 and _gigatransfers(str(lower.speed)) is None:
        return []  # a virtual function: SR-IOV reserves its link status, and the link is the physical function's
    values = (lower.width_max, lower.width, lower.speed_max, lower.speed)
    for value in values if upper is None else (upper.width_max, upper.speed_max, *values):
        if isinstance(value, Unread):
            # A port without PCI Express (a hypervisor's) has no such files: drivers/pci/pci-sysfs.c hides them.
            return [] if value.problem is Problem.MISSING else [blind(value, lower.address)]
    above = lower if upper is None else upper
    assert isinstance(lower.width, int)
    assert isinstance(lower.width_max, int)
    assert isinstance(above.width_max, int)
    speeds = [_gigatransfers(str(text)) for text in (lower.speed, lower.speed_max, above.speed_max)]
    now, own, others = (0.0 if speed is None else speed for speed in speeds)
    saves = "; an idle GPU may save power" if is_gpu(lower) else ""
    findings = _slower(
        lower, "width {} of {}", lower.width, lower.width_max, above.width_max, upper, "", fail
    )
    if None in speeds:
        return [*findings, blind(Unread(Problem.ERROR, f"speed {lower.speed}"), lower.address)]
    severity = warn if is_gpu(lower) else fail
    return [*findings, *_slower(lower, "{} of {} GT/s", now, own, others, upper, saves, severity)]


def _slower(
    lower: PciDevice,
    text: str,
    now: float,
    own: float,
    others: float,
    upper: PciDevice | None,
    saves: str,
    severity: Callable[[str, str], Finding],
) -> list[Finding]:
    """What a link lacks of what both of its ends can do; or of what the lower one can, where its slot is the limit."""
    if now < min(own, others) and upper is not None:
        said = text.format(f"{now:g}", f"{min(own, others):g}")
        return [severity(f"{lower.address}: {said}", f"reseat it, or its riser{saves}")]
    if now < own:
        said = text.format(f"{now:g}", f"{own:g}")
        why = "what is above it is not known" if upper is None else "its slot has no more"
        return [warn(f"{lower.address}: {said}, {why}", f"compare with the other nodes{saves}")]
    return []


def _gigatransfers(text: str) -> float | None:
    """`32.0 GT/s PCIe` (drivers/pci/probe.c, pci_speed_string); `Unknown` has none."""
    match = re.match(r"([\d.]+) GT/s", text)
    return float(match[1]) if match else None


@check(
    "pcie.aer",
    reads=["run dmesg", "read /sys/bus/pci/devices/*/aer_dev_*"],
    source="drivers/pci/pcie/aer.c and dpc.c: uncorrectable fails; corrected cost a replay each, and warn",
)
def pcie_aer(node: Node, expected: Expectations) -> list[CheckResult]:
    """No GPU, RDMA adapter or bridge above one had errors on its PCIe link since boot."""
    name = "pcie.aer"
    if expected.gpus == 0 and expected.without_rdma:
        return []
    ours: set[str] | None = None
    if not isinstance(node.pci, Unread):
        ours = {device.address for device in node.pci}
        if not ours:
            return []
    log = node.host.kernel_log
    counts: dict[tuple[str, Severity], int] = {}
    findings: list[Finding] = []
    if isinstance(log, str):
        counts = {(one.address, one.severity): one.count for one in aer_errors(log)}
        findings = [blind(Unread(Problem.ERROR, shortened(line))) for line in strange_errors(log)]
    counted = False
    grown: dict[str, int] = {}
    for device in node.aer:
        before, after = device.corrected
        told: dict[Severity, int | Unread] = {
            "corrected": after,
            "non-fatal": device.non_fatal,
            "fatal": device.fatal,
        }
        for severity, value in told.items():
            if isinstance(value, int):
                counted = True
                # The kernel logs what it counts: the larger figure has seen more.
                key = (device.address, severity)
                counts[key] = max(value, counts.get(key, 0))
            elif value.problem not in (Problem.MISSING, Problem.NOT_RECORDED):
                findings.append(blind(value, device.address))
        if isinstance(before, int) and isinstance(after, int) and after > before:
            grown[device.address] = after - before
    if isinstance(log, Unread) and not counted:
        findings.append(blind(log, "kernel log"))
    findings += [
        _error_finding(address, severity, count, grown.get(address, 0), ours)
        for (address, severity), count in counts.items()
        if count and (severity != "corrected" or ours is None or address in ours)
    ]
    return result(name, findings, "none since boot", "no error on a PCIe link")


def _error_finding(
    address: str, severity: Severity, count: int, grown: int, ours: set[str] | None
) -> Finding:
    if severity == "corrected":
        now = f", {grown} of them while it was watched" if grown else ""
        return warn(
            f"{address}: {counted(count, 'corrected error')}{now}",
            "cable, riser or slot; compare with the other nodes",
        )
    text = f"{address}: {counted(count, 'uncorrectable error')} ({severity})"
    if ours is not None and address not in ours:
        return warn(f"{text}, which is on no way to a GPU or RDMA adapter", "look at that device")
    return fail(text, "cable, riser or slot: leave this node out")


@check("pcie.bandwidth", reads=["run dmesg"], source="drivers/pci/pci.c, __pcie_print_link_status")
def pcie_bandwidth(node: Node, expected: Expectations) -> list[CheckResult]:
    """No network adapter said at boot that its PCIe slot is too slow for it."""
    name = "pcie.bandwidth"
    devices, log = node.rdma.devices, node.host.kernel_log
    # A captured log alone: nobody says which devices there are, but each line says which driver it is of.
    log_alone = isinstance(devices, Unread) and devices.problem is Problem.NOT_RECORDED
    if expected.without_rdma or (not log_alone and (isinstance(devices, Unread) or not devices)):
        return []
    if isinstance(log, Unread):
        return result(name, [blind(log, "kernel log")], "", "no limited link")
    adapters = set() if isinstance(devices, Unread) else {device.pci for device in devices}
    findings = [
        warn(text, "a narrower slot than the adapter's; compare with the other nodes")
        for text in dict.fromkeys(limited_links(log, *(RDMA_DRIVERS if log_alone else ())))
        if log_alone or text.partition(": ")[0] in adapters
    ]
    if log_alone and not findings:
        return []
    return result(name, findings, "none limited", "no limited link")


@check(
    "pcie.acs", reads=["run lspci -vvv"], source="ACSCtl SrcValid+ on a bridge (NCCL: GPU Direct, PCI ACS)"
)
def acs(node: Node, expected: Expectations) -> list[CheckResult]:
    """No bridge sends peer-to-peer traffic up to the root: Access Control Services are off."""
    name = "pcie.acs"
    if without_gpus(node, expected) or node.host.virtual is True:
        return []  # a guest sees bridges of its hypervisor's making
    wish = "off on every bridge"
    if isinstance(node.acs, Unread):
        return result(name, [blind(node.acs, "lspci -vvv")], "", wish)
    if not node.acs.readable:
        return [
            CheckResult(
                name, Verdict.NOT_PERMITTED, "lspci shows <access denied>", wish, "ask an administrator"
            )
        ]
    findings = []
    if node.acs.enabled:
        enabled, more = node.acs.enabled[:16], len(node.acs.enabled) - 16
        text = f"on at {counted(len(node.acs.enabled), 'bridge')}: {' '.join(enabled)}" + (
            f" and {more} more" if more > 0 else ""
        )
        findings.append(
            warn(text, "off in the firmware, or setpci -s BRIDGE ECAP_ACS+0x6.w=0000, by an administrator")
        )
    return result(name, findings, f"off at {counted(node.acs.bridges, 'bridge')}", wish)


@check(
    "pcie.iommu",
    reads=["link /sys/bus/pci/devices/*/iommu_group", "read /sys/kernel/iommu_groups/*/type"],
    source="Documentation/ABI/testing/sysfs-kernel-iommu_groups",
)
def iommu(node: Node, expected: Expectations) -> list[CheckResult]:
    """The IOMMU does not translate what GPUs send to their peers."""
    name = "pcie.iommu"
    if without_gpus(node, expected) or node.host.virtual is True or isinstance(node.pci, Unread):
        return []
    findings: list[Finding] = []
    kinds: set[str] = set()
    for gpu in filter(is_gpu, node.pci):
        if isinstance(gpu.iommu, Unread):
            if gpu.iommu.problem is Problem.MISSING:
                kinds.add("off")
            else:
                findings.append(blind(gpu.iommu, gpu.address))
        elif gpu.iommu == "identity":
            kinds.add("identity")
        else:
            findings.append(warn(f"{gpu.address}: {gpu.iommu}", "iommu=pt on the kernel's command line"))
    return (
        result(name, findings, ", ".join(sorted(kinds)) or "no GPU", "off or identity")
        if findings or kinds
        else []
    )
