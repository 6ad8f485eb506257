"""Files of JSON lines that a run appends to: a full disk delays a line and stops nothing. Standard library only."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_LONGEST_LINE = 2**16


class Lines:
    """One file of JSON lines, of which this process is the only writer."""

    def __init__(self, file: Path) -> None:
        """Go on where an attempt before stopped, without the half of a line that a kill may leave."""
        self._file = file
        self._descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        end = os.pread(self._descriptor, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
        os.ftruncate(self._descriptor, size - len(end.rpartition(b"\n")[2]))
        self._pending, self._waiting = b"", False

    def append(self, line: dict[str, Any]) -> None:
        """Write one object. It is in the file when this returns, or it waits for the disk to have room again.

        One write per line: a reader never sees half of one, except while the disk is full.
        """
        self._pending += json.dumps(line).encode() + b"\n"
        error = self._write()
        # Metrics are not worth the run: a full disk often has room again when a checkpoint is deleted.
        if error is not None and not self._waiting:
            print(
                f"warning: {self._file}: {error.strerror}; lines wait in memory", file=sys.stderr, flush=True
            )
        self._waiting = error is not None

    def close(self) -> None:
        """Close the file; what still cannot be written is lost, with a warning."""
        error = self._write()
        os.close(self._descriptor)
        if error is not None:
            lost = self._pending.count(b"\n")
            print(f"warning: {self._file}: {error.strerror}; lost {lost} lines", file=sys.stderr, flush=True)

    def _write(self) -> OSError | None:
        """Write what waits; gives the error that stopped it."""
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        except OSError as error:
            return error
        return None
