"""What is in this machine and how it hangs together: sockets, GPUs, network cards, and the PCIe tree between them.

From /sys, whose root folder is an argument, so that a tree captured elsewhere reads the same; the GPUs' names and their
NVLinks from NVML (`recipes.lib.nvlinks`). No torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.lib.nvlinks import Gpu

RELATIONS: Mapping[str, str] = {
    "X": "itself",
    "NV#": "a bonded set of # NVLinks",
    "PIX": "at most a single PCIe bridge",
    "PXB": "several PCIe bridges, without the host bridge",
    "PHB": "a PCIe host bridge, typically the CPU",
    "NODE": "the interconnect between PCIe host bridges of one NUMA node",
    "SYS": "the interconnect between NUMA nodes",
}
"""The words of `nvidia-smi topo -m`, from near to far; what a message between two devices passes."""

_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ROOT_COMPLEX = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_GIGATRANSFERS = re.compile(r"([\d.]+) GT/s")
_NVIDIA, _DISPLAY = "0x10de", ("0x0300", "0x0302")
_EARLY_ENCODING = {2.5: 0.8, 5.0: 0.8}
"""Data bits per bit on the wire: 8b/10b in the first two generations, 128b/130b from 8 GT/s on."""


@dataclass(frozen=True)
class Numa:
    """One NUMA node: a socket, or a part of one."""

    number: int
    cpus: str
    """As the kernel lists them: "0-23,48-71"."""
    memory_gib: float
    distances: tuple[int, ...]
    """To every node, itself included; 10 is local."""


@dataclass(frozen=True)
class Device:
    """A GPU or a network card."""

    name: str
    """GPU0, mlx5_0, eth0."""
    kind: str
    """gpu or nic."""
    model: str
    address: str
    """On the PCI bus; empty for a device that is not on one."""
    path: tuple[str, ...]
    """From the root complex down to the device itself: pci0000:15, 0000:15:01.0, ..., 0000:18:00.0."""
    numa: int
    """-1: the firmware does not say."""
    pcie: str
    """The link as it runs now: "32 GT/s x16"; empty where the kernel does not say."""
    gigabytes: float | None
    """GB/s in one direction: of the PCIe link for a GPU, of the port for a network card. None: not known."""


@dataclass(frozen=True)
class Machine:
    """One node."""

    name: str
    numa: tuple[Numa, ...]
    devices: tuple[Device, ...]
    gpus: tuple[Gpu, ...]
    """What NVML says, in the order of the devices of kind gpu."""
    cpu: str = ""

    def relation(self, one: Device, other: Device) -> str:
        """What is between two devices, in nvidia-smi's words."""
        if one == other:
            return "X"
        if one.kind == other.kind == "gpu" and self.gpus:
            names = [each.name for each in self.devices if each.kind == "gpu"]
            links = self.gpus[names.index(one.name)].links_to(self.gpus[names.index(other.name)])
            if links:
                return f"NV{links}"
        return pcie_relation(one, other, one_socket=len(self.numa) == 1)

    def matrix(self) -> list[list[str]]:
        """The relation of every device to every other one."""
        return [[self.relation(one, other) for other in self.devices] for one in self.devices]

    def kind_of_node(self) -> Machine:
        """The same without what differs between equal nodes."""
        gpus = tuple(dataclasses.replace(gpu, uuid="") for gpu in self.gpus)
        return dataclasses.replace(self, name="", gpus=gpus)


def pcie_relation(one: Device, other: Device, *, one_socket: bool = False) -> str:
    """What a message between two devices passes on PCIe. Pure.

    Where the firmware does not say which socket a device belongs to, they are taken for far apart, unless there is one
    socket alone.

    By where their paths part, as NCCL did before it had a graph (pciDistance, src/topo.cc of 2.4).
    """
    if not one.path or not other.path or one.path[0] != other.path[0]:
        together = one_socket or (one.numa == other.numa and one.numa >= 0)
        return "NODE" if together else "SYS"
    shared = 0
    for mine, its in zip(one.path, other.path, strict=False):
        if mine != its:
            break
        shared += 1
    if shared == 1:
        return "PHB"  # the root complex alone
    deepest = max(len(one.path), len(other.path))
    # Below the last shared bridge: the switch's port and the device on each side, or only the device's functions.
    return "PIX" if deepest - shared <= 2 else "PXB"


def read_machine(name: str, gpus: Sequence[Gpu], root: Path = Path("/")) -> Machine:
    """This machine, or the one whose /sys and /proc were copied below `root`."""
    pci, net = root / "sys/bus/pci/devices", root / "sys/class/net"
    return Machine(
        name=name,
        numa=tuple(_numa_nodes(root / "sys/devices/system/node")),
        devices=(*_gpus(pci, gpus), *_cards(root / "sys/class/infiniband", net)),
        gpus=tuple(gpus),
        cpu=_cpu(root / "proc/cpuinfo"),
    )


