"""Where the time of a run went: its records -> disjoint stretches of the wall clock, each of one kind. Pure.

Every second between the first submission and the last record belongs to exactly one stretch, so the parts of a report
add up to its wall time. What no record explains is of the kind `unknown`; nothing is guessed and nothing is dropped.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["queue", "preflight", "start", "train", "lost", "save", "stop", "idle", "unknown"]

KINDS: dict[Kind, str] = {
    "train": "training that counts",
    "lost": "training lost, repeated later",
    "save": "saves, while training waited",
    "start": "start, until the first step",
    "stop": "after the last logged step",
    "preflight": "preflight",
    "queue": "in the queue",
    "idle": "idle between attempts",
    "unknown": "not on record",
}
"""In the order in which a bar shows them, each with its name for people."""

CLOCKS_DIFFER_SECONDS = 0.02
"""Shorter pauses between two metrics lines are the difference of two clocks, not a save."""


@dataclass(frozen=True)
class Stretch:
    """From `begin` to `end` (unix seconds), in the attempt `attempt` or in the wait before it."""

    kind: Kind
    begin: float
    end: float
    attempt: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Logged:
    """One metrics line: the optimizer step `step` was over at `time`."""

    attempt: int
    step: int
    time: float
    loss: float | None
    tokens: float | None
    tokens_per_second: float | None
    seconds: float | None = None
    """That the step took, as a recipe says which counts no tokens."""


@dataclass(frozen=True)
class Save:
    """One announcement in checkpoints.jsonl."""

    attempt: int
    step: int
    event: str
    time: float
    seconds_blocked: float | None
    seconds_total: float | None


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of one attempt, as far as they were logged."""

    lines: tuple[Logged, ...]
    resumed_after: int | None
    """The step whose state the attempt began with, 0 for a fresh start; None where no record tells."""
    kept_until: float
    """Steps after this one were run again by a later attempt, or never saved by the last; infinite: all are kept."""

    @property
    def lost(self) -> int:
        """Logged steps whose result is not in the final run."""
        first = self.resumed_after if self.resumed_after is not None else self.lines[0].step - 1
        return max(0, int(self.lines[-1].step - max(first, min(self.kept_until, self.lines[-1].step))))


@dataclass
class _Painter:
    """Collects the stretches of one attempt and the kinds that its records say nothing about."""

    attempt: int
    stretches: list[Stretch] = field(default_factory=list)
    missing: set[Kind] = field(default_factory=set)

    def paint(self, kind: Kind, begin: float, end: float) -> None:
        if end <= begin:  # clocks of two nodes may disagree: nothing has a negative length
            return
        last = self.stretches[-1] if self.stretches else None
        if last is not None and last.kind == kind and last.end == begin:
            self.stretches[-1] = Stretch(kind, last.begin, end, self.attempt)
        else:
            self.stretches.append(Stretch(kind, begin, end, self.attempt))


