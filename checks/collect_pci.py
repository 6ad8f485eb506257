"""GPUs, network adapters and the bridges above them, from sysfs and lspci. Asks a Source; pure otherwise."""

from __future__ import annotations

import re

from checks.evidence import Source
from checks.facts import Acs, AerCounters, PciDevice
from checks.lspci import KEPT_LINES, parse_lspci
from checks.reading import Problem, Reading, Unread, integer, line, parsed

FOLDER = "/sys/bus/pci/devices"
ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
NVIDIA, MELLANOX, AMAZON = "0x10de", "0x15b3", "0x1d0f"
EFA_DEVICES = "0xefa"
"""0xefa0 to 0xefa3 (drivers/infiniband/hw/efa/efa_main.c, efa_pci_tbl)."""
GPU_CLASSES = ("0x0300", "0x0302")
"""VGA and 3D controllers (include/linux/pci_ids.h)."""
NETWORK_CLASS, INFINIBAND_CLASS = "0x02", "0x0207"


def collect_pci(source: Source) -> tuple[PciDevice, ...] | Unread:
    """GPUs and adapters that can do RDMA, then the bridges above them."""
    addresses = source.list(FOLDER)
    if isinstance(addresses, Unread):
        return addresses
    wanted = [address for address in addresses if ADDRESS.fullmatch(address) and _matters(source, address)]
    devices = [_device(source, address) for address in wanted]
    above = {
        parent for device in devices if not isinstance(device.parents, Unread) for parent in device.parents
    }
    return (*devices, *(_device(source, address) for address in sorted(above - set(wanted))))


def is_gpu(device: PciDevice) -> bool:
    return device.vendor == NVIDIA and str(device.pci_class).startswith(GPU_CLASSES)


def is_adapter(device: PciDevice) -> bool:
    return str(device.pci_class).startswith(NETWORK_CLASS)


def is_for_rdma(device: PciDevice) -> bool:
    """An adapter that is there for RDMA alone; Mellanox's Ethernet cards serve plain networks too."""
    return str(device.pci_class).startswith(INFINIBAND_CLASS) or device.vendor == AMAZON


def _matters(source: Source, address: str) -> bool:
    vendor, kind = (line(source.read(f"{FOLDER}/{address}/{name}")) for name in ("vendor", "class"))
    if vendor == NVIDIA:
        return str(kind).startswith(GPU_CLASSES)
    if vendor == AMAZON:  # whose plain network adapters are many
        return str(line(source.read(f"{FOLDER}/{address}/device"))).startswith(EFA_DEVICES)
    return str(kind).startswith(INFINIBAND_CLASS) or (
        vendor == MELLANOX and str(kind).startswith(NETWORK_CLASS)
    )


def _device(source: Source, address: str) -> PciDevice:
    folder = f"{FOLDER}/{address}"

    def text(name: str) -> str | Unread:
        return line(source.read(f"{folder}/{name}"), f"{address} {name}")

    def number(name: str) -> int | Unread:
        return integer(source.read(f"{folder}/{name}"), f"{address} {name}")

    return PciDevice(
        address=address,
        vendor=text("vendor"),
        device=text("device"),
        pci_class=text("class"),
        numa_node=number("numa_node"),
        speed=text("current_link_speed"),
        speed_max=text("max_link_speed"),
        width=number("current_link_width"),
        width_max=number("max_link_width"),
        parents=parsed(source.link(folder), lambda path: _parents(path, address), address),
        driver=last_part(source.link(f"{folder}/driver")),
        iommu=_iommu(source, folder),
        fallen=_fallen(source.ask("start", f"{folder}/config")),
    )


def _parents(path: str, address: str) -> tuple[str, ...]:
    """Bridges of `/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:19:00.0`, from the root port down."""
    found = [part for part in path.split("/") if ADDRESS.fullmatch(part)]
    if found[-1:] != [address]:
        raise ValueError("it leads elsewhere")
    return tuple(found[:-1])


def _iommu(source: Source, folder: str) -> str | Unread:
    group = source.link(f"{folder}/iommu_group")
    return group if isinstance(group, Unread) else line(source.read(f"{group}/type"), "IOMMU group")


def _fallen(config: object) -> bool | Unread:
    """All ones: nobody answers at this address (what `lspci` shows as `rev ff`)."""
    if isinstance(config, Unread):
        return config
    if not isinstance(config, str) or not config:
        return Unread(Problem.ERROR, "an empty configuration space")
    return set(config) == {"f"}


def last_part(path: Reading) -> str | Unread:
    return path if isinstance(path, Unread) else path.rstrip("/").rpartition("/")[2]


def collect_acs(source: Source) -> Acs | Unread:
    text = source.run(["lspci", "-vvv"], keep=KEPT_LINES)
    if not isinstance(text, Unread):
        return parse_lspci(text)
    user = source.ask("user")
    if text.problem is Problem.MISSING and isinstance(user, int) and user:
        # With lspci this user would see no more: capabilities are root's (Linux shows others 64 bytes of them).
        return Unread(Problem.NOT_PERMITTED, "no lspci, and only root could read it")
    return text


def count_corrected(
    source: Source, devices: tuple[PciDevice, ...] | Unread, sample: int
) -> tuple[int | Unread, ...]:
    """Errors that each device's link has corrected so far."""
    found = () if isinstance(devices, Unread) else devices
    return tuple(_errors(source, device.address, "correctable", sample) for device in found)


def collect_aer(
    source: Source, devices: tuple[PciDevice, ...] | Unread, corrected: tuple[int | Unread, ...]
) -> tuple[AerCounters, ...]:
    """The kernel's counters of PCIe errors, which an ordinary user may read where the kernel log is for root alone."""
    after = count_corrected(source, devices, 1)
    found = () if isinstance(devices, Unread) else devices
    return tuple(
        AerCounters(
            device.address,
            (before, now),
            _errors(source, device.address, "nonfatal", 0),
            _errors(source, device.address, "fatal", 0),
        )
        for device, before, now in zip(found, corrected, after, strict=True)
    )


def _errors(source: Source, address: str, severity: str, sample: int) -> int | Unread:
    """The sum in the last line, `TOTAL_ERR_COR 0` (drivers/pci/pcie/aer.c, aer_stats_dev_attr)."""
    what = f"{address} aer_dev_{severity}"
    return parsed(source.read(f"{FOLDER}/{address}/aer_dev_{severity}", sample), _total, what)


def _total(text: str) -> int:
    total = re.search(r"^TOTAL_ERR_\w+ (\d+)$", text, re.MULTILINE)
    if total is None:
        raise ValueError("no TOTAL_ERR")
    return int(total[1])
