"""How long a rank works itself in a step, without what it waits for others: the measure by which a slow one is found.

In a synchronous step all ranks take the same time, because the fast ones wait for the slow one inside of a collective.
So parts of a step are timed in which no collective can be:

- the input: from the step's beginning until this rank has its microbatches (the host's clock),
- the forward pass of every layer: after FSDP has gathered its parameters and before it frees them,
- the optimizer's update of this rank's parameters.

On a GPU the last two are timed by events on the stream that computes. They are read at later step boundaries, when they
have happened: nothing is synchronized. The stream waits for a gathered parameter before the first event of a layer, so
that wait is not counted; a GPU that waits for its own host is.

Not timed: the backward pass, where gradients are exchanged in the midst of the arithmetic. A core or a GPU that is
slow is slow in the forward pass too, but something that only slows the backward pass, the exchange itself (a bad
cable) or a save is not seen here. Under tensor parallelism a layer's forward pass does wait for the ranks that share
its matrices, and under DeepSpeed's ZeRO 3 for those that it gathers from: a slow one is not told from its neighbours
there.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from recipes.lib.model import Block

KEPT_STEPS = 10
"""The median over so many: one page fault or one garbage collection makes no rank slow."""
LEAST_STEPS = 5
"""Before that nothing is said. The first step of all, which compiles and allocates, does not count."""
MOST_UNREAD = 8
"""Steps whose events the GPU has not reached yet; of a host that is further ahead the oldest are dropped."""

Events = list[tuple[torch.cuda.Event, torch.cuda.Event]]


class OwnTime:
    """Measures the layers of `model` from here on; `median` is in seconds per step."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host = 0.0
        self._events: Events = []
        self._unread: deque[tuple[float, Events]] = deque(maxlen=MOST_UNREAD)
        self._steps: deque[float] = deque(maxlen=KEPT_STEPS)
        self._is_first = True
        self._begun: Any = None
        for module in model.modules():
            if isinstance(module, Block):
                # Innermost: FSDP's hooks, which wait for the others, come before this one and after that one.
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end, prepend=True)

    @contextmanager
    def input(self) -> Iterator[None]:
        """Around what the host alone does, such as loading."""
        start = time.perf_counter()
        yield
        self._host += time.perf_counter() - start

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around the optimizer's step."""
        self._begin()
        yield
        self._end()

    def step_is_over(self) -> None:
        """At each step boundary: what was measured since the last one is one step."""
        self._unread.append((self._host, self._events))
        self._host, self._events = 0.0, []
        if self._is_first:
            self._is_first = False
            self._unread.clear()
        # In the order of the stream: when a step's last event has happened, all of it has.
        while self._unread and (not self._unread[0][1] or self._unread[0][1][-1][1].query()):
            seconds, events = self._unread.popleft()
            self._steps.append(seconds + sum(start.elapsed_time(end) for start, end in events) / 1000)

    @property
    def median(self) -> float | None:
        """Seconds of own work in a step; None until LEAST_STEPS were measured."""
        return statistics.median(self._steps) if len(self._steps) >= LEAST_STEPS else None

    def _begin(self, *_: Any) -> None:
        self._begun = self._event() if self._on_gpu else time.perf_counter()

    def _end(self, *_: Any) -> None:
        if self._on_gpu:
            self._events.append((self._begun, self._event()))
        else:
            self._host += time.perf_counter() - self._begun

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
