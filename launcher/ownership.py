"""One controller at a time works on a run: the file that says which. File system, and Slurm through the caller.

A lock of the kernel would be simpler and is not used: over NFS it may be missing, or be held by a node that died until
somebody reboots the server. The file names its owner instead, and whoever meets it asks whether that owner still lives.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.spec import UserError

OWNER_FILE = "owner.json"
_TRIES = 5


@dataclass(frozen=True)
class Owner:
    """Who works on a run: a Slurm job, or a process of one machine (`job_id` empty)."""

    cluster: str
    job_id: str
    host: str
    pid: int
    time: float

    def is_same(self, other: Owner) -> bool:
        """A job that was requeued is its own heir; a process is not: its number may be another's by now."""
        if self.job_id:
            return (self.cluster, self.job_id) == (other.cluster, other.job_id)
        return (self.host, self.pid, other.job_id) == (other.host, other.pid, "")

    def __str__(self) -> str:
        return f"job {self.job_id}" if self.job_id else f"process {self.pid} on {self.host}"


def this_process(cluster: str, job_id: str) -> Owner:
    return Owner(cluster, job_id, socket.gethostname(), os.getpid(), time.time())


def read(run_dir: Path) -> Owner | None:
    """The owner on record, None where nobody works on the run."""
    try:
        fields: dict[str, Any] = json.loads((run_dir / OWNER_FILE).read_text())
    except FileNotFoundError:
        return None
    return Owner(**{name: fields[name] for name in Owner.__dataclass_fields__})


def acquire(run_dir: Path, me: Owner, is_alive: Callable[[Owner], bool]) -> Owner | None:
    """Become the owner of a run; gives the dead one that was replaced, or None.

    Raises UserError, one line, where another owner is alive. `is_alive` is only asked about another one.
    """
    mine = run_dir / f".{OWNER_FILE}.{me.host}.{me.pid}"
    mine.write_text(json.dumps(asdict(me)) + "\n")
    replaced = None
    try:
        for _ in range(_TRIES):
            try:
                os.link(mine, run_dir / OWNER_FILE)  # fails where there is one, on NFS too
            except FileExistsError:
                pass
            else:
                return replaced
            there = read(run_dir)
            if there is None:
                continue
            if not there.is_same(me) and is_alive(there):
                raise UserError(f"{run_dir.name}: {there} works on this run; cancel it first, or wait for it")
            replaced = there if not there.is_same(me) else None
            _remove(run_dir, there, me)
        raise UserError(f"{run_dir.name}: others start on this run at this moment; see launcher status")
    finally:
        mine.unlink(missing_ok=True)


def _remove(run_dir: Path, stale: Owner, me: Owner) -> None:
    """Take a dead owner's file away: by rename first, so that of two who do it only one takes this very file."""
    aside = run_dir / f".{OWNER_FILE}.stale.{me.host}.{me.pid}"
    try:
        os.rename(run_dir / OWNER_FILE, aside)
    except FileNotFoundError:
        return
    taken = json.loads(aside.read_text())
    if taken != asdict(stale):
        # Somebody else was faster and this is the new owner's: back with it. His link is atomic, and so is this.
        os.link(aside, run_dir / OWNER_FILE)
    aside.unlink()


def release(run_dir: Path, me: Owner) -> None:
    """Let go of a run, where we still hold it."""
    there = read(run_dir)
    if there is not None and there.is_same(me):
        (run_dir / OWNER_FILE).unlink(missing_ok=True)
