"""Heartbeats of the ranks: whether the run moves, and which rank holds the others up. Pure, but for `read`.

Every rank overwrites one small file at each step boundary. Only changes count, by this machine's clock: the clocks of
nodes differ, and a rank that repeats itself does not move.
"""

from __future__ import annotations

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
LEAST_STRAGGLER_SECONDS = 0.1
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

    def stragglers(self) -> list[Heartbeat]:
        """Ranks whose own time per step is far above the others'; each is named once."""
        own = {
            beat.rank: beat.own
            for beat in self._last.values()
            if beat.own is not None and beat.phase == "step"
        }
        if len(own) < 2:
            return []
        found = []
        for rank, seconds in own.items():
            others = statistics.median(value for other, value in own.items() if other != rank)
            slow = seconds > max(STRAGGLER_FACTOR * others, others + LEAST_STRAGGLER_SECONDS)
            if slow and rank not in self._told:
                self._told.add(rank)
                found.append(self._last[rank])
        return found


def least_seconds(environment: Mapping[str, str]) -> float | None:
    """HANG_SECONDS: the least time without movement that counts as a hang; 0 watches nothing. Raises ValueError."""
    seconds = float(environment.get("HANG_SECONDS", LEAST_HANG_SECONDS))
    return seconds if seconds > 0 else None
