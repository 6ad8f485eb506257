"""A box from `up` to `down`. Everything that changes a box holds its lock."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.box import config, gpus, packages, paths, processes, startup
from launcher.box.packages import Packages, Say
from launcher.box.paths import BoxUnavailable
from launcher.box.processes import DaemonFailed
from launcher.box.startup import Plan
from launcher.spec import UserError

DEFAULT_CPUS_PER_NODE = 16
_START_ATTEMPTS = 3

_Shares = tuple[tuple[gpus.Gpu, ...], ...]


@dataclass(frozen=True)
class Shape:
    """What was asked of a box; `up` leaves a running box of the same shape alone."""

    nodes: int
    cpus_per_node: int
    gpu_device_files: tuple[str, ...]
    accounting: bool

    def __str__(self) -> str:
        extra = ", accounting" if self.accounting else ""
        return f"{self.nodes} nodes, {self.cpus_per_node} CPUs each, {len(self.gpu_device_files)} GPUs{extra}"


@dataclass(frozen=True)
class Box:
    """A box that was brought up."""

    name: str
    state_dir: Path
    slurm_conf: Path
    """For SLURM_CONF."""
    bin_dir: Path
    """For the front of PATH: sbatch, srun, squeue, …, which find their configuration by themselves."""
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """How a box fares."""

    name: str
    state: str
    """`up`: the controller answers; `broken`: the box left something behind but does not answer; `down`."""
    shape: str = ""
    state_dir: str = ""
    nodes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Slurm's state of each node: idle, mixed, allocated, down, …"""
    jobs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of jobs in each of Slurm's states: RUNNING, PENDING."""
    slurm_version: str = ""


def up(
    nodes: int = 2,
    name: str = "default",
    cpus_per_node: int | None = None,
    gpus: int | None = None,
    accounting: bool = False,
    gpu_device_files: Sequence[Path] | None = None,
    say: Say = lambda line: None,
) -> Box:
    """Bring up a Slurm cluster of `nodes` nodes on this machine and return when all nodes answer.

    A running box of the same shape is returned as it is. `cpus_per_node` is what Slurm gives out, not what
    the machine has (default 16): it decides how many jobs share a node. `gpus` is the number of the machine's
    GPUs to deal to the nodes, None for all. `gpu_device_files` stands in for /dev/nvidia0, /dev/nvidia1, … in
    tests: links to /dev/null named nvidiaN will do. `say` is given lines of progress.

    Raises BoxUnavailable if this machine cannot run a box, UserError if a box of that name has another shape.
    """
    paths.check_name(name)
    shape, shares = _plan(nodes, cpus_per_node, gpus, accounting, gpu_device_files)
    wanted = packages.SLURM + (packages.ACCOUNTING if accounting else ())
    unpacked = packages.fetch(wanted, say=say)
    with _lock():
        if existing := _record(name):
            _require_this_host(name, existing)
            if box := _running(name, existing):
                have = _shape_of(existing)
                if have != shape:
                    raise UserError(f"box {name!r} runs with {have}, not {shape}; {_end_it(name)}")
                say(f"box {name!r} is up already")
                return box
            if processes.of_box(paths.state_dir(name) / "slurm.conf", paths.packages_root()):
                # It may be slow only, and its jobs alive: nobody asked to end them.
                raise BoxUnavailable(f"box {name!r} runs but does not answer; {_end_it(name)}")
            say(f"clearing away what box {name!r} left when it died")
        _clear(name)
        return _start(name, shape, shares, unpacked)


def down(name: str = "default") -> bool:
    """End a box with all its jobs and processes and remove its folder. False if there was nothing to do.

    Jobs are killed without notice. Raises UserError when called from within one of the box's own jobs.
    """
    paths.check_name(name)
    with _lock():
        folder = paths.state_dir(name)
        if not paths.is_folder(folder):
            return False
        if record := _record(name):
            _require_this_host(name, record)
        if os.environ.get(config.JOB_MARKER) == str(folder / "slurm.conf"):
            raise UserError(f"this is a job of box {name!r}: bring the box down from outside of it")
        _clear(name)
        return True


def find(name: str = "default") -> Box | None:
    """The box of that name if its controller answers, else None."""
    record = _record(paths.check_name(name))
    return _running(name, record) if record and record["host"] == socket.gethostname() else None


def recorded_shape(name: str = "default") -> Shape | None:
    """The shape of a box that was brought up and not down since, from its record alone, or None."""
    record = _record(name)
    return None if record is None else _shape_of(record)


