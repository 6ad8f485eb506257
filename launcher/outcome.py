"""Why an attempt ended, from what was seen of its end. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.slurm import TaskExit

State = Literal["done", "failed", "cancelled", "timeout", "preempted", "requeued", "node_failure"]


@dataclass(frozen=True)
class RankError:
    """The exception that ended one rank, as its task wrapper recorded it."""

    time: float
    rank: int
    node: str
    type: str
    message: str
    traceback: str

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RankError:
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Ending:
    """The facts about the end of an attempt."""

    exit_code: int
    """Of the step: 0 only when every task ended with 0."""
    task_exits: tuple[TaskExit, ...] = ()
    errors: tuple[RankError, ...] = ()
    stop_signal: str = ""
    """The signal that the controller itself received, e.g. SIGTERM; empty for none."""
    slurm_cause: str = ""
    """Why Slurm ended the job (launcher.slurm.parse_cancellation); empty where it did not, or there is none."""
    deadline_passed: bool = False
    last_lines: tuple[str, ...] = ()
    """The end of the step's own output: what srun said."""


@dataclass(frozen=True)
class Outcome:
    state: State
    reason: str
    rank: int | None = None
    """The first rank that failed, where one did."""


_BY_SLURM = {
    "CANCELLED": Outcome("cancelled", "the job was cancelled"),
    "TIMEOUT": Outcome("timeout", "the time limit was reached"),
    "PREEMPTED": Outcome("preempted", "a job of higher priority took the nodes"),
    "REQUEUED": Outcome("requeued", "the job was put back into the queue"),
    "NODE_FAIL": Outcome("node_failure", "a node of the job failed"),
}


def classify(ending: Ending) -> Outcome:
    """The state and the one-line reason of an attempt."""
    if ending.exit_code == 0:
        return Outcome("done", "all ranks finished")
    if ending.slurm_cause:
        return _BY_SLURM[ending.slurm_cause]
    if ending.deadline_passed:
        return _BY_SLURM["TIMEOUT"]
    if ending.stop_signal:
        return Outcome("cancelled", f"the controller received {ending.stop_signal}")
    first = first_error(ending.errors)
    killed = next((task for task in ending.task_exits if task.signal and task.signal != "Terminated"), None)
    if killed is not None:
        # A rank that a signal kills writes no record; the others' broken connections are echoes of it.
        return Outcome("failed", f"rank {killed.tasks[0]} on {killed.node}: {killed.signal}", killed.tasks[0])
    if first is not None:
        message = first.message.strip().splitlines()[0] if first.message.strip() else "no message"
        return Outcome("failed", f"rank {first.rank} on {first.node}: {first.type}: {message}", first.rank)
    if ending.task_exits:
        task = ending.task_exits[0]
        return Outcome(
            "failed", f"rank {task.tasks[0]} on {task.node}: exit code {task.exit_code}", task.tasks[0]
        )
    said = next((line for line in reversed(ending.last_lines) if line.strip()), "no message")
    return Outcome("failed", f"the tasks ended with status {ending.exit_code}: {said.strip()}")


def first_error(errors: Sequence[RankError]) -> RankError | None:
    """The rank that failed first: later ones mostly report that a peer closed its connection."""
    return min(errors, key=lambda error: error.time, default=None)
