"""What `nvidia-smi` prints, as the answers of NVML that it was made of. Pure; for importing captures only.

`nvidia-smi -q` is a tree by indentation (`Name   : value`), `nvidia-smi nvlink -s` a list of links for each GPU. Where
the text says N/A, or that the functionality has been deprecated, NVML had answered that it is not supported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from checks.collect_gpu import (
    AGGREGATE,
    CORRECTED,
    DRAM,
    LINK_COUNT,
    LINK_SPEED,
    MEMORY_TEMPERATURE,
    MOST_GPUS,
    RECOVERY_ACTION,
    SLOWDOWN,
    SRAM,
    UNCORRECTED,
    VOLATILE,
)
from checks.evidence import Record, key_of
from checks.nvidia_smi_values import (
    cuda_number,
    enabled,
    first_number,
    lanes,
    listed,
    mebibytes,
    members,
    put,
    value_of,
    yes,
)
from checks.reading import NOT_A_VALUE, Problem

Tree = dict[str, str]
"""`PCI/GPU Link Info/Link Width/Current` -> `16x`."""

QUERY = "==============NVSMI LOG=============="
ARCHITECTURES = {
    "Kepler": 2,
    "Maxwell": 3,
    "Pascal": 4,
    "Volta": 5,
    "Turing": 6,
    "Ampere": 7,
    "Ada Lovelace": 8,
}
ARCHITECTURES |= {"Hopper": 9, "Blackwell": 10}
ACTIONS = {
    "none": 0,
    "reset": 1,
    "gpu reset": 1,
    "reboot": 2,
    "node reboot": 2,
    "drain p2p": 3,
    "drain and reset": 4,
    "recover imex domain": 5,
    "bus reset": 6,
    "system reboot": 7,
}
REASONS = {
    "Idle": 0x1,
    "Applications Clocks Setting": 0x2,
    "SW Power Cap": 0x4,
    "HW Slowdown": 0x8,
    "Sync Boost": 0x10,
    "SW Thermal Slowdown": 0x20,
    "HW Slowdown/HW Thermal Slowdown": 0x40,
    "HW Slowdown/HW Power Brake Slowdown": 0x80,
    "Display Clock Setting": 0x100,
}
FABRIC_STATES = {"not started": 1, "in progress": 2, "completed": 3}
LINK = re.compile(r"\s*Link (\d+): (?:([\d.]+) GB/s|<?(\w+)>?)")
_TRUTH = {"true": 1, "false": 2}
FABRIC_HEALTH = {
    "Summary": (-1, {"healthy": 1, "unhealthy": 2, "limited capacity": 3}),
    "Bandwidth": (0, {"degraded": 1, "full": 2}),
    "Route Recovery in progress": (2, _TRUTH),
    "Route Unhealthy": (4, _TRUTH),
    "Access Timeout Recovery": (6, _TRUTH),
    "Incorrect Configuration": (
        8,
        {
            "none": 1,
            "incorrect systemguid": 2,
            "incorrect chassis serial number": 3,
            "no partition": 4,
            "insufficient nvlink resources": 5,
            "incompatible gpu firmware": 6,
            "invalid location": 7,
            "gpu state invalid": 8,
        },
    ),
}
"""Names under `Fabric`, `Health` with their words (nvidia-smi(1)), and the shift of each in nvml.h's
NVML_GPU_FABRIC_HEALTH_MASK_*; the summary has a member of its own."""
FAILED = re.compile(
    r"NVIDIA-SMI has failed.*|^Failed to initialize NVML: .*|^Unable to determine the device handle for .*",
    re.MULTILINE | re.IGNORECASE,
)
"""What it prints in place of an answer, the last of a GPU that does not answer:
`Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error`, or `: GPU is lost.  Reboot the system …`."""
MIG_MODE = re.compile(r"Nvlink queries are not supported for Devices in MIG mode", re.IGNORECASE)
NO_LINK = "as all links are inActive"
"""`NVML: Unable to retrieve NVLink information as all links are inActive`, in place of a GPU's links."""
HEAD = re.compile(r"^GPU (\d+): (.*?) \(UUID: ([^)]*)\)$", re.MULTILINE)


