"""A run outlives what a cluster does to it. Every test proves from Slurm and the ledger that its fault struck."""

from __future__ import annotations

import os
import signal

from tests.box_runs.support import Launcher, ended, submit_entrypoint, wait_until
from tests.box_runs.survival import STEPS, after_step, check_continued, job, runs_log, start_now


def test_before_the_time_limit_the_ranks_save_and_the_job_is_requeued(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", "time=1", steps=420, **STEPS)
    first = ended(run)
    assert (first["cause"], first["action"], first["exit_code"]) == ("time_limit", "requeued", 75)
    assert first["saved_out"] == first["step_out"], "the last step was not saved"
    # So that the second attempt is the last one, however early Slurm warned the first.
    launcher.slurm("scontrol", "update", f"jobid={run.jobs()[0]['job_id']}", "timelimit=10")
    start_now(launcher, run)
    check_continued(run, 420, "time_limit", "done")
    assert job(launcher, run)["Restarts"] == "1"
    assert len(run.jobs()) == 1


def test_scontrol_requeue_in_the_middle_of_a_step(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", steps=60, **STEPS)
    after_step(run, 12)
    launcher.slurm("scontrol", "requeue", run.jobs()[-1]["job_id"])
    start_now(launcher, run)
    first, _ = check_continued(run, 60, "requeued", "done")
    assert first["saved_out"] >= 12
    assert job(launcher, run)["Restarts"] == "1"


def test_after_the_kill_of_one_rank_the_tasks_start_again_in_the_same_job(launcher: Launcher) -> None:
    run = submit_entrypoint(
        launcher, "nodes=2", "tasks_per_node=1", steps=40, fault="kill", rank=1, step=12, **STEPS
    )
    first, second = check_continued(run, 40, "killed", "done")
    assert (first["reason"].partition(" on ")[0], first["action"], first["rank"]) == (
        "rank 1",
        "restarted",
        1,
    )
    assert "Killed" in first["reason"]
    assert second["job_id"] == first["job_id"]
    assert job(launcher, run)["Restarts"] == "0"
    assert second["tasks_started"] - first["ended"] < 10.0


def test_after_the_kill_of_the_controller_the_shell_requeues(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", steps=80, **STEPS)
    after_step(run, 12)
    os.kill(run.state()["pid"], signal.SIGKILL)
    wait_until(lambda: job(launcher, run)["Restarts"] == "1", "the requeue by the shell")
    start_now(launcher, run)
    first, _ = check_continued(run, 80, "controller_lost", "done")
    assert (first["job_id"], first["action"]) == (run.jobs()[0]["job_id"], "requeued")
    assert "the controller was killed (status 137)" in runs_log(run)


def test_a_job_that_may_not_be_requeued_gets_a_successor(launcher: Launcher) -> None:
    """Under torchrun, whose agents no signal may reach: the stop file alone tells the workers."""
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", "launch=torchrun", steps=80, **STEPS)
    after_step(run, 7)
    first_job = run.jobs()[-1]["job_id"]
    launcher.slurm("scontrol", "update", f"jobid={first_job}", "requeue=0")
    wait_until(lambda: job(launcher, run)["Requeue"] == "0", "requeue=0")
    launcher.slurm("scancel", "--batch", "--signal=USR1", first_job)
    first, second = check_continued(run, 80, "preemption", "done")
    assert first["action"] == "successor"
    assert first["saved_out"] == first["step_out"]
    assert [line["job_id"] for line in run.jobs()] == [first["job_id"], second["job_id"]]
    assert run.jobs()[1]["after"] == first_job
    assert second["job_id"] != first_job


def test_a_rank_that_hangs_is_named_with_what_the_others_wait_in(launcher: Launcher) -> None:
    run = submit_entrypoint(
        launcher, "nodes=2", "tasks_per_node=1", "env.HANG_SECONDS=4",
        steps=30, fault="hang", rank=1, step=12, barrier=1, **STEPS,
    )  # fmt: skip
    first, _ = check_continued(run, 30, "hang", "done")
    assert (first["rank"], first["action"]) == (1, "restarted")
    assert "stands in stuck_in_a_loader (steps.py:" in first["reason"]
    assert (
        "while the others wait in barrier: gloo barrier, call 12 of group 0 (default_pg)" in first["reason"]
    )
    assert any(line.endswith("; made call 11 last") for line in first["evidence"])
    assert (run.path / "attempt-01" / "stacks-0.txt").read_text().count("most recent call first")


def test_of_two_launchers_that_resume_one_run_the_second_gets_one_line(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=1", "tasks_per_node=1", steps=70, **STEPS)
    after_step(run, 2)
    log = run.path / "second.log"
    launcher.slurm("sbatch", f"--output={log}", str(run.script_file))
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"), "the second one's end")
    owner = run.jobs()[0]["job_id"]
    assert log.read_text() == (
        f"launcher: {run.path.name}: job {owner} works on this run; cancel it first, or wait for it\n"
    )
    check_continued(run, 70, "done")
