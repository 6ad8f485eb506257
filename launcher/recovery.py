"""What comes after an attempt: nothing, the same tasks again in this job, the job again, or another job. Pure.

Each cause has a budget of its own, so that one bad node cannot eat the retries of everything else. Budgets count since
the last attempt that saved something new: a run of many weeks meets every failure more often than any number here, and
one that cannot get past a point stops there whatever the cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.outcome import Cause, Outcome

Action = Literal["done", "requeued", "restarted", "successor", "stopped"]

BUDGETS: Mapping[Cause, int | None] = {
    "preemption": None,
    "requeued": None,
    "time_limit": None,
    "user_error": 1,
    "out_of_memory": 1,
    "hang": 3,
    "hardware": 3,
    "node_failure": 5,
    "storage": 2,
    "controller_lost": 3,
    "killed": 3,
    "unknown": 2,
}
"""How often a run goes on after each cause without having saved anything new in between; None: always."""

ATTEMPTS_WITHOUT_PROGRESS = 3
_ALLOCATION_HOLDS: frozenset[Cause] = frozenset(
    {"user_error", "out_of_memory", "hang", "hardware", "storage", "killed", "unknown"}
)
"""Causes that leave the job and its nodes to us: the tasks can start again without a place in the queue."""


@dataclass(frozen=True)
class Past:
    """One attempt of the ledger, as far as it matters here."""

    cause: str
    made_steps: bool
    """It completed at least one optimizer step."""
    saved: bool
    """It left a checkpoint of a later step than there was before."""


@dataclass(frozen=True)
class Possible:
    """What can be done from here."""

    slurm: bool
    """The run is a Slurm job."""
    may_requeue: bool = True
    slurm_requeues: bool = False
    """Slurm has already put the job back, or will by itself."""
    seconds_left: float | None = None
    """Until the time limit; None where nobody knows."""
    worth_a_restart: float = 120.0
    """A restart with less time than this left would be stopped again before it did anything."""
    spare_nodes: int = 0
    """Healthy nodes of the job beyond those that work; the failed one is not among them."""
    interactive: bool = False
    preflight_failed: bool = False
    """No task was started."""
    indispensable: str = ""
    """Why the job cannot be put back into the queue without the nodes that the preflight found, "" where it can."""


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    exclude: tuple[str, ...] = ()
    """Nodes that the next attempt has to do without."""

    @property
    def goes_on(self) -> bool:
        return self.action in ("requeued", "restarted", "successor")


def decide(outcome: Outcome, past: Sequence[Past], possible: Possible) -> Decision:
    """The next step of a run whose newest attempt, the last of `past`, ended with `outcome`."""
    if outcome.cause == "done":
        return Decision("done", outcome.reason)
    if outcome.cause == "cancelled":
        return Decision("stopped", "somebody cancelled it")
    if possible.interactive:
        return Decision("stopped", "a run under a debugger is not repeated")
    why_not = refusal(outcome, past)
    if why_not:
        return Decision("stopped", why_not)
    bad = left_behind(outcome)
    if _restarts_here(outcome, possible, bad):
        return Decision("restarted", "the tasks start again in this allocation", bad)
    if possible.preflight_failed and outcome.cause == "hardware":
        # The checks would find the same again: the run may only go on without what they found.
        if not bad:
            return Decision(
                "stopped", "it is no node's fault; a person has to look at what the preflight found"
            )
        if not possible.slurm:
            return Decision("stopped", "a person has to look at what the preflight found")
        if possible.indispensable:
            return Decision("stopped", possible.indispensable)
    if not possible.slurm:
        return Decision("stopped", "there is no queue to go back to; resume continues it")
    if possible.may_requeue:
        return Decision("requeued", "the job goes back into the queue", bad)
    return Decision("successor", "this job may not be requeued; another one follows it", bad)


def left_behind(outcome: Outcome) -> tuple[str, ...]:
    """The nodes that the next attempt has to do without."""
    if outcome.cause not in ("hardware", "node_failure"):
        return ()
    return outcome.suspects or ((outcome.node,) if outcome.node else ())


def refusal(outcome: Outcome, past: Sequence[Past]) -> str:
    """Why a run must not go on, "" where it may; `past` ends with the attempt that ended with `outcome`."""
    if outcome.cause == "user_error" and past and not past[-1].made_steps:
        return "an error before the first step would come again"
    budget = BUDGETS[outcome.cause]
    spent = _spent(outcome.cause, past)
    if budget is not None and spent > budget:
        return f"{outcome.cause} came {spent} times without a new checkpoint in between; {budget} retries are the limit"
    newest = past[-ATTEMPTS_WITHOUT_PROGRESS:]
    if len(newest) == ATTEMPTS_WITHOUT_PROGRESS and not any(attempt.saved for attempt in newest):
        causes = ", ".join(attempt.cause for attempt in newest)
        return f"no new checkpoint in {ATTEMPTS_WITHOUT_PROGRESS} attempts ({causes})"
    return ""


def _spent(cause: str, past: Sequence[Past]) -> int:
    """How often the cause came, from the last attempt that saved something new to now."""
    count = 0
    for attempt in reversed(past):
        count += attempt.cause == cause
        if attempt.saved:
            break
    return count


def _restarts_here(outcome: Outcome, possible: Possible, bad: Sequence[str]) -> bool:
    enough = possible.seconds_left is None or possible.seconds_left > possible.worth_a_restart
    if possible.slurm_requeues or not enough:
        return False
    if possible.preflight_failed and outcome.cause == "hardware":
        return possible.slurm and 0 < len(bad) <= possible.spare_nodes
    if outcome.cause == "node_failure":
        return possible.spare_nodes >= max(1, len(bad))
    if bad and possible.slurm:
        # The card or the link will fail again: only with other nodes in their place.
        return possible.spare_nodes >= len(bad)
    return outcome.cause in _ALLOCATION_HOLDS
