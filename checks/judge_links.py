"""What joins GPUs to each other and to the host: NVLink, fabric manager, PCIe. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from checks.collect_pci import is_adapter, is_gpu
from checks.expectations import Expectations
from checks.facts import Gpu, Node, PciDevice
from checks.findings import Finding, blind, fail, result, warn
from checks.judge_gpu import IDLE, gpus_of, without_gpus
from checks.kernel_log import limited_links
from checks.reading import Problem, Unread
from checks.registry import check
from checks.verdict import CheckResult, Verdict

NVLINKS = (
    (r"A100-SXM", 12, 25000),
    (r"H100 80GB HBM3|H100 SXM|H200$|H200 SXM|GH200", 18, 26562),
    (r"GB?200|GB?300", 18, 53125),
)
"""GPU's name -> links and MB/s of each in one direction, as `nvidia-smi nvlink -s` prints them on healthy nodes."""

RDMA_DRIVERS = ("mlx5_core", "mlx4_core", "bnxt_en", "ice", "efa")
"""Kernel drivers whose lines in the log are about adapters that do RDMA."""

COMPLETED = 3
HEALTH = (
    # nvml.h, NVML_GPU_FABRIC_HEALTH_MASK_*: shift, width, what is bad.
    (0, 0x3, "degraded bandwidth"),
    (2, 0x3, "route recovery in progress"),
    (4, 0x3, "route unhealthy"),
    (6, 0x3, "access timeout recovery"),
)
CONFIGURATION = (8, 0xF)
SUMMARY = {2: "unhealthy", 3: "limited capacity"}
"""nvml.h, NVML_GPU_FABRIC_HEALTH_SUMMARY_*."""
HOPPER = 9


def expected_links(gpu: Gpu) -> tuple[int, int] | None:
    """Links and MB/s of this kind of GPU, where it is known to have them."""
    name = gpu.name if isinstance(gpu.name, str) else ""
    return next(((links, speed) for kind, links, speed in NVLINKS if re.search(kind, name)), None)


