"""What a recipe that measures leaves behind: every figure with what it was measured on, and how far it is.

RUN_DIR/results.jsonl begins, for each attempt, with a line of kind "about" (command, versions, hardware, ranks); each
measurement is a line after it. RUN_DIR/metrics.jsonl has a line per measurement, too: step 3 of 12, as a training run
has, but without a loss. That is what the launcher's `status` and `--wait` show. An attempt that was interrupted is
repeated from the start: it takes minutes, and figures of two different hours do not belong into one table.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from recipes.lib.distributed import LaunchError, World, attempt, run_directory
from recipes.lib.heartbeat import Heartbeat
from recipes.lib.lines import Lines
from recipes.lib.metrics import METRICS_FILE, say
from recipes.lib.stopping import OF_THIS_PROCESS, Stopped, attempt_folder

RESULTS_FILE = "results.jsonl"
SHOWN_FILE = "results.txt"


class Measurements:
    """The results of one attempt. All ranks make every call together; rank 0 writes and prints.

    As a context: leaving it says that the rank is done and closes the files.
    """

    def __init__(self, recipe: str, world: World, steps: int, directory: Path | None = None) -> None:
        """`steps` is how many measurements there will be; `directory` the run's, where it is known already."""
        self.directory = directory or run_directory(recipe, world)
        self._world, self._steps, self._step = world, steps, 0
        self._began = time.time()
        self._heartbeat = Heartbeat(attempt_folder(), world.rank)
        self._heartbeat.beat(0, "start")
        about = {"kind": "about", "recipe": recipe, **facts(world)}
        self._results = Lines(self.directory / RESULTS_FILE) if world.is_first else None
        self._metrics = Lines(self.directory / METRICS_FILE) if world.is_first else None
        if world.is_first:
            (self.directory / SHOWN_FILE).unlink(missing_ok=True)  # an earlier attempt's
        self.hardware = str(about["hardware"])
        self.node_of_rank: list[str] = about["node_of_rank"]
        self.note(**about)
        nodes = f"{about['nodes']} node{'s' if about['nodes'] > 1 else ''}"
        self.say(f"{recipe}: {world.size} rank{'s' if world.size > 1 else ''} on {nodes}, {self.hardware}")
        self.say(f"run directory {self.directory}")

    def note(self, **line: Any) -> None:
        """A line of results that is no measurement, such as what was found about the network."""
        if self._results is not None:
            self._results.append({"attempt": attempt(), "time": time.time(), **line})

    def add(self, what: str, **figures: Any) -> None:
        """One measurement more. Raises Stopped, on every rank alike, when the run was asked to stop."""
        self._step += 1
        self._heartbeat.beat(self._step, "step")
        self.note(kind="measurement", what=what, **figures)
        if self._metrics is not None:
            now = time.time()
            progress = {"step": self._step, "steps": self._steps, "what": what, "seconds": now - self._began}
            self._metrics.append({"time": now, "attempt": attempt(), **progress})
            self._began = now
        reason = (
            OF_THIS_PROCESS.agreed(self._world.rank, attempt_folder()) if self._step < self._steps else None
        )
        if reason is not None:
            self.say(f"stopped after measurement {self._step} of {self._steps}: {reason}")
            raise Stopped

    def say(self, text: str) -> None:
        """A line for the log, from rank 0."""
        if self._world.is_first:
            say(text)

    def show(self, text: str) -> None:
        """A part of the result as people read it: in the log and in RUN_DIR/results.txt, which the launcher shows."""
        if self._world.is_first:
            say(text)
            with (self.directory / SHOWN_FILE).open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def picture(self, name: str) -> Path:
        """Where a picture of this name goes; says so. For rank 0."""
        path = self.directory / name
        self.show(f"picture {path}")
        return path

    def __enter__(self) -> Measurements:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or kind is Stopped:
            self._heartbeat.beat(self._step, "done")
        for file in (self._results, self._metrics):
            if file is not None:
                file.close()


def several(world: World) -> None:
    """Connect all ranks. Raises LaunchError where this one is alone: there is nobody to talk to."""
    if world.size < 2:
        raise LaunchError("one rank alone has nobody to talk to: start two or more (tasks_per_node=2)")
    connect(world)


def connect(world: World) -> None:
    """The first collective, of all ranks: NCCL makes its communicator in it.

    A message between two ranks alone would make it as well, and wait for the others for ever.
    """
    dist.all_reduce(torch.ones(1, device=world.device))


def facts(world: World) -> dict[str, Any]:
    """The command, the versions and the hardware, from all ranks: rank 0's and what differs from it."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    mine = {"node": node_name(), "device": gpu or cpu_model()}
    found = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine)
    devices = [each["device"] for each in found]
    counted = [f"{devices.count(each)} x {each}" for each in dict.fromkeys(devices)]
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if gpu:
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "command": command(),
        "versions": versions,
        "hardware": ", ".join(counted) if gpu else f"{os.cpu_count()} CPU cores, {cpu_model()}",
        "kernel": platform.release(),
        "ranks": world.size,
        "nodes": len({each["node"] for each in found}),
        "node_of_rank": [each["node"] for each in found],
        "backend": dist.get_backend() if dist.is_initialized() else "none",
    }


def command() -> str:
    """What was started on every rank, without who started it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else sys.argv[0]
    return shlex.join(["python", "-m", name, *sys.argv[1:]])


def node_name() -> str:
    """This node's name: Slurm's, where Slurm started us. Nodes of a box share one host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def cpu_model() -> str:
    """The processor's name, as the kernel gives it; its architecture where it gives none, as on Arm."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
