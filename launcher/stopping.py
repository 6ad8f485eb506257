"""Asking the ranks of an attempt to save and stop: who asks, until when, and the file that tells them. File system.

A signal handler only sets a flag; the controller's loop does the rest. The ranks look for the file at every step
boundary, so it also reaches those that no signal reaches: inside containers, behind torchrun agents.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.outcome import StopReason
from launcher.ownjob import OwnJob
from launcher.render import warning_seconds

STOP_FILE = "stop.json"
MOST_MARGIN_SECONDS = 20.0
"""Kept of the time that is left, for the ledger line and the requeue."""
WARNING_SLACK_SECONDS = 90.0
"""A warning so much ahead of the time that was asked for is not about the time limit."""
EARLIEST_WARNING_SECONDS = 30.0
"""Slurm's warning came 24 s early on 22.05."""
LOCAL_GRACE_SECONDS = 10.0


class Signals:
    """The signals that reached the controller. Installed before anything else, read in its loop."""

    def __init__(self) -> None:
        self.end = ""
        """SIGTERM or SIGINT: everything ends, now."""
        self.warning = ""
        """SIGUSR1: something will end, and there is time."""
        self.end_time = 0.0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_end)
        signal.signal(signal.SIGUSR1, self._on_warning)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # its default would end us; the ranks dump stacks on it

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        if not self.end:
            self.end, self.end_time = signal.Signals(number).name, time.time()

    def _on_warning(self, number: int, frame: FrameType | None) -> None:
        self.warning = signal.Signals(number).name


@dataclass(frozen=True)
class Stop:
    """A request to the ranks."""

    reason: StopReason
    deadline: float | None
    """Unix time after which the tasks are killed; None leaves that to Slurm."""
    evidence: str


def write(attempt_dir: Path, stop: Stop) -> None:
    """Tell the ranks, by rename: they see the whole request or none."""
    path = attempt_dir / STOP_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"reason": stop.reason, "deadline": stop.deadline, "time": time.time()}) + "\n"
    )
    os.replace(temporary, path)


def due(job: OwnJob | None, *, warned: bool, now: float, measured: float | None) -> Stop | None:
    """Whether Slurm is about to end the job: a preemption, or its time limit within the warning time. Pure.

    Slurm's signal is one of two ways to learn of the limit. The other is the clock: a job whose limit was given to
    sbatch by hand has a warning time that was made for another limit, or none.
    """
    if job is None:
        return Stop("time_limit", None, "SIGUSR1, and slurmctld did not answer") if warned else None
    left = None if job.end_time is None else job.end_time - now
    deadline = None if left is None else now + max(1.0, left - min(MOST_MARGIN_SECONDS, left / 3))
    if job.preempt_time is not None:
        return Stop("preemption", deadline, f"PreemptTime is set; {_in(left)}")
    total = None if job.end_time is None or job.start_time is None else job.end_time - job.start_time
    lead = warning_seconds(total, measured) if total is not None else 0
    if left is not None and left < lead - 5:
        return Stop("time_limit", deadline, f"the time limit is {_in(left)}")
    if not warned:
        return None
    if left is None or total is None or left > lead + WARNING_SLACK_SECONDS:
        # Nobody warns so early of a time limit: somebody wants the nodes.
        return Stop("preemption", deadline, f"SIGUSR1, and the time limit is {_in(left)}")
    if left > max(0.6 * total, lead + min(lead, EARLIEST_WARNING_SECONDS)):
        return None  # a warning made for a longer limit; the clock above speaks in time
    return Stop("time_limit", deadline, f"SIGUSR1; the time limit is {_in(left)}")


def _in(left: float | None) -> str:
    return "far away" if left is None else f"{left:.0f} s away"
