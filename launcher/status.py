"""The state of a run, from its own directory and from whoever runs it. File system and subprocess (Slurm).

The run's own record comes first: state.json of the newest job is right for as long as its controller lives, and final
once it holds an end. Slurm is asked only for what the record cannot know: a job that waits, or one that ended without
a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import durations, heartbeats, runs, slurm
from launcher.outcome import RankError, first_error

ENDS = frozenset({"done", "failed", "cancelled", "timeout", "preempted", "requeued", "node_failure", "lost"})
SLURM_MAY_GO_ON = frozenset({"preempted", "requeued", "node_failure"})
"""Ends of an attempt after which Slurm usually starts the job again: only Slurm knows whether it will."""


@dataclass(frozen=True)
class RunStatus:
    """What `status` shows. `state` is pending, starting, running, unsubmitted, unknown or one of ENDS."""

    run: str
    recipe: str
    state: str
    reason: str
    job_id: str
    executor: str
    attempts: int
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    directory: str
    slow: tuple[str, ...] = ()
    """Ranks that hold the others up, or did in the last attempt: a sentence each."""
    passed_over: tuple[str, ...] = ()
    """Checkpoints that the newest attempt did not go on from, each with what is wrong with it."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDS

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def status_of(run: runs.Run) -> RunStatus:
    """Ask everyone once. Raises slurm.SlurmError when Slurm has to be asked and does not answer."""
    spec, metrics, jobs = run.spec(), runs.last_metrics(run), run.jobs()
    job = jobs[-1] if jobs else {}
    state, reason = _state(run.state(), job)
    return RunStatus(
        run=run.id,
        recipe=spec.recipe,
        state=state,
        reason=reason,
        job_id=str(job.get("job_id", "")),
        executor=str(job.get("executor", spec.executor)),
        attempts=len(run.attempt_dirs()),
        step=metrics.get("step"),
        steps=metrics.get("steps"),
        loss=metrics.get("loss"),
        tokens_per_second=metrics.get("tokens_per_second"),
        directory=str(run.path),
        slow=heartbeats.sentences(run.state().get("slow")),
        passed_over=passed_over(run),
    )


def passed_over(run: runs.Run) -> tuple[str, ...]:
    """What the newest attempt found unsound when it began, one line each."""
    newest = len(run.attempt_dirs())
    return tuple(
        f"step-{int(event['step']):08d}: {event.get('reason')}"
        for event in durations.announcements(run)
        if event.get("event") == "passed_over" and event.get("attempt") == newest
    )


def _state(record: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[str, str]:
    if not job:
        return "unsubmitted", "no job was submitted for this run"
    job_id = str(job["job_id"])
    if job["executor"] != "slurm":
        return _state_here(record, job)
    ended = record.get("job_id") == job_id and record["state"] in ENDS
    may_go_on = record.get("action") == "requeued" or record.get("state") in SLURM_MAY_GO_ON
    if ended and not may_go_on:
        return record["state"], record["reason"]
    state = slurm.job_state(job_id)
    if ended and (state is None or state.is_over):
        return record["state"], record["reason"]
    if ended and state is not None:
        return "pending", f"{record['reason']}; job {job_id} is {state.name}"
    if state is None:
        return "lost", f"Slurm no longer knows job {job_id}, and it left no ledger line; see the batch log"
    if not state.is_over and record.get("job_id") == job_id and state.name == "RUNNING":
        return record["state"], record["reason"]
    return _from_slurm(state, job_id)


def _from_slurm(state: slurm.JobState, job_id: str) -> tuple[str, str]:
    """Slurm's word as ours, for a job whose controller has said nothing. Pure."""
    names = {"PENDING": "pending", "CONFIGURING": "pending", "RUNNING": "starting", "COMPLETING": "running"}
    names |= {"CANCELLED": "cancelled", "TIMEOUT": "timeout"}
    reason = f"job {job_id} is {state.name}" + (
        f" ({state.reason})" if state.reason not in ("", "None") else ""
    )
    return names.get(state.name, "failed" if state.is_over else "pending"), reason


def _state_here(record: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[str, str]:
    """A run of this machine: its controller's record, as long as that process, or submitit's around it, lives."""
    current = record.get("updated", 0.0) >= job["time"]
    if current and record["state"] in ENDS:
        return record["state"], record["reason"]
    if not is_alive(int(job["job_id"])):
        return "lost", "the controller ended without a ledger line; see the batch log"
    return (record["state"], record["reason"]) if current else ("starting", "the controller starts")


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie (one that its parent has not collected yet)."""
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def failure_of(run: runs.Run) -> RankError | None:
    """The error of the rank that failed first in the newest attempt, with its traceback."""
    folders = run.attempt_dirs()
    return first_error(runs.rank_errors(folders[-1])) if folders else None


def batch_log(run: runs.Run) -> Path | None:
    """The newest job's batch log: what the controller said, and the shell around it."""
    jobs = run.jobs()
    if not jobs:
        return None
    job_id = jobs[-1]["job_id"]
    if jobs[-1].get("log"):
        return Path(jobs[-1]["log"])
    return run.submitit_folder / f"{job_id}_0_log.out"


def telling_log(run: runs.Run) -> Path | None:
    """The log that says most about a failure without a traceback: the failed rank's, else the batch step's."""
    rank, folders, batch = run.state().get("rank"), run.attempt_dirs(), batch_log(run)
    candidates = [folders[-1] / f"rank-{rank}.log"] if rank is not None and folders else []
    candidates += [batch] if batch is not None else []
    return next((path for path in candidates if path.exists() and path.stat().st_size), None)


def signal_local(run: runs.Run, number: int) -> bool:
    """Send a signal to the controller of a run of this machine. False where it no longer runs."""
    pid = run.state().get("pid")
    if pid is None or not is_alive(int(pid)):
        return False
    os.kill(int(pid), number)
    return True
