"""GPUs, NVLinks and fabric manager, through NVML. Asks a Source; pure otherwise."""

from __future__ import annotations

import re
from typing import Any

from checks.evidence import Source
from checks.facts import FabricState, Gpu, Gpus, NvLink, Process, RemappedRows
from checks.reading import Problem, Unread

# Field identifiers and enumerations of nvml.h.
RECOVERY_ACTION, MEMORY_TEMPERATURE, LINK_COUNT = 230, 82, 91
LINK_SPEED, LINK_SPEED_COMMON = 164, 90
LINK_ERRORS = (161, 162, 163)
"""Replay, recovery, CRC. Blackwell and later have LINK_RECOVERIES instead."""
LINK_RECOVERIES = 215
CORRECTED, UNCORRECTED = 0, 1
VOLATILE, AGGREGATE = 0, 1
DRAM, SRAM = 2, 7
SLOWDOWN = 1
LOST = frozenset({11, 14, 15, 16})
"""Interrupt issue, corrupted infoROM, GPU is lost, reset required."""

MOST_GPUS, MOST_LINKS = 256, 64


def collect_gpus(source: Source) -> Gpus:
    count = _at_most(MOST_GPUS, _integer(source.ask("nvml", "nvmlDeviceGetCount"), "GPU count"), "GPUs")
    number = count if isinstance(count, int) else 0
    links = [_link_count(source, index) for index in range(number)]
    before = [_link_errors(source, index, links[index], 0) for index in range(number)]
    gpus = [_gpu(source, index) for index in range(number)]
    if any(isinstance(count, int) and count for count in links):
        source.wait(1.0)
    after = [_link_errors(source, index, links[index], 1) for index in range(number)]
    devices = source.list("/dev")
    return Gpus(
        driver=_text(source.ask("nvml", "nvmlSystemGetDriverVersion")),
        cuda=_cuda(source),
        count=count,
        gpus=tuple(
            _with_links(source, gpu, links[gpu["index"]], before[gpu["index"]], after[gpu["index"]])
            for gpu in gpus
        ),
        device_files=devices
        if isinstance(devices, Unread)
        else tuple(name for name in devices if re.fullmatch(r"nvidia\d+", name)),
    )


def _gpu(source: Source, index: int) -> dict[str, Any]:
    def ask(function: str, *args: Any) -> Any | Unread:
        return source.ask("nvml", function, index, *args)

    def number(function: str, *args: Any) -> int | Unread:
        return _integer(ask(function, *args), function)

    pci, memory = ask("nvmlDeviceGetPciInfo"), ask("nvmlDeviceGetMemoryInfo")
    ecc = ask("nvmlDeviceGetEccMode")
    mig = ask("nvmlDeviceGetMigMode")
    return {
        "index": index,
        "bus_id": kernel_address(_member(pci, "busId", str)),
        "name": _text(ask("nvmlDeviceGetName")),
        "uuid": _text(ask("nvmlDeviceGetUUID")),
        "memory_total": _member(memory, "total", int),
        "memory_used": _member(memory, "used", int),
        "architecture": number("nvmlDeviceGetArchitecture"),
        "ecc": _member(ecc, 0, int),
        "recovery_action": _field(source, index, RECOVERY_ACTION),
        "ecc_volatile_uncorrected": number("nvmlDeviceGetTotalEccErrors", UNCORRECTED, VOLATILE),
        "sram_uncorrected": number("nvmlDeviceGetMemoryErrorCounter", UNCORRECTED, AGGREGATE, SRAM),
        "sram_corrected": number("nvmlDeviceGetMemoryErrorCounter", CORRECTED, AGGREGATE, SRAM),
        "dram_corrected": number("nvmlDeviceGetMemoryErrorCounter", CORRECTED, AGGREGATE, DRAM),
        "remapped": _remapped(ask("nvmlDeviceGetRemappedRows")),
        "sram_threshold": _member(ask("nvmlDeviceGetSramEccErrorStatus"), "bThresholdExceeded", int),
        "repairs_pending": _repairs(ask("nvmlDeviceGetRepairStatus")),
        "unrepairable": number("nvmlDeviceGetUnrepairableMemoryFlag_v1"),
        "clock_reasons": _first_supported(
            number("nvmlDeviceGetCurrentClocksEventReasons"),
            lambda: number("nvmlDeviceGetCurrentClocksThrottleReasons"),  # drivers before 535.54
        ),
        "temperature": number("nvmlDeviceGetTemperature", 0),
        "temperature_slowdown": number("nvmlDeviceGetTemperatureThreshold", SLOWDOWN),
        "temperature_margin": number("nvmlDeviceGetMarginTemperature"),
        "memory_temperature": _field(source, index, MEMORY_TEMPERATURE),
        "pcie_generation": number("nvmlDeviceGetCurrPcieLinkGeneration"),
        "pcie_generation_max": number("nvmlDeviceGetMaxPcieLinkGeneration"),
        "pcie_width": number("nvmlDeviceGetCurrPcieLinkWidth"),
        "pcie_width_max": number("nvmlDeviceGetMaxPcieLinkWidth"),
        "processes": _processes(source, ask("nvmlDeviceGetComputeRunningProcesses")),
        "fabric": _fabric(ask("nvmlDeviceGetGpuFabricInfoV")),
        "mig": _member(mig, 0, int),
        "lost": _lost(source, index),
    }


