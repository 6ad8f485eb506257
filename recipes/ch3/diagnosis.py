"""From what the ranks testified to the culprit: one function per tool, all pure.

A testimony is what `faulty` leaves: how the rank ended, what torch said, the line of source where it was, its
collectives from the flight recorder, and its log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from recipes.lib.flight_record import Call, parting


@dataclass(frozen=True)
class Testimony:
    """What one rank left behind."""

    end: str
    """fails, stands still, is done, or what became of its process."""
    said: str
    """torch's message, where there is one."""
    line: str
    """Where its main thread was: `file:line in function: text`."""
    calls: tuple[Call, ...]
    log: str = ""

    @property
    def waits_in(self) -> Call | None:
        """The newest collective that it called."""
        return self.calls[-1] if self.calls else None


@dataclass(frozen=True)
class Finding:
    """The culprit, and how it was found."""

    tool: str
    rank: int
    collective: str
    called_at: str
    """The line in which the other ranks call that collective."""
    line: str
    """The line in which the culprit is meanwhile, or which made what is wrong."""
    said: str
    """The tool's own words, or what they come to."""


class NotNamed(Exception):
    """The tool did not say who it was."""


_FINGERPRINT = re.compile(
    r"Rank (?P<rank>\d+) is running collective: CollectiveFingerPrint\("
    r"SequenceNumber=(?P<number>\d+), OpType=(?P<operation>\w+), TensorShape=\[(?P<shape>[^\]]*)\]"
)
_UNUSED = re.compile(r"did not receive grad for rank (?P<rank>\d+): (?P<names>[a-z][^\n]*)")
_NOT_REACHED = re.compile(r"Ranks? (?P<ranks>[\d, ]+) failed to pass monitoredBarrier in (?P<limit>\d+) ms")
_NOT_A_NUMBER = re.compile(r"Function '(?P<function>\w+)' returned nan values")
_MADE_IN = re.compile(
    r'File "[^"]*?(?P<file>recipes/ch3/\w+\.py)", line (?P<line>\d+), in (?P<function>\w+)\n +(?P<text>.*)'
)


def by_comparison(testimonies: Mapping[int, Testimony]) -> Finding:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL: before every collective the ranks compare what each is about to call."""
    calls = {
        int(found["rank"]): found
        for each in testimonies.values()
        for found in _FINGERPRINT.finditer(each.said)
    }
    shapes = {rank: found["shape"] for rank, found in calls.items()}
    if not shapes:
        raise NotNamed("no rank was told of a mismatch")
    usual = max(
        shapes.values(),
        key=lambda shape: (list(shapes.values()).count(shape), _was_usual(shape, testimonies)),
    )
    rank = _only(rank for rank, shape in shapes.items() if shape != usual)
    found = calls[rank]
    return Finding(
        "TORCH_DISTRIBUTED_DEBUG=DETAIL",
        rank,
        f"{found['operation']} of [{usual}], call {found['number']} of its group",
        next(each.line for other, each in testimonies.items() if shapes.get(other) == usual),
        testimonies[rank].line,
        f"the shape is [{found['shape']}] on rank {rank} and [{usual}] on the others",
    )


def _was_usual(shape: str, testimonies: Mapping[int, Testimony]) -> int:
    """How often a shape was called before: of two ranks that differ, neither is the majority."""
    sizes = [call.sizes.partition("]")[0] for each in testimonies.values() for call in each.calls]
    return sizes.count(f"[{shape}")


def by_unused_parameters(testimonies: Mapping[int, Testimony]) -> Finding:
    """DistributedDataParallel itself: a bucket is not sent until all gradients in it are there."""
    found = {rank: match for rank, each in testimonies.items() if (match := _UNUSED.search(each.said))}
    rank = _only(found)
    return Finding(
        "TORCH_DISTRIBUTED_DEBUG=INFO",
        rank,
        *_waited_in(rank, testimonies),
        testimonies[rank].line,
        f"no gradient on rank {rank} for {found[rank]['names']}",
    )


def by_flight_recorder(testimonies: Mapping[int, Testimony]) -> Finding:
    """The recorder of every rank: the first call in which they part."""
    parted = parting({rank: each.calls for rank, each in testimonies.items()})
    if parted is None:
        raise NotNamed("all ranks made the same calls")
    rank = _only(parted.culprits)
    instead, expected = parted.instead, parted.expected
    return Finding(
        "flight recorder",
        rank,
        str(expected),
        (expected.line if expected else "") or testimonies[parted.others[0]].line,
        (instead.line if instead else "") or testimonies[rank].line,
        f"{_named(parted.others)} called {expected}; rank {rank} called {instead}",
    )


def by_monitored_barrier(testimonies: Mapping[int, Testimony]) -> Finding:
    """A barrier on gloo with a short timeout, in which rank 0 keeps the list."""
    found = next((match for each in testimonies.values() if (match := _NOT_REACHED.search(each.said))), None)
    if found is None:
        raise NotNamed("all ranks reached the barrier")
    rank = _only(int(word) for word in found["ranks"].split(","))
    called_at = testimonies[0].line if rank else testimonies[1].line
    return Finding(
        "monitored barrier", rank, "the monitored barrier", called_at, testimonies[rank].line, found[0]
    )


def by_anomaly_detection(testimonies: Mapping[int, Testimony]) -> Finding:
    """torch.autograd.set_detect_anomaly: looks at every gradient and remembers which forward call it belongs to."""
    found = {rank: match for rank, each in testimonies.items() if (match := _NOT_A_NUMBER.search(each.said))}
    rank = _only(found)
    forward = (
        testimonies[rank].log.partition("Traceback of forward call")[2].partition("(Triggered internally")[0]
    )
    made = list(_MADE_IN.finditer(forward))
    if not made:
        raise NotNamed(f"rank {rank}: no traceback of the forward call in its log")
    where = made[-1]
    return Finding(
        "anomaly detection",
        rank,
        *_waited_in(rank, testimonies),
        f"{where['file']}:{where['line']} in {where['function']}: {where['text']}",
        found[rank][0],
    )


TOOLS = {
    "mismatched_shapes": by_comparison,
    "unused_parameter": by_unused_parameters,
    "skipped_collective": by_flight_recorder,
    "deadlock": by_flight_recorder,
    "straggler": by_monitored_barrier,
    "nan_on_one_rank": by_anomaly_detection,
}


def _waited_in(rank: int, testimonies: Mapping[int, Testimony]) -> tuple[str, str]:
    """The collective in which the others wait for `rank`, and its line."""
    other = next(each for number, each in testimonies.items() if number != rank)
    return str(other.waits_in), (other.waits_in.line if other.waits_in else "") or other.line


def _only(ranks: object) -> int:
    named = sorted(set(ranks))  # type: ignore[call-overload]
    if len(named) != 1:
        raise NotNamed(f"the tool names {_named(named) if named else 'no rank'}")
    return int(named[0])


def _named(ranks: object) -> str:
    words = [str(rank) for rank in ranks]  # type: ignore[attr-defined]
    return f"rank{'s' if len(words) > 1 else ''} {', '.join(words)}"
