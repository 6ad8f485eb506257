"""A run that stands still: noticing it, and naming the rank that the others wait for. File system.

All ranks dump their stacks and their collectives at once (SIGUSR2, witness.py). The flight recorders know which call
the ranks wait in and who has not made it; the stacks know the line where that rank stands, and judge alone where no
recorder answers: most ranks stand in the same collective then, and the one that does not is the one to look at.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import heartbeats, traces
from launcher.heartbeats import Monitor, Stalled, Straggler
from launcher.spec import UserError
from launcher.traces import Held

DUMP_SECONDS = 5.0
"""For the stacks to arrive; a rank that is stuck in the kernel never writes its own."""

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$')
_COLLECTIVES = "torch/distributed/"
_ENGINE = "torch/autograd/graph.py"
_LIBRARIES = re.compile(
    r"/(site-packages|dist-packages|lib/python3[.\d]*)/|<frozen|launcher/task\.py|rendezvous\.py"
)


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} ({Path(self.file).name}:{self.line})"


@dataclass(frozen=True)
class Place:
    """Where a rank's main thread stands."""

    frames: tuple[Frame, ...]
    """Innermost first."""

    @property
    def own(self) -> Frame | None:
        """The innermost line that is neither torch's nor Python's: what the reader wrote."""
        return next((frame for frame in self.frames if not _LIBRARIES.search(frame.file)), None)

    @property
    def collective(self) -> str:
        """The collective that it is inside of: torch.distributed's function, or the backward pass, whose
        collectives run in a thread without Python; "" for none."""
        inside = [frame for frame in self.frames if _COLLECTIVES in frame.file and frame.name != "wrapper"]
        if inside:
            return inside[-1].name
        return "backward" if any(frame.file.endswith(_ENGINE) for frame in self.frames) else ""


@dataclass(frozen=True)
class Hang:
    """What was found, the sentence for the ledger first."""

    rank: int | None
    lines: tuple[str, ...]


class HangWatch:
    """Looks at the heartbeats of one attempt."""

    def __init__(self, attempt_dir: Path, least_seconds: float | None) -> None:
        self._dir = attempt_dir
        self._monitor = Monitor(least_seconds) if least_seconds is not None else None
        self.stalled: Stalled | None = None
        self.slow: list[Straggler] = []
        """Every rank that was slow so far."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], attempt_dir: Path) -> HangWatch:
        """With HANG_SECONDS of the tasks' environment. Raises UserError where it is no number."""
        try:
            return cls(attempt_dir, heartbeats.least_seconds(environment))
        except ValueError:
            raise UserError(f"env.HANG_SECONDS={environment['HANG_SECONDS']}: seconds are wanted") from None

    def look(self, now: float) -> list[Straggler]:
        """Take in the newest heartbeats; gives the ranks that are slow and were not before. Sets `stalled`, `slow`."""
        if self._monitor is None:
            return []
        self._monitor.take(heartbeats.read(self._dir), now)
        self.stalled = self._monitor.stalled(now)
        new = self._monitor.stragglers()
        self.slow += new
        return new


