"""A run whose job may not be requeued goes on in another job, as often as it takes, under one run id."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from launcher import runs
from launcher.paths import REPOSITORY
from tests.box_runs.support import Launcher, ended, submit_entrypoint, wait_until
from tests.box_runs.survival import STEPS, after_step, check_continued, job, runs_log, steps_of

TRAINING = ("args.steps=120", "args.save_every=5", "args.sequence_length=32", "args.batch_size=4")


def sbatch_the_file(launcher: Launcher, tmp_path: Path) -> runs.Run:
    """`sbatch --no-requeue` of ch4_fsdp's rendered file on two nodes, the file in a folder of its own."""
    file, log = tmp_path / "ch4_fsdp.sbatch", tmp_path / "batch.log"
    file.write_text(launcher("render", "recipe=ch4_fsdp", "cluster=box", "tasks_per_node=1").stdout)
    command = ["sbatch", "--no-requeue", "--nodes=2", f"--output={log}", str(file), *TRAINING]
    launcher.slurm(*command, cwd=REPOSITORY)
    wait_until(lambda: runs.all_runs([launcher.run_root]), f"the run directory; {log}")
    run = launcher.only_run()
    after_step(run, 12)
    assert job(launcher, run)["Requeue"] == "0"
    return run


def check_followed(launcher: Launcher, run: runs.Run, cause: str) -> None:
    """The second job did the rest of the same run, from where the first one had saved."""
    first, second = (ended(run, number) for number in (1, 2))
    assert (first["cause"], first["action"]) == (cause, "successor")
    assert (second["cause"], second["step_out"]) == ("done", 120)
    assert len(run.attempts()) == 2
    assert 5 <= second["saved_in"] < 120
    resumed = [
        step for line, step in zip(metrics_of(run), steps_of(run), strict=True) if line["attempt"] == 2
    ]
    assert resumed == list(range(second["saved_in"] + 1, 121))
    assert [line["job_id"] for line in run.jobs()] == [first["job_id"], second["job_id"]]
    assert run.jobs()[1]["after"] == first["job_id"] != second["job_id"]
    assert launcher.only_run() == run
    assert job(launcher, run, 1)["Restarts"] == "0"
    assert json.loads(launcher("status", run.id, "--json").stdout)["state"] == "done"


def metrics_of(run: runs.Run) -> list[dict[str, int]]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def test_a_job_file_that_may_not_be_requeued_is_followed_by_the_runs_own_script(
    launcher: Launcher, tmp_path: Path
) -> None:
    run = sbatch_the_file(launcher, tmp_path)
    launcher.slurm("scancel", "--batch", "--signal=USR1", run.jobs()[0]["job_id"])
    check_followed(launcher, run, "preemption")
    first = run.attempts()[0]
    assert first["saved_out"] == first["step_out"]


def test_after_the_kill_of_the_controller_of_a_job_file_another_job_follows(
    launcher: Launcher, tmp_path: Path
) -> None:
    run = sbatch_the_file(launcher, tmp_path)
    os.kill(run.state()["pid"], signal.SIGKILL)
    check_followed(launcher, run, "controller_lost")
    log = (tmp_path / "batch.log").read_text()
    assert "the controller was killed (status 137)" in log
    assert f"job {run.jobs()[1]['job_id']} follows job {run.jobs()[0]['job_id']}" in log
    assert run.jobs()[1]["controller_killed"] is True


def test_after_the_kill_of_the_controller_of_a_submitted_run_another_job_follows(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", steps=60, **STEPS)
    after_step(run, 12)
    first_job = run.jobs()[0]["job_id"]
    launcher.slurm("scontrol", "update", f"jobid={first_job}", "requeue=0")
    os.kill(run.state()["pid"], signal.SIGKILL)
    first, second = check_continued(run, 60, "controller_lost", "done")
    assert (first["job_id"], first["action"]) == (first_job, "successor")
    assert second["job_id"] == run.jobs()[1]["job_id"] != first_job
    assert f"job {second['job_id']} follows job {first_job}" in runs_log(run)
