"""The node itself: limits, memory for sharing, clocks, file systems, names. Pure."""

from __future__ import annotations

from checks.expectations import Expectations
from checks.facts import FileSystem, Node
from checks.findings import Finding, blind, fail, result, warn
from checks.hostlist import folded
from checks.judge_rdma import without_rdma
from checks.reading import Problem, Unread, counted
from checks.registry import check
from checks.verdict import CheckResult, Verdict

GIB = 1 << 30
NO_ADDRESS = (Problem.ERROR, Problem.TIMED_OUT)
"""The resolver's own answer that there is no such name, and a resolver that is still looking."""
MEMLOCK_LEAST = 16 * GIB
FILES_FAIL, FILES_WARN = 1024, 4096
SHM_FAIL, SHM_WARN = 128 << 20, GIB
FREE_FAIL, FREE_WARN = GIB >> 2, 2 * GIB
INODES_LEAST = 1000
SLOW_WRITE = 1.0
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies", "refined-jiffies")


@check("host.memlock", reads=["read /proc/self/limits"], source="RDMA pins memory: unlimited or ≥ 16 GiB")
def memlock(node: Node, expected: Expectations) -> list[CheckResult]:
    """An RDMA program may lock the memory that its adapter reads."""
    if without_rdma(node, expected):
        return []
    return _limit(
        node, "host.memlock", "Max locked memory", MEMLOCK_LEAST, MEMLOCK_LEAST, "PropagateResourceLimits"
    )


@check(
    "host.nofile",
    reads=["read /proc/self/limits"],
    source="NCCL and data loaders open files by rank: NVIDIA/nccl",
)
def nofile(node: Node, expected: Expectations) -> list[CheckResult]:
    """A process may open enough files for its connections."""
    return _limit(node, "host.nofile", "Max open files", FILES_FAIL, FILES_WARN, "ulimit -n")


def _limit(node: Node, name: str, limit: str, least: int, better: int, remedy: str) -> list[CheckResult]:
    wish = f"at least {better >> 30} GiB or unlimited" if better >= GIB else f"at least {better}"
    limits = node.host.limits
    if isinstance(limits, Unread):
        return result(name, [blind(limits)], "", wish)
    value = limits.get(limit, "")
    findings: list[Finding] = []
    if value != "unlimited":
        if not value.isdigit():
            findings.append(blind(Unread(Problem.ERROR, f"{limit}: {value!r}")))
        elif int(value) < least:
            findings.append(fail(f"{limit} {value}", f"raise it: {remedy}, or limits.conf of slurmd"))
        elif int(value) < better:
            findings.append(warn(f"{limit} {value}", f"raise it: {remedy}"))
    return result(name, findings, f"{limit} {value}", wish)


@check("host.shm", reads=["statvfs /dev/shm"], source="NCCL and data loaders share memory there (llm-d#352)")
def shared_memory(node: Node, expected: Expectations) -> list[CheckResult]:
    """/dev/shm has room."""
    name = "host.shm"
    wish = f"at least {SHM_WARN >> 20} MiB free"
    shm = next((one for one in node.file_systems if one.path == "/dev/shm"), None)
    if shm is None:
        return result(name, [blind(Unread(Problem.NOT_RECORDED, "/dev/shm"))], "", wish)
    if isinstance(shm.free, Unread):
        return result(name, [blind(shm.free, "/dev/shm")], "", wish)
    findings = []
    text = f"{shm.free >> 20} MiB free" + ("" if isinstance(shm.size, Unread) else f" of {shm.size >> 20}")
    remedy = "remove what dead jobs left in /dev/shm; in a container --shm-size or --ipc=host"
    if shm.free < SHM_FAIL:
        findings.append(fail(text, remedy))
    elif shm.free < SHM_WARN:
        findings.append(warn(text, remedy))
    return result(name, findings, text, wish)


