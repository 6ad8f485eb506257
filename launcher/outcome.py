"""Why an attempt ended, from what was seen of its end. Pure.

The order of the questions is the order of trust: a finished run is done whatever came after; then what the controller
itself decided (a hang), what Slurm says of the job, what was asked of the ranks; and only then what the ranks said,
because most of that is echoes: when one rank dies, every other one reports a broken connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.slurm import TaskExit

Cause = Literal[
    "done", "user_error", "out_of_memory", "hang", "hardware", "node_failure", "preemption", "time_limit", "cancelled",
    "storage", "requeued", "controller_lost", "killed", "unknown",
]  # fmt: skip
State = Literal["done", "failed", "cancelled", "timeout", "preempted", "requeued", "node_failure", "lost"]
StopReason = Literal["time_limit", "preemption", "cancel", "requeue"]

STOPPED_EXIT = 75
"""Status of a rank that saved and stopped because it was asked to (EX_TEMPFAIL); recipes/lib/stopping.py has it too."""

_STATES: Mapping[Cause, State] = {
    "done": "done",
    "node_failure": "node_failure",
    "preemption": "preempted",
    "time_limit": "timeout",
    "cancelled": "cancelled",
    "requeued": "requeued",
    "controller_lost": "lost",
}
MOST_EVIDENCE = 6
_LONGEST_LINE = 300


@dataclass(frozen=True)
class RankError:
    """The exception that ended one rank, as its task wrapper recorded it."""

    time: float
    rank: int
    node: str
    type: str
    message: str
    traceback: str

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RankError:
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        message = self.message.strip().splitlines()[0] if self.message.strip() else "no message"
        return f"rank {self.rank} on {self.node}: {self.type}: {message}"


@dataclass(frozen=True)
class Ending:
    """The facts about the end of an attempt."""

    exit_code: int
    """Of the step: 0 only when every task ended with 0."""
    task_exits: tuple[TaskExit, ...] = ()
    errors: tuple[RankError, ...] = ()
    hang: tuple[str, ...] = ()
    """What the watch over the heartbeats found, the sentence first; empty where nothing hung."""
    hung_rank: int | None = None
    stop_signal: str = ""
    """The signal that the controller itself received, e.g. SIGTERM; empty for none."""
    stop_reason: StopReason | None = None
    """What the ranks were asked to stop for."""
    slurm_cause: str = ""
    """Why Slurm ended the job (launcher.slurm.parse_cancellation); empty where it did not, or there is none."""
    failed_nodes: tuple[str, ...] = ()
    """Nodes of the attempt that Slurm took out of the job or calls down."""
    last_lines: tuple[str, ...] = ()
    """The end of the step's own output: what srun said."""
    log_lines: tuple[str, ...] = ()
    """The ends of the ranks' logs."""


@dataclass(frozen=True)
class Outcome:
    """The cause of an attempt's end, for the ledger and for what to do next."""

    cause: Cause
    reason: str
    rank: int | None = None
    """The first rank that failed, where one did."""
    node: str = ""
    """The node that is to blame, where one is."""
    evidence: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    """Every node to leave behind, where the preflight found several."""

    @property
    def state(self) -> State:
        """The coarser word of `status`."""
        return _STATES.get(self.cause, "failed")


_BY_SLURM: Mapping[str, Outcome] = {
    "CANCELLED": Outcome("cancelled", "the job was cancelled"),
    "TIMEOUT": Outcome("time_limit", "the time limit was reached"),
    "PREEMPTED": Outcome("preemption", "a job of higher priority took the nodes"),
    "REQUEUED": Outcome("requeued", "the job was put back into the queue"),
    "NODE_FAIL": Outcome("node_failure", "a node of the job failed"),
}
_BY_REQUEST: Mapping[StopReason, str] = {
    "time_limit": "TIMEOUT",
    "preemption": "PREEMPTED",
    "cancel": "CANCELLED",
    "requeue": "REQUEUED",
}

