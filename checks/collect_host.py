"""Limits, clocks, file systems, names, environment and versions of a node. Asks a Source; pure otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping

from checks.evidence import Source
from checks.expectations import Expectations
from checks.facts import FileSystem, Host, Names
from checks.kernel_log import KEPT_LINES
from checks.reading import Problem, Reading, Unread, line, parsed

TIME_ERROR, STA_UNSYNC = 5, 0x40
"""adjtimex(2): nothing keeps the clock right."""

ENVIRONMENT = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "CUDA_",
    "TORCH_",
    "SLURM_",
    "MASTER_",
    "LD_",
    "OMP_",
    "TP_",
    "OMPI_",
)
PACKAGES = (
    "torch",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "transformer-engine",
    "flash-attn",
    "deepspeed",
    "vllm",
    "sglang",
    "numpy",
)
FILE_VARIABLES = ("NCCL_TOPO_FILE", "NCCL_GRAPH_FILE", "NCCL_CONF_FILE", "NCCL_TUNER_CONFIG_PATH")
VERSION_FILES = {
    "kernel": "/proc/sys/kernel/osrelease",
    "nvidia module": "/sys/module/nvidia/version",
    "mlx5 module": "/sys/module/mlx5_core/version",
    "efa module": "/sys/module/efa/version",
    "gdrdrv module": "/sys/module/gdrdrv/version",
}


def collect_host(source: Source) -> Host:
    return Host(
        virtual=parsed(source.read("/proc/cpuinfo"), _hypervisor, "/proc/cpuinfo"),
        limits=parsed(source.read("/proc/self/limits"), parse_limits, "/proc/self/limits"),
        memory=parsed(source.read("/proc/meminfo"), _memory, "/proc/meminfo"),
        governors=_governors(source),
        clock_source=parsed(
            source.read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            _word,
            "clock source",
        ),
        clock_synchronized=_synchronized(source.ask("clock")),
        iommu_groups=_count(source.list("/sys/kernel/iommu_groups")),
        kernel_log=Unread(Problem.NOT_RECORDED, "kernel log"),
    )


def collect_kernel_log(source: Source) -> Reading:
    """dmesg, or the journal's copy where dmesg is for root alone and the journal is not."""
    log = source.run(["dmesg"], keep=KEPT_LINES)
    if isinstance(log, Unread):
        journal = source.run(["journalctl", "--dmesg", "--boot", "--no-pager", "--quiet"], keep=KEPT_LINES)
        # Who may not read the journal gets an empty one, or its own lines: that is no answer.
        if not isinstance(journal, Unread) and journal.strip():
            return journal
    return log


def _hypervisor(text: str) -> bool:
    """Whether the CPU says that it is virtual (X86_FEATURE_HYPERVISOR in arch/x86/kernel/cpu/proc.c)."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if flags is None:
        raise ValueError("no flags")
    return "hypervisor" in flags[1].split()


def parse_limits(text: str) -> Mapping[str, str]:
    """Name -> soft limit (fs/proc/base.c, proc_pid_limits: columns of 25, 20, 20 and 10 signs)."""
    found = {}
    for row in text.splitlines()[1:]:
        match = re.match(r"(Max .*?)\s{2,}(\S+)\s+(\S+)", row)
        if match:
            found[match[1]] = match[2]
    if not found:
        raise ValueError("no limit")
    return found


def _word(text: str) -> str:
    if not re.fullmatch(r"[\w-]+", text, re.ASCII):
        raise ValueError("not a name")
    return text


def _memory(text: str) -> int:
    total = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    if total is None:
        raise ValueError("no MemTotal")
    return int(total[1]) * 1024


def _governors(source: Source) -> tuple[str, ...] | Unread:
    folder = "/sys/devices/system/cpu/cpufreq"
    policies = source.list(folder)
    if isinstance(policies, Unread):
        return policies
    found: set[str] = set()
    for policy in (name for name in policies if name.startswith("policy")):
        governor = line(source.read(f"{folder}/{policy}/scaling_governor"), f"{policy} scaling_governor")
        if isinstance(governor, Unread):
            return governor
        found.add(governor)
    return tuple(sorted(found))


def _synchronized(answer: object) -> bool | Unread:
    if isinstance(answer, Unread):
        return answer
    if not isinstance(answer, dict) or not all(
        isinstance(answer.get(name), int) for name in ("state", "status")
    ):
        return Unread(Problem.ERROR, f"clock: {answer!r}")
    return answer["state"] != TIME_ERROR and not answer["status"] & STA_UNSYNC


def _count(names: tuple[str, ...] | Unread) -> int | Unread:
    return names if isinstance(names, Unread) else len(names)


# --- file systems -----------------------------------------------------------------------------------------


def collect_file_systems(source: Source, folders: tuple[str, ...]) -> tuple[FileSystem, ...]:
    """/dev/shm, /tmp and the job's folders, once each."""
    mounts = source.read("/proc/self/mounts")
    return tuple(_file_system(source, path, mounts) for path in dict.fromkeys(("/dev/shm", "/tmp", *folders)))


