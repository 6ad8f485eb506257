"""What NVML says of the GPUs here and of the NVLinks between them. No torch."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_LINKS = 18
"""NVML_NVLINK_MAX_LINKS: Hopper's and Blackwell's GPUs have as many, earlier ones fewer."""

_TO_GPU, _TO_SWITCH = 0, 2
"""NVML_NVLINK_DEVICE_TYPE_GPU and _SWITCH of nvml.h."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    model: str
    uuid: str
    address: str
    """On the PCI bus, as /sys/bus/pci/devices spells it."""
    links_to_switch: int = 0
    """Active NVLinks to an NVSwitch, which joins the GPU to every other one."""
    links_to_gpu: tuple[tuple[str, int], ...] = ()
    """Active NVLinks that lead straight to another GPU, by its address."""
    link_gigabytes: float | None = None
    """GB/s of one link in one direction; None where NVML does not say."""

    @property
    def links(self) -> int:
        """Active NVLinks in all."""
        return self.links_to_switch + sum(count for _, count in self.links_to_gpu)

    @property
    def nvlink_gigabytes(self) -> float | None:
        """GB/s of all links together in one direction; None without NVLink, or where NVML does not say."""
        return self.links * self.link_gigabytes if self.links and self.link_gigabytes else None

    def links_to(self, other: Gpu) -> int:
        """How many NVLinks a message to `other` can use at once, as `nvidia-smi topo -m` counts them."""
        return dict(self.links_to_gpu).get(other.address, 0) or min(
            self.links_to_switch, other.links_to_switch
        )


def sysfs_address(bus_id: str) -> str:
    """NVML's 00000000:1B:00.0 as the kernel writes it: 0000:1b:00.0."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def read_gpus(nvml: Any = None) -> list[Gpu]:
    """The GPUs that the driver shows; [] on a machine without NVIDIA's driver.

    `nvml` is the module pynvml, or what stands in for it. Raises its NVMLError for a driver that is there and broken.
    """
    if nvml is None:
        nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return []
    try:
        count = nvml.nvmlDeviceGetCount()
        return [_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    finally:
        nvml.nvmlShutdown()


def recorded_gpus(file: Path) -> list[Gpu]:
    """The GPUs of another machine, from a JSON list with the fields of Gpu; [] where there is no such file."""
    if not file.exists():
        return []
    return [
        Gpu(
            **{
                **entry,
                "links_to_gpu": tuple((address, count) for address, count in entry.get("links_to_gpu", ())),
            }
        )
        for entry in json.loads(file.read_text())
    ]


def _gpu(nvml: Any, handle: Any) -> Gpu:
    to_switch, to_gpu, speed = 0, dict[str, int](), None
    for link in range(_MOST_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
            kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_InvalidArgument):
            break  # no NVLink at all, or no more of them
        if kind == _TO_SWITCH:
            to_switch += 1
        elif kind == _TO_GPU:
            address = sysfs_address(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))
            to_gpu[address] = to_gpu.get(address, 0) + 1
    if to_switch or to_gpu:
        speed = _link_gigabytes(nvml, handle)
    return Gpu(
        model=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        address=sysfs_address(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)),
        links_to_switch=to_switch,
        links_to_gpu=tuple(sorted(to_gpu.items())),
        link_gigabytes=speed,
    )


def _link_gigabytes(nvml: Any, handle: Any) -> float | None:
    """NVML gives MB/s, 26562 on Hopper."""
    (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    if field.nvmlReturn != nvml.NVML_SUCCESS or not field.value.uiVal:
        return None
    return float(field.value.uiVal) / 1e3


def _text(value: str | bytes) -> str:
    """pynvml gives str; some of its versions give bytes."""
    return value.decode() if isinstance(value, bytes) else value
