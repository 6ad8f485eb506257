"""Reads the facts of a node's networks from /sys/class, /proc/net and nccl.conf. File system.

`root` is / on a live node; in a test it is a folder with the same files. Formats: kernel
Documentation/ABI/stable/sysfs-class-infiniband, Documentation/ABI/testing/sysfs-class-net, net/ipv4/fib_trie.c
(/proc/net/route: addresses are hexadecimal in the byte order of the CPU).
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from checks.fabric_facts import FabricFacts, Gid, Gpu, Interface, RdmaPort, Route
from checks.given import parse_nccl_conf

NVIDIA_VENDOR, DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")
EMPTY_GID = "0000:0000:0000:0000:0000:0000:0000:0000"
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]|pci[0-9a-f]{4,}:[0-9a-f]{2}")


def read_facts(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> FabricFacts:
    """Everything that can be read; what cannot is named in `unread`."""
    reader = _Reader(root)
    return FabricFacts(
        node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        ports=tuple(reader.ports()),
        interfaces=tuple(reader.interfaces()),
        routes=tuple(reader.routes()),
        gpus=tuple(reader.gpus()),
        nccl_conf=parse_nccl_conf(reader.nccl_conf(environment)),
        unread=tuple(reader.unread),
    )


class _Reader:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.unread: list[str] = []

    def text(self, path: Path) -> str:
        """The content, stripped; empty where there is no such file. Another error is noted: it is no absence."""
        try:
            return path.read_text(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            self.unread.append(f"{path}: {error.strerror}")
            return ""

    def entries(self, path: Path) -> list[Path]:
        try:
            return sorted(path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.unread.append(f"{path}: {error.strerror}")
            return []

    # --- RDMA -------------------------------------------------------------------------------------------------------

    def ports(self) -> list[RdmaPort]:
        found = []
        for device in self.entries(self.root / "sys/class/infiniband"):
            card = device / "device"
            for port in self.entries(device / "ports"):
                if port.name.isdecimal():
                    found.append(
                        RdmaPort(
                            device=device.name,
                            number=int(port.name),
                            state=self.text(port / "state").partition(":")[2].strip(),  # "4: ACTIVE"
                            link_layer=self.text(port / "link_layer"),
                            gbps=gigabits(self.text(port / "rate")),
                            driver=(card / "driver").resolve().name if (card / "driver").exists() else "",
                            netdevs=tuple(one.name for one in self.entries(card / "net")),
                            gids=tuple(self.gids(port)),
                            pci_path=pci_path(card),
                            numa_node=numa_node(self.text(card / "numa_node")),
                        )
                    )
        return found

    def gids(self, port: Path) -> list[Gid]:
        """The filled entries. Reading the type of an empty one fails with EINVAL, which is how sysfs says empty."""
        found = []
        for path in self.entries(port / "gids"):
            address = self.text(path) if path.name.isdecimal() else ""
            if address and address != EMPTY_GID:
                kind = self.text(port / "gid_attrs" / "types" / path.name)
                found.append(Gid(int(path.name), address, kind))
        return sorted(found, key=lambda gid: gid.index)

    # --- interfaces and routes --------------------------------------------------------------------------------------

    def interfaces(self) -> list[Interface]:
        found = []
        for path in self.entries(self.root / "sys/class/net"):
            if not path.is_dir():
                continue  # bonding_masters is a file there
            state = self.text(path / "operstate")
            master = path / "master"
            found.append(
                Interface(
                    name=path.name,
                    # lo and tunnels say "unknown" while they work (kernel Documentation/networking/operstates.rst)
                    running=state == "up" or (state == "unknown" and self._is_up(path)),
                    master=Path(os.readlink(master)).name if master.is_symlink() else "",
                    physical=(path / "device").exists(),
                )
            )
        return found

    def _is_up(self, path: Path) -> bool:
        flags = self.text(path / "flags")
        return bool(int(flags, 16) & 1) if flags else False

    def routes(self) -> list[Route]:
        path = self.root / "proc/net/route"
        try:
            return parse_routes(self.text(path))
        except ValueError as error:
            self.unread.append(f"{path}: {error}")
            return []

    # --- GPUs, configuration ----------------------------------------------------------------------------------------

    def gpus(self) -> list[Gpu]:
        found = []
        for path in self.entries(self.root / "sys/bus/pci/devices"):
            if self.text(path / "vendor") != NVIDIA_VENDOR:
                continue
            if self.text(path / "class").startswith(DISPLAY_CLASSES):
                node = numa_node(self.text(path / "numa_node"))
                found.append(Gpu(path.name, node, self.text(path / "local_cpulist"), pci_path(path)))
        return found

    def nccl_conf(self, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        """The files in NCCL's order: its own file replaces the one in the home folder, /etc/nccl.conf comes last."""
        own = environment.get("NCCL_CONF_FILE", "")
        home = environment.get("HOME", "")
        files = [own or (f"{home}/.nccl.conf" if home else ""), "/etc/nccl.conf"]
        return [(file, self.text(self.root / file.lstrip("/"))) for file in files if file]


def gigabits(text: str) -> float | None:
    """`400 Gb/sec (4X NDR)` -> 400; None where no rate is said."""
    match = re.match(r"([\d.]+) Gb/sec", text)
    return float(match[1]) if match else None


def numa_node(text: str) -> int | None:
    """-1 is the kernel's word for unknown, as on every virtual machine without a firmware table."""
    return int(text) if text.isdecimal() else None


def pci_path(link: Path) -> tuple[str, ...]:
    """PCI addresses from the host bridge to the device itself; empty where the link leads to no PCI device."""
    if not link.exists():
        return ()
    return tuple(part for part in link.resolve().parts if _PCI_ADDRESS.fullmatch(part))


def parse_routes(text: str) -> list[Route]:
    """/proc/net/route, without rejecting routes (flag 0x200) and those that are down (flag 1 missing).

    Raises ValueError for a line of another form.
    """
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            raise ValueError(f"not a route: {line.strip()[:80]}")
        flags = int(fields[3], 16)
        if flags & 0x1 and not flags & 0x200:
            network = ipaddress.IPv4Network((_address(fields[1]), str(_address(fields[7]))))
            found.append(Route(fields[0], str(network), int(fields[6])))
    return found


def _address(text: str) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(text, 16).to_bytes(4, sys.byteorder))
