"""Copies of a run's state in host memory, taken while the GPU computes.

torch's own `DefaultStager` does the same, but in torch 2.11 it forgets its memory after each copy and fails at the
second one; what it is made of is used here, and keeps a copy's memory for the next.
"""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.cuda._pin_memory_utils as pinning
from torch import UntypedStorage
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

State = dict[str, Any]


class _ResidentCopies(StateDictStager):
    """Takes pinned memory from the system before it hands it to the driver.

    Pinning new memory makes the driver fetch each page while it holds its lock, which every kernel's launch waits for:
    22 GiB made the training step beside it 17 s long. Written to first, by threads that hold no lock, the pages are
    there.
    """

    def _stage_untyped_storage(self, storage: UntypedStorage, non_blocking: bool = False) -> UntypedStorage:
        new = storage not in self._cached_storage_mapping
        if self.pin_memory and new and storage.nbytes() >= self.pin_memory_min_bytes:
            self._cached_storage_mapping[storage] = _pinned(storage.nbytes())
        staged: UntypedStorage = super()._stage_untyped_storage(storage, non_blocking=non_blocking)
        return staged


def _pinned(size: int) -> UntypedStorage:
    memory = torch.empty(size, dtype=torch.uint8).fill_(0).untyped_storage()
    pinning.pin_memory(memory.data_ptr(), size)
    unpin = weakref.finalize(memory, pinning.unpin_memory, memory.data_ptr())
    unpin.atexit = False  # the CUDA context is gone by then
    return memory


class Stager:
    """One copy of the state at a time; the memory of the first is used for all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.overlaps = device.type == "cuda"
        """Whether a copy goes on after `stage` has returned."""
        # Pinned: the GPU writes to it by itself, at the rate of the bus.
        self._copies = _ResidentCopies(pin_memory=self.overlaps)
        # A new thread's device is the first GPU. Leaving a stream of another one would make this process a context
        # there, of half a GiB, and fail where that GPU is full: "out of memory", in a save of rank 2.
        own = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        self._thread = ThreadPoolExecutor(1, "staging", **own) if self.overlaps else None
        self._stream = torch.cuda.Stream(device) if self.overlaps else None

    def stage(self, state: State) -> Future[State]:
        """A copy of `state` as it is now. Nothing of it may change before the future is done.

        The copy is valid until the next one.
        """
        if self._thread is None:
            done: Future[State] = Future()
            done.set_result(self._copies.stage(state))
            return done
        # The copies run on a stream of their own, which knows nothing of kernels that have yet to write this state.
        torch.cuda.current_stream(self._device).synchronize()
        return self._thread.submit(self._copy, state)

    def _copy(self, state: State) -> State:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):  # this thread's; its device is the stream's
            copied: State = self._copies.stage(state, non_blocking=True)
        self._stream.synchronize()
        return copied

    def close(self) -> None:
        """Wait for the copy under way and give the memory back."""
        if self._thread is not None:
            self._thread.shutdown()
        self._copies.close()
