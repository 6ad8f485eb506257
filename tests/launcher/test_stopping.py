"""When the ranks are asked to stop, and for what; and how Slurm's answers are read."""

from __future__ import annotations

import pytest

from launcher.ownjob import OwnJob, parse_gone, parse_kill_wait, parse_own_job
from launcher.render import warning_seconds
from launcher.slurm import parse_key_values
from launcher.stopping import due

NOW = 10_000.0


def job(left: float, limit: float = 3600.0, preempt: float | None = None) -> OwnJob:
    return OwnJob(NOW + left - limit, NOW + left, NOW - 100.0, preempt, True, 0, ("n1",))


@pytest.mark.parametrize(
    ("minutes", "measured", "seconds"),
    [(60, None, 120), (2, None, 40), (1, None, 20), (60, 300.0, 300), (60, 5.0, 30), (10, 1000.0, 200)],
)
def test_the_warning_comes_early_enough_and_leaves_most_of_the_time(
    minutes: int, measured: float | None, seconds: int
) -> None:
    assert warning_seconds(minutes * 60, measured) == seconds


def test_long_before_the_limit_nothing_is_asked() -> None:
    assert due(job(1800.0), warned=False, now=NOW, measured=None) is None


def test_the_warning_before_the_limit() -> None:
    stop = due(job(130.0), warned=True, now=NOW, measured=None)
    assert stop is not None
    assert stop.reason == "time_limit"
    assert stop.deadline == NOW + 110.0


def test_the_clock_speaks_where_no_warning_came() -> None:
    assert due(job(116.0), warned=False, now=NOW, measured=None) is None
    stop = due(job(114.0), warned=False, now=NOW, measured=None)
    assert stop is not None
    assert stop.reason == "time_limit"


def test_a_warning_that_was_made_for_a_longer_limit_waits_for_the_clock() -> None:
    """`sbatch --time=2` of a file whose header says 120 s: Slurm signals in the first second."""
    assert due(job(119.0, limit=120.0), warned=True, now=NOW, measured=None) is None
    assert due(job(30.0, limit=120.0), warned=True, now=NOW, measured=None) is not None
    assert due(job(50.0, limit=60.0), warned=True, now=NOW, measured=None) is None
    assert due(job(38.0, limit=60.0), warned=True, now=NOW, measured=None) is not None


def test_a_preemption_is_one_however_much_time_the_limit_leaves() -> None:
    stop = due(job(9.0, preempt=NOW - 1.0), warned=False, now=NOW, measured=None)
    assert stop is not None
    assert (stop.reason, stop.deadline) == ("preemption", NOW + 6.0)
    early = due(job(3000.0), warned=True, now=NOW, measured=None)
    assert early is not None
    assert early.reason == "preemption"


def test_a_warning_counts_when_slurmctld_never_answered() -> None:
    assert due(None, warned=False, now=NOW, measured=None) is None
    assert due(None, warned=True, now=NOW, measured=None) is not None


RECORD = (
    "JobId=1 JobName=x Requeue=1 Restarts=2 SubmitTime=2026-11-21T09:35:38 EligibleTime=2026-11-21T09:35:38 "
    "StartTime=2026-11-21T09:35:48 EndTime=2026-11-21T09:38:48 PreemptTime=None NodeList=n[1-2] Partition=main"
)


def test_the_own_job_is_read_from_scontrol() -> None:
    found = parse_own_job(parse_key_values(RECORD))
    assert (found.may_requeue, found.restarts, found.nodes) == (True, 2, ("n1", "n2"))
    assert (found.preempt_time, found.queue_seconds) == (None, 10.0)
    assert found.end_time is not None
    assert found.start_time is not None
    assert found.end_time - found.start_time == 180.0


def test_nodes_that_cannot_work_are_read_from_scontrol() -> None:
    states = ["IDLE", "MIXED", "DOWN*+NOT_RESPONDING", "ALLOCATED+DRAIN", "ALLOCATED", "FAILING"]
    lines = [
        f"NodeName=n{number} Arch=x CPUAlloc=1 State={state} ThreadsPerCore=1"
        for number, state in enumerate(states)
    ]
    assert parse_gone("\n".join(lines)) == ("n2", "n5")
    assert parse_gone("\n".join(lines), ("DRAIN",)) == ("n3",)


def test_kill_wait_is_read_from_the_configuration() -> None:
    assert parse_kill_wait("KeepAliveTime = 1\nKillWait                = 10 sec\n") == 10.0
    assert parse_kill_wait("") == 30.0