def _with_links(
    source: Source,
    gpu: dict[str, Any],
    count: int | Unread,
    before: list[int | Unread],
    after: list[int | Unread],
) -> Gpu:
    links: tuple[NvLink, ...] | Unread
    if isinstance(count, Unread):
        links = count
    else:
        index = gpu["index"]
        speeds = _fields(source, index, LINK_SPEED, count)
        links = tuple(
            NvLink(link, _active(source, index, link), speed, (before[link], after[link]))
            for link, speed in enumerate(speeds)
        )
    return Gpu(**gpu, nvlinks=links)


def _link_count(source: Source, index: int) -> int | Unread:
    return _at_most(MOST_LINKS, _field(source, index, LINK_COUNT), f"NVLinks of GPU {index}")


def _active(source: Source, index: int, link: int) -> bool | Unread:
    state = _integer(source.ask("nvml", "nvmlDeviceGetNvLinkState", index, link), f"NVLink {link}")
    return state if isinstance(state, Unread) else state == 1


def _link_errors(source: Source, index: int, count: int | Unread, sample: int) -> list[int | Unread]:
    """Errors of each link so far. A kind of error that the GPU does not count is none; none counted is unsupported."""
    if isinstance(count, Unread) or not count:
        return []
    kinds = [_fields(source, index, kind, count, sample) for kind in (*LINK_ERRORS, LINK_RECOVERIES)]
    sums: list[int | Unread] = []
    for values in zip(*kinds, strict=True):
        counted = [value for value in values if isinstance(value, int)]
        broken = [v for v in values if isinstance(v, Unread) and v.problem is not Problem.UNSUPPORTED]
        if broken or not counted:
            sums.append(next((v for v in (*broken, *values) if isinstance(v, Unread)), 0))
        else:
            sums.append(sum(counted))
    return sums


def _fields(source: Source, index: int, field: int, scopes: int, sample: int = 0) -> list[int | Unread]:
    answer = source.ask("nvml_field", index, field, scopes, sample=sample)
    if isinstance(answer, Unread):
        return [answer] * scopes
    if not isinstance(answer, list) or len(answer) != scopes:
        return [Unread(Problem.ERROR, f"GPU {index}: field {field}: {answer!r}")] * scopes
    return [_one_field(one, f"GPU {index}: field {field}") for one in answer]


def _field(source: Source, index: int, field: int) -> int | Unread:
    return _fields(source, index, field, 1)[0]


def _one_field(answer: Any, what: str) -> int | Unread:
    from checks.evidence import opened

    if not isinstance(answer, dict):
        return Unread(Problem.ERROR, f"{what}: {answer!r}")
    return _integer(opened(answer, what), what)


def _lost(source: Source, index: int) -> tuple[int, ...]:
    """Codes that mean a lost GPU, among everything that NVML answered for this one."""
    start = "nvml nvmlDevice"
    codes = {
        record["nvml"]
        for key, record in list(source.records.items())
        if key.startswith(start) and key.split()[2:3] == [str(index)] and record.get("nvml") in LOST
    }
    return tuple(sorted(codes))