def _linked(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Without those that have no NVLink to look at: cards of a kind without it, and one GPU alone in a machine.

    A virtual machine that was given one GPU of a node has no links to it: an H200 whose driver says so is as it should
    be there (tests/checks/bundles/h200_x1.json), and so is a GH200 alone, whose nvidia-smi calls all links inactive.
    Beside another one it is not.
    """

    def has_none(gpu: Gpu) -> bool:
        unsupported = isinstance(gpu.nvlinks, Unread) and gpu.nvlinks.problem is Problem.UNSUPPORTED
        if expected_links(gpu) is None:
            return unsupported or gpu.nvlinks == ()
        return len(gpus) == 1 and (unsupported or gpu.nvlinks == ())

    return tuple(gpu for gpu in gpus if not has_none(gpu))


@check(
    "nvlink.links",
    reads=["nvml_field * 91 1", "nvml nvmlDeviceGetNvLinkState *", "nvml_field * 164 *"],
    source="nvidia-smi nvlink -s on healthy A100, H100, H200, B200",
)
def links(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every NVLink of every GPU is up at its full speed."""
    name = "nvlink.links"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    gpus = _linked(gpus)
    if not gpus:
        return []
    findings: list[Finding] = []
    for gpu in gpus:
        known = expected_links(gpu)
        if isinstance(gpu.nvlinks, Unread):
            findings.append(blind(gpu.nvlinks, f"GPU {gpu.index}"))
            continue
        up = [link for link in gpu.nvlinks if link.active is True]
        wanted = known[0] if known else len(gpu.nvlinks)
        unreadable = [link.active for link in gpu.nvlinks if isinstance(link.active, Unread)]
        if unreadable:
            findings.append(blind(unreadable[0], f"GPU {gpu.index}"))
        elif len(up) < wanted and (known or up):
            down = [str(link.link) for link in gpu.nvlinks if link.active is False]
            text = f"GPU {gpu.index}: {len(up)} of {wanted} links up" + (
                f", down: {' '.join(down)}" if down else ""
            )
            findings.append(fail(text, "reset the GPU or reseat it: leave this node out"))
        for link in up:
            if isinstance(link.speed, Unread):
                findings.append(blind(link.speed, f"GPU {gpu.index} link {link.link}"))
            elif known and link.speed < known[1]:
                findings.append(
                    fail(f"GPU {gpu.index} link {link.link}: {link.speed / 1000:g} GB/s", "reset the GPU")
                )
    first = expected_links(gpus[0])
    wish = f"{first[0]} × {first[1] / 1000:g} GB/s" if first else "all links up"
    return result(name, findings, f"all up on {len(gpus)} GPUs", wish)


@check(
    "nvlink.errors",
    reads=["nvml_field * 161 *", "nvml_field * 215 *"],
    source="growth of NVLink error counters",
)
def errors(node: Node, expected: Expectations) -> list[CheckResult]:
    """No NVLink counts new errors while nothing runs."""
    name = "nvlink.errors"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    gpus = _linked(gpus)
    findings: list[Finding] = []
    for gpu in gpus:
        if isinstance(gpu.nvlinks, Unread):
            findings.append(blind(gpu.nvlinks, f"GPU {gpu.index}"))
            continue
        for link in gpu.nvlinks:
            before, after = link.errors
            if isinstance(before, Unread) or isinstance(after, Unread):
                findings += [
                    blind(one, f"GPU {gpu.index}") for one in link.errors if isinstance(one, Unread)
                ][:1]
            elif after > before:
                findings.append(
                    fail(f"GPU {gpu.index} link {link.link}: {after - before} new errors", "reseat it")
                )
    return result(name, findings, f"none new on {len(gpus)} GPUs", "no growth") if gpus else []


@check(
    "nvlink.fabric",
    reads=["nvml nvmlDeviceGetGpuFabricInfoV *"],
    source="nvmlDeviceGetGpuFabricInfo: state completed, status success; zero UUID and clique 0 are normal on HGX",
)
def fabric(node: Node, expected: Expectations) -> list[CheckResult]:
    """Fabric manager has brought every GPU into the NVSwitch fabric."""
    name = "nvlink.fabric"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    gpus = tuple(gpu for gpu in gpus if not _before_fabric(gpu))
    states = [gpu.fabric.state for gpu in gpus if not isinstance(gpu.fabric, Unread)]
    if not gpus or (len(states) == len(gpus) and not any(states)):
        return []  # no NVSwitch in this node, says every GPU
    findings: list[Finding] = []
    restart = "restart nvidia-fabricmanager, then reset the GPUs"
    for gpu in gpus:
        info = gpu.fabric
        if isinstance(info, Unread):
            findings.append(blind(info, f"GPU {gpu.index}"))
            continue
        if info.state != COMPLETED:
            said = {0: "not supported", 1: "not started", 2: "in progress"}.get(
                info.state, f"state {info.state}"
            )
            findings.append(fail(f"GPU {gpu.index}: {said}", restart))
        elif info.status:
            findings.append(fail(f"GPU {gpu.index}: status {info.status}", restart))
        if info.health:
            for shift, mask, what in HEALTH:
                if info.health >> shift & mask == 1:
                    findings.append(fail(f"GPU {gpu.index}: {what}", restart))
            if info.health >> CONFIGURATION[0] & CONFIGURATION[1] > 1:
                findings.append(fail(f"GPU {gpu.index}: incorrect configuration", restart))
        if info.summary in SUMMARY:
            findings.append(fail(f"GPU {gpu.index}: health is {SUMMARY[info.summary]}", restart))
    return result(name, findings, f"completed on {len(gpus)} GPUs", "completed, success")


def _before_fabric(gpu: Gpu) -> bool:
    unsupported = isinstance(gpu.fabric, Unread) and gpu.fabric.problem is Problem.UNSUPPORTED
    return unsupported and isinstance(gpu.architecture, int) and gpu.architecture < HOPPER


# --- PCIe -------------------------------------------------------------------------------------------------


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
    shown = next((f"generation {gpu.pcie_generation} × {gpu.pcie_width}" for gpu in gpus), "")
    return result(name, findings, f"{shown} on {len(gpus)} GPUs", "full width and generation")


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
        chain = [known[address] for address in (*end.parents, end.address) if address in known]
        # The last pair is the device's own; behind a hypervisor it may have no port above it.
        offset = len(chain) % 2
        for upper, lower in _pairs(chain[offset:]):
            findings += _link_findings(upper, lower)
        # A guest's device may have no link of its own; on metal every device has one.
        hidden = isinstance(end.width, Unread) and end.width.problem is Problem.MISSING
        if isinstance(end.width, Unread) and not (hidden and node.host.virtual is True):
            findings.append(blind(end.width, end.address))
    return result(name, findings, f"{len(ends)} devices at their best", "width and speed of both ends")


def _pairs(chain: list[PciDevice]) -> list[tuple[PciDevice, PciDevice]]:
    return list(zip(chain[::2], chain[1::2], strict=True))


def _link_findings(upper: PciDevice, lower: PciDevice) -> list[Finding]:
    for value in (
        upper.width_max,
        lower.width_max,
        lower.width,
        upper.speed_max,
        lower.speed_max,
        lower.speed,
    ):
        if isinstance(value, Unread):
            # A port without PCI Express (a hypervisor's) has no such files: drivers/pci/pci-sysfs.c hides them.
            return [] if value.problem is Problem.MISSING else [blind(value, lower.address)]
    findings = []
    assert isinstance(upper.width_max, int)
    assert isinstance(lower.width_max, int)
    assert isinstance(lower.width, int)
    possible = min(upper.width_max, lower.width_max)
    if lower.width < possible:
        findings.append(
            fail(f"{lower.address}: width {lower.width} of {possible}", "reseat it, or its riser")
        )
    speeds = [_gigatransfers(str(text)) for text in (upper.speed_max, lower.speed_max, lower.speed)]
    if None in speeds:
        return [*findings, blind(Unread(Problem.ERROR, f"speed {lower.speed}"), lower.address)]
    most, now = min(speeds[0] or 0.0, speeds[1] or 0.0), speeds[2] or 0.0
    if now < most:
        verdict = warn if is_gpu(lower) else fail
        findings.append(
            verdict(f"{lower.address}: {now:g} of {most:g} GT/s", "reseat it; an idle GPU may save power")
        )
    return findings


def _gigatransfers(text: str) -> float | None:
    """`32.0 GT/s PCIe` (drivers/pci/probe.c, pci_speed_string); `Unknown` has none."""
    match = re.match(r"([\d.]+) GT/s", text)
    return float(match[1]) if match else None


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
        text = f"on at {len(node.acs.enabled)} bridges: {' '.join(enabled)}" + (
            f" and {more} more" if more > 0 else ""
        )
        findings.append(
            warn(text, "off in the firmware, or setpci -s BRIDGE ECAP_ACS+0x6.w=0000, by an administrator")
        )
    return result(name, findings, f"off at {node.acs.bridges} bridges", wish)


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