def number(value: object) -> float | None:
    """A finite number, None for everything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def logged_lines(lines: Iterable[Mapping[str, Any]]) -> list[Logged]:
    """Metrics lines that say which step of which attempt was over when; others are left out."""
    found = []
    for line in lines:
        attempt, step, time = (number(line.get(key)) for key in ("attempt", "step", "time"))
        if attempt is None or step is None or time is None:
            continue
        others = (number(line.get(key)) for key in ("loss", "tokens", "tokens_per_second", "seconds"))
        found.append(Logged(int(attempt), int(step), time, *others))
    return found


def save_events(lines: Iterable[Mapping[str, Any]]) -> list[Save]:
    """Announcements that name their step, attempt and time; others are left out."""
    found = []
    for line in lines:
        attempt, step, time = (number(line.get(key)) for key in ("attempt", "step", "time"))
        if attempt is None or step is None or time is None:
            continue
        seconds = (number(line.get(key)) for key in ("seconds_blocked", "seconds_total"))
        found.append(Save(int(attempt), int(step), str(line.get("event")), time, *seconds))
    return found


def steps_by_attempt(
    logged: Sequence[Logged],
    saves: Sequence[Save],
    step_in: Mapping[int, float | None],
    *,
    ended_early: bool,
) -> dict[int, Steps]:
    """Which steps each attempt ran and which of them the final run holds.

    `ended_early`: the last attempt is over and the run is not done, so that its steps after the last save are lost too.
    """
    lines: dict[int, list[Logged]] = {}
    for line in logged:
        mine = lines.setdefault(line.attempt, [])
        if not mine or line.step > mine[-1].step:
            mine.append(line)
    stride = _stride(lines)
    resumed: dict[int, int | None] = {}
    for attempt in sorted(lines):
        first = lines[attempt][0]
        if not resumed and not step_in.get(attempt):
            resumed[attempt] = 0
        else:
            saved = [step for step in _held(saves, attempt) if step < first.step]
            resumed[attempt] = _resumed_after(first.step, stride, saved, step_in.get(attempt))
    kept: float = math.inf
    if ended_early and saves:
        kept = max(_held(saves), default=0)
    found = {}
    for attempt in sorted(lines, reverse=True):
        found[attempt] = Steps(tuple(lines[attempt]), resumed[attempt], kept)
        start = resumed[attempt]
        kept = min(kept, start if start is not None else lines[attempt][0].step - 1)
    return dict(sorted(found.items()))


def _held(saves: Sequence[Save], attempt: int | None = None) -> set[int]:
    """Steps that a resume finds: saved, and not passed over since. With `attempt`: those that it found itself."""
    held: set[int] = set()
    for save in saves:
        if save.event == "saved" and (attempt is None or save.attempt < attempt):
            held.add(save.step)
        elif save.event == "passed_over" and (attempt is None or save.attempt <= attempt):
            held.discard(save.step)
    return held


def _stride(lines: Mapping[int, Sequence[Logged]]) -> int | None:
    """Steps from one metrics line to the next (`log_every`). The median: the last step is logged out of turn."""
    apart = [
        later.step - earlier.step for mine in lines.values() for earlier, later in itertools.pairwise(mine)
    ]
    return int(statistics.median_low(apart)) if apart else None


def _resumed_after(first: int, stride: int | None, saved: Sequence[int], step_in: float | None) -> int | None:
    """The newest saved step before the first logged one. At least `first - stride`, or a line would stand between."""
    known = list(saved)
    if stride is not None:
        known.append(max(0, first - stride))
    elif step_in is not None and not known and step_in < first:
        known.append(int(step_in))
    return max(known, default=None)


def paint_attempt(
    record: Mapping[str, Any],
    attempt: int,
    steps: Steps | None,
    saves: Sequence[Save],
    *,
    steps_are_logged: bool,
) -> tuple[list[Stretch], set[Kind]]:
    """The stretches of one attempt from its controller's start to its end, and the kinds that no record covers.

    `record` is the ledger's line, empty where there is none; `steps_are_logged`: the run has metrics lines at all.
    """
    painter = _Painter(attempt)
    seconds = record.get("seconds")
    parts = seconds if isinstance(seconds, Mapping) else {}
    started, tasks, ended = (number(record.get(key)) for key in ("started", "tasks_started", "ended"))
    if started is not None:
        checked = number(parts.get("preflight"))
        until = tasks if tasks is not None else ended if ended is not None else started
        if checked is None:
            painter.missing.add("preflight")
            painter.paint("unknown", started, until)
        else:
            middle = min(started + checked, until)
            painter.paint("preflight", started, middle)
            painter.paint("start" if tasks is not None else "stop", middle, until)
    if steps is not None:
        mine = [save for save in saves if save.attempt == attempt]
        # Saves are announced since ledger lines have causes: there, none announced is none made.
        announced = "cause" in record or any(save.attempt <= attempt for save in saves)
        _paint_steps(painter, steps, mine, tasks, ended, announced=announced)
    elif tasks is not None and ended is not None:
        start = number(parts.get("start"))
        if start is not None:
            painter.paint("start", tasks, min(tasks + start, ended))
            painter.paint("stop", tasks + start, ended)
        elif steps_are_logged:
            painter.paint("start", tasks, ended)  # it ended before it had logged a step
        else:
            painter.missing |= {"start", "train"}
            painter.paint("unknown", tasks, ended)
    if not record:
        painter.missing |= {"preflight", "start", "stop"}
    return painter.stretches, painter.missing


def _paint_steps(
    painter: _Painter,
    steps: Steps,
    saves: Sequence[Save],
    tasks: float | None,
    ended: float | None,
    *,
    announced: bool,
) -> None:
    first, last = steps.lines[0], steps.lines[-1]
    begin = _begin_of_steps(steps)
    if begin is None:
        painter.missing |= {"start", "train"}
        begin = first.time
        painter.paint("unknown", tasks if tasks is not None else begin, begin)
    elif tasks is not None:
        begin = max(begin, tasks)
        painter.paint("start", tasks, begin)
    blocked = _blocked(saves)
    if not announced or len(blocked) < sum(save.event in ("saved", "failed") for save in saves):
        painter.missing.add("save")
    before, step_before = begin, steps.resumed_after if steps.resumed_after is not None else first.step - 1
    tokens_before: float | None = None
    for line in steps.lines:
        pauses = list(blocked)
        if not announced and tokens_before is not None:
            pauses = _pause(before, line, tokens_before)
        free = without(before, line.time, pauses)
        for gap_begin, gap_end in without(before, line.time, free):
            painter.paint("save" if announced else "unknown", gap_begin, gap_end)
        kept = min(max(steps.kept_until - step_before, 0), line.step - step_before)
        budget = sum(end - start for start, end in free) * kept / (line.step - step_before)
        for start, end in free:
            middle = min(end, start + budget)
            painter.paint("train", start, middle)
            painter.paint("lost", middle, end)
            budget -= middle - start
        before, step_before, tokens_before = max(before, line.time), line.step, line.tokens
    if ended is not None:
        rest = without(last.time, ended, blocked)
        for start, end in rest:
            painter.paint("stop", start, end)
        for start, end in without(last.time, ended, rest):
            painter.paint("save", start, end)
    else:
        painter.missing.add("stop")


def _begin_of_steps(steps: Steps) -> float | None:
    """When the first logged stretch of steps began: its tokens divided by its rate before its line, or its seconds.

    None where that line has neither or where the attempt resumed is unknown.
    """
    line = steps.lines[0]
    if line.seconds is not None:
        return line.time - line.seconds
    if steps.resumed_after is None or not line.tokens or not line.tokens_per_second:
        return None
    mine = (
        line.tokens * (line.step - steps.resumed_after) / line.step
    )  # a batch has one size for the whole run
    return line.time - mine / line.tokens_per_second


def _blocked(saves: Sequence[Save]) -> list[tuple[float, float]]:
    """When training waited for a save: from its announcement on, or, without one, up to its end."""
    begun = {save.step: save.time for save in saves if save.event == "started"}
    found = []
    for save in saves:
        if save.event in ("saved", "failed") and save.seconds_blocked is not None:
            took = save.seconds_total if save.seconds_total is not None else save.seconds_blocked
            begin = begun.get(save.step, save.time - took)
            found.append((begin, begin + save.seconds_blocked))
    return sorted(found)


def _pause(before: float, line: Logged, tokens_before: float) -> list[tuple[float, float]]:
    """Time in which the training's own clock stood still; rates do not count it."""
    if not line.tokens or not line.tokens_per_second:
        return []
    paused = line.time - before - (line.tokens - tokens_before) / line.tokens_per_second
    return [(before, before + paused)] if paused > CLOCKS_DIFFER_SECONDS else []