def looks_like(text: str) -> bool:
    return (
        QUERY in text
        or bool(HEAD.search(text))
        or bool(FAILED.search(text))
        or "No devices were found" in text
    )


def records(text: str, part: str = "") -> dict[str, Record]:
    """NVML's answers. A session that holds several `-q` is told by `part` (`idle`, `load`); else the first counts.

    Raises:
        ValueError: there is no such part; the line names those that are there.
    """
    found: dict[str, Record] = {}
    if "No devices were found" in text:
        put(found, {"value": 0}, "nvmlDeviceGetCount")
    elif "NVIDIA-SMI has failed" in text:
        put(found, {"problem": "missing", "detail": "NVIDIA-SMI has failed: no driver"}, "nvmlDeviceGetCount")
    elif failed := FAILED.search(text):
        put(found, {"problem": "error", "detail": failed[0].strip()}, "nvmlDeviceGetCount")
    if QUERY in text:
        found |= _of_query(_part(text, part))
    found |= _of_links(text, counted=QUERY in text)
    return found | _of_absent(found, FAILED.search(text))


def _of_absent(found: Mapping[str, Record], failed: re.Match[str] | None) -> dict[str, Record]:
    """GPUs of which nothing is told: those that are counted beyond, and the one of which nvidia-smi says so."""
    count = found.get("nvml nvmlDeviceGetCount", {}).get("value")
    if not isinstance(count, int):
        return {}
    silent = [
        index
        for index in range(min(count, MOST_GPUS))
        if key_of("nvml", ["nvmlDeviceGetName", index]) not in found
    ]
    absent: dict[str, Record] = {}
    if failed and not silent:
        silent = [count]
        put(absent, {"value": count + 1}, "nvmlDeviceGetCount")
    why = (
        failed[0].strip()
        if failed
        else f"there are GPUs up to number {count - 1}, and nothing is told of this one"
    )
    told = ["nvmlDeviceGetName"]
    if key_of("nvml", ["nvmlDeviceGetPciInfo", 0]) in found:
        told.append("nvmlDeviceGetPciInfo")
    for index in silent:
        for function in told:
            put(absent, {"problem": "error", "detail": why}, function, index)
    return absent


def _part(text: str, part: str) -> str:
    pieces = text.split(QUERY)
    names = [re.findall(r"^# (\w+) ::", before, re.MULTILINE)[-1:] for before in pieces[:-1]]
    titles = [name[0] if name else "" for name in names]
    if part and part not in titles:
        raise ValueError(
            f"no part {part!r} in this capture: {', '.join(filter(None, titles)) or 'it has one alone'}"
        )
    piece = pieces[1 + (titles.index(part) if part else 0)]
    return piece.partition("\n#####")[0]


def _of_query(text: str) -> dict[str, Record]:
    found: dict[str, Record] = {}
    head, *bodies = re.split(r"^GPU ([0-9A-Fa-f:.]+)\n", text, flags=re.MULTILINE)
    top = dict(_tree(head))
    if "Attached GPUs" not in top and not bodies:
        raise ValueError("nvidia-smi -q without a GPU in it: cut off, or another tool's")
    put(found, value_of(top.get("Attached GPUs"), int), "nvmlDeviceGetCount")
    put(found, value_of(top.get("Driver Version"), str), "nvmlSystemGetDriverVersion")
    put(found, value_of(top.get("CUDA Version"), cuda_number), "nvmlSystemGetCudaDriverVersion")
    trees = [dict(_tree(body)) for body in bodies[1::2]]
    for index, (address, body, tree) in enumerate(zip(bodies[::2], bodies[1::2], trees, strict=True)):
        answers: dict[str, Record] = {}
        _of_gpu(answers, index, address, body, tree)
        ends_early = index == len(trees) - 1 and _breaks_off(tree, trees[0])
        found |= _broken_off(answers) if ends_early else answers
    return found


