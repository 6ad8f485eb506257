"""What joins GPUs to each other: NVLink, its switches, fabric manager. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from checks.expectations import Expectations
from checks.facts import Gpu, Node
from checks.findings import Finding, blind, by_administrator, fail, result, times, warn
from checks.judge_gpu import gpus_of, without_gpus
from checks.reading import Problem, Unread, counted, shortened
from checks.registry import check
from checks.sxid import GUIDE, Sxid, strange_sxids, sxids
from checks.verdict import CheckResult

NVLINKS = (
    (r"A100-SXM", 12, 25000),
    (r"H100 80GB HBM3|H100 SXM|H200$|H200 SXM|GH200", 18, 26562),
    (r"G?B[23]00", 18, 53125),
)
"""GPU's name -> links and MB/s of each in one direction, as `nvidia-smi nvlink -s` prints them on healthy nodes."""

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
    Beside another one it is not. A GPU in MIG mode has none to offer, whatever its kind.
    """

    def has_none(gpu: Gpu) -> bool:
        unsupported = isinstance(gpu.nvlinks, Unread) and gpu.nvlinks.problem is Problem.UNSUPPORTED
        if gpu.mig == 1 and unsupported:
            return True
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
        # Of a kind that is not known, every card has as many as the one that shows most.
        same = [
            len(one.nvlinks) for one in gpus if one.name == gpu.name and not isinstance(one.nvlinks, Unread)
        ]
        wanted = known[0] if known else max(same)
        unreadable = [link.active for link in gpu.nvlinks if isinstance(link.active, Unread)]
        if unreadable:
            findings.append(blind(unreadable[0], f"GPU {gpu.index}"))
        elif len(up) < wanted and (known or up):
            down = [str(link.link) for link in gpu.nvlinks if link.active is False]
            text = f"GPU {gpu.index}: {len(up)} of {counted(wanted, 'link')} up" + (
                f", down: {' '.join(down)}" if down else ""
            )
            findings.append(fail(text, by_administrator("reset the GPU or reseat it")))
        for link in up:
            if isinstance(link.speed, Unread):
                findings.append(blind(link.speed, f"GPU {gpu.index} link {link.link}"))
            elif known and link.speed < known[1]:
                findings.append(
                    fail(
                        f"GPU {gpu.index} link {link.link}: {link.speed / 1000:g} GB/s",
                        by_administrator("reset the GPU"),
                    )
                )
    first = expected_links(gpus[0])
    wish = f"{first[0]} × {first[1] / 1000:g} GB/s" if first else "all links up"
    return result(name, findings, f"all up on {counted(len(gpus), 'GPU')}", wish)


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
                    fail(
                        f"GPU {gpu.index} link {link.link}: {counted(after - before, 'new error')}",
                        by_administrator("reseat the GPU"),
                    )
                )
    return result(name, findings, f"none new on {counted(len(gpus), 'GPU')}", "no growth") if gpus else []


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
    restart = by_administrator("restart nvidia-fabricmanager, then reset the GPUs")
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
    return result(name, findings, f"completed on {counted(len(gpus), 'GPU')}", "completed, success")


def _before_fabric(gpu: Gpu) -> bool:
    unsupported = isinstance(gpu.fabric, Unread) and gpu.fabric.problem is Problem.UNSUPPORTED
    return unsupported and isinstance(gpu.architecture, int) and gpu.architecture < HOPPER


@check("nvlink.sxid", reads=["run dmesg"], source=GUIDE)
def switches(node: Node, expected: Expectations) -> list[CheckResult]:
    """No NVSwitch has reported an error that stalls the GPUs."""
    name = "nvlink.sxid"
    if without_gpus(node, expected):
        return []
    wish = "no SXid"
    log = node.host.kernel_log
    if isinstance(log, Unread):
        return result(name, [blind(log, "kernel log")], "", wish)
    findings = [_switch_finding(one) for one in sxids(log) if one.action != "nothing"]
    findings += [blind(Unread(Problem.ERROR, shortened(line))) for line in strange_sxids(log)]
    return result(name, findings, "none in the kernel log", wish)


def _switch_finding(one: Sxid) -> Finding:
    links = f" link {' '.join(map(str, one.links))}" if one.links else ""
    text = f"SXid {one.number} on {one.switch}{links}{times(one.count)}"
    until = "leave the node out until an administrator has done so"
    if one.action == "reboot":
        return fail(f"{text}, fatal to the whole fabric", f"reboot the node: {until}")
    if one.action == "reset":
        return fail(text, f"reset all GPUs and NVSwitches together, or reboot the node: {until}")
    if one.action == "watch":
        return warn(text, "NVIDIA calls it non-fatal; a link that repeats it is suspect")
    return blind(Unread(Problem.ERROR, f"{text}: neither fatal nor non-fatal, and in no list of NVIDIA's"))