def parse_stacks(text: str) -> Place | None:
    """The main thread of the last dump in a faulthandler file: the thread that ends in the program's own module.

    None where no thread was dumped. Threads come newest first, so the main one is the last of its dump.
    """
    threads: list[list[Frame]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif (match := _FRAME.match(line)) and threads:
            threads[-1].append(Frame(match["file"], int(match["line"]), match["name"]))
    main = [frames for frames in threads if frames and frames[-1].name == "<module>"]
    main += [frames for frames in threads if frames and "_run_module_as_main" in frames[-1].name]
    chosen = main[-1] if main else (threads[-1] if threads else None)
    return Place(tuple(chosen)) if chosen else None


def read_stacks(attempt_dir: Path) -> dict[int, Place]:
    """The dumped place of every rank that wrote one."""
    found = {}
    for path in attempt_dir.glob("stacks-*.txt"):
        rank = path.stem.partition("-")[2]
        place = parse_stacks(path.read_text(errors="replace")) if rank.isdigit() else None
        if place is not None:
            found[int(rank)] = place
    return found


def examine(attempt_dir: Path, stalled: Stalled) -> Hang:
    """Wait for the stacks and the collectives that were asked for, then name the rank."""
    ranks = [beat.rank for beat in stalled.beats]
    end = time.monotonic() + DUMP_SECONDS
    while time.monotonic() < end and not (
        set(read_stacks(attempt_dir)) >= set(ranks) and set(traces.written(attempt_dir)) >= set(ranks)
    ):
        time.sleep(0.1)
    time.sleep(0.2)  # the last file of stacks may still be growing
    return judge(stalled, read_stacks(attempt_dir), traces.held(traces.read(attempt_dir), ranks))


def judge(stalled: Stalled, places: Mapping[int, Place], held: Held | None = None) -> Hang:
    """Which rank the others wait for, and in what. Pure."""
    hosts = {beat.rank: beat.host for beat in stalled.beats}
    waiting = {rank: place.collective for rank, place in places.items() if place.collective}
    suspects = _suspects(stalled, places, waiting, held)
    told = f"nothing moved for {stalled.seconds:.0f} s after step {stalled.step}"
    lines = [_line(rank, hosts[rank], places.get(rank), held) for rank in sorted(hosts)]
    inside = _collective(list(waiting.values()), held)
    if not suspects:
        where = f": all ranks wait in {inside}" if inside else ""
        return Hang(None, (f"{told}{where}", *lines))
    rank = suspects[0]
    place = places.get(rank)
    at = f"stands in {place.own or place.frames[0]}" if place else "gave no stack"
    named = f"rank {rank} on {hosts[rank]} {at}" + (f" while the others wait in {inside}" if inside else "")
    ordered = sorted(lines, key=lambda line: not line.startswith(f"rank {rank} "))
    return Hang(rank, (f"{told}: {named}", *ordered))


def _collective(waiting: Sequence[str], held: Held | None) -> str:
    """What is waited in: the function's name as the reader wrote it, and what the flight recorder calls it."""
    name = _commonest(waiting) if waiting else ""
    if held is None:
        return name
    return f"{name}: {held}" if name else str(held)


def _suspects(
    stalled: Stalled, places: Mapping[int, Place], waiting: Mapping[int, str], held: Held | None
) -> list[int]:
    ranks = [beat.rank for beat in stalled.beats if beat.phase != "done"]
    outside = [rank for rank in ranks if rank not in waiting]
    if held is not None and held.missing:
        # One without a stack is stuck where Python cannot answer; then one that is in no collective at all.
        return sorted(held.missing, key=lambda rank: (rank in places, rank in waiting, rank))
    if waiting and outside:
        # One without a stack is stuck where Python cannot answer; one with a stack says where.
        return sorted(outside, key=lambda rank: (rank in places, rank))
    if stalled.behind:
        return [beat.rank for beat in stalled.behind]
    own = {rank: place.own for rank, place in places.items() if place.own is not None}
    common = Counter(own.values()).most_common(1)
    if len(own) > 2 and common[0][1] > len(own) // 2:
        return [rank for rank in sorted(own) if own[rank] != common[0][0]]
    return []


def _line(rank: int, host: str, place: Place | None, held: Held | None) -> str:
    instead = f"; {held.missing[rank]}" if held is not None and rank in held.missing else ""
    if place is None:
        return f"rank {rank} on {host}: no stack{instead}"
    inside = f"{place.collective}, called from " if place.collective else ""
    return f"rank {rank} on {host}: {inside}{place.own or place.frames[0]}{instead}"


def _commonest(words: Sequence[str]) -> str:
    return Counter(words).most_common(1)[0][0]
