"""The ranks' collectives, as torch's flight recorders have them: which one cannot finish, and who is missing in it.

`read` looks into the files that the ranks wrote when they were asked (witness.py); the rest is pure. Keys and states
are those of the recorder's format 2.10, which torch 2.11 and 2.13 write: a call is over when it is `retired`, or its
state is `completed`; gloo's state is `scheduled` always.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DEFAULTS = {
    # NCCL's watchdog writes its pickle (for `torchfrtrace`) when a collective times out. Its default is /tmp of a node.
    "TORCH_FR_DUMP_TEMP_FILE": ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE",),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": (),
    "TORCH_FR_BUFFER_SIZE": ("TORCH_NCCL_TRACE_BUFFER_SIZE",),
}
"""Variables of the recorders, each with its names in older versions of torch."""
BUFFER_SIZE = 2000
"""Calls; a step of FSDP makes some hundred. It is torch's own default now, and was none before."""


@dataclass(frozen=True)
class Call:
    """One call of a collective on one rank."""

    backend: str
    """gloo or nccl: each numbers its own calls."""
    group: str
    number: int
    """Of the call in its group, from 1: the same on every rank for the same collective."""
    name: str
    sizes: str
    """Of the inputs, with their types: "[98432] Float"; "" for a barrier."""
    order: int
    """Among all calls of the rank."""
    is_over: bool

    @property
    def key(self) -> tuple[str, str, int]:
        return self.backend, self.group, self.number


@dataclass(frozen=True)
class Trace:
    """What one rank wrote."""

    calls: tuple[Call, ...]
    groups: Mapping[str, tuple[int, ...]]
    """The ranks of every process group that it is in."""
    descriptions: Mapping[str, str]


@dataclass(frozen=True)
class Held:
    """A collective that some ranks wait in and that cannot finish."""

    call: Call
    description: str
    """Of the process group; "" for one without."""
    waiting: tuple[int, ...]
    missing: Mapping[int, str]
    """The ranks that are not in it, and what they did instead; empty where all have come."""

    def __str__(self) -> str:
        sizes = f" of {self.call.sizes}" if self.call.sizes else ""
        group = f"{self.call.group} ({self.description})" if self.description else self.call.group
        return f"{self.call.backend} {self.call.name}{sizes}, call {self.call.number} of group {group}"


def variables(attempt_dir: Path, given: Mapping[str, str]) -> dict[str, str]:
    """What the recorders want in a rank's environment, without what the user gave, under whatever name."""
    wanted = {
        "TORCH_FR_DUMP_TEMP_FILE": str(attempt_dir / "nccl-trace-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": str(BUFFER_SIZE),
    }
    return {
        name: value
        for name, value in wanted.items()
        if not any(each in given for each in (name, *_DEFAULTS[name]))
    }


def written(attempt_dir: Path) -> dict[int, Path]:
    """The file of every rank that wrote one."""
    files = {path.stem.partition("-")[2]: path for path in attempt_dir.glob("collectives-*.json")}
    return {int(rank): path for rank, path in files.items() if rank.isdigit()}


def read(attempt_dir: Path) -> dict[int, Trace]:
    """The trace of every rank that wrote one."""
    return {rank: parse(path.read_text()) for rank, path in written(attempt_dir).items()}


def parse(text: str) -> Trace:
    """Raises ValueError or KeyError for what witness.py does not write."""
    record = json.loads(text)
    calls = [_call(backend, entry) for backend, entries in record["calls"].items() for entry in entries]
    groups = record["groups"].items()
    return Trace(
        tuple(sorted(calls, key=lambda call: call.order)),
        {name: tuple(group["ranks"]) for name, group in groups},
        {name: "" if group["description"] == "undefined" else group["description"] for name, group in groups},
    )


def _call(backend: str, entry: Mapping[str, Any]) -> Call:
    sizes = zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
    number = entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]
    return Call(
        backend=backend,
        group=entry["process_group"][0] + (" point to point" if entry["is_p2p"] else ""),
        number=int(number),
        name=entry["profiling_name"].partition(":")[2],
        sizes=", ".join(f"{list(size)} {dtype}" for size, dtype in sizes),
        order=int(entry["record_id"]),
        is_over=entry["retired"] or entry["state"] == "completed",
    )


def held(traces: Mapping[int, Trace], ranks: Sequence[int]) -> Held | None:
    """The collective that most of `ranks` wait in, of those the one that misses somebody; None where none waits.

    Of each group a rank waits in the first call that is not over: later ones were queued behind it.
    """
    first: dict[tuple[str, str, int], dict[int, Call]] = {}
    for rank, trace in traces.items():
        seen = set()
        for call in trace.calls:
            if not call.is_over and (call.backend, call.group) not in seen:
                seen.add((call.backend, call.group))
                first.setdefault(call.key, {})[rank] = call
    found = [_held(calls, traces, ranks) for calls in first.values()]
    return max(
        found, key=lambda each: (bool(each.missing), len(each.waiting), -each.call.order), default=None
    )


def _held(calls: Mapping[int, Call], traces: Mapping[int, Trace], ranks: Sequence[int]) -> Held:
    """`calls`: the same call, by the ranks that wait in it."""
    names = [call.name for call in calls.values()]
    common = max(names, key=names.count)  # ranks that differ here called something else at its place
    call = next(call for call in calls.values() if call.name == common)
    waiting = tuple(sorted(rank for rank in calls if calls[rank].name == common))
    trace = traces[waiting[0]]
    members = trace.groups.get(call.group, ())
    missing = {}
    for rank in members:
        if rank in ranks and rank not in waiting and (why := _absence(call, traces.get(rank))):
            missing[rank] = why
    return Held(call, trace.descriptions.get(call.group, ""), waiting, missing)


def _absence(call: Call, trace: Trace | None) -> str:
    """What a rank of the group did in place of `call`; "" where it has made it."""
    if trace is None:
        return "gave no trace"
    mine = [each for each in trace.calls if (each.backend, each.group) == (call.backend, call.group)]
    same = next((each for each in mine if each.number == call.number), None)
    if same is not None and same.name != call.name:
        return f"called {same.name} instead"
    last = max((each.number for each in mine), default=0)
    if last >= call.number:
        return ""
    return f"made call {last} last" if last else "made no call there"