def read_text(file: Path) -> str:
    """A file of /sys without its line end; empty where it is not there or cannot be read, as /sys often says no."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _cpu(file: Path) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", read_text(file), re.MULTILINE)
    return found[1] if found else ""


def _numa_nodes(folder: Path) -> list[Numa]:
    found = []
    for node in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        memory = re.search(r"MemTotal:\s+(\d+) kB", read_text(node / "meminfo"))
        distances = tuple(int(word) for word in read_text(node / "distance").split())
        gib = int(memory[1]) / 2**20 if memory else 0.0
        found.append(Numa(int(node.name[4:]), read_text(node / "cpulist"), gib, distances))
    return found


def _gpus(pci: Path, gpus: Sequence[Gpu]) -> list[Device]:
    """The GPUs that NVML names, in its order; without NVML those of NVIDIA that the bus shows."""
    listed = {path.name: path for path in sorted(pci.glob("*"))}
    wanted = [(gpu.address, gpu.model) for gpu in gpus]
    if not gpus:
        shown = [name for name, path in listed.items() if _is_nvidia_gpu(path)]
        wanted = [(name, "NVIDIA GPU, no driver") for name in shown]
    return [
        _device(f"GPU{number}", "gpu", model, listed.get(address, pci / address), address)
        for number, (address, model) in enumerate(wanted)
    ]


def _is_nvidia_gpu(path: Path) -> bool:
    return read_text(path / "vendor") == _NVIDIA and read_text(path / "class").startswith(_DISPLAY)


def _cards(infiniband: Path, net: Path) -> list[Device]:
    """RDMA devices by their own name, and Ethernet interfaces that belong to none of them."""
    found, taken = [], set()
    for card in sorted(infiniband.glob("*"), key=lambda path: _natural(path.name)):
        device = _device(card.name, "nic", read_text(card / "hca_type") or "RDMA", card / "device")
        taken.add((card / "device").resolve())
        found.append(dataclasses.replace(device, gigabytes=_rdma_gigabytes(card)))
    for interface in sorted(net.glob("*"), key=lambda path: _natural(path.name)):
        hardware = interface / "device"
        if not hardware.exists() or hardware.resolve() in taken:
            continue  # virtual (lo, bridges), or an RDMA device's
        speed = read_text(interface / "speed")
        gigabytes = int(speed) / 8e3 if speed.isdigit() and int(speed) else None
        device = _device(interface.name, "nic", "Ethernet", hardware)
        found.append(dataclasses.replace(device, gigabytes=gigabytes))
    return found


def _rdma_gigabytes(card: Path) -> float | None:
    """Of all ports: "400 Gb/sec (4X NDR)"."""
    rates = [read_text(port / "rate").split()[:1] for port in sorted((card / "ports").glob("*"))]
    found = [float(words[0]) / 8 for words in rates if words and re.fullmatch(r"[\d.]+", words[0])]
    return sum(found) if found else None


def _device(name: str, kind: str, model: str, folder: Path, address: str = "") -> Device:
    parts = folder.resolve().parts if folder.exists() else ()
    path = tuple(part for part in parts if _ROOT_COMPLEX.fullmatch(part) or _PCI_ADDRESS.fullmatch(part))
    numa = -1
    pcie, gigabytes = "", None
    if path:
        # A virtual device (virtio1) hangs below its PCI function, which knows the socket and the link.
        function = Path(*parts[: parts.index(path[-1]) + 1])
        numa_text = read_text(function / "numa_node")
        numa = int(numa_text) if re.fullmatch(r"-?\d+", numa_text) else -1
        pcie, gigabytes = pcie_link(function)
    return Device(name, kind, model, path[-1] if path else address, path, numa, pcie, gigabytes)


def pcie_link(function: Path) -> tuple[str, float | None]:
    """The link of a PCI function as it is able to run, and its GB/s in one direction.

    Able, not as it runs now: an idle GPU slows its link down until there is something to carry.
    """
    speed = _GIGATRANSFERS.search(read_text(function / "max_link_speed"))
    width = read_text(function / "max_link_width")
    if speed is None or not width.isdigit() or not int(width):
        return "", None
    transfers = float(speed[1])
    encoding = _EARLY_ENCODING.get(transfers, 128 / 130)
    return f"{transfers:g} GT/s x{width}", transfers * encoding * int(width) / 8


def _natural(name: str) -> list[tuple[int, str]]:
    """mlx5_10 after mlx5_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
