"""Attempts whose controller was killed before it could write their ledger line. File system, and Slurm for the nodes.

The next controller finds the folder without a line and writes it: an attempt that is missing from the ledger would be
time that nobody accounts for, and a controller that dies every time would be started for ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import badnodes, durations, ledger, ownjob, recovery, runs, slurm
from launcher.allocation import Allocation
from launcher.outcome import Outcome
from launcher.saying import say

START_FILE = "attempt.json"


def note_start(
    attempt_dir: Path, job_id: str, nodes: Sequence[str], started: float, queue_seconds: float | None
) -> None:
    """Leave what a later controller needs to know of this attempt, should this one die.

    `queue_seconds` is how long it waited in Slurm's queue; None where another attempt did, or nobody knows.
    """
    about = {"job_id": job_id, "nodes": list(nodes), "started": started, "queue_seconds": queue_seconds}
    runs.write_text(attempt_dir / START_FILE, json.dumps(about) + "\n")


def settle(run: runs.Run, allocation: Allocation) -> str:
    """Write the missing lines. Gives the reason why the run must not go on, "" where it may."""
    written = {int(line["attempt"]) for line in run.attempts()}
    refusal = ""
    for folder in run.attempt_dirs():
        number = int(folder.name.partition("-")[2])
        if number in written:
            continue
        about = runs.read_json(folder / START_FILE) or {}
        outcome = _what_happened(about, allocation)
        record = _record(run, number, folder, outcome)
        refusal = recovery.refusal(outcome, [*ledger.past(run.attempts_file), ledger.past_of(record)])
        record |= {
            "action": "stopped"
            if refusal
            else "requeued"
            if about.get("job_id") == allocation.job_id
            else "successor",
            "decision": refusal or "the next controller goes on",
        }
        ledger.append_line(run.attempts_file, record)
        if outcome.node and allocation.job_id:
            badnodes.note_outcome(run, allocation.cluster, number, outcome.node, outcome)
        say(f"attempt {number} left no ledger line: {outcome.cause}: {outcome.reason}")
    return refusal


def _what_happened(about: dict[str, Any], allocation: Allocation) -> Outcome:
    """A dead node takes the controller with it; otherwise the controller was killed alone."""
    nodes = [str(node) for node in about.get("nodes", [])]
    if nodes and allocation.job_id:
        try:
            down = ownjob.gone(nodes)
        except slurm.SlurmError as error:
            say(f"the state of the nodes is not known: {error}")
            down = ()
        if down:
            how = (
                "with the controller on it"
                if nodes[0] in down
                else "and the controller ended before it could say so"
            )
            return Outcome("node_failure", f"node {', '.join(down)} failed, {how}", node=down[0])
    return Outcome("controller_lost", "the controller ended without a word: it was killed, or its node died")


def _record(run: runs.Run, number: int, folder: Path, outcome: Outcome) -> dict[str, Any]:
    about = runs.read_json(folder / START_FILE) or {}
    metrics, events = ledger.read_lines(run.metrics_file), durations.announcements(run)
    steps = [line for line in metrics if line.get("attempt") == number]
    before = [line for line in metrics if int(line.get("attempt", 0)) < number]
    started = float(about.get("started", folder.stat().st_mtime))
    logs = [path.stat().st_mtime for path in folder.iterdir()]
    ended = max([started, *logs, *(float(line["time"]) for line in steps)])
    until_now = [event for event in events if int(event.get("attempt", 0)) <= number]
    seconds = durations.of_attempt(number, started, ended, metrics, events)
    if about.get("queue_seconds") is not None:
        seconds["queue"] = about["queue_seconds"]
    return {
        "attempt": number,
        "job_id": about.get("job_id", ""),
        "nodes": about.get("nodes", []),
        "state": outcome.state,
        "cause": outcome.cause,
        "reason": outcome.reason,
        "evidence": list(durations.troubles(number, events)),
        "exit_code": None,
        "started": started,
        "tasks_started": None,
        "ended": ended,
        "rank": None,
        "step_in": before[-1].get("step") if before else None,
        "step_out": (steps or before)[-1].get("step") if steps or before else None,
        "made_steps": bool(steps),
        "saved_in": durations.saved_before(number, events),
        "saved_out": durations.last_saved(until_now),
        "seconds": seconds,
        "excluded": [],
        "slow": state.get("slow", []) if (state := run.state()).get("attempt") == number else [],
    }