def _file_system(source: Source, path: str, mounts: Reading) -> FileSystem:
    room = source.ask("statvfs", path)

    def number(name: str) -> int | Unread:
        if isinstance(room, Unread):
            return room
        value = room.get(name) if isinstance(room, dict) else None
        return value if isinstance(value, int) else Unread(Problem.ERROR, f"{path}: {room!r}")

    # A mount that does not answer is not asked twice: each question costs its deadline.
    hangs = isinstance(room, Unread) and room.problem is Problem.TIMED_OUT
    seconds = room if hangs else source.ask("written", path)
    return FileSystem(
        path=path,
        kind=parsed(mounts, lambda text: _kind(text, path), "/proc/self/mounts"),
        size=number("size"),
        free=number("free"),
        inodes=number("inodes"),
        inodes_free=number("inodes_free"),
        written=seconds
        if isinstance(seconds, float | Unread)
        else Unread(Problem.ERROR, f"{path}: {seconds!r}"),
    )


def _kind(mounts: str, path: str) -> str:
    """Type of the deepest mount that holds the path; blanks in mount points are written as \\040."""
    best, kind = "", ""
    for row in mounts.splitlines():
        words = row.split()
        if len(words) < 3:
            continue
        point = words[1].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, words[2]
    if not kind:
        raise ValueError(f"no mount holds {path}")
    return kind


# --- names, environment, versions -------------------------------------------------------------------------


def collect_names(source: Source, expected: Expectations) -> Names:
    own = line(source.read("/proc/sys/kernel/hostname"), "host name")
    host, _, port = (expected.master or "").rpartition(":")
    wanted = dict.fromkeys(([own] if isinstance(own, str) else []) + ([host] if host else []))
    resolved = {name: _addresses(source.ask("resolve", name)) for name in wanted}
    master: Reading | None = None
    if host:
        took = source.ask("connect", host, port)
        master = f"{took} ms" if isinstance(took, float) else _unlike(took, "connect")
    for name in expected.peers:
        resolved[name] = _addresses(source.ask("resolve", name))
        answer = resolved[name]
        if isinstance(answer, Unread) and answer.problem is Problem.TIMED_OUT:
            break  # a resolver that waits for a dead server waits for every name
    return Names(own, resolved, master)


def _addresses(answer: object) -> tuple[str, ...] | Unread:
    if isinstance(answer, list) and answer and all(isinstance(one, str) and one for one in answer):
        return tuple(answer)
    return _unlike(answer, "addresses")


def _unlike(answer: object, what: str) -> Unread:
    """Why there is no answer, or that it is of no form that is known."""
    return answer if isinstance(answer, Unread) else Unread(Problem.ERROR, f"{what}: {answer!r}")


def collect_environment(source: Source) -> Mapping[str, str] | Unread:
    answer = source.ask("environment", *ENVIRONMENT)
    if isinstance(answer, dict) and all(isinstance(value, str) for value in answer.values()):
        return {str(name): value for name, value in answer.items()}
    return _unlike(answer, "environment")


def collect_named_files(source: Source, environment: Mapping[str, str] | Unread) -> dict[str, bool | Unread]:
    if isinstance(environment, Unread):
        return {}
    named = [f"{name}={environment[name]}" for name in FILE_VARIABLES if environment.get(name)]
    return {one: _exists(source.ask("start", one.partition("=")[2])) for one in named}


def _exists(answer: object) -> bool | Unread:
    if isinstance(answer, Unread):
        return False if answer.problem is Problem.MISSING else answer
    return True


def collect_versions(source: Source) -> dict[str, str | Unread]:
    found: dict[str, str | Unread] = {
        name: line(source.read(path), name) for name, path in VERSION_FILES.items()
    }
    found["system"] = parsed(source.read("/etc/os-release"), _pretty_name, "/etc/os-release")
    python = source.ask("python")
    found["python"] = python if isinstance(python, str | Unread) else Unread(Problem.ERROR, repr(python))
    packages = source.ask("packages", *PACKAGES)
    for package in PACKAGES:
        if isinstance(packages, dict):
            version = packages.get(package)
            found[package] = str(version) if version else Unread(Problem.MISSING, f"Python package {package}")
        else:
            found[package] = (
                packages if isinstance(packages, Unread) else Unread(Problem.ERROR, repr(packages))
            )
    return found


def _pretty_name(text: str) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', text, re.MULTILINE)
    if match is None:
        raise ValueError("no PRETTY_NAME")
    return match[1]
