"""What is known of one node: frozen facts, each value beside the reason why it is not known. Pure.

The collectors (`checks.collect`) fill them from a Source, the checks judge them, and whoever derives settings from a
node's hardware reads them: `collect_node(source)` gives a `Node`, live or from a bundle.
PCI addresses are the kernel's: lower case, four digits of domain, `0000:9b:00.0`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from checks.reading import Reading, Unread, parsed

Text = str | Unread
Number = int | Unread


@dataclass(frozen=True)
class RemappedRows:
    """nvmlDeviceGetRemappedRows: rows by cause, and whether a remap waits for a reset or has failed."""

    correctable: int
    uncorrectable: int
    pending: bool
    failed: bool


@dataclass(frozen=True)
class Process:
    pid: int
    name: Text
    alive: bool | Unread
    """Whether /proc knows the pid: NVML keeps dead ones for a while, and knows those of other containers by theirs."""


@dataclass(frozen=True)
class NvLink:
    link: int
    active: bool | Unread
    speed: Number
    """MB/s in one direction, as the driver counts: 25000, 26562, 53125."""
    errors: tuple[Number, Number]
    """Replay, recovery and CRC errors together, at the start and at the end of the collection."""


@dataclass(frozen=True)
class FabricState:
    """nvmlDeviceGetGpuFabricInfo: what fabric manager has told this GPU."""

    state: int
    """0 not supported, 1 not started, 2 in progress, 3 completed."""
    status: int
    """An NVML return code; it counts once the state is completed."""
    clique: int
    cluster: str
    health: int | None = None
    """Bits of NVML_GPU_FABRIC_HEALTH_MASK_*."""
    summary: int | None = None
    """NVML_GPU_FABRIC_HEALTH_SUMMARY_*: 0 not supported, 1 healthy, 2 unhealthy, 3 limited capacity."""


@dataclass(frozen=True)
class Gpu:
    index: int
    bus_id: Text
    name: Text
    uuid: Text
    memory_total: Number
    """Bytes, as memory_used."""
    memory_used: Number
    architecture: Number
    """7 Ampere, 8 Ada, 9 Hopper, 10 Blackwell."""
    ecc: Number
    """1 where ECC is on."""
    recovery_action: Number
    ecc_volatile_uncorrected: Number
    sram_uncorrected: Number
    """Aggregate over the GPU's life, as the next two."""
    sram_corrected: Number
    dram_corrected: Number
    remapped: RemappedRows | Unread
    sram_threshold: Number
    """1 where NVIDIA's threshold of SRAM errors is exceeded (drivers from 550 on tell, as the next two)."""
    repairs_pending: tuple[str, ...] | Unread
    """`channel`, `TPC`: what a reset would repair."""
    unrepairable: Number
    """1 where memory cannot be repaired any more."""
    clock_reasons: Number
    """Bits of nvmlClocksEventReason*."""
    temperature: Number
    """Degrees C."""
    temperature_slowdown: Number
    """Degrees at which the GPU slows down."""
    temperature_margin: Number
    """Degrees left to the limit (T.Limit), which newer GPUs tell instead."""
    memory_temperature: Number
    pcie_generation: Number
    pcie_generation_max: Number
    pcie_width: Number
    pcie_width_max: Number
    processes: tuple[Process, ...] | Unread
    fabric: FabricState | Unread
    nvlinks: tuple[NvLink, ...] | Unread
    mig: Number
    lost: tuple[int, ...]
    """NVML's return codes that mean a lost GPU, among all its answers: 11, 14, 15, 16."""


@dataclass(frozen=True)
class Gpus:
    driver: Text
    cuda: Text
    """CUDA version that the driver supports, `13.1`."""
    count: Number
    gpus: tuple[Gpu, ...]
    device_files: tuple[str, ...] | Unread
    """nvidia0, nvidia1, … under /dev."""


@dataclass(frozen=True)
class PciDevice:
    """A GPU, a network adapter, or a bridge on the way to one."""

    address: str
    vendor: Text
    device: Text
    pci_class: Text
    numa_node: Number
    speed: Text
    """`32.0 GT/s PCIe`, as the next."""
    speed_max: Text
    width: Number
    width_max: Number
    parents: tuple[str, ...] | Unread
    """Bridges from the root port down to the device."""
    driver: Text
    iommu: Text
    """Kind of its IOMMU group, `identity` or `DMA-FQ`; MISSING where the IOMMU is off."""
    fallen: bool | Unread
    """Its configuration space reads as ones: it has fallen off the bus."""


@dataclass(frozen=True)
class AerCounters:
    """How many errors a device's PCIe link had since boot, as the kernel counts them for AER."""

    address: str
    corrected: tuple[Number, Number]
    """At the start and at the end of the collection."""
    non_fatal: Number
    fatal: Number


