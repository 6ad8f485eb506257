"""InfiniBand, RoCE and EFA devices, and network interfaces, from sysfs. Asks a Source; pure otherwise."""

from __future__ import annotations

import re
from dataclasses import replace

from checks.collect_pci import last_part
from checks.evidence import Source
from checks.facts import Counter, Gid, Interface, Rdma, RdmaDevice, RdmaPort
from checks.reading import Problem, Reading, Unread, integer, line

INFINIBAND = "/sys/class/infiniband"
NET = "/sys/class/net"
PORT_COUNTERS = (
    "link_downed",
    "symbol_error",
    "link_error_recovery",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
)
"""Files of `counters/` (drivers/infiniband/core/sysfs.c, pma_attrs). Some drivers log each read of others."""
HARDWARE_COUNTERS = (
    "rnr_nak_retry_err",
    "local_ack_timeout_err",
    "roce_slow_restart",
    "rx_drops",
    "retrans_timeout_events",
)
"""Files of `hw_counters/`: the first three mlx5's (drivers/infiniband/hw/mlx5/counters.c), the last two EFA's."""
FI_INFO = ("fi_info", "/opt/amazon/efa/bin/fi_info")
"""On PATH, and where the EFA installer puts libfabric and its tools, which only a login shell's profile has on PATH
(docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-start.html)."""
EFA_PROVIDER = re.compile(r"^provider:\s*efa", re.MULTILINE)
WATCHED_SECONDS = 1.0
MOST_GIDS = 32
"""A port of mlx5 has 256 places for GIDs, of which the first few are taken."""
VIRTUAL = re.compile(r"(veth|cali|cilium|lxc|docker|br-|tap|tunl|flannel|vxlan|nodelocaldns|kube-|dummy)")


def collect_rdma(source: Source) -> Rdma:
    names = source.list(INFINIBAND)
    devices: tuple[RdmaDevice, ...] | Unread = names if isinstance(names, Unread) else ()
    if not isinstance(names, Unread):
        began = source.ask("monotonic", "rdma")
        first = {
            (name, port): _counts(source, name, port, 0) for name in names for port in _ports(source, name)
        }
        found = [_device(source, name) for name in names]
        if names:
            source.wait(WATCHED_SECONDS)
        second = {key: _counts(source, *key, 1) for key in first}
        ended = source.ask("monotonic", "rdma", sample=1)
        seconds = ended - began if isinstance(began, float) and isinstance(ended, float) else 0.0
        devices = tuple(
            replace(
                device,
                ports=tuple(
                    replace(port, counters=_paired(first[key], second[key], seconds))
                    for port in device.ports
                    for key in [(port.device, str(port.port))]
                ),
            )
            for device in found
        )
    verbs = source.list("/dev/infiniband")
    said, tool = _libfabric(source, devices)
    return Rdma(
        devices=devices,
        verbs=verbs
        if isinstance(verbs, Unread)
        else tuple(name for name in verbs if name.startswith("uverbs")),
        peermem=_module(source, "nvidia_peermem", "nv_peer_mem", "efa_nv_peermem"),
        dmabuf=_dmabuf(source),
        libfabric=said,
        libfabric_tool=tool,
    )


def _device(source: Source, name: str) -> RdmaDevice:
    folder = f"{INFINIBAND}/{name}"
    interfaces = source.list(f"{folder}/device/net")
    return RdmaDevice(
        name=name,
        pci=last_part(source.link(f"{folder}/device")),
        driver=last_part(source.link(f"{folder}/device/driver")),
        numa_node=integer(source.read(f"{folder}/device/numa_node"), f"{name} numa_node"),
        firmware=line(source.read(f"{folder}/fw_ver"), f"{name} fw_ver"),
        board=line(source.read(f"{folder}/board_id"), f"{name} board_id"),
        ports=tuple(_port(source, name, port) for port in _ports(source, name)),
        interfaces=() if isinstance(interfaces, Unread) else interfaces,
    )


def _ports(source: Source, name: str) -> tuple[str, ...]:
    ports = source.list(f"{INFINIBAND}/{name}/ports")
    return () if isinstance(ports, Unread) else tuple(port for port in ports if port.isdigit())


def _port(source: Source, name: str, port: str) -> RdmaPort:
    folder = f"{INFINIBAND}/{name}/ports/{port}"

    def text(file: str) -> str | Unread:
        return line(source.read(f"{folder}/{file}"), f"{name} {file}")

    layer = text("link_layer")
    return RdmaPort(
        device=name,
        port=int(port),
        state=text("state"),
        phys_state=text("phys_state"),
        rate=text("rate"),
        link_layer=layer,
        lid=text("lid"),
        gids=_gids(source, folder),
        counters=(),
    )


def _gids(source: Source, folder: str) -> tuple[Gid, ...] | Unread:
    places = source.list(f"{folder}/gids")
    if isinstance(places, Unread):
        return places
    found: list[Gid] = []
    for index in sorted(int(place) for place in places if place.isdigit())[:MOST_GIDS]:
        gid = line(source.read(f"{folder}/gids/{index}"))
        # An empty place reads as zeros, or as EINVAL where it is of another network namespace.
        if isinstance(gid, Unread):
            if gid.problem in (Problem.TIMED_OUT, Problem.NOT_PERMITTED):
                return gid
            continue
        if set(gid) <= set("0:"):
            continue
        found.append(
            Gid(
                index,
                gid,
                line(source.read(f"{folder}/gid_attrs/types/{index}"), f"GID {index} type"),
                line(source.read(f"{folder}/gid_attrs/ndevs/{index}"), f"GID {index} ndev"),
            )
        )
    return tuple(found)