def _breaks_off(tree: Tree, first: Tree) -> bool:
    """Whether the last GPU's part ends early: a whole one ends with its processes, and has what the first GPU's has."""
    sections, others = ({path.partition("/")[0] for path in one} for one in (tree, first))
    without = not tree or ("Product Name" in tree and "Processes" not in sections)
    return without or bool(others - sections - {"MIG Device"})


def _broken_off(answers: Mapping[str, Record]) -> dict[str, Record]:
    ended: Record = {"problem": "error", "detail": "the output of nvidia-smi ends before it"}
    return {
        key: ended if record.get("problem") == Problem.NOT_RECORDED else record
        for key, record in answers.items()
    }


def _of_gpu(found: dict[str, Record], index: int, address: str, body: str, tree: Tree) -> None:
    def answer(record: Record, function: str, *args: Any) -> None:
        put(found, record, function, index, *args)

    def field(number: int, record: Record) -> None:
        found[key_of("nvml_field", [index, number, 1])] = {"value": [record]}

    def take(path: str, kind: Any) -> Record:
        return value_of(tree.get(path), kind)

    answer({"value": {"busId": address}}, "nvmlDeviceGetPciInfo")
    answer(take("Product Name", str), "nvmlDeviceGetName")
    answer(take("GPU UUID", str), "nvmlDeviceGetUUID")
    answer(take("Product Architecture", lambda text: ARCHITECTURES[text]), "nvmlDeviceGetArchitecture")
    answer(
        members(total=take("FB Memory Usage/Total", mebibytes), used=take("FB Memory Usage/Used", mebibytes)),
        "nvmlDeviceGetMemoryInfo",
    )
    answer(
        listed(take("ECC Mode/Current", enabled), take("ECC Mode/Pending", enabled)), "nvmlDeviceGetEccMode"
    )
    answer(
        listed(take("MIG Mode/Current", enabled), take("MIG Mode/Pending", enabled)), "nvmlDeviceGetMigMode"
    )
    field(RECOVERY_ACTION, _recovery(tree))
    field(MEMORY_TEMPERATURE, take("Temperature/Memory Current Temp", first_number))
    ecc = "ECC Errors"
    before_ampere = tree.get(f"{ecc}/Volatile/Double Bit/Total")
    uncorrected = _sum(tree, f"{ecc}/Volatile/", "Uncorrectable")
    answer(
        uncorrected if before_ampere is None else value_of(before_ampere, int),
        "nvmlDeviceGetTotalEccErrors",
        UNCORRECTED,
        VOLATILE,
    )
    for verdict, word in ((UNCORRECTED, "Uncorrectable"), (CORRECTED, "Correctable")):
        for place, name in ((SRAM, "SRAM"), (DRAM, "DRAM")):
            total = _sum(tree, f"{ecc}/Aggregate/{name} ", word)
            answer(total, "nvmlDeviceGetMemoryErrorCounter", verdict, AGGREGATE, place)
    rows = [
        take(f"Remapped Rows/{name}", kind)
        for name, kind in (
            ("Correctable Error", int),
            ("Uncorrectable Error", int),
            ("Pending", yes),
            ("Remapping Failure Occurred", yes),
        )
    ]
    answer(
        value_of(tree["Remapped Rows"], int) if "Remapped Rows" in tree else listed(*rows),
        "nvmlDeviceGetRemappedRows",
    )
    exceeded = take(f"{ecc}/Aggregate/SRAM Threshold Exceeded", yes)
    answer(members(bThresholdExceeded=exceeded), "nvmlDeviceGetSramEccErrorStatus")
    repairs = [take(f"{ecc}/{name} Repair Pending", yes) for name in ("Channel", "TPC")]
    answer(listed(*repairs), "nvmlDeviceGetRepairStatus")
    answer(take(f"{ecc}/Unrepairable Memory", yes), "nvmlDeviceGetUnrepairableMemoryFlag_v1")
    answer(_reasons(tree), "nvmlDeviceGetCurrentClocksEventReasons")
    answer(take("Temperature/GPU Current Temp", first_number), "nvmlDeviceGetTemperature", 0)
    answer(take("Temperature/GPU Slowdown Temp", first_number), "nvmlDeviceGetTemperatureThreshold", SLOWDOWN)
    answer(take("Temperature/GPU T.Limit Temp", first_number), "nvmlDeviceGetMarginTemperature")
    link = "PCI/GPU Link Info"
    answer(take(f"{link}/PCIe Generation/Current", int), "nvmlDeviceGetCurrPcieLinkGeneration")
    answer(take(f"{link}/PCIe Generation/Max", int), "nvmlDeviceGetMaxPcieLinkGeneration")
    answer(take(f"{link}/Link Width/Current", lanes), "nvmlDeviceGetCurrPcieLinkWidth")
    answer(take(f"{link}/Link Width/Max", lanes), "nvmlDeviceGetMaxPcieLinkWidth")
    answer(_processes(body), "nvmlDeviceGetComputeRunningProcesses")
    answer(_fabric(tree), "nvmlDeviceGetGpuFabricInfoV")