def without(begin: float, end: float, holes: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """What is left of `begin` to `end` after the holes, which come in order."""
    left, position = [], begin
    for hole_begin, hole_end in holes:
        if hole_end <= position or hole_begin >= end:
            continue
        if hole_begin > position:
            left.append((position, hole_begin))
        position = max(position, hole_end)
    if position < end:
        left.append((position, end))
    return left


def paint_wait(
    before: Mapping[str, Any],
    record: Mapping[str, Any],
    attempt: int,
    jobs: Sequence[Mapping[str, Any]],
    gap: tuple[float | None, float],
) -> tuple[list[Stretch], set[Kind]]:
    """The wait before an attempt: in the queue since its submission, idle before that.

    `before` is the ledger's line of the attempt before, empty for the first; `gap` runs from that attempt's end (None:
    there was none) to this one's first sign of life. A job that Slurm puts back waits in the queue at once.
    """
    painter = _Painter(attempt)
    begin, end = gap
    job = submission(record, jobs, end)
    submitted = number(job.get("time"))
    seconds = record.get("seconds")
    queued = number(seconds.get("queue")) if isinstance(seconds, Mapping) else None
    if submitted is not None and queued is not None:
        # `sbatch jobs/…` writes no line before its controller runs; Slurm knows since when the job waited.
        submitted = min(submitted, end - queued)
    # Between two attempts of one job only Slurm's own requeue waits in a queue.
    waits: Kind = "queue" if (job.get("executor") == "slurm" or record.get("job_id")) else "start"
    if submitted is not None and (begin is None or submitted > begin):
        painter.paint("idle", submitted if begin is None else begin, submitted)
        painter.paint(waits, submitted, end)
    elif queued is not None:
        middle = end - queued if begin is None else max(begin, end - queued)
        painter.paint("idle", middle if begin is None else begin, middle)
        painter.paint("queue", middle, end)
    elif begin is None:
        painter.missing.add("queue")
    elif before.get("action") == "restarted":
        painter.paint("idle", begin, end)
    elif record.get("job_id") and (submitted is not None or record["job_id"] == before.get("job_id")):
        painter.paint("queue", begin, end)
    elif submitted is not None and record:
        painter.paint("idle", begin, end)
    else:
        painter.missing.add("queue")
        painter.paint("unknown", begin, end)
    return painter.stretches, painter.missing


def submission(
    record: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], started: float
) -> Mapping[str, Any]:
    """The line of jobs.jsonl behind an attempt: its job's, else the newest before its start; empty where none is."""
    dated = [job for job in jobs if number(job.get("time")) is not None]
    mine = [job for job in dated if record.get("job_id") and job.get("job_id") == record["job_id"]]
    earlier = [job for job in dated if job["time"] <= started]
    return (mine or earlier or [{}])[-1]
