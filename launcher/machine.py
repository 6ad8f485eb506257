"""What this machine and its box have, for the profiles that run on them. File system, subprocess."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.spec import UserError

DEFAULT_BOX_NODES = 2
"""What `box up` starts."""

BOX_NAME_VARIABLE = "LAUNCHER_BOX"
"""Which box `cluster=box` means where several run side by side; "default" when unset."""


@dataclass(frozen=True)
class NodeFacts:
    """What one node offers a job."""

    gpus: int
    cpus: int
    """What the scheduler may give out."""
    cores: int
    """Real cores behind them; fewer where several nodes of a box share this machine."""
    nodes: int | None = 1
    """Nodes of this kind; None where nobody knows yet."""


def this_machine(devices: Path = Path("/dev"), environment: Mapping[str, str] = os.environ) -> NodeFacts:
    """This machine as one node: its device files and the cores that this process may use.

    A CUDA_VISIBLE_DEVICES that is set hides GPUs from the job as well, so it counts. Neither a driver nor
    torch is asked: that would cost the command line seconds.
    """
    gpus = sum(1 for device in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", device.name))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # As CUDA reads it: the first negative or empty entry hides itself and all that follow.
        names = [name.strip() for name in visible.split(",")]
        shown = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        gpus = min(gpus, shown)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return NodeFacts(gpus=gpus, cpus=cores, cores=cores)


def box_node() -> NodeFacts:
    """One node of the running box, as its Slurm reports it; what `box up` would start where none runs."""
    # Here, because only cluster=box needs them.
    from launcher import box
    from launcher.box.gpus import share_out

    machine = this_machine()
    found = box.find(box_name())
    if found is None:
        cores = max(1, machine.cores // DEFAULT_BOX_NODES)
        least = min(map(len, share_out(range(machine.gpus), DEFAULT_BOX_NODES)))
        return NodeFacts(least, cpus=cores, cores=cores, nodes=None)
    return parse_box_nodes(_sinfo(found.bin_dir), machine)


def box_name() -> str:
    """The box that `cluster=box` means."""
    return os.environ.get(BOX_NAME_VARIABLE, "default")


def parse_box_nodes(sinfo: str, machine: NodeFacts) -> NodeFacts:
    """The least that every node of a box has, from lines `NODE|CPUS|GRES`, one per node and partition."""
    nodes = {line.partition("|")[0]: line.split("|") for line in sinfo.splitlines() if line}
    gpus = [re.search(r"\bgpu(?::[^:,()]+)?:(\d+)", gres) for _, _, gres in nodes.values()]
    cores = max(1, machine.cores // len(nodes))
    return NodeFacts(
        gpus=min(int(found[1]) if found else 0 for found in gpus),
        # A box gives out more CPUs than the machine has; a rank is to ask for its share of real cores.
        cpus=min(cores, *(int(cpus) for _, cpus, _ in nodes.values())),
        cores=cores,
        nodes=len(nodes),
    )


def _sinfo(bin_dir: Path) -> str:
    command = [str(bin_dir / "sinfo"), "--noheader", "--Node", "--format=%N|%c|%G"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if finished.returncode != 0 or not finished.stdout.strip():
        raise UserError(f"cluster=box: its sinfo does not answer: {finished.stderr.strip() or 'no node'}")
    return finished.stdout