def status(name: str = "default") -> Status:
    """How the box of that name fares. Waits at most some seconds for an answer."""
    record = _record(paths.check_name(name))
    folder = paths.state_dir(name)
    if record is None:
        return Status(name, "broken" if paths.is_folder(folder) else "down", state_dir=str(folder))
    shape = str(_shape_of(record))
    box = find(name)
    if box is None:
        return Status(name, "broken", shape, str(folder))
    jobs: dict[str, int] = {}
    for job_state in (processes.ask([box.bin_dir / "squeue", "-h", "-o", "%T"]) or "").split():
        jobs[job_state] = jobs.get(job_state, 0) + 1
    version = (processes.ask([box.bin_dir / "sinfo", "--version"]) or "").strip()
    return Status(name, "up", shape, str(folder), startup.node_states(box.bin_dir), jobs, version)


def environment(box: Box) -> dict[str, str]:
    """Variables to add to a process that shall use the box: PATH with its commands first, and SLURM_CONF."""
    rest = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = [str(box.bin_dir), *(entry for entry in rest if entry != str(box.bin_dir))]
    return {"PATH": os.pathsep.join(path), "SLURM_CONF": str(box.slurm_conf)}


def _plan(
    nodes: int, cpus: int | None, wanted: int | None, accounting: bool, device_files: Sequence[Path] | None
) -> tuple[Shape, _Shares]:
    if not 1 <= nodes <= config.MAX_NODES:
        raise UserError(f"nodes={nodes}: a box has 1 to {config.MAX_NODES} nodes")
    if cpus is not None and cpus < 1:
        raise UserError(f"cpus_per_node={cpus}: a node has at least 1 CPU")
    chosen = gpus.choose(gpus.detect(device_files), wanted)
    files = tuple(gpu.device_file for gpu in chosen)
    return Shape(nodes, cpus or DEFAULT_CPUS_PER_NODE, files, accounting), gpus.share_out(chosen, nodes)


def _start(name: str, shape: Shape, shares: _Shares, unpacked: Packages) -> Box:
    """Write the box's folder and start its daemons, again with other ports if somebody else was faster."""
    plan = Plan(f"box-{name}", paths.state_dir(name), shape.cpus_per_node, shape.accounting, shares)
    for attempt in range(1, _START_ATTEMPTS + 1):
        layout = startup.lay_out(plan, unpacked)
        try:
            _note(name, shape)
            startup.write(layout, unpacked)
            startup.start(layout, unpacked)
            return _box(name, layout.state_dir, shape)
        except DaemonFailed as failure:
            taken = startup.port_was_taken(layout)
            _clear(name)
            if not taken or attempt == _START_ATTEMPTS:
                raise BoxUnavailable(f"box {name!r} did not start: {failure}") from failure
        except BaseException:  # Ctrl-C too: leave no daemon behind
            _clear(name)
            raise
    raise AssertionError("unreachable")


def _note(name: str, shape: Shape) -> None:
    """Make the box's folder and note what the box is to be, before anything starts that may need clearing."""
    folder = paths.private_folder(paths.state_dir(name))
    folder.chmod(0o700)  # it will hold the key that lets its bearer run jobs
    record = {"host": socket.gethostname(), "shape": dataclasses.asdict(shape)}
    (folder / "box.json").write_text(json.dumps(record), "utf-8")


def _end_it(name: str) -> str:
    return f"use another --name, or end it with: python -m launcher box down --name {name}"


def _lock() -> contextlib.AbstractContextManager[None]:
    """One lock for all boxes: two that start at once would only fight for the machine."""
    return paths.locked(paths.root() / "boxes.lock")


def _record(name: str) -> dict[str, Any] | None:
    """What `up` wrote down about a box; None if there is none that this user may see."""
    try:
        return dict(json.loads((paths.state_dir(name) / "box.json").read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError, PermissionError, json.JSONDecodeError):
        return None


def _shape_of(record: Mapping[str, Any]) -> Shape:
    shape = dict(record["shape"])
    return Shape(**{**shape, "gpu_device_files": tuple(shape["gpu_device_files"])})


def _box(name: str, folder: Path, shape: Shape) -> Box:
    nodes = tuple(config.node_name(index) for index in range(shape.nodes))
    return Box(name, folder, folder / "slurm.conf", folder / "bin", nodes)


def _running(name: str, record: Mapping[str, Any]) -> Box | None:
    box = _box(name, paths.state_dir(name), _shape_of(record))
    return box if startup.answers(box.bin_dir) else None


def _require_this_host(name: str, record: Mapping[str, Any]) -> None:
    """A cache folder may be shared by machines, a box's processes are not."""
    if record["host"] != socket.gethostname():
        raise BoxUnavailable(
            f"box {name!r} was brought up on host {record['host']}: bring it down there, use another --name,"
            f" or delete {paths.state_dir(name)} if that host is gone"
        )


def _clear(name: str) -> None:
    """Kill what is left of a box and remove its folder."""
    folder = paths.state_dir(name)
    processes.kill_all(folder / "slurm.conf", paths.packages_root())
    if paths.is_folder(folder):
        shutil.rmtree(folder)
