"""Trees of /sys and /proc as Linux lays them out, for machines that are not here.

Files and their forms: Documentation/ABI/testing/sysfs-bus-pci (max_link_speed "32.0 GT/s PCIe", numa_node),
sysfs-class-infiniband (rate "400 Gb/sec (4X NDR)"), sysfs-class-net (speed, in Mb/s), sysfs-devices-node, all of the
kernel's source; NVML's numbers are those of a DGX H100 (18 links of 26.562 GB/s to its NVSwitches).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from recipes.lib.nvlinks import Gpu

GEN5 = ("32.0 GT/s PCIe", "16")


def file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def socket(root: Path, number: int, cpus: str, distances: str) -> None:
    node = root / f"sys/devices/system/node/node{number}"
    file(node / "cpulist", cpus)
    file(node / "distance", distances)
    file(node / "meminfo", f"Node {number} MemTotal:       1056452048 kB")


def pci(root: Path, path: Sequence[str], numa: int, link: tuple[str, str] = GEN5, **files: str) -> Path:
    """A PCI function below its bridges, listed on the bus."""
    function = root / "sys/devices" / "/".join(path)
    file(function / "numa_node", str(numa))
    file(function / "max_link_speed", link[0])
    file(function / "max_link_width", link[1])
    for name, text in files.items():
        file(function / name, text)
    listed = root / "sys/bus/pci/devices" / path[-1]
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.symlink_to(os.path.relpath(function, listed.parent))
    return function


def rdma(
    root: Path, name: str, function: Path, rate: str = "400 Gb/sec (4X NDR)", model: str = "MT4129"
) -> None:
    card = root / "sys/class/infiniband" / name
    file(card / "hca_type", model)
    file(card / "ports/1/rate", rate)
    (card / "device").symlink_to(os.path.relpath(function, card))


def ethernet(root: Path, name: str, function: Path, speed: str = "100000") -> None:
    interface = root / "sys/class/net" / name
    file(interface / "speed", speed)
    (interface / "device").symlink_to(os.path.relpath(function, interface))


def gpu(address: str, **changes: object) -> Gpu:
    base = Gpu("NVIDIA H100 80GB HBM3", f"GPU-{address}", address, links_to_switch=18, link_gigabytes=26.562)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def dgx(root: Path) -> list[Gpu]:
    """Two sockets, each with four switches that hold a GPU and a network card, and a card for storage below a port of
    its own; as NVIDIA's DGX H100 and machines like it are built.
    """
    socket(root, 0, "0-55,112-167", "10 21")
    socket(root, 1, "56-111,168-223", "21 10")
    file(root / "proc/cpuinfo", "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8480C")
    gpus, cards = [], 0
    for numa in (0, 1):
        for slot in range(4):
            bus = 0x15 + 0x10 * slot + 0x80 * numa
            complex_, port = f"pci0000:{bus:02x}", f"0000:{bus:02x}:01.0"
            switch = [complex_, port, f"0000:{bus + 1:02x}:00.0"]
            at = f"0000:{bus + 3:02x}:00.0"
            pci(
                root,
                [*switch, f"0000:{bus + 2:02x}:00.0", at],
                numa,
                vendor="0x10de",
                **{"class": "0x030200"},
            )
            card = pci(root, [*switch, f"0000:{bus + 2:02x}:01.0", f"0000:{bus + 4:02x}:00.0"], numa)
            rdma(root, f"mlx5_{cards}", card)
            gpus.append(gpu(at))
            cards += 1
        bus = 0x0A + 0x80 * numa
        function = pci(root, [f"pci0000:{bus:02x}", f"0000:{bus:02x}:01.0", f"0000:{bus + 1:02x}:00.0"], numa)
        ethernet(root, f"ens{numa}", function)
    file(root / "nvml.json", json.dumps([dataclasses.asdict(each) for each in gpus]))
    return gpus


def pcie_box(root: Path) -> list[Gpu]:
    """One socket; two GPUs joined by four NVLinks below one switch, two more on ports of their own, one of them on
    another host bridge.
    """
    socket(root, 0, "0-31", "10")
    model = {"vendor": "0x10de", "class": "0x030000"}
    switch = ["pci0000:00", "0000:00:01.0", "0000:01:00.0"]
    pci(root, [*switch, "0000:02:00.0", "0000:03:00.0"], -1, **model)
    pci(root, [*switch, "0000:02:01.0", "0000:04:00.0"], -1, **model)
    pci(root, ["pci0000:00", "0000:00:03.0", "0000:05:00.0"], -1, **model)
    pci(root, ["pci0000:40", "0000:40:01.0", "0000:41:00.0"], -1, **model)
    card = pci(root, [*switch[:2], "0000:01:00.1", "0000:06:00.0", "0000:07:00.0", "0000:08:00.0"], -1)
    ethernet(root, "eth0", card, speed="-1")
    pair = ("0000:03:00.0", "0000:04:00.0")
    common = {"model": "NVIDIA A40", "links_to_switch": 0}
    gpus = [
        gpu(pair[0], links_to_gpu=((pair[1], 4),), **common),
        gpu(pair[1], links_to_gpu=((pair[0], 4),), **common),
        gpu("0000:05:00.0", **common),
        gpu("0000:41:00.0", **common),
    ]
    file(root / "nvml.json", json.dumps([dataclasses.asdict(each) for each in gpus]))
    return gpus
