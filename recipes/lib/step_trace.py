"""From the profiler's trace of some training steps to seconds by part and by what limits them. Pure.

Each moment of a step belongs to the first of these that applies:

- an operation or kernel runs: to the part that started it (attention, backward, optimizer ...), as `compute` if its
  arithmetic is the limit, else as `memory`,
- ranks exchange something, and nothing else runs: `network` (an exchange behind arithmetic costs no time),
- the host fetches the batch: `input`,
- otherwise the device waits for the host's Python: `host`.

So the shares add up to the step, and what is hidden behind something else is not counted twice. On a CPU the operations
are those of the host's threads and the exchange is gloo's, on a GPU the kernels of all streams, whose part is where the
host was when it launched them.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.lib.roofline import product_intensity

PREFIX = "part:"
"""Of the names of our own ranges among the profiler's."""
CATEGORIES = ("compute", "memory", "network", "input", "host")
"""In the order in which they claim a moment."""

_CONTAINER = re.compile(
    r"^(autograd::|torch::autograd::|c10d::|Torch|## |Compiled|FSDP|Distributed)|Backward\d*$"
)
"""Operations that start others and also wait: their own time is no arithmetic."""
_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})


@dataclass(frozen=True)
class Work:
    """Something that ran, from `begin` to `end` in microseconds of the trace."""

    begin: float
    end: float
    part: str
    category: str


@dataclass(frozen=True)
class StepTimes:
    """The mean step of a trace."""

    steps: int
    seconds: float
    by_part: Mapping[tuple[str, str], float]
    """Seconds by (part, category); they add up to `seconds`."""
    exchange: float
    """Seconds in which ranks exchanged something, hidden or not."""

    def category(self, name: str) -> float:
        """Seconds of a category."""
        return sum(seconds for (_, each), seconds in self.by_part.items() if each == name)

    def parts(self) -> list[tuple[str, float]]:
        """(part, seconds) in the order in which a step goes through them."""
        sums: Counter[str] = Counter()
        for (part, _), seconds in self.by_part.items():
            sums[part] += seconds
        return sorted(sums.items(), key=lambda item: _order(item[0]))


@dataclass(frozen=True)
class Memory:
    """Allocated bytes above those at a step's beginning."""

    peaks: Mapping[str, int]
    """The highest while each part ran."""
    curve: Sequence[tuple[float, int]]
    """(seconds since the step's beginning, bytes) of the last step."""


PARTS = (
    "input",
    "forward: embedding",
    "forward: attention",
    "forward: feed-forward",
    "forward: norms",
    "forward: whole layers",
    "forward: head and loss",
    "forward: rest",
    "backward",
    "backward: recomputation",
    "exchange",
    "clipping, sums",
    "optimizer",
    "host",
)


def times_of(events: Sequence[Mapping[str, Any]], ridge: float) -> StepTimes:
    """The mean step. `events` are a Chrome trace's, `ridge` the device's FLOP per byte.

    Raises ValueError for a trace without a whole step.
    """
    where = _Parts(events)
    works, on_device = _works(events, where, ridge)
    windows = where.steps
    if on_device:
        # The host runs ahead: a step ends on the device with the last work that the host started in it.
        ends = [
            max((work.end for work, launched in on_device if begin <= launched < end), default=end)
            for begin, end in windows
        ]
        windows = list(itertools.pairwise(ends))
    if not windows:
        raise ValueError("the trace holds no whole step")
    inputs = [Work(begin, end, "input", "input") for begin, end in where.inputs]
    every = [*works, *inputs]
    sums: Counter[tuple[str, str]] = Counter()
    exchange = 0.0
    for begin, end in windows:
        inside = [work for work in every if work.begin < end and work.end > begin]
        sums.update(_claimed(inside, begin, end))
        exchange += _union([work for work in inside if work.category == "network"], begin, end)
    count = len(windows)
    by_part = {key: microseconds / count / 1e6 for key, microseconds in sums.items()}
    return StepTimes(count, sum(by_part.values()), by_part, exchange / count / 1e6)


def memory_of(events: Sequence[Mapping[str, Any]], *, cuda: bool) -> Memory:
    """What was allocated, by part, over all steps of the trace. Needs a trace made with `profile_memory`."""
    where = _Parts(events)
    levels = sorted(
        (float(event["ts"]), int(event["args"]["Total Allocated"]))
        for event in events
        if event.get("name") == "[memory]" and int(event["args"]["Device Type"]) == int(cuda)
    )
    peaks: dict[str, int] = {}
    curve: list[tuple[float, int]] = []
    for begin, end in where.steps:
        inside = [(at, level) for at, level in levels if begin <= at <= end]
        if not inside:
            continue
        before = [level for at, level in levels if at < begin]
        base = before[-1] if before else inside[0][1]
        curve = [((at - begin) / 1e6, level - base) for at, level in inside]
        for at, level in inside:
            part = where.at(at)
            peaks[part] = max(peaks.get(part, 0), level - base)
    ordered = sorted(peaks, key=_order)
    return Memory({part: peaks[part] for part in ordered}, curve)


def bottleneck(ranks: Sequence[Mapping[str, float]]) -> tuple[str, int]:
    """What limits the step, and on which rank: `ranks` holds each one's seconds by category.

    In an exchange everybody waits for the last one. So who spends least in it is who the others wait for, and what
    takes most of *its* time limits the job: a rank with a slow disk shows as `network` on all the others.
    """
    slowest = min(range(len(ranks)), key=lambda rank: ranks[rank].get("network", 0.0))
    most = max(CATEGORIES, key=lambda name: ranks[slowest].get(name, 0.0))
    return most, slowest


