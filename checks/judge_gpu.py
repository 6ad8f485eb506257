"""GPUs: all there, reachable, healthy in memory, not throttled. Pure."""

from __future__ import annotations

from checks.collect_pci import is_gpu
from checks.expectations import Expectations
from checks.facts import Gpu, Node
from checks.findings import Finding, blind, by_administrator, fail, result, times, warn
from checks.kernel_log import Xid, fallen, not_started, strange_xids, xids
from checks.reading import Problem, Unread, counted, shortened
from checks.registry import check
from checks.verdict import CheckResult, Verdict

NVML = "NVML (docs.nvidia.com/deploy/nvml-api)"
RECOVERY_ACTIONS = {
    0: "none",
    1: "GPU reset",
    2: "node reboot",
    3: "drain peer-to-peer",
    4: "drain and reset",
    5: "recover the IMEX domain",
    6: "bus reset",
    7: "system reboot",
}
"""nvmlDeviceGpuRecoveryAction_t."""
LOST = {
    11: "interrupt issue",
    14: "corrupted infoROM",
    15: "GPU is lost",
    16: "reset required",
}
WATCHED = {
    63: "memory is replaced at the GPU's next reset: gpu.remap says whether one is due",
    92: "many corrected memory errors: gpu.ecc has the counts",
    94: "a memory error that ended one application alone: gpu.remap says whether the GPU wants a reset",
}
"""Xids that are no application's doing."""
HARDWARE_SLOWDOWNS = {0x8: "hardware slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake"}
THERMAL = {0x20: "software thermal slowdown"}
IDLE = 0x1
FIRST_DRIVER_WITH_ACTION = 570
TURING, AMPERE = 6, 7
"""nvml.h, NVML_DEVICE_ARCH_*."""
SRAM_UNCORRECTED_LIMIT = 4
SRAM_CORRECTED_LIMIT = 10_000
DRAM_CORRECTED_LIMIT = 20_000_000
REMAPPED_LIMIT = 512
COOLING = "tell an administrator: the node's cooling does not keep up"
MARGIN_WARN, HOT_WARN, MEMORY_HOT_WARN = 5, 85, 95


def without_gpus(node: Node, expected: Expectations) -> bool:
    """Nobody wants GPUs here, or nobody said and everything that would show one shows none."""
    if expected.gpus is not None:
        return expected.gpus == 0
    gpus = node.gpus
    no_driver = isinstance(gpus.count, Unread) and gpus.count.problem is Problem.MISSING
    no_files = gpus.device_files == ()
    no_devices = not isinstance(node.pci, Unread) and not any(map(is_gpu, node.pci))
    return no_driver and no_files and no_devices


def gpus_of(node: Node, expected: Expectations, name: str) -> tuple[Gpu, ...] | list[CheckResult]:
    """The GPUs to judge, or the results where there are none to look at."""
    if without_gpus(node, expected):
        return []
    if isinstance(node.gpus.count, Unread):
        return result(name, [blind(node.gpus.count, "NVML")], "", "NVML answers")
    return node.gpus.gpus or []


@check("gpu.count", reads=["nvml nvmlDeviceGetCount"], source=NVML)
def count(node: Node, expected: Expectations) -> list[CheckResult]:
    """As many GPUs as the job asked for, of the kind that it asked for, and none that the driver lost since boot."""
    name = "gpu.count"
    if expected.gpus == 0:
        return []
    wanted = "GPUs" if expected.gpus is None else f"at least {counted(expected.gpus, 'GPU')}"
    wanted += f" of kind {expected.sku}" if expected.sku else ""
    if without_gpus(node, expected):
        say = "say --gpus=0 where that is right"
        return [CheckResult(name, Verdict.WARN, "no NVIDIA GPU and no driver", wanted, say)]
    found = node.gpus.count
    if isinstance(found, Unread):
        return result(name, [blind(found, "NVML")], "", wanted)
    names = [str(gpu.name) for gpu in node.gpus.gpus]
    findings: list[Finding] = []
    leave = "leave this node out: sbatch --exclude"
    if found < (1 if expected.gpus is None else expected.gpus):
        findings.append(fail(counted(found, "GPU"), leave))
    on_bus = 0 if isinstance(node.pci, Unread) else sum(map(is_gpu, node.pci))
    files = () if isinstance(node.gpus.device_files, Unread) else node.gpus.device_files
    if found < on_bus and found < len(files):
        findings.append(
            fail(
                f"{found} of {counted(on_bus, 'GPU')} on the bus answering",
                leave,
            )
        )
    for gpu in node.gpus.gpus:
        if isinstance(gpu.name, Unread):
            findings.append(blind(gpu.name, f"GPU {gpu.index}"))
        elif expected.sku and expected.sku.lower() not in gpu.name.lower():
            findings.append(fail(f"GPU {gpu.index} is {gpu.name}", leave))
    if len(set(names)) > 1:
        findings.append(
            warn(
                "different GPUs: " + ", ".join(sorted(set(names))),
                "ask Slurm for one kind: --gres=gpu:KIND:N, or --constraint",
            )
        )
    kinds = ", ".join(dict.fromkeys(names))
    return result(name, findings, f"{found} × {kinds}", wanted)


