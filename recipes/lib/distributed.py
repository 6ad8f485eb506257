"""Who this process is among the others: from torch's environment variables to a process group, and back.

torchrun and the launcher set the same variables, so a recipe cannot tell them apart. Without any of them the
process is a world of one.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from recipes.lib.garbage import imports_are_done
from recipes.lib.stopping import Stopped

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
"""After this long in one collective a rank gives up: another has died or hangs, and nodes cost money."""

PATIENCE = datetime.timedelta(hours=2)
"""The same for what one rank or a file system may take long over: preparing data, writing a checkpoint."""

SECONDS_UNTIL_VISIBLE = 60.0
"""How long another node may not see a new folder: NFS clients remember "no such file" for a minute."""

T = TypeVar("T")

_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GPU_PROMISES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")


class LaunchError(RuntimeError):
    """The process was started in a way that cannot work; the message is one line for the person who did."""


@dataclass(frozen=True)
class World:
    """This process's place among all ranks, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks on this node."""
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """All ranks, on gloo and with PATIENCE; None without torch.distributed."""
    background: dist.ProcessGroup | None = None
    """The same for the thread that writes checkpoints: of two threads in one group, one would get the other's
    messages."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0: the one that prints, writes metrics and renames checkpoints."""
        return self.rank == 0


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the process group that the environment describes, and leave it at the end.

    `device` is "auto" (a GPU where there is one), "cpu" or "cuda". Without torch's variables the group has
    this process alone and needs no address. Raises LaunchError where ranks are missing their variables or a
    GPU.
    """
    imports_are_done()
    world = world_from_environment(os.environ, device)
    _start_process_group(world)
    patient, background = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    stopped: Stopped | None = None
    try:
        yield dataclasses.replace(world, patient=patient, background=background)
    except Stopped as request:
        stopped = request  # on all ranks alike
    # Not in a `finally`: after an error the other ranks may be inside a collective, and leaving the group
    # would wait for them. The process ends with its traceback instead and the launcher stops the rest.
    dist.barrier()
    dist.destroy_process_group()
    if stopped is not None:
        raise stopped


@contextmanager
def alone(device: str = "auto") -> Iterator[World]:
    """A world of one without torch.distributed. Raises LaunchError where more than one rank was started."""
    imports_are_done()
    world = world_from_environment(os.environ, device)
    if world.size > 1:
        raise LaunchError(f"WORLD_SIZE={world.size}: this recipe runs on one device; start one task")
    yield world


def world_from_environment(environment: Mapping[str, str], device: str) -> World:
    """Read the variables; starts nothing. Raises LaunchError as `joined` does."""
    given = [name for name in _REQUIRED if name in environment]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        tasks = environment.get("SLURM_NTASKS", "1")
        if tasks != "1":
            # Every task would train alone and call itself rank 0: N runs that overwrite each other.
            start = "start the recipe with `python -m launcher` or torchrun"
            raise LaunchError(f"SLURM_NTASKS={tasks} but RANK is not set: {start}")
        return World(rank=0, size=1, local_rank=0, local_size=1, device=_device(device, 0, 1, environment))
    missing = [name for name in _REQUIRED if name not in environment]
    if missing:
        raise LaunchError(f"{', '.join(given)} set but not {', '.join(missing)}: a launcher sets all of them")
    size, local_rank = int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"])
    local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
    return World(
        rank=int(environment["RANK"]),
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        device=_device(device, local_rank, local_size, environment),
    )


def _device(wanted: str, local_rank: int, local_size: int, environment: Mapping[str, str]) -> torch.device:
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        promise = next((name for name in _GPU_PROMISES if environment.get(name, "0") != "0"), None)
        if wanted == "cuda" or promise is not None:
            why = "device=cuda" if wanted == "cuda" else f"{promise}={environment[promise or '']}"
            reason = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"
            raise LaunchError(f"{why}, but {reason} (device=cpu would run without one)")
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1 and local_size > 1:
        # Slurm's --gpus-per-task: each task sees its own GPU only, as number 0.
        local_rank = 0
    if local_rank >= visible:
        raise LaunchError(f"LOCAL_RANK={local_rank}, but {visible} GPUs are visible: start one task per GPU")
    return torch.device("cuda", local_rank)


def _start_process_group(world: World) -> None:
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(world.device)
    # gloo beside NCCL: offloaded parameters and the exchange of Python objects live on the CPU. No device_id:
    # the subgroups of a mesh are split off NCCL's communicator then, and have no gloo.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        # A store without a port: nobody else has to find this process.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, store=store, rank=0, world_size=1)


def sum_over_ranks(value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of the tensors of all ranks (of `group`), on each of them; the tensor itself in a world of one."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value


def from_first(value: T, world: World) -> T:
    """Rank 0's value, on every rank; it must survive pickling."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def run_directory(recipe: str, world: World) -> Path:
    """The run's directory, which every rank sees; made if it is not there.

    RUN_DIR where the launcher set it; otherwise rank 0 names one under ./runs and tells the others.
    """
    if "RUN_DIR" in os.environ:
        folder = Path(os.environ["RUN_DIR"])
    else:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        # From the first: by its own clock, each rank would name a directory of its own.
        folder = Path("runs") / from_first(f"{recipe}-torchrun-{now}", world)
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def attempt() -> int:
    """Number of this attempt within the run, from 1."""
    return int(os.environ.get("ATTEMPT", "1"))
