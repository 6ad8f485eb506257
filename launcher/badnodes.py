"""Nodes to stay away from for a while: who put them on record, why, until when. File system.

RUN_ROOT/.nodes/CLUSTER/WRITER.jsonl, CLUSTER as Slurm calls itself. Every writer has a file of its own and appends to
it: O_APPEND is atomic on one machine only, and over NFS two clients that append to one file overwrite each other's
lines. A reader takes all files together, in the order of time. A record ends by itself, because nobody remembers to
take a repaired node off a list; or a later line clears it.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import ledger, ownjob, slurm
from launcher.outcome import Outcome
from launcher.runs import Run
from launcher.spec import JobSpec

HOURS = {"fail": 24.0, "hardware": 24.0, "node_failure": 2.0, "unknown": 1.0}
"""How long a node is left out. What was seen to be broken: a day, in which somebody looks. A node that died: Slurm
itself keeps it out while it is down, and what comes back from a reboot and dies again does so soon. A check that could
not look: an hour, because the fault may lie in the looking. So for one end of a bad link: it may be the other one."""

FORGET_DAYS = 30.0
"""Files that nobody wrote to for so long are not read: everything in them has ended."""


@dataclass(frozen=True)
class BadNode:
    """One reason to stay away from a node."""

    node: str
    time: float
    until: float
    kind: str
    """A key of HOURS."""
    reason: str
    evidence: tuple[str, ...] = ()
    run: str = ""
    attempt: int | None = None
    directory: str = ""

    @property
    def ends(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.until))


def folder(root: Path, cluster: str) -> Path:
    """Where a cluster's records are. Slurm's cluster names are plain words; anything else becomes one."""
    return root / ".nodes" / (re.sub(r"[^\w.-]", "_", cluster) or "cluster")


def clusters(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".nodes").glob("*") if path.is_dir())


def note_outcome(run: Run, cluster: str, attempt: int, node: str, outcome: Outcome) -> None:
    """Put a node on record for what ended an attempt."""
    own = tuple(line for line in outcome.evidence if line.startswith(f"{node}: ")) or outcome.evidence
    failed = any(re.match(rf"{re.escape(node)}: \S+ fail: ", line) for line in own)
    kind = outcome.cause if not outcome.suspects else "fail" if failed else "unknown"
    reason = own[0] if outcome.suspects and own else outcome.reason
    now = time.time()
    until = now + HOURS[kind] * 3600
    bad = BadNode(node, now, until, kind, reason, own, run.id, attempt, str(run.path))
    _append(folder(run.path.parent, cluster), f"run-{run.id}", asdict(bad))


def clear(root: Path, cluster: str, nodes: Iterable[str]) -> None:
    """Take nodes off the record; what is found later counts again."""
    for node in nodes:
        writer = f"cleared-{socket.gethostname()}-{os.getpid()}"
        _append(folder(root, cluster), writer, {"node": node, "time": time.time(), "cleared": True})


def _append(where: Path, writer: str, line: dict[str, object]) -> None:
    where.mkdir(parents=True, exist_ok=True)
    ledger.append_line(where / f"{writer}.jsonl", line)


def everything(root: Path, cluster: str) -> list[BadNode]:
    """All records, oldest first, without those that were cleared."""
    oldest = time.time() - FORGET_DAYS * 86400
    files = [path for path in folder(root, cluster).glob("*.jsonl") if path.stat().st_mtime > oldest]
    lines = [line for path in files for line in ledger.read_lines(path)]
    found: list[BadNode] = []
    for line in sorted(lines, key=lambda one: float(one["time"])):
        if line.get("cleared"):
            found = [bad for bad in found if bad.node != line["node"]]
        else:
            known = {name: line[name] for name in BadNode.__dataclass_fields__ if name in line}
            found.append(BadNode(**{**known, "evidence": tuple(line.get("evidence", ()))}))
    return found


def current(records: Sequence[BadNode], now: float) -> list[BadNode]:
    """For each node that is to be left out now, the record that lasts longest; in the order of time. Pure."""
    longest: dict[str, BadNode] = {}
    for bad in records:
        if bad.until > now and (bad.node not in longest or bad.until >= longest[bad.node].until):
            longest[bad.node] = bad
    return sorted(longest.values(), key=lambda bad: bad.time)


# --- at submission ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """What a submission does about bad nodes."""

    nodes: tuple[str, ...]
    """For --exclude: the user's own and the bad ones."""
    lines: tuple[str, ...]
    """What is said about it."""


