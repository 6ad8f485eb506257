"""The job that the controller runs in: what Slurm says of it, and putting it back into the queue. Subprocess.

Everything here runs on the batch host, where Slurm's commands are; a container often lacks them (pyxis#129,
submitit#1601).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launcher import slurm

QUICK_SECONDS = 15.0
"""For a question in the middle of a run; a slurmctld that is down refuses after about 9 s."""
WATCH_SECONDS = 5.0
"""How often slurmctld is asked whether the job is being preempted or its limit was changed."""
RETRY_SECONDS = 3.0
DEFAULT_KILL_WAIT = 30.0

_AWAY = (
    "Unable to contact slurm controller",
    "timed out",
    "Connection refused",
    "Zero Bytes",
    "no answer within",
)
_ENDED_BY_TERM = "failed with status -15"
_NODE_GONE = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN")
_NODE_LEAVING = (*_NODE_GONE, "DRAIN")
"""A draining node runs its jobs to their end; somebody will look at it after, so no new step should begin there."""


@dataclass(frozen=True)
class OwnJob:
    """What slurmctld says of a running job. Times are unix seconds, None where there is none."""

    start_time: float | None
    end_time: float | None
    """When Slurm will end it: the time limit, or the end of a preemption's grace."""
    eligible_time: float | None
    preempt_time: float | None
    may_requeue: bool
    restarts: int
    nodes: tuple[str, ...]
    partition: str = ""
    node_count: int = 1
    """Nodes that it needs, spares included."""
    excluded: tuple[str, ...] = ()
    """Nodes that it must not get."""

    @property
    def queue_seconds(self) -> float | None:
        """From when the job might have started to when it did."""
        if self.start_time is None or self.eligible_time is None:
            return None
        return max(0.0, self.start_time - self.eligible_time)


def parse_own_job(record: Mapping[str, str]) -> OwnJob:
    """From `scontrol show job`. Pure."""
    return OwnJob(
        start_time=_time(record.get("StartTime", "")),
        end_time=_time(record.get("EndTime", "")),
        eligible_time=_time(record.get("EligibleTime", "")),
        preempt_time=_time(record.get("PreemptTime", "")),
        may_requeue=record.get("Requeue") == "1",
        restarts=int(record.get("Restarts", "0")),
        nodes=_names(record.get("NodeList", "")),
        partition=record.get("Partition", ""),
        node_count=int(record.get("NumNodes", "1").partition("-")[0]),
        excluded=_names(record.get("ExcNodeList", "")),
    )


def _names(hostlist: str) -> tuple[str, ...]:
    return () if hostlist == "(null)" else tuple(slurm.expand_hostlist(hostlist))