def _of_links(text: str, *, counted: bool) -> dict[str, Record]:
    """NVLinks of `nvidia-smi nvlink -s`; names and count of the GPUs too, where no -q told them.

    A GPU beside others with links that shows none has lost them all. Where none shows any and nothing is said of links
    (`nvidia-smi -L`, or cards without NVLink) there is no answer about links.
    """
    found: dict[str, Record] = {}
    heads = list(HEAD.finditer(text))
    blocks: dict[int, tuple[re.Match[str], list[re.Match[str]]]] = {}
    told: dict[int, bool] = {}
    for head in heads:
        rest = text[head.end() :].lstrip("\n").splitlines()
        end = next((n for n, row in enumerate(rest) if not LINK.match(row)), len(rest))
        rows = [match for row in rest[:end] if (match := LINK.match(row))]
        index = int(head[1])
        told[index] = told.get(index, False) or (not rows and NO_LINK.lower() in "".join(rest[:1]).lower())
        if rows or index not in blocks:
            blocks[index] = (head, rows)
    any_links = any(rows for _, rows in blocks.values()) or any(told.values())
    for index, (head, rows) in blocks.items():
        if MIG_MODE.match(text[head.end() :].lstrip("\n")):
            none: Record = {"problem": "unsupported", "detail": "nvidia-smi says that it is in MIG mode"}
            put(found, {"value": [1, 1]}, "nvmlDeviceGetMigMode", index)
            found[key_of("nvml_field", [index, LINK_COUNT, 1])] = {"value": [none]}
        elif any_links:
            _put_links(found, index, rows)
        if not counted:
            put(found, {"value": head[2]}, "nvmlDeviceGetName", index)
            put(found, {"value": head[3]}, "nvmlDeviceGetUUID", index)
    if blocks and not counted:
        # They are numbered from 0 on; one that is left out in between is there and does not answer.
        put(found, {"value": max(blocks) + 1}, "nvmlDeviceGetCount")
    return found


def _put_links(found: dict[str, Record], index: int, rows: Sequence[re.Match[str]]) -> None:
    found[key_of("nvml_field", [index, LINK_COUNT, 1])] = {"value": [{"value": len(rows)}]}
    speeds = [value_of(row[2], lambda gigabytes: int(float(gigabytes) * 1000)) for row in rows]
    found[key_of("nvml_field", [index, LINK_SPEED, len(rows)])] = {"value": speeds}
    for place, row in enumerate(rows):
        put(found, {"value": int(row[2] is not None)}, "nvmlDeviceGetNvLinkState", index, place)


def _tree(text: str) -> Iterator[tuple[str, str]]:
    stack: list[tuple[int, str]] = []
    for row in text.splitlines():
        if not row.strip():
            continue
        depth = len(row) - len(row.lstrip())
        name, colon, value = row.strip().partition(" : ")
        if not colon and row.rstrip().endswith(" :"):
            name = row.strip()[:-2]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        name = name.strip()
        if colon:
            yield "/".join([*(one for _, one in stack), name]), value.strip()
        stack.append((depth, name))


