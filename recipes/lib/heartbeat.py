"""A sign of life per rank: ATTEMPT_DIR/heartbeat/rank-K, one line of JSON that is overwritten in place.

    {"step": 12, "time": 1764000000.1, "phase": "step", "host": "n1", "pid": 4242, "own": 0.31}

`phase` is start (until the first step), step, save or done. `own` is what own_time.py measures: seconds of a step in
which this rank worked without waiting for others; it is missing until that is known. Whoever watches sees from the age
of the line that a rank stands still, from its step that it lags, from its phase that it may take longer, and from
`own` which one the others wait for. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

FOLDER = "heartbeat"
LINE_BYTES = 256
"""Size of every file: padded with spaces, so that one write replaces the line whole."""
SHORTEST_INTERVAL = 0.5
"""Seconds between two writes of one phase: steps of a millisecond must not load a shared file system."""


class Heartbeat:
    """This rank's file; without a folder (a bare torchrun) nothing is written."""

    def __init__(self, attempt_folder: Path | None, rank: int) -> None:
        self._descriptor: int | None = None
        self._phase, self._written = "", 0.0
        # Slurm's name of the node is the one to exclude or to drain; a hostname may be longer, or shared.
        self._host = os.environ.get("SLURMD_NODENAME", socket.gethostname())[:64]
        if attempt_folder is None:
            return
        folder = attempt_folder / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(
                folder / f"rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            self._give_up(error)

    def beat(self, step: int, phase: str, own: float | None = None) -> None:
        """Note where this rank is; at once where the phase is new, else at most every SHORTEST_INTERVAL."""
        now = time.time()
        if self._descriptor is None or (
            phase == self._phase and 0 <= now - self._written < SHORTEST_INTERVAL
        ):
            return
        self._phase, self._written = phase, now
        line: dict[str, object] = {
            "step": step,
            "time": now,
            "phase": phase,
            "host": self._host,
            "pid": os.getpid(),
        }
        if own is not None:
            line["own"] = round(own, 6)
        try:
            os.pwrite(self._descriptor, json.dumps(line).ljust(LINE_BYTES - 1).encode() + b"\n", 0)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A run does not end for the sake of its sign of life. Its watcher sees an old line, and the log says why."""
        print(f"warning: no heartbeat from here on: {error}", file=sys.stderr, flush=True)
        self._descriptor = None