# What a line says about the cause, the surest first. Sources: the driver's Xid messages, NCCL's error names
# (ncclResult_t), torch's own exception texts, errno(3), slurmstepd's and the kernel's words for the OOM killer.
_SIGNS: tuple[tuple[Cause, re.Pattern[str]], ...] = (
    (
        "hardware",
        re.compile(r"\bXid\b.*: \d+|fallen off the bus|uncorrectable (NVLink|ECC)|ECC error|Uncorrected ECC"),
    ),
    (
        "out_of_memory",
        re.compile(
            r"CUDA out of memory|OutOfMemoryError|\bMemoryError\b|std::bad_alloc|can't allocate memory|"
            r"oom[-_]kill|Out Of Memory|\[Errno 12\]"
        ),
    ),
    (
        "storage",
        re.compile(
            r"\[Errno (5|28|30|116|122)\]|No space left on device|[Dd]isk quota exceeded|Stale file handle|"
            r"PytorchStreamWriter failed|Read-only file system|(?<!NCCL )Input/output error"
        ),
    ),
    (
        "hang",
        re.compile(r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|ran for \d+ milliseconds"),
    ),
    (
        "hardware",
        re.compile(
            r"ncclSystemError|ncclRemoteError|ncclInternalError|ncclUnhandledCudaError|NCCL WARN .*(IB|NET|ibv)|"
            r"CUDA error: (unspecified launch failure|unknown error|uncorrectable|hardware|the launch timed out)|"
            r"CUDA-capable device\(s\) is/are busy|no CUDA-capable device"
        ),
    ),
)  # fmt: skip
_ECHO = re.compile(
    r"Connection (reset|closed|refused)|Broken pipe|closed by peer|Socket closed|recvValue failed|"
    r"failed to recv|store is not|DistNetworkError|DistStoreError"
)
_KILLED_UNDER_TORCHRUN = re.compile(
    r"Root Cause[^\n]*\n\[\d+\]:\n  time[^\n]*\n  host[^\n]*\n  rank +: (?P<rank>\d+)[^\n]*\n  exitcode +: -9 \(pid"
)
"""torchrun's agent outlives a worker that was killed. Its summary (ChildFailedError, in its log) names it; others that
the agent itself had to kill afterwards stand above as "Other Failures"."""
_NOT_FINITE = re.compile(r"first wrong on rank (?P<rank>\d+)")
"""What every rank of a training run raises alike, about the one that made the number (recipes/lib/finite.py)."""
_CRASHES = frozenset({"Segmentation fault", "Aborted", "Illegal instruction", "Floating point exception"})
"""Ends by a signal that the program brought on itself; a kill from outside is none of them."""


def classify(ending: Ending) -> Outcome:
    """The cause, the one-line reason and the evidence of an attempt's end."""
    # srun gives 0 for a step that lost a node, when the ranks elsewhere ended well before Slurm noticed. A run that was
    # done all the same finds nothing left to do.
    if ending.exit_code == 0 and ending.slurm_cause != "NODE_FAIL":
        return Outcome("done", "all ranks finished")
    if (
        ending.hang and ending.slurm_cause != "NODE_FAIL"
    ):  # the others had waited for the ranks of a dead node
        return Outcome("hang", ending.hang[0], ending.hung_rank, evidence=_short(ending.hang[1:]))
    if ending.slurm_cause:
        return _with_evidence(_BY_SLURM[ending.slurm_cause], ending)
    if ending.stop_reason is not None:
        known = _BY_SLURM[_BY_REQUEST[ending.stop_reason]]
        if ending.stop_reason == "cancel" and ending.stop_signal:
            known = Outcome("cancelled", f"the controller received {ending.stop_signal}")
        return _with_evidence(known, ending)
    if ending.failed_nodes:
        named = ", ".join(ending.failed_nodes)
        lines = _short((*ending.last_lines, *map(str, ending.errors)))
        return Outcome("node_failure", f"node {named} failed", node=ending.failed_nodes[0], evidence=lines)
    if _stopped(ending):
        return Outcome("requeued", "the ranks were told to stop by a signal, and saved")
    return _from_the_ranks(ending)


def first_error(errors: Sequence[RankError]) -> RankError | None:
    """The rank that failed first: later ones mostly report that a peer closed its connection."""
    first = min(errors, key=lambda error: error.time, default=None)
    if first is None or first.type != "NotFinite" or (named := _NOT_FINITE.search(first.message)) is None:
        return first
    return next((error for error in errors if error.rank == int(named["rank"])), first)


def sign_of(line: str) -> Cause | None:
    """The cause that one line of a log or an exception speaks of, None for most lines."""
    return next((cause for cause, pattern in _SIGNS if pattern.search(line)), None)


def _stopped(ending: Ending) -> bool:
    """Whether every rank that we know of stopped as asked; srun ends the slower ones with Terminated."""
    exits = ending.task_exits
    asked = all(task.exit_code in (STOPPED_EXIT, 128 + 15) or task.signal == "Terminated" for task in exits)
    return asked and any(task.exit_code == STOPPED_EXIT for task in exits) and not ending.errors


def _from_the_ranks(ending: Ending) -> Outcome:
    evidence = _short((*map(str, sorted(ending.errors, key=lambda error: error.time)), *_telling(ending)))
    rank, node, reason = _first_failure(ending)
    # A rank that a signal killed wrote no record, so it is the first whatever the others recorded; but the reason
    # for the kill stands elsewhere: in the kernel's and slurmstepd's words.
    first, killed = first_error(ending.errors), _killed(ending)
    for line in _telling(ending):
        cause = sign_of(line)
        if cause == "hardware" or (cause == "out_of_memory" and (killed or first is None)):
            return Outcome(cause, f"{reason}; {line.strip()}"[:_LONGEST_LINE], rank, node, evidence)
    if killed is not None:
        return Outcome(_cause_of_signal(killed), reason, rank, node, evidence)
    if first is not None:
        return Outcome(_cause_of_error(first), reason, rank, node, evidence)
    if rank is None:
        return Outcome("unknown", reason, evidence=evidence)
    return Outcome(_cause_of_exit(ending.task_exits[0]), reason, rank, node, evidence)


def _first_failure(ending: Ending) -> tuple[int | None, str, str]:
    """Rank, node and reason of the failure that came first."""
    killed, first = _killed(ending), first_error(ending.errors)
    if killed is not None:
        signal = "Killed (SIGKILL)" if killed.signal == "Killed" else killed.signal
        return killed.tasks[0], killed.node, f"rank {killed.tasks[0]} on {killed.node}: {signal}"
    if first is not None:
        return first.rank, first.node, str(first)
    if ending.task_exits:
        task = ending.task_exits[0]
        signal = " (SIGKILL)" if task.exit_code == 128 + 9 else ""
        return (
            task.tasks[0],
            task.node,
            f"rank {task.tasks[0]} on {task.node}: exit code {task.exit_code}{signal}",
        )
    said = next((line for line in reversed(ending.last_lines) if line.strip()), "no message")
    return None, "", f"the tasks ended with status {ending.exit_code}: {said.strip()}"


def _killed(ending: Ending) -> TaskExit | None:
    """The first task that a signal ended, other than the one that srun ends the rest with."""
    by_signal = (task for task in ending.task_exits if task.signal and task.signal != "Terminated")
    return next(by_signal, None) or _killed_worker(ending)


def _killed_worker(ending: Ending) -> TaskExit | None:
    """The rank that was killed under a torchrun agent, which ends with 1 itself, the first of all agents."""
    match = _KILLED_UNDER_TORCHRUN.search("\n".join(ending.log_lines))
    if match is None or not ending.task_exits:
        return None
    return TaskExit(ending.task_exits[0].node, (int(match["rank"]),), None, "Killed")


def _cause_of_signal(task: TaskExit) -> Cause:
    if "Out Of Memory" in task.signal:
        return "out_of_memory"
    if task.signal == "Killed":
        return "killed"  # by a person, a site's watchdog or a kernel that tells us nothing
    return "user_error" if task.signal.partition(" (")[0] in _CRASHES else "unknown"


def _cause_of_error(error: RankError) -> Cause:
    text = f"{error.type}: {error.message}"
    cause = sign_of(text)
    if cause is not None:
        return cause
    # Only echoes were recorded: whoever failed first left no word.
    return "unknown" if _ECHO.search(text) else "user_error"


def _cause_of_exit(task: TaskExit) -> Cause:
    """An exit status without an exception: 128 + n from a shell or a container stands for a signal."""
    code = task.exit_code or 0
    if code in (128 + 4, 128 + 6, 128 + 8, 128 + 11):
        return "user_error"
    if code == 128 + 9:
        return "killed"
    return "unknown" if code >= 128 or code == STOPPED_EXIT else "user_error"


def _telling(ending: Ending) -> tuple[str, ...]:
    return tuple(line for line in (*ending.last_lines, *ending.log_lines) if sign_of(line) is not None)


def _with_evidence(known: Outcome, ending: Ending) -> Outcome:
    """What went wrong on the way to a stop that somebody else asked for, such as a save that failed."""
    lines = _short((*map(str, ending.errors), *(line for line in ending.last_lines if "***" in line)))
    return Outcome(known.cause, known.reason, known.rank, known.node, lines)


def _short(lines: Sequence[str]) -> tuple[str, ...]:
    unique = dict.fromkeys(line.strip()[:_LONGEST_LINE] for line in lines if line.strip())
    return tuple(unique)[:MOST_EVIDENCE]
