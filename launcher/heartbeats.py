"""Heartbeats of the ranks: whether the run moves, and which rank holds the others up. Pure, but for `read`.

Every rank overwrites one small file at each step boundary. Only changes count, by this machine's clock: the clocks of
nodes differ, and a rank that repeats itself does not move.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = "heartbeat"
LEAST_HANG_SECONDS = 30.0
HANG_STEPS = 10.0
"""A run hangs when nothing moved for so many median steps; the 30 s above are for steps of milliseconds."""
SAVE_PATIENCE = 10.0
"""A save or the preparation of data is no step: so many times longer before it counts as a hang."""
STEPS_BEFORE_JUDGING = 2
"""The first step compiles, allocates and connects; it says nothing about the next."""
STRAGGLER_FACTOR = 3.0
"""Times the others' own work. A choice of ours, for naming a rank without being wrong: NVIDIA's resiliency extension
calls a GPU slow below 0.7 of the fastest (its `gpu_relative_perf_threshold`), but times kernels alone and over minutes;
on a host, where a neighbour's job and a page cache count too, a factor of 1.4 names somebody in every other run."""
LEAST_STRAGGLER_SECONDS = 0.1
"""More than the others: of steps of milliseconds a factor says nothing, and nobody waits long for them."""
STRAGGLER_BEATS = 5
"""One after another in which a rank is slow before it is named: a busy moment passes."""
_KEPT_STEPS = 50


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last wrote of itself."""

    rank: int
    step: int
    phase: str
    """start, step, save, done."""
    host: str
    pid: int
    time: float
    own: float | None = None
    """Seconds that the rank itself needed for the step, without waiting for others; None where it does not say."""


@dataclass(frozen=True)
class Stalled:
    """Nothing moves any more."""

    seconds: float
    beats: tuple[Heartbeat, ...]
    """The last of every rank."""

    @property
    def step(self) -> int:
        return max(beat.step for beat in self.beats)

    @property
    def behind(self) -> tuple[Heartbeat, ...]:
        """The ranks that did fewer steps than another one."""
        return tuple(beat for beat in self.beats if beat.step < self.step)


@dataclass(frozen=True)
class Straggler:
    """A rank that holds the others up, as it was when it was named."""

    rank: int
    host: str
    step: int
    own: float
    """Seconds of its own work in a step, and the median of the other ranks'."""
    others: float

    def __str__(self) -> str:
        times = f" ({self.own / self.others:.0f} times)" if self.others > 0 else ""
        return (
            f"rank {self.rank} on {self.host} is slow: {self.own:.3g} s of its own work in a step, the others "
            f"{self.others:.3g} s{times}; seen at step {self.step}"
        )


def sentences(records: object) -> tuple[str, ...]:
    """Slow ranks as state.json and the ledger have them, a sentence each. What another version wrote is left out."""
    names = [field.name for field in dataclasses.fields(Straggler)]
    whole = [each for each in records if isinstance(each, dict)] if isinstance(records, list | tuple) else []
    return tuple(str(Straggler(**each)) for each in whole if sorted(each) == sorted(names))


def parse(rank: int, text: str) -> Heartbeat | None:
    """One heartbeat; None for a file that is being written for the first time."""
    try:
        fields = json.loads(text)
        own = fields.get("own")
        return Heartbeat(
            rank, int(fields["step"]), str(fields["phase"]), str(fields.get("host", "")), int(fields.get("pid", 0)),
            float(fields["time"]), None if own is None else float(own),
        )  # fmt: skip
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def read(attempt_dir: Path) -> list[Heartbeat]:
    """The heartbeats of an attempt by rank, [] before the first."""
    found = [
        parse(int(path.name.partition("-")[2]), path.read_text(errors="replace"))
        for path in (attempt_dir / FOLDER).glob("rank-*")
        if path.name.partition("-")[2].isdigit()
    ]
    return sorted((beat for beat in found if beat is not None), key=lambda beat: beat.rank)


class Monitor:
    """Takes in what the ranks wrote, again and again, and says when they stall or one lags behind."""

    def __init__(self, least_seconds: float = LEAST_HANG_SECONDS) -> None:
        self._least = least_seconds
        self._last: dict[int, Heartbeat] = {}
        self._moved: dict[int, float] = {}
        self._first_step: int | None = None
        self._step_seconds: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._slow_beats: dict[int, int] = {}
        self._judged: dict[int, int] = {}
        self._told: set[int] = set()

    @property
    def median_step(self) -> float | None:
        return statistics.median(self._step_seconds) if self._step_seconds else None

    def take(self, beats: Sequence[Heartbeat], now: float) -> None:
        """Note what changed; `now` is this machine's clock."""
        for beat in beats:
            before = self._last.get(beat.rank)
            if before is not None and (before.step, before.phase) == (beat.step, beat.phase):
                self._last[beat.rank] = beat
                continue
            if before is not None and beat.rank == 0 and beat.step > before.step > 0:
                self._step_seconds.append((beat.time - before.time) / (beat.step - before.step))
            if self._first_step is None:
                self._first_step = beat.step
            self._last[beat.rank], self._moved[beat.rank] = beat, now

    @property
    def limit(self) -> float:
        """Seconds without any movement that are too many."""
        limit = max(self._least, HANG_STEPS * (self.median_step or 0.0))
        working = [beat for beat in self._last.values() if beat.phase != "done"]
        return limit * SAVE_PATIENCE if any(beat.phase not in ("step", "done") for beat in working) else limit

    def stalled(self, now: float) -> Stalled | None:
        """Whether all have stood still for too long. Before two steps nobody knows how long one takes."""
        beats = tuple(self._last[rank] for rank in sorted(self._last))
        if self._first_step is None or all(beat.phase == "done" for beat in beats):
            return None
        if max(beat.step for beat in beats) - self._first_step < STEPS_BEFORE_JUDGING:
            return None
        still = now - max(self._moved.values())
        return Stalled(still, beats) if still > self.limit else None

    def stragglers(self) -> list[Straggler]:
        """Ranks whose own time per step has been far above the others' for some beats; each is named once."""
        own = {
            beat.rank: beat.own
            for beat in self._last.values()
            if beat.own is not None and beat.phase == "step"
        }
        found = []
        for rank, seconds in own.items():
            beat = self._last[rank]
            if len(own) < 2 or rank in self._told or self._judged.get(rank) == beat.step:
                continue
            self._judged[rank] = beat.step
            others = statistics.median(value for other, value in own.items() if other != rank)
            slow = seconds > max(STRAGGLER_FACTOR * others, others + LEAST_STRAGGLER_SECONDS)
            self._slow_beats[rank] = self._slow_beats.get(rank, 0) + 1 if slow else 0
            if self._slow_beats[rank] >= STRAGGLER_BEATS:
                self._told.add(rank)
                found.append(Straggler(rank, beat.host, beat.step, seconds, others))
        return found


def least_seconds(environment: Mapping[str, str]) -> float | None:
    """HANG_SECONDS: the least time without movement that counts as a hang; 0 watches nothing. Raises ValueError."""
    seconds = float(environment.get("HANG_SECONDS", LEAST_HANG_SECONDS))
    return seconds if seconds > 0 else None
