"""When each action of a pipeline began and ended, on every rank: by the host's clock, on a GPU by its events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from recipes.lib.distributed import World
from recipes.lib.pipeline_orders import Action, Span

KEPT_RUNS = 5
"""Of the schedule. The first ones of a process connect and allocate."""

Mark = Any
"""A moment: seconds on a CPU, an event on a GPU."""


class Clock:
    """Measures this rank's actions; the ranks of `group` begin each run together, so that their times compare.

    Begin and end are right to within the time of one small message. Without `running` it measures nothing and
    nobody waits.
    """

    def __init__(self, world: World, group: dist.ProcessGroup | None, *, running: bool) -> None:
        self._world, self._group, self._running = world, group, running
        self.device = world.device
        self._on_gpu = world.device.type == "cuda"
        self._runs: deque[tuple[Mark, list[tuple[Action, Mark, Mark]]]] = deque(maxlen=KEPT_RUNS)

    def start(self) -> None:
        """A run of the schedule begins."""
        if not self._running:
            return
        if self._group is not None:
            # A sum of one number, and no barrier: on a GPU the host goes on, and only the stream waits.
            dist.all_reduce(torch.zeros(1, device=self._world.device), group=self._group)
        self._runs.append((self._mark(), []))

    @contextmanager
    def measure(self, action: Action) -> Iterator[None]:
        """Around what is computed for `action`, without the messages. Twice for one action is one from end to end."""
        if not self._running:
            yield
            return
        begin = self._mark()
        yield
        actions = self._runs[-1][1]
        if actions and actions[-1][0] == action:
            begin = actions.pop()[1]
        actions.append((action, begin, self._mark()))

    @contextmanager
    def measure_more(self) -> Iterator[None]:
        """Around what belongs to the action that was measured last."""
        if not self._running:
            yield
            return
        with self.measure(self._runs[-1][1][-1][0]):
            yield

    def runs(self) -> list[list[Span]]:
        """The kept runs, oldest first, of this rank's pipeline: every rank's actions, in seconds from the begin.

        All ranks of the world call this together, and all of them get it.
        """
        mine = [
            [Span(self._world.rank, action, self._since(origin, begin), self._since(origin, end))
             for action, begin, end in actions]
            for origin, actions in self._runs
        ]  # fmt: skip
        everyone = [mine] * self._world.size
        if self._world.size > 1:
            dist.all_gather_object(everyone, mine, group=self._world.patient)
        ranks = [self._world.rank] if self._group is None else dist.get_process_group_ranks(self._group)
        return [
            [span for part in parts for span in part]
            for parts in zip(*(everyone[rank] for rank in ranks), strict=True)
        ]

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, origin: Mark, mark: Mark) -> float:
        if not self._on_gpu:
            return float(mark - origin)
        mark.synchronize()
        return float(origin.elapsed_time(mark)) / 1e3


def typical(runs: Sequence[list[Span]]) -> list[Span]:
    """The run of median length."""
    by_length = sorted(runs, key=lambda run: max(span.end for span in run) - min(span.begin for span in run))
    return by_length[len(by_length) // 2]
