"""AdamW whose moments live in a file on each node's own disk: 8 of the 16 bytes that a parameter costs.

The file is mapped into memory, so the moments are ordinary tensors to whoever saves or loads them; the kernel reads
their pages when they are used and writes them back when memory gets short. A step brings one chunk after the other to
the parameters' device, updates it with the same kernel as torch's fused AdamW, and puts it back.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from recipes.lib.arguments import ArgumentError
from recipes.lib.distributed import World

CHUNK = 2**26
"""Numbers that are updated at once: two moments of 256 MiB, in the device's memory for so long."""
_ALIGNED = 1024
"""Numbers: each tensor begins on a page of its own."""


class FileAdamW(torch.optim.AdamW):
    """AdamW over `groups`; both moments of every parameter in one file that `folder` never shows."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        folder: str,
        world: World,
        chunk: int = CHUNK,
    ) -> None:
        """All ranks call this together. Raises ArgumentError where any rank's disk has no room, on all of them."""
        # As torch's own, so that a checkpoint of the one has every option of the other.
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self._chunk = chunk
        parameters = [p for group in self.param_groups for p in group["params"]]
        sizes = [_local(p).numel() for p in parameters]
        starts = list(_starts([size for size in sizes for _ in range(2)]))
        dtype = parameters[0].dtype
        mapped = _allocate_together(Path(folder).expanduser(), starts.pop() * dtype.itemsize, world)
        for parameter, size in zip(parameters, sizes, strict=True):
            first, second = (_part(mapped, starts.pop(0), size, dtype) for _ in range(2))
            self.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": _like(parameter, first),
                "exp_avg_sq": _like(parameter, second),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy moments into the file: torch's own way would replace them by tensors on the parameters' device.

        Rates and decay are this run's own, not the saved ones.
        """
        # Numbers or names, as whoever saved it has called them: the order counts.
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for saved_as, parameter in zip(names, parameters, strict=True):
            mine = self.state[parameter]
            for name, value in state_dict["state"][saved_as].items():
                if value is not mine[name]:
                    mine[name].copy_(value)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        flat = [
            _local(each).view(-1)
            for each in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        ]
        step = state["step"].to(flat[0].device)
        for parts in zip(*(each.split(self._chunk) for each in flat), strict=True):
            value, gradient, *kept = parts
            moments = [each.to(value.device) for each in kept]  # on a CPU the file's pages themselves
            torch._fused_adamw_(
                [value],
                [gradient],
                moments[:1],
                moments[1:],
                [],
                [step],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            for there, here in zip(kept, moments, strict=True):
                if there is not here:
                    there.copy_(here)


def _starts(sizes: list[int]) -> Iterator[int]:
    """Where each begins, and at last where all of them end."""
    start = 0
    for size in sizes:
        yield start
        start += -(-size // _ALIGNED) * _ALIGNED
    yield start


def _part(mapped: mmap.mmap | None, start: int, size: int, dtype: torch.dtype) -> Tensor:
    """So many numbers of the file, as a tensor that begins where its storage does.

    A view with an offset would not do: torch's stager takes a DTensor around one for a tensor of its own memory.
    """
    if not size:  # a rank without rows of this parameter
        return torch.empty(0, dtype=dtype)
    assert mapped is not None
    return torch.frombuffer(mapped, dtype=dtype, count=size, offset=start * dtype.itemsize)


def _allocate_together(folder: Path, size: int, world: World) -> mmap.mmap | None:
    """So many zero bytes in a new file of this rank's, None for none.

    The same ArgumentError on every rank where one of them could not.
    """
    problem, mapped = None, None
    try:
        if size:
            mapped = _allocate(folder / f"moments-of-rank-{world.rank}", size)
    except OSError as error:
        problem = f"{error.strerror} on {socket.gethostname()}; wants {size / 2**30:.3f} GiB a rank"
    problems = [problem]
    if world.size > 1:
        problems = [None] * world.size
        dist.all_gather_object(problems, problem, group=world.patient)
    if found := [each for each in problems if each is not None]:
        raise ArgumentError("optimizer_folder", str(folder), found[0])
    return mapped


def _allocate(file: Path, size: int) -> mmap.mmap:
    """Raises OSError where the disk is full: later, a page that has no room would end the process without a word."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
        # What is mapped stays until the process ends, in whatever way; the disk is never left full.
        file.unlink()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, numbers: Tensor) -> Tensor:
    """The numbers as a tensor that is split as `parameter` is, for checkpoints."""
    shaped = numbers.view(_local(parameter).shape)
    # Not from_local: that would move them to the parameters' device.
    return DTensor(shaped, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else shaped
