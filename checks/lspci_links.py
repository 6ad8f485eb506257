"""PCIe links as `lspci -vvv` prints them, as the files of sysfs that tell the same. Pure; for importing captures only.

A live node's sysfs shows an ordinary user what lspci shows root alone, so nobody asks lspci there. pciutils compares a
link with its own device only, and says so in different words by version (ls-caps.c, cap_express_link): nothing before
3.6, `(ok)` and `(downgraded)` up to 3.7, then nothing for a port whose partner is slower. The figures never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from checks.collect_pci import FOLDER, GPU_CLASSES, MELLANOX, NETWORK_CLASS, NVIDIA
from checks.evidence import Record
from checks.lspci import DEVICE

CLASSES = {
    "VGA compatible controller": "0x030000",
    "3D controller": "0x030200",
    "Ethernet controller": "0x020000",
    "Infiniband controller": "0x020700",
    "Network controller": "0x028000",
    "PCI bridge": "0x060400",
}
"""Names of pci.ids; `lspci -nn` prints `3D controller [0302]: NVIDIA Corporation … [10de:2330]`."""
VENDORS = {"NVIDIA": NVIDIA, "Mellanox": MELLANOX, "Nvidia": NVIDIA}
NUMBERS = re.compile(r"\[([0-9a-f]{4})\]:.*?\[([0-9a-f]{4}):([0-9a-f]{4})\]")
BUSES = re.compile(r"\s+Bus: primary=[0-9a-f]{2}, secondary=([0-9a-f]{2}),")
LINK = re.compile(r"\s+Lnk(Cap|Sta):\s+(?:Port #\d+, )?Speed ([\w./<>]+)[^,]*, Width x(\d+)")


@dataclass
class _Device:
    address: str
    vendor: str
    kind: str
    secondary: str = ""
    """The bus below a bridge."""
    links: dict[str, tuple[str, str]] = field(default_factory=dict)
    """`Cap` and `Sta` -> speed and width."""
    denied: bool = False

    @property
    def is_wanted(self) -> bool:
        """As the collector chooses; EFA devices are in virtual machines, whose lspci names no link."""
        is_gpu = self.vendor == NVIDIA and self.kind.startswith(GPU_CLASSES)
        return is_gpu or (self.vendor == MELLANOX and self.kind.startswith(NETWORK_CLASS))


def link_records(text: str) -> dict[str, Record]:
    """Answers about GPUs, RDMA adapters and the bridges above them; none where lspci shows no such device, or names
    alone (`lspci -nn`)."""
    if not re.search(r"^\s+(?:Capabilities: |LnkCap:|LnkSta:)", text, re.MULTILINE):
        return {}
    devices = {device.address: device for device in _devices(text)}
    below = {
        f"{one.address.partition(':')[0]}:{one.secondary}": one for one in devices.values() if one.secondary
    }
    ways = {one.address: list(_way(one, below)) for one in devices.values() if one.is_wanted}
    if not ways:
        return {}
    shown = sorted({address for way in ways.values() for address in way})
    records: dict[str, Record] = {f"list {FOLDER}": {"value": shown}}
    for address in shown:
        device = devices[address]
        way = list(_way(device, below))
        records[f"link {FOLDER}/{address}"] = {"value": "/".join(["/sys/devices", _root(way), *way])}
        records[f"read {FOLDER}/{address}/vendor"] = {"value": device.vendor}
        records[f"read {FOLDER}/{address}/class"] = {"value": device.kind}
        records |= _link_files(device)
    return records


def _devices(text: str) -> Iterator[_Device]:
    device: _Device | None = None
    for line in text.splitlines():
        if head := DEVICE.match(line):
            if device is not None:
                yield device
            address = f"{head[1] or '0000'}:{head[2]}"
            # Of a device that answers with ones only (rev ff) nothing else is known: gpu.bus says so.
            device = None if "(rev ff)" in head[3] else _Device(address, *_kind(head[3]))
        elif device is None:
            continue
        elif buses := BUSES.match(line):
            device.secondary = buses[1]
        elif link := LINK.match(line):
            device.links[link[1]] = (link[2], link[3])
        elif "<access denied>" in line:
            device.denied = True
    if device is not None:
        yield device


def _kind(title: str) -> tuple[str, str]:
    """Vendor and class of `3D controller: NVIDIA Corporation GH100 [H100 SXM5 80GB] (rev a1)`, as sysfs writes them."""
    if numbers := NUMBERS.search(title):
        return f"0x{numbers[2]}", f"0x{numbers[1]}00"
    kind, _, name = title.partition(": ")
    vendor = next((number for word, number in VENDORS.items() if name.startswith(word)), "0x0000")
    return vendor, CLASSES.get(kind, "0x000000")


def _way(device: _Device, below: dict[str, _Device]) -> Iterator[str]:
    """Addresses from the root port down to the device."""
    above = below.get(device.address.rpartition(":")[0])
    if above is not None and above is not device:
        yield from _way(above, below)
    yield device.address


def _root(way: list[str]) -> str:
    domain, bus, _ = way[0].split(":")
    return f"pci{domain}:{bus}"


def _link_files(device: _Device) -> dict[str, Record]:
    files: dict[str, Record] = {}
    for end, name in (("Cap", "max"), ("Sta", "current")):
        link = device.links.get(end)
        speed, width = (_speed(link[0]), link[1]) if link else ("", "")
        for what, value in (("speed", speed), ("width", width)):
            files[f"read {FOLDER}/{device.address}/{name}_link_{what}"] = (
                {"value": value} if link else _without(device, f"Lnk{end}")
            )
    return files


def _without(device: _Device, what: str) -> Record:
    if device.denied:
        return {"problem": "not permitted", "detail": "lspci shows <access denied>"}
    if device.is_wanted:
        return {
            "problem": "error",
            "detail": f"lspci shows no {what} of {device.address}: is its output cut off?",
        }
    return {"problem": "missing", "detail": f"lspci shows no {what}"}


def _speed(text: str) -> str:
    """`32GT/s` as the kernel writes it: `32.0 GT/s PCIe` (drivers/pci/probe.c, pci_speed_string)."""
    match = re.fullmatch(r"([\d.]+)GT/s", text)
    return f"{float(match[1]):.1f} GT/s PCIe" if match else "Unknown"
