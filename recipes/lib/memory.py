"""How much memory a technique takes on this rank: what it keeps, by kind, and the most that was in use at any time."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Kept:
    """Bytes on this rank between two steps, wherever they live."""

    parameters: int
    gradients: int
    """Right before the optimizer's step; their memory may be used for activations in between."""
    moments: int


@runtime_checkable
class Keeping(Protocol):
    """A technique whose stack holds things where torch would not look."""

    def kept(self) -> Kept:
        """On this rank."""


def kept_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> Kept:
    """Counted, not measured: this rank's own elements of every parameter and of the optimizer's state.

    A gradient is as large as its parameter's part on this rank.
    """
    parameters = sum(_bytes(parameter) for parameter in model.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    moments = sum(_bytes(value) for value in state if isinstance(value, Tensor) and value.ndim)
    return Kept(parameters, parameters, moments)


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


class PeakMemory:
    """The most memory in use since this was made, above what was in use then.

    On a GPU what torch has allocated. On a CPU the process's resident memory (VmHWM of /proc/self/status): all of it
    counts, also what other threads or libraries touch meanwhile, and pages that malloc does not give back.
    """

    def __init__(self, device: torch.device) -> None:
        """Frees what nobody refers to and begins to watch."""
        self._device = device
        gc.collect()  # hooks and modules refer to each other in circles
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # or freed memory would hide what the next technique takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = _status("VmRSS")

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