@check(
    "gpu.recovery", reads=["nvml_field * 230 1"], source="NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, driver ≥ 570"
)
def recovery(node: Node, expected: Expectations) -> list[CheckResult]:
    """The driver's own verdict on each GPU asks for nothing."""
    name = "gpu.recovery"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    findings = []
    for gpu in gpus:
        action = gpu.recovery_action
        if isinstance(action, Unread):
            if action.problem is Problem.UNSUPPORTED and _driver_before(node, FIRST_DRIVER_WITH_ACTION):
                findings.append(
                    warn(
                        f"driver {node.gpus.driver} gives no verdict",
                        "drivers from 570 on do; the other gpu checks say what they see",
                    )
                )
            else:
                findings.append(blind(action, f"GPU {gpu.index}"))
        elif action:
            wanted = RECOVERY_ACTIONS.get(action, f"action {action}")
            findings.append(
                fail(f"GPU {gpu.index} ({gpu.bus_id}) wants: {wanted}", by_administrator(f"do it: {wanted}"))
            )
    return result(name, findings, f"none on {counted(len(gpus), 'GPU')}", "none")


@check(
    "gpu.ecc",
    reads=["nvml nvmlDeviceGetTotalEccErrors *", "nvml nvmlDeviceGetMemoryErrorCounter *"],
    source="uncorrected > 0: NVML; SRAM ≥ 4: scitix/sichek; corrected: azurehpc-health-checks",
)
def ecc(node: Node, expected: Expectations) -> list[CheckResult]:
    """No uncorrected memory error since the driver was loaded, few over the GPU's life."""
    name = "gpu.ecc"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    findings = []
    for gpu in gpus:
        limits = (
            (gpu.ecc_volatile_uncorrected, 1, fail, "uncorrected error", " since the driver was loaded"),
            (gpu.sram_uncorrected, SRAM_UNCORRECTED_LIMIT, fail, "uncorrected SRAM error", " in its life"),
            (gpu.sram_corrected, SRAM_CORRECTED_LIMIT + 1, warn, "corrected SRAM error", ""),
            (gpu.dram_corrected, DRAM_CORRECTED_LIMIT + 1, warn, "corrected DRAM error", ""),
        )
        if _has_no_ecc(gpu):
            findings.append(warn(f"GPU {gpu.index} ({gpu.name}) has no ECC", "wrong results stay unseen"))
            continue
        if gpu.ecc == 0:
            findings.append(
                warn(f"GPU {gpu.index}: ECC is off", "an administrator turns it on: nvidia-smi -e 1")
            )
            continue
        for value, limit, verdict, what, when in limits:
            if isinstance(value, Unread):
                if _is_before(gpu, TURING) and value.problem is Problem.UNSUPPORTED:
                    continue  # nvml.h, nvmlMemoryLocation_t: SRAM and DRAM are told apart since Turing
                findings.append(blind(value, f"GPU {gpu.index}"))
            elif value >= limit:
                findings.append(
                    verdict(
                        f"GPU {gpu.index}: {counted(value, what)}{when}", by_administrator("reset the GPU")
                    )
                )
    return result(
        name, findings, f"no uncorrected error on {counted(len(gpus), 'GPU')}", "no uncorrected error"
    )


@check(
    "gpu.remap",
    reads=["nvml nvmlDeviceGetRemappedRows *"],
    source="NVIDIA GPU Memory Error Management; 512: AZ",
)
def remap(node: Node, expected: Expectations) -> list[CheckResult]:
    """No row of memory waits to be remapped, and no remap has failed."""
    name = "gpu.remap"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    findings = []
    for gpu in gpus:
        rows = gpu.remapped
        if isinstance(rows, Unread):
            if _has_no_ecc(gpu):
                findings.append(warn(f"GPU {gpu.index} ({gpu.name}) has no ECC", "nothing to remap"))
            elif _is_before(gpu, AMPERE) and rows.problem is Problem.UNSUPPORTED:
                text = f"GPU {gpu.index} ({gpu.name}) is older than row remapping"
                findings.append(warn(text, "gpu.ecc has what there is to know of its memory"))
            elif gpu.mig == 1 and rows.problem is Problem.UNSUPPORTED:
                findings.append(
                    warn(f"GPU {gpu.index} is in MIG mode, which hides it", "ask an administrator")
                )
            else:
                findings.append(blind(rows, f"GPU {gpu.index}"))
            continue
        if rows.failed:
            findings.append(fail(f"GPU {gpu.index}: a remap has failed", by_administrator("replace the GPU")))
        if rows.pending:
            findings.append(fail(f"GPU {gpu.index}: a remap is pending", by_administrator("reset the GPU")))
        if rows.uncorrectable > REMAPPED_LIMIT:
            text = f"GPU {gpu.index}: {counted(rows.uncorrectable, 'row')} remapped"
            findings.append(fail(text, by_administrator("replace the GPU")))
    return result(name, findings, f"none pending on {counted(len(gpus), 'GPU')}", "none pending, none failed")


