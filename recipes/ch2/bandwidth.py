"""One message by every road that this machine has: GPU memory, NVLink, PCIe, host memory, another process or node.

    torchrun --nproc-per-node 2 -m recipes.ch2.bandwidth largest=16M
    torchrun --nproc-per-node 2 -m recipes.ch2.bandwidth smallest=64K largest=4G device=cuda

The first rank of each node measures its own roads while the others rest; all nodes do so at once, and the slowest node
counts. GB/s are bytes of the message by time: a copy within one memory reads and writes, so that the memory moves
twice as many. A road is long where the next one ends: pageable memory is copied to pinned memory first, messages
between processes on CPUs pass the kernel's TCP stack.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.ch2.bandwidth_args import BandwidthArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.bandwidth_plots import Curve, Level, bandwidth_and_time_png
from recipes.lib.collectives import ELEMENT_BYTES, WrongResult, numbers, rounded_elements
from recipes.lib.distributed import World, joined
from recipes.lib.limits import TOLERANCE, Impossible, gpu_uuid
from recipes.lib.measurements import Measurements, connect
from recipes.lib.nvlinks import read_gpus
from recipes.lib.tables import size_text, table, time_text
from recipes.lib.timing import Timing, measure, most
from recipes.lib.topology import read_machine
from recipes.lib.training import recipe_main
from recipes.lib.transports import nccl_log, ways_of_all

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Road:
    """One way from memory to memory."""

    name: str
    source: torch.device
    target: torch.device
    pinned: bool = False
    """Whether the memory of the host is locked: only then the GPU reads it by itself, at the full speed of PCIe."""
    ranks: tuple[int, int] | None = None
    """Sender and receiver, where it leads to another process; of this rank's node."""
    limit: float | None = None
    """GB/s that the link can carry, where that is known."""
    link: str = ""


def roads(world: World) -> Iterator[Road]:
    """The roads that there are, the same on every node; nearest first."""
    gpu = world.device
    if gpu.type == "cuda":
        yield Road("GPU memory to itself", gpu, gpu)
        yield from _to_other_gpus(gpu)
        # Grace and Hopper are joined by more than PCIe, which the kernel does not list.
        pcie, link = pcie_of(gpu) if platform.machine() == "x86_64" else (None, "")
        for pinned, memory in ((True, "pinned"), (False, "pageable")):
            yield Road(f"host to GPU, {memory}", CPU, gpu, pinned, limit=pcie, link=link)
            yield Road(f"GPU to host, {memory}", gpu, CPU, pinned, limit=pcie, link=link)
    yield Road("host memory to itself", CPU, CPU)
    first = world.rank - world.local_rank
    if world.local_size > 1:
        yield Road("to another process of the node", gpu, gpu, ranks=(first, first + 1))
    if world.size > world.local_size:
        # Only the first node sends: one message through one card.
        yield Road("to another node", gpu, gpu, ranks=(0, world.local_size))


def pcie_of(gpu: torch.device) -> tuple[float | None, str]:
    """GB/s of the GPU's PCIe link, and what it is."""
    machine = read_machine("", read_gpus())
    address = next((each.address for each in machine.gpus if each.uuid == gpu_uuid(gpu)), None)
    found = next((each for each in machine.devices if each.address == address), None)
    return (found.gigabytes, f"PCIe {found.pcie}") if found else (None, "")


def _to_other_gpus(gpu: torch.device) -> Iterator[Road]:
    """To the next GPU that this process sees: over NVLink, or over PCIe where there is none."""
    if torch.cuda.device_count() < 2:
        return
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    if not torch.cuda.can_device_access_peer(gpu, other):
        yield Road("GPU to GPU, through the host", gpu, other)
        return
    known = {each.uuid: each for each in read_gpus()}
    mine, its = known.get(gpu_uuid(gpu)), known.get(gpu_uuid(other))
    links = mine.links_to(its) if mine and its else 0
    each = mine.link_gigabytes if mine else None
    limit = links * each if links and each else None
    yield Road("GPU to GPU", gpu, other, limit=limit, link=f"{links} NVLinks" if links else "PCIe")


def traveller(road: Road, elements: int, world: World) -> tuple[Callable[[], None], Callable[[], bool]]:
    """What sends the message once, and what says whether it arrived; both do nothing on ranks without a part in it."""
    if road.ranks is not None:
        sender, receiver = road.ranks
        if world.rank not in road.ranks:
            return _nothing, lambda: True
        content = numbers(1, elements, world.device)
        buffer = content if world.rank == sender else torch.zeros_like(content)

        def message() -> None:
            sends = world.rank == sender
            operation = dist.P2POp(dist.isend if sends else dist.irecv, buffer, receiver if sends else sender)
            for work in dist.batch_isend_irecv([operation]):
                work.wait()

        return message, lambda: torch.equal(buffer, content)
    if world.local_rank != 0:
        return _nothing, lambda: True
    content, target = _memory(road, elements, road.source), _memory(road, elements, road.target)
    content.copy_(numbers(1, elements, CPU))
    return (
        lambda: _copy(content, target),
        lambda: torch.equal(target.cpu(), content.cpu()),
    )


