"""A node as a picture: sockets, the PCIe tree that hangs from each, GPUs and network cards, and NVLink between them.

A large machine has its sockets in two rows, the lower one upside down, so that all devices face the NVSwitches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.lib.bandwidth_plots import GREY, INK
from recipes.lib.topology import Device, Machine, Numa

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAF, _DEVICE, _BRIDGE, _HEAD = 1.34, (1.2, 0.84), (1.12, 0.4), (2.4, 0.58)
"""Inches: distance of devices, size of a device, of a bridge and of a socket's name."""

_LEVEL, _TOP, _GAP = 0.72, 0.86, 0.42
"""Inches: height of a level of bridges, room for the titles, distance of two sockets."""

_LINKS = 1.3
"""Inches between or below the rows, for NVLink."""

_MANY = 10
"""Devices beside each other before the sockets take two rows."""

_GPU, _NIC, _WIRE = "#3a8f4f", "#1f5fa8", "#b0a58f"
_FILL = {"gpu": ("#e4f3e4", _GPU), "nic": ("#e3edf8", _NIC), "bridge": ("#fdf3e3", "#c98a1b")}
_SOCKET = ("#f4f4f4", "#8a8a8a")


@dataclass
class Branch:
    """A place in the PCIe tree: a root complex, or a bridge at which ways part."""

    name: str
    branches: list[Branch] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)

    @property
    def leaves(self) -> list[Device]:
        """All devices below, in the order in which they are drawn."""
        return [*(leaf for each in self.branches for leaf in each.leaves), *self.devices]

    @property
    def depth(self) -> int:
        """Levels of bridges, this one included."""
        return 1 + max((each.depth for each in self.branches), default=0)


def pcie_tree(devices: Sequence[Device]) -> list[Branch]:
    """The root complexes with what hangs below them; bridges with a single way on are left out. Pure."""
    roots: dict[str, list[Device]] = {}
    for device in devices:
        roots.setdefault(device.path[0] if device.path else "not on PCI", []).append(device)
    return [_branch(name, 1, below) for name, below in roots.items()]


def _branch(name: str, level: int, devices: Sequence[Device]) -> Branch:
    branch, ways = Branch(name), dict[str, list[Device]]()
    for device in devices:
        if len(device.path) <= level + 1:
            branch.devices.append(device)
        else:
            ways.setdefault(device.path[level], []).append(device)
    for bridge, below in ways.items():
        if len(below) == 1:
            branch.devices.append(below[0])
            continue
        deeper = level + 1
        while (
            all(len(each.path) > deeper + 1 for each in below)
            and len({each.path[deeper] for each in below}) == 1
        ):
            bridge, deeper = below[0].path[deeper], deeper + 1
        branch.branches.append(_branch(bridge, deeper, below))
    return branch


@dataclass
class Socket:
    """A NUMA node with its tree; None is for devices of which the firmware does not say where they are."""

    numa: Numa | None
    roots: list[Branch]

    @property
    def leaves(self) -> int:
        """Devices beside each other."""
        return sum(len(root.leaves) for root in self.roots)

    @property
    def width(self) -> float:
        """Inches."""
        return max(2.7, _LEAF * self.leaves + 0.3)

    @property
    def depth(self) -> float:
        """Inches from its name to its devices."""
        return 0.95 + _LEVEL * max((root.depth for root in self.roots), default=0)


def sockets_of(machine: Machine) -> Iterator[Socket]:
    """Devices whose socket is not known belong to the only one, or stand apart. Pure."""
    only = machine.numa[0].number if len(machine.numa) == 1 else None
    for numa in machine.numa:
        here = [
            each for each in machine.devices if numa.number in (each.numa, only if each.numa < 0 else None)
        ]
        yield Socket(numa, pcie_tree(here))
    known = {numa.number for numa in machine.numa}
    if apart := [each for each in machine.devices if only is None and each.numa not in known]:
        yield Socket(None, pcie_tree(apart))