@check(
    "gpu.repair",
    reads=[
        "nvml nvmlDeviceGetSramEccErrorStatus *",
        "nvml nvmlDeviceGetRepairStatus *",
        "nvml nvmlDeviceGetUnrepairableMemoryFlag_v1 *",
    ],
    source="nvml.h: threshold of SRAM errors, repairs that wait for a reset, memory that cannot be repaired",
)
def repair(node: Node, expected: Expectations) -> list[CheckResult]:
    """No GPU waits for a repair of its memory, or is beyond one, says its driver."""
    name = "gpu.repair"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    findings: list[Finding] = []
    told = False
    for gpu in gpus:
        answers = (gpu.sram_threshold, gpu.repairs_pending, gpu.unrepairable)
        for answer in answers:
            if not isinstance(answer, Unread):
                told = True
            # A driver or a GPU that is older than the question, or a bundle.
            elif answer.problem not in (Problem.UNSUPPORTED, Problem.NOT_RECORDED):
                findings.append(blind(answer, f"GPU {gpu.index}"))
        if gpu.sram_threshold == 1:
            text = f"GPU {gpu.index}: more SRAM errors than NVIDIA allows"
            findings.append(fail(text, by_administrator("replace the GPU")))
        if isinstance(gpu.repairs_pending, tuple) and gpu.repairs_pending:
            what = " and ".join(gpu.repairs_pending)
            findings.append(
                fail(f"GPU {gpu.index}: a {what} repair is pending", by_administrator("reset the GPU"))
            )
        if gpu.unrepairable == 1:
            text = f"GPU {gpu.index}: memory that cannot be repaired"
            findings.append(fail(text, by_administrator("replace the GPU")))
    return (
        result(name, findings, f"none pending on {counted(len(gpus), 'GPU')}", "none pending")
        if told or findings
        else []
    )


@check("gpu.xid", reads=["run dmesg"], source="NVIDIA Xid errors (docs.nvidia.com/deploy/xid-errors)")
def xid(node: Node, expected: Expectations) -> list[CheckResult]:
    """No Xid in the kernel log that asks for more than a look."""
    name = "gpu.xid"
    if without_gpus(node, expected):
        return []
    log = node.host.kernel_log
    if isinstance(log, Unread):
        return result(name, [blind(log, "kernel log")], "", "no Xid")
    known = xids(log)
    findings = [_xid_finding(one, node) for one in known]
    gone = [
        address
        for address in fallen(log)
        if not any(x.number == 79 and address.startswith(x.address) for x in known)
    ]
    findings += [
        fail(f"GPU {address} has fallen off the bus", by_administrator("reboot the node")) for address in gone
    ]
    findings += [
        warn(f"the driver could not start GPU {address}", "is it there now? gpu.count and gpu.bus say")
        for address in not_started(log)
        if address not in gone
    ]
    findings += [blind(Unread(Problem.ERROR, shortened(line))) for line in strange_xids(log)]
    return result(name, [one for one in findings if one], "none in the kernel log", "no Xid")


def _xid_finding(one: Xid, node: Node) -> Finding:
    text = f"Xid {one.number} on {one.address}{times(one.count)}"
    if one.action == "unknown":
        return blind(Unread(Problem.ERROR, f"{text}: neither fatal nor non-fatal: {shortened(one.text)}"))
    if one.action is None or one.action == "watch":
        return warn(
            text, WATCHED.get(one.number, "look at the application; a GPU that repeats it is suspect")
        )
    if one.action == "reset" and (one.healed or _driver_says_healthy(one, node)):
        # The log keeps what a reset has healed long ago; the driver knows better where it has a verdict.
        return warn(f"{text}, and the driver asks for nothing any more", "watch it")
    what = {"reset": "reset that GPU", "reboot": "reboot the node", "isolate": "isolate the node"}[one.action]
    return fail(text, f"{what}: leave the node out until an administrator has done so")


def _driver_says_healthy(one: Xid, node: Node) -> bool:
    return any(
        not isinstance(gpu.bus_id, Unread) and gpu.bus_id.startswith(one.address) and gpu.recovery_action == 0
        for gpu in node.gpus.gpus
    )


