"""What is in each node, and how far its parts are from each other: a matrix in nvidia-smi's words, and a picture.

    python -m recipes.ch1.topology
    torchrun --nproc-per-node 2 -m recipes.ch1.topology

One rank of each node reads /sys and asks NVML; nothing is measured and no GPU is touched. Nodes that are equal are
shown once, with the names of all. A node that differs from its neighbours stands out: it has a picture of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist

from recipes.ch1.topology_args import TopologyArgs
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.distributed import joined
from recipes.lib.measurements import Measurements, node_name
from recipes.lib.nvlinks import read_gpus, recorded_gpus
from recipes.lib.tables import table
from recipes.lib.topology import RELATIONS, Machine, read_machine
from recipes.lib.topology_picture import draw_machine
from recipes.lib.training import recipe_main

NEEDED = "sys/devices/system"


@recipe_main
def main() -> None:
    """Read every node; rank 0 prints and draws each kind of node."""
    args = parse_or_exit(TopologyArgs)
    root = Path(args.root)
    if not (root / NEEDED).is_dir():
        raise ArgumentError("root", args.root, f"wants a folder that holds {NEEDED}/")
    with joined("cpu") as world, Measurements("ch1_topology", world, steps=2) as results:
        gpus = read_gpus() if root == Path("/") else recorded_gpus(root / "nvml.json")
        mine = read_machine(node_name(), gpus, root) if world.local_rank == 0 else None
        found: list[Machine | None] = [mine] * world.size
        if world.size > 1:
            dist.all_gather_object(found, mine)
        machines = [each for each in found if each is not None]
        kinds = kinds_of_node(machines)
        results.add(f"read {counted(len(machines), 'node')}, {counted(len(kinds), 'kind')}")
        if world.is_first:
            for number, (machine, nodes) in enumerate(kinds, start=1):
                results.note(
                    kind="machine", nodes=nodes, matrix=machine.matrix(), **dataclasses.asdict(machine)
                )
                results.show(text_of(machine, nodes))
                name = "topology" if len(kinds) == 1 else f"topology-{number}"
                for ending in ("png", "svg"):
                    draw_machine(results.picture(f"{name}.{ending}"), machine, title_of(nodes))
        results.add("drawn")


def kinds_of_node(machines: list[Machine]) -> list[tuple[Machine, list[str]]]:
    """Each kind of node with the names of all that are of it; the most frequent kind first. Pure."""
    kinds: dict[Machine, list[str]] = {}
    for machine in machines:
        kinds.setdefault(machine.kind_of_node(), []).append(machine.name)
    return sorted(kinds.items(), key=lambda kind: -len(kind[1]))


def text_of(machine: Machine, nodes: list[str]) -> str:
    """Sockets, devices and the matrix, with the words that it uses. Pure."""
    lines = ["", title_of(nodes), machine.cpu or "processor not named"]
    for numa in machine.numa:
        distances = " ".join(map(str, numa.distances))
        lines.append(
            f"NUMA {numa.number}: CPUs {numa.cpus}, {numa.memory_gib:.0f} GiB, distances {distances}"
        )
    if not machine.devices:
        return "\n".join([*lines, "neither a GPU nor a network card is on the PCI bus"])
    heads = ["device", "model", "PCI", "PCIe", "GB/s", "NUMA"]
    rows = [
        [
            *(each.name, each.model, each.address, each.pcie or "?"),
            f"{each.gigabytes:.1f}" if each.gigabytes is not None else "?",
            str(each.numa) if each.numa >= 0 else "?",
        ]
        for each in machine.devices
    ]
    lines += ["", table(heads, rows), ""]
    names, matrix = [each.name for each in machine.devices], machine.matrix()
    lines.append(table(["", *names], [[name, *row] for name, row in zip(names, matrix, strict=True)]))
    used = {"NV#" if word.startswith("NV") else word for row in matrix for word in row}
    lines += ["", *(f"{word:<5} {meaning}" for word, meaning in RELATIONS.items() if word in used)]
    return "\n".join(lines)


def title_of(nodes: list[str]) -> str:
    """The names of equal nodes; of many the first few."""
    shown = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
    return f"{counted(len(nodes), 'node')}: {shown}"


def counted(number: int, word: str) -> str:
    """ "1 node", "2 nodes"."""
    return f"{number} {word}{'s' if number != 1 else ''}"


if __name__ == "__main__":
    main()