def draw_machine(path: Path, machine: Machine, title: str) -> None:
    """Draw one node into a PNG or SVG file, whichever the name of `path` ends with."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(machine)
    links = (_LINKS if len(rows) > 1 else _LINKS - 0.2) if any(gpu.links for gpu in machine.gpus) else _GAP
    frame = max(socket.depth for row in rows for socket in row) + _DEVICE[1] + 0.26
    width = max(6.0, 0.6 + max(sum(each.width for each in row) + _GAP * (len(row) - 1) for row in rows))
    height = _TOP + frame * len(rows) + links * (len(rows) > 1 or links > _GAP) + 0.25
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.3, 0.28, title, fontsize=13, fontweight="bold", color=INK, va="center")
    axes.text(0.3, 0.56, _subtitle(machine), fontsize=8.5, color=GREY, va="center")
    drawing = _Drawing(axes, {})
    top = _Row(_TOP, 1)
    for row, place in zip(rows, (top, _Row(height - 0.25, -1)), strict=False):
        left = (width - sum(each.width for each in row) - _GAP * (len(row) - 1)) / 2
        for number, socket in enumerate(row):
            if number:
                drawing.between_sockets((left - _GAP, left), (place.y(0.36),) * 2)
            drawing.socket(socket, left, place, frame)
            left += socket.width + _GAP
    if len(rows) > 1:
        drawing.between_sockets((0.5, 0.5), (_TOP + frame, _TOP + frame + links))
    for device in machine.devices:
        drawing.device(device)
    drawing.switch(machine, _TOP + frame, links)
    drawing.direct_links(machine)
    figure.savefig(path)


def _rows(machine: Machine) -> list[list[Socket]]:
    sockets = list(sockets_of(machine)) or [Socket(None, [])]
    straight = any(gpu.links_to_gpu for gpu in machine.gpus)  # such links are arcs below one row
    if len(sockets) == 1 or straight or sum(socket.leaves for socket in sockets) <= _MANY:
        return [sockets]
    half = (len(sockets) + 1) // 2
    return [sockets[:half], sockets[half:]]


def _subtitle(machine: Machine) -> str:
    kinds = [each.kind for each in machine.devices]
    models = dict.fromkeys(each.model for each in machine.devices if each.kind == "gpu")
    parts = [machine.cpu] if machine.cpu else []
    if models:
        parts.append(f"{kinds.count('gpu')} x {', '.join(models)}")
    parts.append(f"{kinds.count('nic')} network card{'s' if kinds.count('nic') != 1 else ''}")
    return "; ".join(parts)


@dataclass(frozen=True)
class _Row:
    """Where a row of sockets begins, and whether its trees grow down (1) or up (-1)."""

    edge: float
    direction: int

    def y(self, depth: float) -> float:
        """Of a point so far from the edge."""
        return self.edge + self.direction * depth

    def box(self, depth: float, height: float) -> float:
        """Upper edge of a box that begins so far from the row's edge."""
        return min(self.y(depth), self.y(depth + height))