def leave_out(root: Path, spec: JobSpec) -> LeftOut:
    """The nodes that a new job stays away from. Asks Slurm only where a node is on record. Raises SlurmError."""
    if spec.executor != "slurm" or not clusters(root):
        return LeftOut(spec.exclude, ())
    found = current(everything(root, cluster_name()), time.time())
    if not found:
        return LeftOut(spec.exclude, ())
    said = slurm.run(["sinfo", "--noheader", "--Node", "--format=%N|%P"], timeout=ownjob.QUICK_SECONDS)
    return choose(spec, found, partitions(said, spec.partition))


def cluster_name() -> str:
    """As Slurm calls itself. Raises SlurmError."""
    said = slurm.run(["scontrol", "show", "config"], timeout=ownjob.QUICK_SECONDS)
    match = re.search(r"^ClusterName\s*=\s*(\S+)", said, re.MULTILINE)
    if match is None:
        raise slurm.SlurmError("scontrol show config names no ClusterName")
    return match[1]


def partitions(sinfo: str, wanted: str | None) -> dict[str, tuple[str, ...]]:
    """Nodes by partition, of those that a job asks for, from `NODE|PARTITION` lines; the default has a star. Pure."""
    found: dict[str, list[str]] = {}
    names = wanted.split(",") if wanted else []
    for line in sinfo.splitlines():
        node, _, partition = line.strip().partition("|")
        if partition.rstrip("*") in names or (not names and partition.endswith("*")):
            found.setdefault(partition.rstrip("*"), []).append(node)
    return {name: tuple(dict.fromkeys(nodes)) for name, nodes in found.items()}


def choose(spec: JobSpec, found: Sequence[BadNode], in_partitions: dict[str, tuple[str, ...]]) -> LeftOut:
    """Leave out as many as every partition that may run the job can do without, the newest first. Pure."""
    users = tuple(name for word in spec.exclude for name in slurm.expand_hostlist(word))
    asked = slurm.expand_hostlist(spec.sbatch.get("nodelist", ""))
    here = {node for nodes in in_partitions.values() for node in nodes}
    found = [bad for bad in found if bad.node in here and bad.node not in users]
    names = [bad.node for bad in found if bad.node not in asked]
    reasons: dict[str, str] = {}
    for partition, nodes in in_partitions.items():
        job = ownjob.OwnJob(None, None, None, None, False, 0, (), partition, spec.nodes + spec.spares, users)
        exclusion = ownjob.affordable(job, names, nodes)
        reasons |= dict.fromkeys(exclusion.dropped, exclusion.reason)
    lines, left = [], []
    for bad in found:
        if bad.node in asked:
            lines.append(
                f"{bad.node} is on record as bad until {bad.ends}, but nodelist asks for it: {bad.reason}"
            )
        elif bad.node in reasons:
            continue
        else:
            left.append(bad.node)
            lines.append(f"leaving out {bad.node} until {bad.ends}, because {bad.reason}")
    lines += dict.fromkeys(reasons.values())
    return LeftOut((*spec.exclude, *left), tuple(lines))


# --- in a job that has one all the same -----------------------------------------------------------------------


def in_a_job(found: Sequence[BadNode], nodes: Sequence[str], spare: int) -> LeftOut:
    """Which of a job's own nodes its first attempt leaves idle: the newest on record, as far as spares go. Pure.

    sbatch reads no record of ours, and a node may come onto it while the job is in the queue.
    """
    here = [bad for bad in reversed(found) if bad.node in nodes]
    left, kept = here[:spare], here[spare:]
    lines = [
        f"leaving out {bad.node} until {bad.ends}: a spare takes its place, because {bad.reason}"
        for bad in left
    ]
    lines += [
        f"{bad.node} is on record as bad until {bad.ends}, and the job has no spare to take its place "
        f"(sbatch --exclude={bad.node}, or one node more and spares=1): {bad.reason}"
        for bad in kept
    ]
    return LeftOut(tuple(bad.node for bad in left), tuple(lines))
