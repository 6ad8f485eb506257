"""Why a process gave no answer in time: it hangs, or it had no CPU. Reads /proc.

A node that is busy with the end of somebody's job looks like one with a dead mount, if nobody asks: both are silent.
The kernel knows: the third field of /proc/PID/stat is the state (R runs or waits for a CPU, D waits in the kernel and
cannot be killed, S sleeps), and /proc/PID/schedstat has the nanoseconds that it ran and that it stood ready without a
CPU (Documentation/scheduler/sched-stats.rst; absent where the kernel has no CONFIG_SCHED_INFO).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Scheduled:
    """How a process stands with the scheduler, now."""

    state: str
    """R, S, D, …; empty where it could not be read."""
    waited: float | None = None
    """Seconds, since it began, that it was ready and had no CPU."""


def scheduled(pid: int, proc: Path = PROC) -> Scheduled:
    """What /proc says now; of a process that is gone, nothing."""
    # The name stands in brackets and may hold brackets and spaces: what follows the last one is fixed.
    stat = _text(proc / str(pid) / "stat").rpartition(")")[2].split()
    schedstat = _text(proc / str(pid) / "schedstat").split()
    waited = int(schedstat[1]) / 1e9 if len(schedstat) == 3 and schedstat[1].isdecimal() else None
    return Scheduled(stat[0] if stat else "", waited)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""  # nothing is known, and nothing is said


def is_starved(now: Scheduled) -> bool:
    """Whether its silence says nothing of what it asked: it computes, or would if it had a CPU. Pure.

    The state decides, not the time: whose CPUs are rationed (a container's quota) stands in state R without that the
    kernel counts it as waiting, and who waited for a CPU first may hang in what it asked now.
    """
    return now.state == "R"


def described(before: Scheduled, after: Scheduled, who: str = "the reader") -> str:
    """For a verdict's line: which of the two it was; "" where nothing is known. Pure."""
    waited = ""
    if before.waited is not None and after.waited is not None:
        waited = f", {max(0.0, after.waited - before.waited):.1f} s of them without a CPU"
    return {
        "R": f"; {who} was ready to run (state R{waited}): this machine is overloaded",
        "D": f"; {who} is stuck in the kernel (state D): a dead mount or driver",
        "S": f"; {who} sleeps (state S): what it asked does not answer",
    }.get(after.state, "")