def _processes(source: Source, answer: Any | Unread) -> tuple[Process, ...] | Unread:
    if isinstance(answer, Unread):
        return answer
    if not isinstance(answer, list) or not all(isinstance(one, dict) and "pid" in one for one in answer):
        return Unread(Problem.ERROR, f"processes: {answer!r}")
    found = []
    for one in answer:
        name = source.read(f"/proc/{one['pid']}/comm")
        gone = isinstance(name, Unread) and name.problem is Problem.MISSING
        alive = name if isinstance(name, Unread) and not gone else not gone
        found.append(Process(one["pid"], name if isinstance(name, Unread) else name.strip(), alive))
    return tuple(found)


def _repairs(answer: Any | Unread) -> tuple[str, ...] | Unread:
    if isinstance(answer, Unread):
        return answer
    if not isinstance(answer, list) or len(answer) != 2 or not all(isinstance(one, int) for one in answer):
        return Unread(Problem.ERROR, f"repairs: {answer!r}")
    return tuple(name for name, pending in zip(("channel", "TPC"), answer, strict=True) if pending)


def _remapped(answer: Any | Unread) -> RemappedRows | Unread:
    if isinstance(answer, Unread):
        return answer
    if not isinstance(answer, list) or len(answer) != 4:
        return Unread(Problem.ERROR, f"remapped rows: {answer!r}")
    correctable, uncorrectable, pending, failed = (_integer(one, "remapped rows") for one in answer)
    for one in (correctable, uncorrectable, pending, failed):
        if isinstance(one, Unread):
            return one
    assert isinstance(correctable, int)
    assert isinstance(uncorrectable, int)
    return RemappedRows(correctable, uncorrectable, bool(pending), bool(failed))


def _fabric(answer: Any | Unread) -> FabricState | Unread:
    if isinstance(answer, Unread):
        return answer
    try:
        cluster = bytes(answer["clusterUuid"]).hex()
        return FabricState(
            int(answer["state"]),
            int(answer["status"]),
            int(answer["cliqueId"]),
            cluster,
            answer.get("healthMask"),
            answer.get("healthSummary"),
        )
    except (KeyError, TypeError, ValueError) as error:
        return Unread(Problem.ERROR, f"fabric: {error}: {answer!r}")


def _cuda(source: Source) -> str | Unread:
    version = _integer(source.ask("nvml", "nvmlSystemGetCudaDriverVersion"), "CUDA version")
    return version if isinstance(version, Unread) else f"{version // 1000}.{version % 1000 // 10}"


def kernel_address(bus_id: str | Unread) -> str | Unread:
    """`00000000:9B:00.0` of NVML and `0000:9b:00` of the driver's log as the kernel writes it: `0000:9b:00.0`."""
    if isinstance(bus_id, Unread):
        return bus_id
    match = re.fullmatch(
        r"(?:([0-9a-f]+):)?([0-9a-f]{2}):([0-9a-f]{2})(?:\.([0-7]))?", bus_id.strip().lower()
    )
    if match is None:
        return Unread(Problem.ERROR, f"not a PCI address: {bus_id!r}")
    return f"{int(match[1] or '0', 16):04x}:{match[2]}:{match[3]}.{match[4] or '0'}"


def _first_supported(value: int | Unread, otherwise: Any) -> int | Unread:
    if isinstance(value, Unread) and value.problem is Problem.UNSUPPORTED:
        older: int | Unread = otherwise()
        # Where nobody recorded the older question, the newer one's answer is what is known.
        return value if isinstance(older, Unread) and older.problem is Problem.NOT_RECORDED else older
    return value


def _integer(answer: Any | Unread, what: str) -> int | Unread:
    if isinstance(answer, Unread):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int):
        return Unread(Problem.ERROR, f"{what}: not a number: {answer!r}")
    return answer


def _at_most(most: int, count: int | Unread, what: str) -> int | Unread:
    """A damaged record must not make a loop of a billion questions."""
    if isinstance(count, int) and count > most:
        return Unread(Problem.ERROR, f"{count} {what}: more than there can be")
    return count


def _text(answer: Any | Unread) -> str | Unread:
    if isinstance(answer, str | Unread):
        return answer
    return Unread(Problem.ERROR, f"not a text: {answer!r}")


def _member(answer: Any | Unread, name: str | int, kind: type) -> Any | Unread:
    if isinstance(answer, Unread):
        return answer
    try:
        value = answer[name]
    except (KeyError, IndexError, TypeError):
        return Unread(Problem.ERROR, f"no {name} in {answer!r}")
    return value if isinstance(value, kind) else Unread(Problem.ERROR, f"{name}: {value!r}")
