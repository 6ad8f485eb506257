"""The ledger: one JSON line per attempt in a run's attempts.jsonl. File system.

Lines are only appended. One write of one line with O_APPEND, so that a reader never sees half of one on a local file
system, and a torn last line (a node that died while writing) is passed over by the reader instead of hiding the rest.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.heartbeats import Straggler
from launcher.recovery import Past


@dataclass(frozen=True)
class AttemptRecord:
    """What happened in one attempt. Times are unix seconds; `seconds` holds durations by part."""

    attempt: int
    job_id: str
    nodes: tuple[str, ...]
    world_size: int
    state: str
    """done, failed, cancelled, timeout: how the attempt ended (launcher.outcome)."""
    reason: str
    exit_code: int
    started: float
    tasks_started: float | None
    ended: float
    rank: int | None = None
    """The first rank that failed, where one did."""
    step_in: int | None = None
    """Last optimizer step on record when the attempt began; None where no metrics were written."""
    step_out: int | None = None
    launch: str = "srun"
    """Way of starting the tasks: srun or torchrun."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """queue, preflight, controller, tasks, and of these start, train, save; lost: work that no checkpoint holds."""
    versions: Mapping[str, str] = field(default_factory=dict)
    cause: str = "unknown"
    """launcher.outcome.Cause: finer than `state`."""
    evidence: tuple[str, ...] = ()
    """The lines that the cause was read from."""
    action: str = "stopped"
    """launcher.recovery.Action: what came after."""
    decision: str = ""
    """Why that."""
    restarts: int = 0
    """How often Slurm had started this job before."""
    made_steps: bool = False
    saved_in: int | None = None
    """Newest step that held a sound checkpoint when the attempt began, and at its end."""
    saved_out: int | None = None
    code: str = ""
    """Commit, with a + where the tree was changed."""
    excluded: tuple[str, ...] = ()
    """Nodes that the run has to do without from here on."""
    slow: tuple[Straggler, ...] = ()
    """Ranks that held the others up (launcher.heartbeats): rank, host, step, and seconds of own work in a step."""


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and push it to the disk: the node may be gone in the next second.

    After a line that was torn by such an end, a line break comes first, or the torn line would take this one with it.
    """
    line = json.dumps(record, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (b"\n" if torn else b"") + line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file, [] where there is none. A last line without its end is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # still being written, or torn by a node that died
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn in the middle: an append after it started a new line
    return [record for record in records if isinstance(record, dict)]


def append(path: Path, record: AttemptRecord) -> None:
    append_line(path, dataclasses.asdict(record))


def amend(path: Path, attempt: int, **changes: Any) -> None:
    """Correct an attempt's record by another line: what was written stays, and the later word counts."""
    append_line(path, {"attempt": attempt, "amends": True, **changes})


def attempts(path: Path) -> list[dict[str, Any]]:
    """The ledger's records, oldest first, as plain mappings (a newer launcher may have written more keys)."""
    records: dict[Any, dict[str, Any]] = {}
    for line in read_lines(path):
        if line.pop("amends", False):
            records.setdefault(line["attempt"], {}).update(line)
        else:
            records[line["attempt"]] = line
    return list(records.values())


def past_of(record: Mapping[str, Any]) -> Past:
    """A record as the decision about the next attempt sees it. An older launcher wrote no cause."""
    before, after = record.get("saved_in"), record.get("saved_out")
    saved = after is not None and (before is None or after > before)
    return Past(str(record.get("cause", "unknown")), bool(record.get("made_steps", True)), saved)


def past(path: Path) -> list[Past]:
    return [past_of(record) for record in attempts(path)]