@check(
    "host.governor",
    reads=["list /sys/devices/system/cpu/cpufreq"],
    source="Documentation/admin-guide/pm/cpufreq",
)
def governor(node: Node, expected: Expectations) -> list[CheckResult]:
    """CPUs run at full clock: their governor is performance."""
    name = "host.governor"
    found = node.host.governors
    if isinstance(found, Unread):
        # A guest's clock is its hypervisor's.
        hidden = found.problem is Problem.MISSING and node.host.virtual is True
        return [] if hidden else result(name, [blind(found)], "", "performance")
    slow = [one for one in found if one != "performance"]
    findings = (
        [warn(", ".join(slow), "cpupower frequency-set -g performance, by an administrator")] if slow else []
    )
    return result(name, findings, ", ".join(found) or "the firmware decides", "performance")


@check(
    "clock.source",
    reads=["read /sys/devices/system/clocksource/clocksource0/current_clocksource"],
    source="Documentation/ABI/testing/sysfs-devices-clocksource",
)
def clock_source(node: Node, expected: Expectations) -> list[CheckResult]:
    """The kernel reads the time from the CPU, not from a slow chip."""
    name = "clock.source"
    source = node.host.clock_source
    if isinstance(source, Unread):
        return result(name, [blind(source)], "", "tsc")
    findings = (
        [warn(source, "the kernel found the CPU's counter unstable: see its log")]
        if source in SLOW_CLOCKS
        else []
    )
    return result(name, findings, source, "tsc, or the hypervisor's")


@check("clock.sync", reads=["clock"], source="adjtimex(2): STA_UNSYNC, TIME_ERROR")
def clock_sync(node: Node, expected: Expectations) -> list[CheckResult]:
    """Something keeps the clock right."""
    name = "clock.sync"
    synchronized = node.host.clock_synchronized
    if isinstance(synchronized, Unread):
        return result(name, [blind(synchronized)], "", "synchronized")
    findings = (
        []
        if synchronized
        else [warn("not synchronized", "ask an administrator to start chronyd or systemd-timesyncd")]
    )
    return result(name, findings, "synchronized", "synchronized")


# --- file systems -----------------------------------------------------------------------------------------


def _job_file_systems(node: Node) -> list[FileSystem]:
    return [one for one in node.file_systems if one.path != "/dev/shm"]


def _nothing_asked(name: str) -> list[CheckResult]:
    return result(name, [blind(Unread(Problem.NOT_RECORDED, "no folder"))], "", "folders")


@check("fs.space", reads=["statvfs /tmp"], source="a full disk ends a job at its first checkpoint")
def space(node: Node, expected: Expectations) -> list[CheckResult]:
    """The job's folders have room for more data and more files."""
    name = "fs.space"
    findings: list[Finding] = []
    folders = _job_file_systems(node)
    for one in folders:
        if isinstance(one.free, Unread):
            findings.append(_gone(one, one.free))
        elif one.free < FREE_FAIL:
            findings.append(fail(f"{one.path}: {one.free >> 20} MiB free", "remove what is not needed"))
        elif one.free < FREE_WARN:
            findings.append(warn(f"{one.path}: {one.free >> 20} MiB free", "remove what is not needed"))
        # File systems without a fixed number of inodes (btrfs, many parallel ones) say 0 of 0.
        limited = isinstance(one.inodes, int) and one.inodes > 0
        if limited and isinstance(one.inodes_free, int) and one.inodes_free < INODES_LEAST:
            findings.append(
                fail(f"{one.path}: {counted(one.inodes_free, 'inode')} free", "remove small files")
            )
    shown = ", ".join(f"{one.path} {one.free >> 30} GiB" for one in folders if isinstance(one.free, int))
    return (
        result(name, findings, shown, f"at least {FREE_WARN >> 30} GiB free")
        if folders
        else _nothing_asked(name)
    )