# --- inside -----------------------------------------------------------------------------------------------


class _Parts:
    """In which part of a step the host was at each time."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        spans = sorted(
            (float(event["ts"]), -float(event["dur"]), str(event["name"]).removeprefix(PREFIX))
            for event in events
            if event.get("cat") == "user_annotation" and str(event["name"]).startswith(PREFIX)
        )
        self.steps = [(begin, begin - minus) for begin, minus, name in spans if name == "step"]
        self.inputs = [(begin, begin - minus) for begin, minus, name in spans if name == "input"]
        self._times: list[float] = []
        self._labels: list[str] = []
        open_spans: list[tuple[float, str]] = []

        def close_until(now: float) -> None:
            while open_spans and open_spans[-1][0] <= now:
                end, _ = open_spans.pop()
                self._note(end, open_spans)

        for begin, minus, name in spans:
            close_until(begin)
            open_spans.append((begin - minus, name))
            self._note(begin, open_spans)
        close_until(float("inf"))

    def _note(self, time: float, open_spans: list[tuple[float, str]]) -> None:
        self._times.append(time)
        self._labels.append(_part([name for _, name in open_spans]))

    def at(self, time: float) -> str:
        index = bisect.bisect_right(self._times, time) - 1
        return self._labels[index] if index >= 0 else "host"


def _part(names: Sequence[str]) -> str:
    """What the innermost of nested ranges stands for."""
    inner = names[-1] if names else "host"
    if inner == "step":
        return "clipping, sums"
    if "input" in names or "optimizer" in names or "step" not in names:
        return inner if "step" in names else "host"
    if "forward" in names:
        return "forward: rest" if inner == "forward" else f"forward: {inner}"
    # A module that runs again outside of the forward pass is recomputed for the backward pass.
    return "backward" if inner == "gradients" else "backward: recomputation"


def _works(
    events: Sequence[Mapping[str, Any]], where: _Parts, ridge: float
) -> tuple[list[Work], list[tuple[Work, float]]]:
    """Everything that ran; and what ran on a GPU with the time at which the host launched it (none on a CPU)."""
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    operations = {event["args"].get("External id"): event for event in events if event.get("cat") == "cpu_op"}
    on_device: list[tuple[Work, float]] = []
    on_host: list[Work] = []
    for event in events:
        category, name = event.get("cat"), str(event.get("name"))
        begin = float(event.get("ts", 0))
        end = begin + float(event.get("dur", 0))
        if category in _DEVICE_WORK:
            at = launched.get(event["args"].get("correlation"))
            if at is not None:
                operation = operations.get(event["args"].get("External id"))
                kind = "network" if "nccl" in name.lower() else _limit(operation, ridge)
                on_device.append((Work(begin, end, _exchange_or(where.at(at), kind), kind), at))
        elif category == "user_annotation" and name.startswith("gloo:"):
            on_host.append(Work(begin, end, "exchange", "network"))
        elif category == "cpu_op" and not _CONTAINER.search(name):
            part = where.at(begin)
            kind = "input" if part == "input" else _limit(event, ridge)
            on_host.append(Work(begin, end, part, kind))
    if on_device:
        return [work for work, _ in on_device], on_device
    return on_host, []


def _exchange_or(part: str, category: str) -> str:
    return "exchange" if category == "network" else part


def _limit(operation: Mapping[str, Any] | None, ridge: float) -> str:
    """What limits an operation: arithmetic only in products that are large enough; the rest moves data."""
    if operation is None:
        return "memory"
    found = operation.get("args", {})
    dims = [each for each in found.get("Input Dims", []) if each and isinstance(each[0], int)]
    kinds = [kind for kind in found.get("Input type", []) if kind]
    intensity = product_intensity(str(operation["name"]), dims, kinds[0] if kinds else "")
    return "compute" if intensity is not None and intensity >= ridge else "memory"


def _claimed(works: Sequence[Work], begin: float, end: float) -> dict[tuple[str, str], float]:
    """Microseconds between `begin` and `end` by (part, category), each moment once."""
    changes: dict[float, list[tuple[int, Work]]] = defaultdict(list)
    for work in works:
        changes[max(work.begin, begin)].append((1, work))
        changes[min(work.end, end)].append((-1, work))
    changes.setdefault(begin, [])
    changes.setdefault(end, [])
    active: dict[str, Counter[str]] = {name: Counter() for name in CATEGORIES}
    sums: Counter[tuple[str, str]] = Counter()
    before = begin
    for time in sorted(changes):
        if time > before:
            sums[_winner(active)] += time - before  # type: ignore[assignment]
        before = time
        for change, work in changes[time]:
            active[work.category][work.part] += change
            if not active[work.category][work.part]:
                del active[work.category][work.part]
    return dict(sums)


def _winner(active: Mapping[str, Counter[str]]) -> tuple[str, str]:
    for category in CATEGORIES:
        if active[category]:
            return next(iter(active[category])), category
    return "host", "host"


def _union(works: Sequence[Work], begin: float, end: float) -> float:
    total, until = 0.0, begin
    for work in sorted(works, key=lambda each: each.begin):
        total += max(0.0, min(work.end, end) - max(work.begin, until))
        until = max(until, min(work.end, end))
    return total


def _order(part: str) -> int:
    return PARTS.index(part) if part in PARTS else len(PARTS)