def _counts(source: Source, name: str, port: str, sample: int) -> dict[str, int | Unread]:
    folder = f"{INFINIBAND}/{name}/ports/{port}"
    counts: dict[str, int | Unread] = {}
    standard = source.list(f"{folder}/counters")
    hardware = source.list(f"{folder}/hw_counters")
    if isinstance(standard, Unread) and isinstance(hardware, Unread):
        return {"counters": standard}
    # EFA has no counters/ but hw_counters/; every other device has both, so a missing file there is unknown.
    if not isinstance(standard, Unread):
        for file in PORT_COUNTERS:
            counts[file] = integer(source.read(f"{folder}/counters/{file}", sample), f"{name} {file}")
    if not isinstance(hardware, Unread):
        for file in (file for file in HARDWARE_COUNTERS if file in hardware):
            counts[file] = integer(source.read(f"{folder}/hw_counters/{file}", sample), f"{name} {file}")
    return counts


def _paired(
    first: dict[str, int | Unread], second: dict[str, int | Unread], seconds: float
) -> tuple[Counter, ...]:
    nothing = Unread(Problem.ERROR, "gone at the second look")
    return tuple(Counter(name, value, second.get(name, nothing), seconds) for name, value in first.items())


def _module(source: Source, *names: str) -> bool | Unread:
    modules = source.read("/proc/modules")
    if isinstance(modules, Unread):
        return modules
    return any(row.split(" ", 1)[0] in names for row in modules.splitlines())


def _dmabuf(source: Source) -> bool | Unread:
    """The open kernel modules of NVIDIA export GPU memory as dma-buf, to kernels from 5.12 (NCCL asks for the same).

    /proc/driver/nvidia/version says `NVIDIA UNIX Open Kernel Module for x86_64 …`.
    """
    version = source.read("/proc/driver/nvidia/version")
    release = line(source.read("/proc/sys/kernel/osrelease"))
    if isinstance(version, Unread):
        return version
    if isinstance(release, Unread):
        return release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None:
        return Unread(Problem.ERROR, f"kernel release {release!r}")
    return "Open Kernel Module" in version and (int(numbers[1]), int(numbers[2])) >= (5, 12)


def _libfabric(source: Source, devices: tuple[RdmaDevice, ...] | Unread) -> tuple[Reading, str]:
    """What fi_info says, and which one: the first that knows EFA, else the first that says anything."""
    if isinstance(devices, Unread) or not any(device.driver == "efa" for device in devices):
        return Unread(Problem.NOT_RECORDED, "no EFA device, so fi_info was not asked"), ""
    said = []
    for tool in FI_INFO:
        answer = source.run([tool, "-p", "efa"])
        if isinstance(answer, str) and EFA_PROVIDER.search(answer):
            return answer, tool
        said.append((answer, tool))
    texts = [one for one in said if isinstance(one[0], str)]
    # A tool that is there and complains says more than one that is missing, or that an older bundle did not ask.
    absent = (Problem.MISSING, Problem.NOT_RECORDED)
    complaints = [one for one in said if isinstance(one[0], Unread) and one[0].problem not in absent]
    return (*texts, *complaints, *said)[0]


# --- interfaces -------------------------------------------------------------------------------------------


def collect_interfaces(source: Source, rdma: Rdma) -> tuple[Interface, ...] | Unread:
    names = source.list(NET)
    if isinstance(names, Unread):
        return names
    real = [name for name in names if not VIRTUAL.match(name) and name != "bonding_masters"]
    routes = source.read("/proc/net/route")
    default = [] if isinstance(routes, Unread) else _default_interfaces(routes)
    devices = () if isinstance(rdma.devices, Unread) else rdma.devices
    lossless = {
        interface
        for device in devices
        for port in device.ports
        if port.link_layer == "Ethernet" and device.driver != "efa"
        for interface in device.interfaces
    }
    return tuple(_interface(source, name, default, lossless) for name in real)


def _interface(source: Source, name: str, default: list[str], lossless: set[str]) -> Interface:
    folder = f"{NET}/{name}"

    def number(file: str, sample: int = 0) -> int | Unread:
        return integer(source.read(f"{folder}/{file}", sample), f"{name} {file}")

    master = last_part(source.link(f"{folder}/master"))
    address = source.ask("ipv4", name)
    return Interface(
        name=name,
        state=line(source.read(f"{folder}/operstate"), f"{name} operstate"),
        mtu=number("mtu"),
        speed=number("speed"),
        pci=last_part(source.link(f"{folder}/device")),
        master=None if isinstance(master, Unread) else master,
        kind=number("type"),
        ipv4=address if isinstance(address, str | Unread) else Unread(Problem.ERROR, str(address)),
        carrier_changes=(number("carrier_changes"), number("carrier_changes", 1)),
        priority_flow=source.run(["dcb", "-j", "pfc", "show", "dev", name])
        if name in lossless
        else Unread(Problem.NOT_RECORDED, f"{name} is no RoCE interface"),
        default_route=name in default,
    )


def _default_interfaces(routes: str) -> list[str]:
    """Interfaces of routes to 0.0.0.0/0 (net/ipv4/fib_trie.c, fib_route_seq_show)."""
    rows = [row.split() for row in routes.splitlines()[1:]]
    return [row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"]