@dataclass
class _Drawing:
    axes: Axes
    places: dict[str, tuple[float, float, int]]
    """Of a device by its name: middle, upper edge, direction of its row."""

    def box(
        self, x: float, y: float, size: tuple[float, float], colours: tuple[str, str], zorder: int = 3
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.06"
        fill, edge = colours
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y), *size, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.2, zorder=zorder
            )
        )

    def text(self, x: float, y: float, text: str, size: float, colour: str = INK, **options: Any) -> None:
        self.axes.text(
            x,
            y,
            text,
            fontsize=size,
            color=colour,
            ha=options.pop("ha", "center"),
            va="center",
            zorder=4,
            **options,
        )

    def wire(self, begin: tuple[float, float], end: tuple[float, float], row: _Row) -> None:
        """Away, across, away: the way across is close to where it begins, so that no two of them meet."""
        across = begin[1] + row.direction * 0.13
        points = ([begin[0], begin[0], end[0], end[0]], [begin[1], across, across, end[1]])
        self.axes.plot(*points, color=_WIRE, linewidth=1.3, zorder=1, solid_joinstyle="round")

    def socket(self, socket: Socket, left: float, row: _Row, frame: float) -> None:
        """The frame, the name, and the tree."""
        self.box(left, row.box(0, frame), (socket.width, frame), ("#fbfbfb", "#d9d9d9"), zorder=0)
        middle = left + socket.width / 2
        y = row.box(0.14, _HEAD[1])
        self.box(middle - _HEAD[0] / 2, y, _HEAD, _SOCKET)
        numa = socket.numa
        self.text(
            middle,
            y + 0.2,
            f"NUMA node {numa.number}" if numa else "socket not known",
            9.5,
            fontweight="bold",
        )
        cpus = numa.cpus if numa and len(numa.cpus) <= 16 else f"{numa.cpus[:14]}..." if numa else ""
        said = f"CPUs {cpus}, {numa.memory_gib:.0f} GiB" if numa else "the firmware does not say"
        self.text(middle, y + 0.42, said, 7.5, GREY)
        x = left + (socket.width - _LEAF * socket.leaves) / 2
        for root in socket.roots:
            self.branch(root, x, 1.07, (middle, 0.14 + _HEAD[1]), row, frame, "host bridge")
            x += _LEAF * len(root.leaves)

    def branch(
        self,
        branch: Branch,
        left: float,
        depth: float,
        parent: tuple[float, float],
        row: _Row,
        frame: float,
        kind: str,
    ) -> None:
        """A bridge in the middle of its devices, with wires to what is above and below; `depth` is from the edge."""
        middle = left + _LEAF * len(branch.leaves) / 2
        self.wire((parent[0], row.y(parent[1])), (middle, row.y(depth)), row)
        y = row.box(depth, _BRIDGE[1])
        self.box(middle - _BRIDGE[0] / 2, y, _BRIDGE, _FILL["bridge"])
        self.text(middle, y + 0.14, kind, 7.5)
        self.text(middle, y + 0.29, branch.name, 6, GREY)
        below = (middle, depth + _BRIDGE[1])
        for each in branch.branches:
            self.branch(each, left, depth + _LEVEL, below, row, frame, "PCIe switch")
            left += _LEAF * len(each.leaves)
        for device in branch.devices:
            begins = frame - 0.14 - _DEVICE[1]
            self.places[device.name] = (left + _LEAF / 2, row.box(begins, _DEVICE[1]), row.direction)
            self.wire((middle, row.y(below[1])), (left + _LEAF / 2, row.y(begins)), row)
            left += _LEAF

    def device(self, device: Device) -> None:
        """Its name, model, address, PCIe link, and for a card the speed of its port."""
        x, y, _ = self.places[device.name]
        self.box(x - _DEVICE[0] / 2, y, _DEVICE, _FILL[device.kind])
        model = device.model.removeprefix("NVIDIA ")
        port = f"{device.gigabytes:g} GB/s" if device.gigabytes is not None and device.kind == "nic" else ""
        lines = [
            model if len(model) <= 18 else f"{model[:16]}...",
            device.address,
            f"PCIe {device.pcie}" if device.pcie else "",
            port,
        ]
        self.text(x, y + 0.15, device.name, 9, fontweight="bold")
        for number, line in enumerate([each for each in lines if each]):
            self.text(x, y + 0.33 + 0.135 * number, line, 6.5)

    def between_sockets(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        """What nvidia-smi calls SYS."""
        self.axes.plot(xs, ys, color=_SOCKET[1], linewidth=2.2, zorder=1)
        if xs[0] != xs[1]:
            self.text(sum(xs) / 2, ys[0] - 0.12, "SYS", 7.5, GREY)
        else:
            self.text(
                xs[0] + 0.07, ys[0] + 0.2, "SYS", 7.5, GREY, ha="left"
            )  # above the bar of the NVSwitches

    def switch(self, machine: Machine, top: float, room: float) -> None:
        """A bar for the NVSwitches that join all GPUs."""
        gpus = [each for each in machine.devices if each.kind == "gpu"]
        joined = [(each, gpu) for each, gpu in zip(gpus, machine.gpus, strict=False) if gpu.links_to_switch]
        if not joined:
            return
        xs = [self.places[each.name][0] for each, _ in joined]
        left, right, y = min(xs) - 0.45, max(xs) + 0.45, top + room / 2 - 0.18
        self.box(left, y, (right - left, 0.36), ("#d3ecd3", _GPU))
        rate = joined[0][1].nvlink_gigabytes
        said = f": {rate:.0f} GB/s in each direction for every GPU" if rate else ""
        self.text((left + right) / 2, y + 0.18, f"NVSwitch{said}", 9)
        for each, gpu in joined:
            x, edge, direction = self.places[each.name]
            begin, end = (edge + _DEVICE[1], y) if direction == 1 else (edge, y + 0.36)
            self.axes.plot([x, x], [begin, end], color=_GPU, linewidth=2.4, zorder=2)
            self.text(
                x + 0.07, (begin + end) / 2 + 0.06 * direction, f"NV{gpu.links_to_switch}", 8, _GPU, ha="left"
            )

    def direct_links(self, machine: Machine) -> None:
        """An arc between each two GPUs that are joined without a switch."""
        from matplotlib.patches import FancyArrowPatch

        gpus = [each for each in machine.devices if each.kind == "gpu"]
        for one, gpu in enumerate(machine.gpus):
            for other in range(one + 1, len(gpus)):
                count = dict(gpu.links_to_gpu).get(machine.gpus[other].address, 0)
                if not count:
                    continue
                (begin, edge, _), (end, _, _) = self.places[gpus[one].name], self.places[gpus[other].name]
                bottom, depth = edge + _DEVICE[1], min(0.95, 0.3 * (end - begin))
                # A quadratic arc reaches half as deep as its control point.
                bend = 2 * depth / (end - begin)
                style = f"arc3,rad={bend}"
                self.axes.add_patch(
                    FancyArrowPatch(
                        (begin, bottom), (end, bottom), connectionstyle=style, arrowstyle="-", color=_GPU,
                        linewidth=1.8, zorder=5, shrinkA=0, shrinkB=0,
                    )
                )  # fmt: skip
                self.text((begin + end) / 2, bottom + depth + 0.12, f"NV{count}", 8, _GPU)
