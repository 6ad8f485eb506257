"""What the controller prints into the batch step's log, and what others wrote there. File system."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


def say(message: str) -> None:
    """One dated line in the batch step's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}", flush=True)


def own_log() -> str:
    """The file behind our standard error, "" where that is no file (a terminal, a pipe)."""
    path = Path("/proc/self/fd/2").resolve()
    return str(path) if path.is_file() else ""


@dataclass(frozen=True)
class OwnLog:
    """The batch step's log from here on: slurmstepd writes into it why it ends the job."""

    path: Path
    offset: int

    @classmethod
    def begin(cls) -> OwnLog | None:
        path = own_log()
        return cls(Path(path), os.stat(path).st_size) if path else None

    def added(self) -> str:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read().decode(errors="replace")
