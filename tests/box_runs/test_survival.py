"""What test_conformance does not try: a job that may not be requeued, what a hang's reason says, a second launcher."""

from __future__ import annotations

from tests.box_runs.support import Launcher, submit_entrypoint, wait_until
from tests.box_runs.survival import STEPS, after_step, check_continued, job


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
