"""The reason of an attempt names the cause, not its echoes."""

from __future__ import annotations

from launcher.outcome import Ending, Outcome, RankError, classify
from launcher.slurm import TaskExit


def error(rank: int, time: float, type_: str = "ValueError", message: str = "bad") -> RankError:
    return RankError(time, rank, f"n{rank // 2 + 1}", type_, message, "Traceback …")


def test_all_ranks_at_zero_is_done() -> None:
    assert classify(Ending(exit_code=0)) == Outcome("done", "all ranks finished")


def test_the_first_error_by_time_is_the_cause() -> None:
    ending = Ending(
        exit_code=1,
        task_exits=(TaskExit("n1", (0, 1), 1, ""),),
        errors=(
            error(0, 20.0, "RuntimeError", "Connection closed by peer"),
            error(3, 10.0, message="bad shape\nmore"),
        ),
    )
    assert classify(ending) == Outcome("failed", "rank 3 on n2: ValueError: bad shape", 3)


def test_a_rank_killed_by_a_signal_is_the_cause_of_the_others_exceptions() -> None:
    ending = Ending(
        exit_code=137,
        task_exits=(TaskExit("n2", (2,), None, "Killed"), TaskExit("n1", (0,), 1, "")),
        errors=(error(0, 10.0, "RuntimeError", "Connection reset by peer"),),
    )
    assert classify(ending) == Outcome("failed", "rank 2 on n2: Killed", 2)


def test_ranks_that_srun_terminated_are_not_the_cause() -> None:
    ending = Ending(
        exit_code=1,
        task_exits=(TaskExit("n1", (0,), None, "Terminated"), TaskExit("n2", (2,), 7, "")),
        errors=(error(2, 1.0),),
    )
    assert classify(ending).rank == 2


def test_an_exit_without_exception_gives_its_code() -> None:
    ending = Ending(exit_code=7, task_exits=(TaskExit("n2", (3,), 7, ""),))
    assert classify(ending) == Outcome("failed", "rank 3 on n2: exit code 7", 3)


def test_what_slurm_says_of_the_job_wins_over_its_echoes() -> None:
    cancelled = Ending(exit_code=143, stop_signal="SIGTERM", slurm_cause="CANCELLED", errors=(error(0, 1.0),))
    assert classify(cancelled).state == "cancelled"
    for cause, state in [("TIMEOUT", "timeout"), ("PREEMPTED", "preempted"), ("REQUEUED", "requeued")]:
        assert classify(Ending(exit_code=143, stop_signal="SIGTERM", slurm_cause=cause)).state == state
    assert classify(Ending(exit_code=143, deadline_passed=True)).state == "timeout"


def test_a_run_that_finished_is_done_even_when_the_job_is_cancelled_a_moment_later() -> None:
    assert classify(Ending(exit_code=0, stop_signal="SIGTERM", slurm_cause="CANCELLED")).state == "done"


def test_a_signal_to_the_controller_is_no_failure_of_the_recipe() -> None:
    ending = Ending(
        exit_code=143, stop_signal="SIGTERM", task_exits=(TaskExit("localhost", (0,), None, "Terminated"),)
    )
    assert classify(ending) == Outcome("cancelled", "the controller received SIGTERM")


def test_without_any_record_the_last_line_of_srun_is_the_reason() -> None:
    ending = Ending(exit_code=1, last_lines=("srun: error: Unable to create step: Invalid account", ""))
    assert classify(ending).reason.endswith("status 1: srun: error: Unable to create step: Invalid account")
