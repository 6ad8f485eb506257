"""The cause of an attempt is the cause, not its echoes, and every cause is told from its evidence."""

from __future__ import annotations

import pytest

from launcher.outcome import STOPPED_EXIT, Ending, Outcome, RankError, classify
from launcher.slurm import TaskExit
from recipes.lib.finite import Account, blame


def error(rank: int, time: float, type_: str = "ValueError", message: str = "bad") -> RankError:
    return RankError(time, rank, f"n{rank // 2 + 1}", type_, message, "Traceback …")


def ended(code: int | None = 1, signal: str = "", **more: object) -> Ending:
    """One rank ended so, and srun with it."""
    exits = (TaskExit("n1", (0,), None if signal else code, signal),)
    return Ending(**{"exit_code": code or 137, "task_exits": exits, **more})  # type: ignore[arg-type]


XID = "[ 812.4] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."
CASES = {
    "done": (Ending(exit_code=0), "done", "done"),
    "cancelled by scancel": (Ending(143, stop_signal="SIGTERM", slurm_cause="CANCELLED"), "cancelled", "cancelled"),
    "time limit by Slurm": (Ending(143, stop_signal="SIGTERM", slurm_cause="TIMEOUT"), "time_limit", "timeout"),
    "stopped before the limit": (ended(STOPPED_EXIT, stop_reason="time_limit"), "time_limit", "timeout"),
    "preempted by Slurm": (Ending(143, stop_signal="SIGTERM", slurm_cause="PREEMPTED"), "preemption", "preempted"),
    "stopped for a preemption": (ended(STOPPED_EXIT, stop_reason="preemption"), "preemption", "preempted"),
    "requeued by scontrol": (Ending(143, stop_signal="SIGTERM", slurm_cause="REQUEUED"), "requeued", "requeued"),
    "ranks stopped by a signal of their own": (ended(STOPPED_EXIT), "requeued", "requeued"),
    "node failure by Slurm": (Ending(143, slurm_cause="NODE_FAIL"), "node_failure", "node_failure"),
    "node taken out of a job that goes on": (ended(1, failed_nodes=("n2",)), "node_failure", "node_failure"),
    "a hang": (Ending(137, hang=("nothing moved", "rank 1 …"), hung_rank=1), "hang", "failed"),
    "NCCL's watchdog": (
        ended(errors=(error(0, 1, "DistBackendError", "Watchdog caught collective operation timeout: WorkNCCL"),)),
        "hang", "failed",
    ),
    "CUDA out of memory": (
        ended(errors=(error(0, 1, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"),)),
        "out_of_memory", "failed",
    ),
    "Python's MemoryError": (ended(errors=(error(0, 1, "MemoryError", ""),)), "out_of_memory", "failed"),
    "slurm's OOM killer": (
        ended(signal="Killed", last_lines=("slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=7.1",)),
        "out_of_memory", "failed",
    ),
    "srun's Out Of Memory": (ended(signal="Out Of Memory"), "out_of_memory", "failed"),
    "killed by nobody knows whom": (ended(signal="Killed"), "killed", "failed"),
    "137 without a word": (ended(137), "killed", "failed"),
    "Xid in a log": (ended(signal="Killed", log_lines=("step 3", XID)), "hardware", "failed"),
    "NCCL system error": (
        ended(errors=(error(0, 1, "DistBackendError", "NCCL error: ncclSystemError: System call failed"),)),
        "hardware", "failed",
    ),
    "ECC error": (
        ended(errors=(error(0, 1, "AcceleratorError", "CUDA error: uncorrectable ECC error encountered"),)),
        "hardware", "failed",
    ),
    "disk full": (ended(errors=(error(0, 1, "OSError", "[Errno 28] No space left on device"),)), "storage", "failed"),
    "quota": (ended(errors=(error(0, 1, "OSError", "[Errno 122] Disk quota exceeded"),)), "storage", "failed"),
    "input/output error": (ended(errors=(error(0, 1, "OSError", "[Errno 5] Input/output"),)), "storage", "failed"),
    "torch could not write": (
        ended(errors=(error(0, 1, "RuntimeError", "PytorchStreamWriter failed writing file data/3"),)),
        "storage", "failed",
    ),
    "segmentation fault": (ended(signal="Segmentation fault (core dumped)"), "user_error", "failed"),
    "import error": (ended(errors=(error(0, 1, "ImportError", "no module named x"),)), "user_error", "failed"),
    "exit status": (ended(7), "user_error", "failed"),
    "only echoes": (ended(errors=(error(0, 1, "RuntimeError", "Connection closed by peer"),)), "unknown", "failed"),
    "srun said no": (Ending(1, last_lines=("srun: error: Unable to create step",)), "unknown", "failed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_cause_is_told_from_its_evidence(name: str) -> None:
    ending, cause, state = CASES[name]
    found = classify(ending)
    assert (found.cause, found.state) == (cause, state), found
    assert found.reason
    assert len(found.reason.splitlines()) == 1


def test_the_first_error_by_time_is_the_cause_and_the_others_are_evidence() -> None:
    echo = error(0, 20.0, "RuntimeError", "Connection closed by peer")
    found = classify(
        Ending(
            1,
            task_exits=(TaskExit("n1", (0, 1), 1, ""),),
            errors=(echo, error(3, 10.0, message="bad shape\nmore")),
        )
    )
    assert found == Outcome(
        "user_error", "rank 3 on n2: ValueError: bad shape", 3, "n2",
        ("rank 3 on n2: ValueError: bad shape", "rank 0 on n1: RuntimeError: Connection closed by peer"),
    )  # fmt: skip


def test_a_loss_that_is_no_number_is_about_the_rank_that_made_it() -> None:
    """All ranks raise the same, whoever was quickest; a retry goes on from the checkpoint that the reason names."""
    message = blame([Account(1.0, True)] * 3 + [Account(1.0, False)])
    said = f"step 4: loss 2, gradient norm nan; {message}; the last good checkpoint is step-00000003"
    ending = ended(errors=tuple(error(rank, 10.0 + rank, "NotFinite", said) for rank in range(4)))
    found = classify(ending)
    assert (found.cause, found.rank, found.node) == ("user_error", 3, "n2")
    assert found.reason == f"rank 3 on n2: NotFinite: {said}"
    assert classify(ended(errors=(error(0, 1, "NotFinite", "step 1: no rank is to blame"),))).rank == 0


def test_a_rank_killed_by_a_signal_is_the_cause_of_the_others_exceptions() -> None:
    ending = Ending(
        exit_code=137,
        task_exits=(TaskExit("n2", (2,), None, "Killed"), TaskExit("n1", (0,), 1, "")),
        errors=(error(0, 10.0, "RuntimeError", "Connection reset by peer"),),
    )
    found = classify(ending)
    assert (found.cause, found.reason, found.rank, found.node) == (
        "killed",
        "rank 2 on n2: Killed (SIGKILL)",
        2,
        "n2",
    )


SUMMARY = """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
launcher.task FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-21_11:29:34
  host      : n2
  rank      : 2 (local_rank: 0)
  exitcode  : {other} (pid: 16419)
  error_file: <N/A>
  traceback : Signal received by PID 16419
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_11:29:34
  host      : n2
  rank      : 3 (local_rank: 1)
  exitcode  : {root} (pid: 16420)
  error_file: <N/A>
  traceback : Signal received by PID 16420
============================================================"""


def test_a_rank_killed_under_torchrun_is_named_by_its_agent() -> None:
    """The other rank's echo was recorded, and the agent's own status says nothing."""
    agents = {
        "exit_code": 1,
        "task_exits": (TaskExit("n2", (1,), 1, ""), TaskExit("n1", (0,), None, "Terminated")),
        "errors": (error(0, 10.0, "RuntimeError", "Connection reset by peer"),),
    }
    killed = tuple(SUMMARY.format(other="-15", root="-9").splitlines())
    found = classify(Ending(**agents, log_lines=killed))  # type: ignore[arg-type]
    assert (found.cause, found.reason, found.rank, found.node) == (
        "killed",
        "rank 3 on n2: Killed (SIGKILL)",
        3,
        "n2",
    )
    by_the_agent = tuple(SUMMARY.format(other="-9", root="1").splitlines())
    found = classify(Ending(**agents, log_lines=by_the_agent))  # type: ignore[arg-type]
    assert found.cause == "unknown", "the agent kills what does not end; that is no cause"


def test_ranks_that_srun_terminated_are_not_the_cause() -> None:
    ending = Ending(
        exit_code=1,
        task_exits=(TaskExit("n1", (0,), None, "Terminated"), TaskExit("n2", (2,), 7, "")),
        errors=(error(2, 1.0),),
    )
    assert classify(ending).rank == 2


def test_a_run_that_finished_is_done_even_when_the_job_is_cancelled_a_moment_later() -> None:
    assert classify(Ending(exit_code=0, stop_signal="SIGTERM", slurm_cause="CANCELLED")).state == "done"


def test_a_step_that_lost_a_node_is_not_done_because_srun_ended_with_0() -> None:
    assert classify(Ending(exit_code=0, slurm_cause="NODE_FAIL")).cause == "node_failure"


def test_a_hang_on_a_node_that_died_is_its_failure() -> None:
    found = classify(Ending(143, hang=("nothing moved", "rank 1 …"), slurm_cause="NODE_FAIL"))
    assert found.cause == "node_failure"


def test_a_signal_to_the_controller_is_no_failure_of_the_recipe() -> None:
    ending = ended(signal="Terminated", stop_signal="SIGTERM", stop_reason="cancel")
    assert (classify(ending).cause, classify(ending).reason) == (
        "cancelled",
        "the controller received SIGTERM",
    )


def test_a_save_that_fails_during_a_stop_is_evidence_and_the_stop_the_cause() -> None:
    full = error(1, 1.0, "OSError", "[Errno 28] No space left on device")
    found = classify(ended(1, stop_reason="time_limit", errors=(full,)))
    assert (found.cause, found.evidence) == ("time_limit", (str(full),))


def test_a_slower_agent_that_srun_terminated_does_not_hide_that_the_ranks_stopped() -> None:
    exits = (TaskExit("n1", (0,), STOPPED_EXIT, ""), TaskExit("n2", (1,), 143, ""))
    assert classify(Ending(143, exits)).cause == "requeued"


def test_a_rank_that_stops_while_another_fails_does_not_hide_it() -> None:
    exits = (TaskExit("n1", (0,), STOPPED_EXIT, ""), TaskExit("n2", (2,), None, "Segmentation fault"))
    assert classify(Ending(STOPPED_EXIT, exits)).cause == "user_error"