def _time(text: str) -> float | None:
    """Slurm's local time without a zone; None, N/A and Unknown are no time."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def look(job_id: str) -> OwnJob:
    """Ask slurmctld. Raises SlurmError when it does not answer."""
    return parse_own_job(slurm.job_record(job_id, timeout=QUICK_SECONDS))


def parse_kill_wait(config: str) -> float:
    """KillWait of `scontrol show config`: seconds between TERM and KILL for a job that is to end. Pure."""
    for line in config.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "KillWait":
            return float(value.split()[0])
    return DEFAULT_KILL_WAIT


def kill_wait() -> float:
    return parse_kill_wait(slurm.run(["scontrol", "show", "config"], timeout=QUICK_SECONDS))


def gone(nodes: Sequence[str]) -> tuple[str, ...]:
    """Those of the nodes that Slurm calls down, failing or silent: no task lives there. Raises SlurmError."""
    return parse_gone(_node_records(nodes))


def unfit(nodes: Sequence[str]) -> tuple[str, ...]:
    """Those of the nodes on which no new step should begin: the draining ones as well. Raises SlurmError."""
    return parse_gone(_node_records(nodes), _NODE_LEAVING)


def _node_records(nodes: Sequence[str]) -> str:
    return slurm.run(["scontrol", "show", "node", "-o", ",".join(nodes)], timeout=QUICK_SECONDS)


def parse_gone(records: str, states: Sequence[str] = _NODE_GONE) -> tuple[str, ...]:
    """Node names out of `scontrol show node -o` whose State holds one of these words. Pure."""
    found = [slurm.parse_key_values(line) for line in records.splitlines() if line.strip()]
    return tuple(
        record["NodeName"] for record in found if any(word in record.get("State", "") for word in states)
    )


class Watcher:
    """Asks slurmctld about the job now and then, in a thread: one that is down takes 9 s to say so."""

    def __init__(self, job_id: str, first: OwnJob | None, every: float = WATCH_SECONDS) -> None:
        self._job_id, self._every = job_id, every
        self._newest = first
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slurm-watcher", daemon=True)
        self._thread.start()

    @property
    def newest(self) -> OwnJob | None:
        """The last answer; None while there was none."""
        return self._newest

    def ask_now(self) -> None:
        self._wake.set()

    def close(self) -> None:
        self._over.set()
        self._wake.set()

    def _watch(self) -> None:
        while not self._over.is_set():
            self._wake.wait(self._every)
            self._wake.clear()
            if self._over.is_set():
                return
            try:
                self._newest = look(self._job_id)
            except slurm.SlurmError:
                continue  # away or restarting: the last answer holds, and requeue() below reports what stays away


# --- back into the queue --------------------------------------------------------------------------------------------


def is_away(error: slurm.SlurmError) -> bool:
    """Whether slurmctld did not answer, which passes, or refused, which does not.

    The words alone do not tell: without slurmctld `scontrol requeue` of 22.05 says "Unexpected message received".
    """
    return any(sign in str(error) for sign in _AWAY) or not _answers()


def _answers() -> bool:
    try:
        return " is UP" in slurm.run(["scontrol", "ping"], timeout=QUICK_SECONDS)
    except slurm.SlurmError:
        return False


def insist(command: Sequence[str], until: float, say: Callable[[str], None], **how: Mapping[str, str]) -> str:
    """Run a Slurm command again and again while slurmctld is away, at most until the unix time `until`.

    Raises SlurmError: its refusal, or that it stayed away.
    """
    said = False
    while True:
        try:
            return slurm.run(command, timeout=QUICK_SECONDS, **how)
        except slurm.SlurmError as error:
            if not is_away(error) or time.time() + RETRY_SECONDS > until:
                raise
            if not said:
                say(
                    f"slurmctld does not answer; {command[0]} {command[1]} is tried again until it does: {error}"
                )
                said = True
        time.sleep(RETRY_SECONDS)


@dataclass(frozen=True)
class Exclusion:
    """Nodes that the next job of a run must not get."""

    nodes: tuple[str, ...]
    """All of them: those that the user excluded, and the broken ones that the job can do without."""
    dropped: tuple[str, ...] = ()
    """Broken ones that it cannot do without."""
    reason: str = ""
    """Why they were dropped."""


def exclusion(job_id: str, broken: Sequence[str], until: float, say: Callable[[str], None]) -> Exclusion:
    """Which of the broken nodes the job may exclude without pending for ever. Raises SlurmError, as `insist` does."""
    said = insist(["scontrol", "show", "job", "-o", job_id], until, say)
    job = parse_own_job(slurm.parse_key_values(said))
    nodes = insist(
        ["sinfo", "--noheader", "--Node", "--format=%N", f"--partition={job.partition}"], until, say
    )
    return affordable(job, broken, tuple(dict.fromkeys(nodes.split())))


def affordable(job: OwnJob, broken: Sequence[str], in_partition: Sequence[str]) -> Exclusion:
    """Exclude the broken nodes, the newest first, as long as the partition keeps as many as the job needs. Pure.

    Nodes that are down now count as kept: they may come back, and Slurm gives the job none of them before.
    """
    users = tuple(node for node in job.excluded if node not in broken)
    free = [node for node in in_partition if node not in users]
    most = max(0, len(free) - job.node_count)
    here = [node for node in broken if node in free]
    dropped = tuple(here[: max(0, len(here) - most)])
    kept = tuple(node for node in broken if node not in dropped)
    if not dropped:
        return Exclusion((*users, *kept))
    reason = (
        f"{', '.join(dropped)} cannot be excluded: the job needs {job.node_count} nodes, and partition "
        f"{job.partition} would have {len(free) - len(here)} left"
    )
    return Exclusion((*users, *kept), dropped, reason)


def requeue(job_id: str, exclude: Sequence[str], until: float, say: Callable[[str], None]) -> None:
    """Put this job back into the queue, away from some nodes. Everything in it receives SIGTERM before this returns.

    Raises SlurmError where Slurm refuses or stays away.
    """
    try:
        insist(["scontrol", "requeue", job_id], until, say)
    except slurm.SlurmError as error:
        if _ENDED_BY_TERM not in str(error):
            raise
        # The SIGTERM of its own success: once slurmctld has accepted, it reaches every process of the job, this command
        # too before it could say so. Taken for a refusal, the run would go on twice, as this job and as a successor.
    if exclude:
        # Slurm takes a change of nodes for a pending job only, so it comes after; KillWait leaves the time for it.
        command = ["scontrol", "update", f"jobid={job_id}", f"ExcNodeList={','.join(exclude)}"]
        try:
            insist(command, until, say)
        except slurm.SlurmError as error:
            if _ENDED_BY_TERM not in str(error):
                raise
            insist(command, until, say)  # the same SIGTERM, which comes once


def submit_successor(
    job_id: str, script: Path, exclude: Sequence[str], environment: Mapping[str, str], until: float,
    say: Callable[[str], None],
) -> str:  # fmt: skip
    """Submit a job that starts when this one has ended, and return its id. Raises SlurmError where Slurm refuses."""
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job_id}"]
    if exclude:
        command.append(f"--exclude={','.join(exclude)}")
    said = insist([*command, str(script)], until, say, environment=slurm.without_outer_job(environment))
    return said.strip().partition(";")[0]