@dataclass(frozen=True)
class Acs:
    """Bridges whose ACSCtl has SrcValid+, as `lspci -vvv` tells root."""

    enabled: tuple[str, ...]
    redirecting: tuple[str, ...]
    """Those that also send peer-to-peer traffic up to the root (ReqRedir+)."""
    bridges: int
    readable: bool
    fallen: tuple[str, ...]
    """Devices shown with (rev ff): they answer with ones only."""


@dataclass(frozen=True)
class Gid:
    index: int
    gid: str
    kind: Text
    """`IB/RoCE v1` or `RoCE v2`."""
    interface: Text

    @property
    def ipv4(self) -> str | None:
        """The address inside an IPv4-mapped GID, 0000:…:ffff:0a00:0001."""
        mapped = re.fullmatch(r"(?:0000:){5}ffff:([0-9a-f]{4}):([0-9a-f]{4})", self.gid)
        if mapped is None:
            return None
        number = int(mapped[1] + mapped[2], 16)
        return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


@dataclass(frozen=True)
class Counter:
    """A counter of the kernel at two moments; judged by growth, because its level is as old as the machine."""

    name: str
    first: Number
    second: Number
    seconds: float


@dataclass(frozen=True)
class RdmaPort:
    device: str
    port: int
    state: Text
    phys_state: Text
    rate: Text
    """`400 Gb/sec (4X NDR)`."""
    link_layer: Text
    """`InfiniBand` or `Ethernet`."""
    lid: Text
    gids: tuple[Gid, ...] | Unread
    counters: tuple[Counter, ...]

    @property
    def gigabits(self) -> float | Unread:
        return parsed(self.rate, _gigabits, f"{self.device} rate")


def _gigabits(text: str) -> float:
    number = float(text.split()[0])
    if not 0 < number < float("inf"):
        raise ValueError("no rate")
    return number


@dataclass(frozen=True)
class RdmaDevice:
    name: str
    pci: Text
    driver: Text
    """mlx5_core, efa, …: the kernel's driver of the PCI device."""
    numa_node: Number
    firmware: Text
    board: Text
    ports: tuple[RdmaPort, ...]
    interfaces: tuple[str, ...]
    """Network interfaces of the same PCI device."""


@dataclass(frozen=True)
class Rdma:
    devices: tuple[RdmaDevice, ...] | Unread
    verbs: tuple[str, ...] | Unread
    """uverbs0, … under /dev/infiniband."""
    peermem: bool | Unread
    dmabuf: bool | Unread
    libfabric: Reading
    """What `fi_info -p efa` printed."""
    libfabric_tool: str = ""
    """The fi_info that said so."""


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    name: str
    state: Text
    """`up`, `down`, `unknown`."""
    mtu: Number
    speed: Number
    """Mb/s; -1 where the driver cannot say."""
    pci: Text
    master: str | None
    """The bond or bridge that it is part of."""
    kind: Number
    """ARPHRD: 1 Ethernet, 32 InfiniBand, 772 loopback (include/uapi/linux/if_arp.h)."""
    ipv4: Text
    carrier_changes: tuple[Number, Number]
    priority_flow: Reading
    """PFC as `mlnx_qos` or the driver's files tell it."""
    default_route: bool


@dataclass(frozen=True)
class FileSystem:
    path: str
    kind: Text
    """From /proc/self/mounts: nfs4, tmpfs, …"""
    size: Number
    """Bytes, as free (what an ordinary user may still write)."""
    free: Number
    inodes: Number
    inodes_free: Number
    written: float | Unread
    """Seconds for a small file written, synced, read and removed."""


@dataclass(frozen=True)
class Host:
    virtual: bool | Unread
    limits: Mapping[str, str] | Unread
    """`Max locked memory` -> soft limit, as in /proc/self/limits."""
    memory: Number
    """Bytes of RAM."""
    governors: tuple[str, ...] | Unread
    clock_source: Text
    clock_synchronized: bool | Unread
    iommu_groups: Number
    kernel_log: Reading


@dataclass(frozen=True)
class Names:
    """What names lead to: name -> addresses."""

    own: Text
    """The host's own name, which Gloo and gethostname(2) use. Slurm may call the node by another."""
    resolved: Mapping[str, tuple[str, ...] | Unread]
    master: Reading | None
    """Milliseconds to connect to the job's first node; None where nobody asked."""


@dataclass(frozen=True)
class Node:
    """Everything that was collected on one node."""

    name: str
    gpus: Gpus
    pci: tuple[PciDevice, ...] | Unread
    acs: Acs | Unread
    aer: tuple[AerCounters, ...]
    rdma: Rdma
    interfaces: tuple[Interface, ...] | Unread
    file_systems: tuple[FileSystem, ...]
    host: Host
    names: Names
    environment: Mapping[str, str] | Unread
    """Without secrets."""
    named_files: Mapping[str, bool | Unread] = field(default_factory=dict)
    """Whether the files exist that variables name: NCCL_TOPO_FILE=/etc/nccl/topo.xml -> True."""
    versions: Mapping[str, Text] = field(default_factory=dict)
    """kernel, driver, cuda, nccl, torch, ofed, python, …"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each collector cost."""