def _sum(tree: Mapping[str, str], start: str, word: str) -> Record:
    """All counters whose name begins so and holds the word: parity and SEC-DED errors are told apart since 535."""
    parts = [
        value_of(text, int) for path, text in tree.items() if path.startswith(start) and f" {word}" in path
    ]
    if not parts:
        return {"problem": "not recorded", "detail": f"no {word} in this output of nvidia-smi"}
    return next(
        (one for one in parts if "value" not in one), {"value": sum(one.get("value", 0) for one in parts)}
    )


def _recovery(tree: Mapping[str, str]) -> Record:
    """The driver's verdict. Before 570 there were two questions in its place, and later drivers print them still."""
    action = value_of(tree.get("GPU Recovery Action"), lambda text: ACTIONS[text.lower()])
    reset, drain = (
        value_of(tree.get(f"GPU Reset Status/{name}"), yes)
        for name in ("Reset Required", "Drain and Reset Recommended")
    )
    if not action.get("value") and 1 in (reset.get("value"), drain.get("value")):
        return {"value": ACTIONS["reset"] if reset.get("value") else ACTIONS["drain and reset"]}
    if action.get("problem") == Problem.NOT_RECORDED and "value" in reset and "value" in drain:
        return {"value": ACTIONS["none"]}
    return action


def _reasons(tree: Mapping[str, str]) -> Record:
    for title in ("Clocks Event Reasons", "Clocks Throttle Reasons"):
        known = {bit: tree[f"{title}/{name}"] for name, bit in REASONS.items() if f"{title}/{name}" in tree}
        if known:
            strange = [text for text in known.values() if text not in ("Active", "Not Active")]
            if strange:
                return value_of(strange[0], int)
            return {"value": sum(bit for bit, text in known.items() if text == "Active")}
        if title in tree:
            return value_of(tree[title], int)
    return value_of(None, int)


def _processes(body: str) -> Record:
    section = re.search(r"^    Processes\s*(?:: (.*))?\n((?:        .*\n?)*)", body, re.MULTILINE)
    if section is None:
        return value_of(None, int)
    if section[1] and section[1].strip() != "None":
        return value_of(section[1].strip(), int)
    found: list[dict[str, Any]] = []
    for row in section[2].splitlines():
        name, _, value = (part.strip() for part in row.partition(":"))
        if name == "Process ID" and value.isdigit():
            found.append({"pid": int(value)})
        elif found:
            found[-1][name] = value
    return {"value": [{"pid": one["pid"]} for one in found if "C" in one.get("Type", "C")]}


def _fabric(tree: Mapping[str, str]) -> Record:
    state = tree.get("Fabric/State", tree.get("Fabric"))
    if state is None or NOT_A_VALUE.fullmatch(state):
        return value_of(state, int)
    if state.lower() not in FABRIC_STATES:
        return {"problem": "error", "detail": f"fabric state {state!r}"}
    cluster = tree.get("Fabric/ClusterUUID", "").replace("-", "")
    clique = tree.get("Fabric/CliqueId", "0")
    status = tree.get("Fabric/Status", "")
    if status == "N/A" and state.lower() == "completed":
        return {"problem": "error", "detail": "fabric completed, and its status N/A"}
    health = {
        name: value_of(tree.get(f"Fabric/Health/{name}", "N/A").lower(), words.__getitem__)
        for name, (_, words) in FABRIC_HEALTH.items()
    }
    strange = next((one for one in health.values() if one.get("problem") == "error"), None)
    if strange:
        return {**strange, "detail": f"health of the fabric: {strange['detail']}"}
    bits = sum(
        health[name].get("value", 0) << shift for name, (shift, _) in FABRIC_HEALTH.items() if shift >= 0
    )
    return {
        "value": {
            "state": FABRIC_STATES[state.lower()],
            # The text of another status is not a number; 999 is NVML's unknown error.
            "status": 0 if status in ("Success", "N/A") else 999,
            "cliqueId": int(clique) if clique.isdigit() else 0,
            "clusterUuid": list(bytes.fromhex(cluster)) if re.fullmatch(r"[0-9a-fA-F]{32}", cluster) else [],
            "healthMask": bits,
            "healthSummary": health["Summary"].get("value", 0),
        }
    }
