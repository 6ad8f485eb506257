"""DeepSpeed, where it is installed: how it is told what this process is, before and after it is imported.

It is a stack of its own (env/requirements/deepspeed.in): nothing but chapter 5 wants it, so nothing else imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import warnings
from typing import Any

from recipes.lib.distributed import LaunchError, World

# torch 2.13 renames what 0.19.8 calls, and says so at every rank's first call.
warnings.filterwarnings(
    "ignore", message=r"`torch.distributed.\w+_tensor` is deprecated", category=FutureWarning
)


def check_deepspeed(recipe: str) -> None:
    """Raises LaunchError, one line, where this Python has no DeepSpeed. Imports nothing."""
    if importlib.util.find_spec("deepspeed") is None:
        way = "python -m launcher env install deepspeed makes a Python that has it"
        raise LaunchError(f"{recipe} needs deepspeed, which is not installed here: {way}")


def import_deepspeed(recipe: str, world: World) -> Any:
    """The package `deepspeed`, ready to use in the process group of `world`. Raises LaunchError without one."""
    check_deepspeed(recipe)
    # It looks for GPUs by itself otherwise, and would take one that device=cpu has declined.
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it insists, also in a world of one
    deepspeed = importlib.import_module("deepspeed")
    if world.device.type == "cpu":
        # An exchange through shared memory, which it would compile for a minute at the first start. gloo is there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Without its search for an MPI: who this process is has been settled.
    deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed


def missing_tools() -> str | None:
    """What this node lacks to compile any operator; None where both are there."""
    missing = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
    return f"wants {' and '.join(missing)}, to compile an operator of DeepSpeed" if missing else None


def missing_for_disks() -> str | None:
    """What offload to a disk lacks on this node; None where its operator can be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "wants libaio with its headers (Debian's libaio-dev) to compile DeepSpeed's async_io; nearest: cpu"
    return None