def _gone(one: FileSystem, why: Unread) -> Finding:
    if why.problem is Problem.MISSING:
        return fail(f"{one.path} is not there", "is its file system mounted on this node?")
    return blind(why, one.path)


@check("fs.write", reads=["written /tmp"], source="write, fsync, read back, with a deadline")
def write(node: Node, expected: Expectations) -> list[CheckResult]:
    """A small file can be written to the job's folders, synced and read back."""
    name = "fs.write"
    findings: list[Finding] = []
    folders = _job_file_systems(node)
    for one in folders:
        took = one.written
        if isinstance(took, Unread):
            # The write itself was refused: the disk is full, read-only, or not ours.
            if took.problem in (Problem.ERROR, Problem.NOT_PERMITTED):
                findings.append(
                    fail(f"{one.path}: {took.detail}", "mounted read-write, with room, for this user?")
                )
            else:
                findings.append(_gone(one, took))
        elif took > SLOW_WRITE:
            findings.append(
                warn(f"{one.path}: {took:.1f} s for 4 KiB", "a loaded server; checkpoints will wait")
            )
    slowest = max((one.written for one in folders if isinstance(one.written, float)), default=0.0)
    shown = f"{counted(len(folders), 'folder')}, at most {slowest * 1000:.0f} ms"
    return result(name, findings, shown, f"under {SLOW_WRITE:g} s") if folders else _nothing_asked(name)


# --- names ------------------------------------------------------------------------------------------------


@check(
    "names.resolve", reads=["resolve *"], source="getaddrinfo(3); Gloo and NCCL ask for the node's own name"
)
def resolve(node: Node, expected: Expectations) -> list[CheckResult]:
    """This node's name and its neighbours' lead to addresses, and not to the loopback where there are neighbours."""
    name = "names.resolve"
    findings: list[Finding] = []
    remedy = "ask for a DNS or /etc/hosts entry, or set NodeAddr in slurm.conf"
    own, resolved = node.names.own, node.names.resolved
    if isinstance(own, Unread):
        findings.append(blind(own))
    strangers = [
        host
        for host, addresses in resolved.items()
        if host in expected.peers
        and host != own
        and isinstance(addresses, Unread)
        and addresses.problem in NO_ADDRESS
    ]
    if strangers:
        # A neighbour may still be reached by its address. No name where all are unknown: such nodes are folded.
        asked = [host for host in expected.peers if host in resolved]
        which = "no neighbour" if len(strangers) == len(asked) else f"not {folded(strangers)}"
        findings.append(warn(f"{which} resolves", remedy))
    for host, addresses in resolved.items():
        if host in strangers:
            continue
        # The resolver's own answer is ERROR: there is no such name.
        if isinstance(addresses, Unread) and addresses.problem is Problem.ERROR:
            findings.append(fail(f"{host}: {addresses.detail}", remedy))
        elif isinstance(addresses, Unread):
            findings.append(blind(addresses, host))
        elif expected.peers and all(address.startswith(("127.", "::1")) for address in addresses):
            findings.append(
                warn(f"{host} is {addresses[0]}", "other nodes cannot reach it there: /etc/hosts")
            )
    return result(name, findings, f"{counted(len(resolved), 'name')} resolved", "an address for each")


@check(
    "names.master",
    reads=["connect *"],
    source="a rank that cannot reach the first node waits until its time-out",
)
def master(node: Node, expected: Expectations) -> list[CheckResult]:
    """The job's first node accepts a connection."""
    name = "names.master"
    took = node.names.master
    if took is None:
        return []
    if isinstance(took, Unread):
        if took.problem in (Problem.ERROR, Problem.TIMED_OUT):
            remedy = "its address is wrong for this node, nothing listens there, or a firewall drops the connection"
            return [CheckResult(name, Verdict.FAIL, took.detail, "connects", remedy)]
        return result(name, [blind(took)], "", "connects")
    return [CheckResult(name, Verdict.PASS, took, "connects")]
