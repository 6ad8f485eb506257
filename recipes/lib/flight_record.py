"""torch's flight recorder: every collective of this process with its line of source, and where the ranks part.

The recorder keeps the newest calls (TORCH_FR_BUFFER_SIZE of them) of gloo and of NCCL, with the Python stack of each.
Ranks that train together call the same collectives in the same order. The first call in which they differ is the one
that went wrong, however much later and in whatever other call they got stuck.
"""

from __future__ import annotations

import linecache
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

RECORDERS = ("_dump_fr_trace", "_dump_nccl_trace")
"""Functions of torch's own extension, of gloo's recorder and of NCCL's; the second exists in CUDA builds alone."""
SOURCES = Path(__file__).parents[1]
"""The recipes: of a stack, the innermost line in here is the one that a reader wrote."""


@dataclass(frozen=True)
class Call:
    """One call of a collective on one rank."""

    group: str
    """What its process group was made for (`group_desc`)."""
    number: int
    """Among the calls of its group, from 1."""
    name: str
    """With the library: gloo:all_reduce."""
    sizes: str
    """Of the inputs, with their types."""
    line: str
    """`file:line in function: text` of the recipe that called; "" where torch called from a thread of its own."""

    @property
    def kind(self) -> tuple[str, str, str]:
        """What must be the same on all ranks."""
        return self.group, self.name, self.sizes

    def __str__(self) -> str:
        sizes = f" of {self.sizes}" if self.sizes else ""
        return f"{self.name}{sizes}, call {self.number} of group {self.group}"


@dataclass(frozen=True)
class Parting:
    """The first call that is not the same on all ranks."""

    culprits: tuple[int, ...]
    instead: Call | None
    """What the first culprit called there; None where it called nothing any more."""
    others: tuple[int, ...]
    expected: Call | None
    """What the others called."""


def recorded() -> list[Call]:
    """This process's calls of both libraries, the oldest first."""
    entries: list[dict[str, Any]] = []
    for function in RECORDERS:
        dump = getattr(dist.distributed_c10d.torch._C._distributed_c10d, function, None)
        if dump is not None:
            entries += pickle.loads(dump())["entries"]
    return [_call(entry) for entry in sorted(entries, key=lambda entry: int(entry["time_created_ns"]))]


def _call(entry: dict[str, Any]) -> Call:
    sizes = zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
    name, description = entry["process_group"]
    frames = [(frame["filename"], frame["line"], frame["name"]) for frame in entry.get("frames", [])]
    return Call(
        group=name if description == "undefined" else description,
        number=int(entry["collective_seq_id"]),
        name=entry["profiling_name"],
        sizes=", ".join(f"{list(size)} {dtype}" for size, dtype in sizes),
        line=own_line(frames),
    )


def own_line(frames: Sequence[tuple[str, int, str]]) -> str:
    """The innermost line in a recipe; `frames` are (file, line, function), the innermost first."""
    for file, number, function in frames:
        path = Path(file)
        if SOURCES in path.parents and path.parent.name != "lib":
            text = linecache.getline(file, number).strip()
            return f"{path.relative_to(SOURCES.parent)}:{number} in {function}: {text}"
    return ""


def parting(calls: Mapping[int, Sequence[Call]]) -> Parting | None:
    """Where the ranks part; None where all made the same calls. Pure.

    The minority is to blame. Of two halves it is the one that broke with its own habit: that called something else
    than what had followed the same call before.
    """
    for position in range(max(map(len, calls.values()), default=0)):
        here = {rank: each[position] if position < len(each) else None for rank, each in calls.items()}
        kinds = Counter(call.kind if call else None for call in here.values())
        if len(kinds) == 1:
            continue
        common, count = kinds.most_common(1)[0]
        culprits = [rank for rank, call in here.items() if (call.kind if call else None) != common]
        if count * 2 <= len(here):
            culprits = [rank for rank in here if _breaks_habit(calls[rank], position)] or culprits
        others = [rank for rank in here if rank not in culprits]
        if not others:
            others = [rank for rank in here if rank != culprits[0]]
        return Parting(tuple(culprits), here[culprits[0]], tuple(others), here[others[0]])
    return None


def _breaks_habit(calls: Sequence[Call], position: int) -> bool:
    if position == 0:
        return False
    kinds = [call.kind for call in calls]
    before = [at for at in range(position - 1) if kinds[at] == kinds[position - 1]]
    if not before:
        return False
    return position >= len(kinds) or kinds[position] != kinds[before[-1] + 1]