@check(
    "gpu.bus",
    reads=["nvml nvmlDeviceGetPciInfo *", "start /sys/bus/pci/devices/*/config", "run lspci -vvv"],
    source="NVML return codes 11, 14, 15, 16; configuration space of ones (pciutils shows rev ff)",
)
def bus(node: Node, expected: Expectations) -> list[CheckResult]:
    """Every GPU answers: none has fallen off the bus."""
    name = "gpu.bus"
    gpus = gpus_of(node, expected, name)
    findings = []
    devices = [] if isinstance(node.pci, Unread) else [device for device in node.pci if is_gpu(device)]
    findings += [
        fail(f"{one.address} reads as ones", by_administrator("reboot the node"))
        for one in devices
        if one.fallen is True
    ]
    findings += [blind(one.fallen, one.address) for one in devices if isinstance(one.fallen, Unread)]
    if not isinstance(node.acs, Unread):
        findings += [
            fail(f"{one} is shown as rev ff", by_administrator("reboot the node")) for one in node.acs.fallen
        ]
    if isinstance(gpus, list):
        return result(name, findings, "", "every GPU answers") if findings and expected.gpus != 0 else gpus
    for gpu in gpus:
        for code in gpu.lost:
            findings.append(fail(f"GPU {gpu.index}: {LOST[code]}", by_administrator("reboot the node")))
        if not gpu.lost and isinstance(gpu.bus_id, Unread):
            findings.append(blind(gpu.bus_id, f"GPU {gpu.index}"))
    return result(
        name,
        findings,
        f"{counted(len(gpus), 'GPU')} answering",
        "every GPU answers",
    )


@check(
    "gpu.throttle",
    reads=[
        "nvml nvmlDeviceGetCurrentClocksEventReasons *",
        "nvml nvmlDeviceGetCurrentClocksThrottleReasons *",
    ],
    source="nvml.h, nvmlClocksEventReason*",
)
def throttle(node: Node, expected: Expectations) -> list[CheckResult]:
    """No GPU is slowed down by heat or by the power supply."""
    name = "gpu.throttle"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    findings = []
    for gpu in gpus:
        if isinstance(gpu.clock_reasons, Unread):
            findings.append(blind(gpu.clock_reasons, f"GPU {gpu.index}"))
            continue
        for table, verdict in ((HARDWARE_SLOWDOWNS, fail), (THERMAL, warn)):
            for bit, what in table.items():
                if gpu.clock_reasons & bit:
                    findings.append(
                        verdict(
                            f"GPU {gpu.index}: {what}",
                            by_administrator("look at the node's cooling and power supply"),
                        )
                    )
    return result(name, findings, f"no slowdown on {counted(len(gpus), 'GPU')}", "no slowdown")


@check(
    "gpu.temperature",
    reads=["nvml nvmlDeviceGetTemperature *"],
    source="NVML slowdown threshold and T.Limit; memory 95 C: HBM3 slows down from there on",
)
def temperature(node: Node, expected: Expectations) -> list[CheckResult]:
    """Idle GPUs are some degrees away from slowing down."""
    name = "gpu.temperature"
    gpus = gpus_of(node, expected, name)
    if isinstance(gpus, list):
        return gpus
    findings = []
    for gpu in gpus:
        if isinstance(gpu.temperature, Unread):
            findings.append(blind(gpu.temperature, f"GPU {gpu.index}"))
            continue
        left = gpu.temperature_margin
        if isinstance(left, Unread):
            limit = HOT_WARN if isinstance(gpu.temperature_slowdown, Unread) else gpu.temperature_slowdown
            left = limit - gpu.temperature
        if left <= 0:
            findings.append(
                fail(
                    f"GPU {gpu.index}: {gpu.temperature} C, at its limit",
                    by_administrator("look at the node's cooling"),
                )
            )
        elif left <= MARGIN_WARN:
            findings.append(warn(f"GPU {gpu.index}: {gpu.temperature} C, {left} below its limit", COOLING))
        memory = gpu.memory_temperature
        if isinstance(memory, int) and memory >= MEMORY_HOT_WARN:
            findings.append(warn(f"GPU {gpu.index}: memory at {memory} C", COOLING))
    hottest = max((gpu.temperature for gpu in gpus if isinstance(gpu.temperature, int)), default=0)
    return result(name, findings, f"at most {hottest} C", f"over {MARGIN_WARN} C below the limit")


def _has_no_ecc(gpu: Gpu) -> bool:
    return isinstance(gpu.ecc, Unread) and gpu.ecc.problem is Problem.UNSUPPORTED


def _is_before(gpu: Gpu, architecture: int) -> bool:
    return isinstance(gpu.architecture, int) and gpu.architecture < architecture


def _driver_before(node: Node, first: int) -> bool:
    driver = node.gpus.driver
    return isinstance(driver, str) and driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < first