def _nothing() -> None:
    """What a resting rank does."""


def _memory(road: Road, elements: int, device: torch.device) -> Tensor:
    return torch.zeros(elements, device=device, pin_memory=road.pinned and device.type == "cpu")


def _copy(content: Tensor, target: Tensor) -> None:
    target.copy_(content, non_blocking=True)


def measured(road: Road, size: int, world: World, args: BandwidthArgs) -> Timing:
    """The time of one size. Raises WrongResult where it does not arrive, Impossible where it is too fast."""
    send, arrived = traveller(road, size // ELEMENT_BYTES, world)
    timing = measure(send, world, trials=args.trials, budget=args.budget)
    if most(
        float(not arrived())
    ):  # on all ranks alike: one that stopped alone would leave the others waiting
        raise WrongResult(f"{road.name}, {size_text(size)}: what arrives is not what was sent")
    rate = size / timing.seconds / 1e9
    if road.limit is not None and rate > TOLERANCE * road.limit:
        raise Impossible(f"{road.name}: {rate:.1f} GB/s, but {road.link} carries {road.limit:.1f} GB/s")
    return timing


@recipe_main
def main() -> None:
    """Measure every road over all sizes; rank 0 prints and draws."""
    args = parse_or_exit(BandwidthArgs)
    sizes = [rounded_elements(size, 1) * ELEMENT_BYTES for size in args.sizes]
    with nccl_log() as log, joined(args.device) as world:
        connect(world)
        found = list(roads(world))
        lines: dict[str, list[dict[str, Any]]] = {road.name: [] for road in found}
        with Measurements("ch2_bandwidth", world, len(found) * len(sizes)) as results:
            for road in found:
                for size in sizes:
                    timing = measured(road, size, world, args)
                    rate = size / timing.seconds / 1e9
                    line = {"road": road.name, "size": size, "gb_s": rate, "link": road.link}
                    line |= {"link_gb_s": road.limit, "correct": True, **timing.figures()}
                    results.add(f"{road.name} {size_text(size)}: {rate:.3g} GB/s", **line)
                    lines[road.name].append({**line, "spread": timing.spread})
            ways = ways_of_all(world, log)
            results.note(kind="transport", **ways)
            if world.is_first:
                show(found, lines, results)
                draw(found, lines, ways["library"], results)


def show(found: list[Road], lines: dict[str, list[dict[str, Any]]], results: Measurements) -> None:
    """A row for each road: its smallest and largest message."""
    rows = []
    for road in found:
        small, large = lines[road.name][0], lines[road.name][-1]
        limit = f"{road.limit:.1f} ({road.link})" if road.limit else road.link
        rate = f"{large['gb_s']:.2f}"
        rows.append([road.name, time_text(small["seconds"]), rate, f"{large['spread']:.0%}", limit])
    sizes = [size_text(line["size"]) for line in (lines[found[0].name][0], lines[found[0].name][-1])]
    head = ["road", f"{sizes[0]} takes", f"GB/s at {sizes[1]}", "spread", "the link carries GB/s"]
    results.show(table(head, rows))


def draw(
    found: list[Road], lines: dict[str, list[dict[str, Any]]], library: str, results: Measurements
) -> None:
    """All roads over the sizes."""
    rates, times = [], []
    for road in found:
        each = lines[road.name]
        sizes = [line["size"] for line in each]
        seconds = [[line[key] for line in each] for key in ("seconds", "seconds_min", "seconds_max")]
        speeds = [
            [line["size"] / line[key] / 1e9 for line in each]
            for key in ("seconds", "seconds_max", "seconds_min")
        ]
        times.append(Curve(road.name, sizes, *seconds))
        rates.append(Curve(road.name, sizes, *speeds))
    levels = {road.link: road.limit for road in found if road.limit is not None}
    bandwidth_and_time_png(
        results.picture("bandwidth.png"),
        "One message by every road",
        f"{results.hardware}; between processes {library}; median of the trials, the band is fastest to slowest",
        rates,
        times,
        bandwidth_label="bytes of the message by time [GB/s]",
        levels=[Level(link, limit) for link, limit in levels.items()],
    )


if __name__ == "__main__":
    main()
