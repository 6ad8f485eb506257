"""What no link can carry: figures above it are mistakes of the measurement, and are refused.

The bound counts bytes that must pass a member's own link, whatever the algorithm. Members are GPUs where all ranks are
on one machine, and machines where messages pass network cards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.lib.collectives import COLLECTIVES
from recipes.lib.distributed import World
from recipes.lib.nvlinks import read_gpus
from recipes.lib.topology import Machine, read_machine, read_text

TOLERANCE = 1.02
"""For what a clock and a rounded rate add to a figure."""


class Impossible(Exception):
    """A figure that no link could have carried."""


@dataclass(frozen=True)
class Link:
    """What joins one rank to the others, as far as it is known."""

    machine: str
    """The kernel's boot id: nodes of a box are one machine."""
    gpu: float | None
    """GB/s out of its GPU in one direction: all NVLinks together, or the PCIe link where it has none."""
    gpu_link: str
    cards: float | None
    """GB/s of the machine's network cards together; None where one does not say."""


@dataclass(frozen=True)
class Limit:
    """The narrowest link between some ranks."""

    gigabytes: float
    """GB/s in one direction."""
    what: str
    members: int
    """How many of them talk to each other over such a link."""
    ranks: int

    def bus_bandwidth(self, name: str, *, in_network: bool) -> float:
        """The largest bus bandwidth in GB/s that this link allows.

        `in_network`: the switch may add up (NVLS, SHARP), so that a number crosses the link once, not nearly twice.
        """
        away = (self.members - 1) / self.members
        passing = {
            "all_reduce": 1.0 if in_network else 2 * away,
            "all_gather": away,
            "reduce_scatter": away,
            "all_to_all": away * self.ranks / self.members,
            "broadcast": 1.0,
            "reduce": 1.0,
            "scatter": away,
            "gather": away,
            "send_recv": 1.0,
        }
        return COLLECTIVES[name].bus_factor(self.ranks) * self.gigabytes / passing[name]


def refuse_impossible(
    name: str, size: int, bus_bandwidth: float, limit: Limit | None, *, in_network: bool
) -> None:
    """Raise Impossible for a bus bandwidth in GB/s above the limit, if one is known."""
    if limit is None:
        return
    most = limit.bus_bandwidth(name, in_network=in_network)
    if bus_bandwidth > TOLERANCE * most:
        raise Impossible(
            f"{name} of {size} bytes: {bus_bandwidth:.1f} GB/s of bus bandwidth, but {limit.what} carry "
            f"{limit.gigabytes:.1f} GB/s, which allows {most:.1f}: the clock or the result is wrong"
        )


def limit_between(links: Sequence[Link]) -> Limit | None:
    """What limits ranks with these links; None where that is not known. Pure."""
    machines = {link.machine for link in links}
    if len(machines) > 1:
        cards = [link.cards for link in links]
        known = [each for each in cards if each is not None]
        if len(known) < len(cards):
            return None
        return Limit(min(known), "a machine's network cards", len(machines), len(links))
    gpus = [link.gpu for link in links]
    known = [each for each in gpus if each is not None]
    if len(known) < len(gpus) or len(links) < 2:
        return None
    return Limit(min(known), f"a GPU's {links[0].gpu_link}", len(links), len(links))


def links_of_all(world: World) -> list[Link]:
    """Every rank's link, on every rank."""
    mine = link_of(read_machine("", read_gpus()), gpu_uuid(world.device), _boot_id())
    found = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine)
    return found


def link_of(machine: Machine, gpu_uuid: str, boot_id: str) -> Link:
    """The link of the rank on this GPU of the machine; without a GPU for an empty uuid. Pure."""
    rates = [device.gigabytes for device in machine.devices if device.kind == "nic"]
    known = [rate for rate in rates if rate is not None]
    cards = sum(known) if known and len(known) == len(rates) else None
    for gpu in machine.gpus:
        if gpu.uuid == gpu_uuid:
            if gpu.nvlink_gigabytes is not None:
                return Link(boot_id, gpu.nvlink_gigabytes, f"{gpu.links} NVLinks", cards)
            device = next(each for each in machine.devices if each.address == gpu.address)
            return Link(boot_id, device.gigabytes if not gpu.links else None, "PCIe link", cards)
    return Link(boot_id, None, "", cards)


def gpu_uuid(device: torch.device) -> str:
    """As NVML spells it; empty for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def _boot_id() -> str:
    return read_text(Path("/proc/sys/kernel/random/boot_id"))
