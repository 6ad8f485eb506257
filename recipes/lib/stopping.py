"""Stopping on request: a signal or a file asks, all ranks agree at a step boundary, save together and exit with 75.

A signal handler only sets a flag. Saving inside one may never finish (it interrupts whatever holds a lock), and a
save that one rank begins alone waits for ever for the others.

Under torchrun a SIGTERM to the agent reaches the workers, which have 30 seconds before the agent kills them;
SIGUSR1 is not passed on (it ends the agent). A launcher that needs longer writes the stop file instead.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

STOPPED_EXIT = 75
"""Exit status of a rank that stopped on request, after saving: EX_TEMPFAIL, "try again later"."""

STOP_FILE = "stop.json"
"""In the attempt's folder: {"reason": …, "deadline": unix seconds or null, "time": unix seconds}."""

REASONS = ("signal", "time_limit", "preemption", "cancel", "requeue", "other")
"""What ranks tell each other by number."""


class Stopped(SystemExit):
    """Raised on every rank alike, when all have agreed and what was to be saved is saved."""

    def __init__(self) -> None:
        super().__init__(STOPPED_EXIT)


class StopFlag:
    """Whether this process was asked to stop: by SIGTERM or SIGUSR1, or by the stop file that rank 0 looks for."""

    def __init__(self) -> None:
        self._heard = ""

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 set the flag and do nothing else. Only the main thread can call this."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = signal.Signals(number).name

    def agreed(self, rank: int = 0, folder: Path | None = None) -> str | None:
        """The reason to stop that all ranks agree on, or None to go on; all ranks call this at the same boundary.

        One number over gloo: the host waits for the other hosts, not for its GPU, whose kernels stay queued.
        `folder` is the attempt's, where there is one.
        """
        mine = self._asked(folder if rank == 0 else None)
        if dist.is_initialized() and dist.get_world_size() > 1:
            number = torch.tensor(mine)
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            mine = int(number)
        return REASONS[mine - 1] if mine else None

    def _asked(self, folder: Path | None) -> int:
        """Number of the reason, from 1; 0 for none. The file says more than the signal that woke us for it."""
        if folder is not None:
            try:
                text = (folder / STOP_FILE).read_text()
            except OSError:
                pass  # not there; or the file system stumbles, and then a signal or the next boundary tells
            else:
                return REASONS.index(_reason(text)) + 1
        return 1 if self._heard else 0


def _reason(text: str) -> str:
    """What a stop file says. That it is there is the request: one that cannot be read is no reason to go on."""
    try:
        found = json.loads(text)
    except ValueError:
        return "other"
    reason = found.get("reason") if isinstance(found, dict) else None
    return reason if reason in REASONS else "other"


OF_THIS_PROCESS = StopFlag()
"""The flag that recipes set at their start: what a signal does is a fact of the process, not of an object."""


def attempt_folder() -> Path | None:
    """The folder of this attempt: ATTEMPT_DIR, which the launcher sets; None under a bare torchrun."""
    return Path(os.environ["ATTEMPT_DIR"]) if os.environ.get("ATTEMPT_DIR") else None
