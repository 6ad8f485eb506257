"""Where the seconds of an attempt went, from its metrics and its save announcements. Pure, but for `of_run`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launcher import ledger, runs

CHECKPOINTS_FILE = "checkpoints.jsonl"
FIXED_STOP_SECONDS = 20.0
"""For the controller, srun and Slurm around the save itself."""

Lines = Sequence[Mapping[str, Any]]


def announcements(run: runs.Run) -> list[dict[str, Any]]:
    """What rank 0 said of its checkpoints: started, saved, failed, skipped; and passed_over, by a resume."""
    return ledger.read_lines(run.path / CHECKPOINTS_FILE)


def last_saved(events: Lines) -> int | None:
    """The highest step that was announced as saved and that no resume has passed over since; None before the first."""
    holds: set[int] = set()
    for event in events:
        if event.get("event") == "saved":
            holds.add(int(event["step"]))
        elif event.get("event") == "passed_over":
            holds.discard(int(event["step"]))
    return max(holds, default=None)


def saved_before(number: int, events: Lines) -> int | None:
    """The newest step that attempt `number` could go on from: saved before it, and found sound when it began."""
    return last_saved(
        [
            event
            for event in events
            if int(event.get("attempt", 0)) < number
            or (event.get("attempt") == number and event.get("event") == "passed_over")
        ]
    )


def troubles(number: int, events: Lines) -> tuple[str, ...]:
    """One line about each checkpoint that attempt `number` passed over when it began, or could not write."""
    words = {"passed_over": "was passed over", "failed": "was not saved", "skipped": "was not saved"}
    return tuple(
        f"step-{int(event['step']):08d} {words[event['event']]}: {event.get('reason') or 'no reason given'}"
        for event in events
        if event.get("attempt") == number and event.get("event") in words
    )


def of_attempt(
    number: int, tasks_started: float | None, ended: float, metrics: Lines, events: Lines
) -> dict[str, float]:
    """start: tasks begin -> first step done; train: from there to the end without saves; save: blocked by saves;
    lost: work that no checkpoint holds. Without a step there is only start."""
    if tasks_started is None:
        return {}
    steps = [line for line in metrics if line.get("attempt") == number]
    if not steps:
        return {"start": round(ended - tasks_started, 3)}
    mine = [event for event in events if event.get("attempt") == number]
    first, last = float(steps[0]["time"]), float(steps[-1]["time"])
    save = sum(float(event.get("seconds_blocked") or 0.0) for event in mine)
    saved = [event for event in mine if event.get("event") == "saved"]
    lost = last - first
    if saved:
        holds = max(int(event["step"]) for event in saved)
        lost = sum(
            float(line["time"]) - float(before["time"])
            for before, line in itertools.pairwise(steps)
            if int(line["step"]) > holds
        )
    return {
        "start": round(max(0.0, first - tasks_started), 3),
        "train": round(max(0.0, ended - first - save), 3),
        "save": round(save, 3),
        "lost": round(max(0.0, lost), 3),
    }


def stop_seconds(metrics: Lines, events: Lines) -> float | None:
    """What it takes to stop: the rest of a step and a whole save, twice over, and what is fixed. None: not measured."""
    saves = [
        float(event["seconds_total"])
        for event in events
        if event.get("event") == "saved" and event.get("seconds_total")
    ]
    steps = [
        (float(after["time"]) - float(before["time"])) / (int(after["step"]) - int(before["step"]))
        for before, after in itertools.pairwise(metrics)
        if before.get("attempt") == after.get("attempt") and int(after["step"]) > int(before["step"])
    ]
    if not saves or not steps:
        return None
    return FIXED_STOP_SECONDS + 2 * (max(saves) + statistics.median(steps))


def measured_stop_seconds(run: runs.Run) -> float | None:
    """`stop_seconds` of a run directory."""
    return stop_seconds(ledger.read_lines(run.metrics_file), announcements(run))
