"""A run outlives what a cluster does to it. Every test proves from Slurm and the ledger that its fault struck."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import box as boxes
from launcher import ledger, runs, slurm
from tests.box_runs.support import Launcher, ended, submit_entrypoint, wait_until

STEPS = {"module": "steps", "seconds": 0.1, "save_every": 5}


def steps_of(run: runs.Run) -> list[int]:
    return [line["step"] for line in ledger.read_lines(run.metrics_file)]


def started_from(run: runs.Run, attempt: int) -> int:
    return int((run.path / f"attempt-{attempt:02d}" / "from-0").read_text())


def after_step(run: runs.Run, step: int) -> None:
    wait_until(lambda: step in steps_of(run), f"step {step} of {run.path}")


def job(launcher: Launcher, run: runs.Run, which: int = -1) -> dict[str, str]:
    said = launcher.slurm("scontrol", "show", "job", "-o", run.jobs()[which]["job_id"])
    return slurm.parse_key_values(said)


def start_now(launcher: Launcher, run: runs.Run, restarts: int = 1) -> None:
    """A requeued job waits for its credential to expire; an administrator may let it start at once."""
    command = ["scontrol", "update", f"jobid={run.jobs()[-1]['job_id']}", "starttime=now"]

    def runs_again() -> bool:
        subprocess.run(command, env=launcher.environment, capture_output=True, check=False)
        found = job(launcher, run)
        return found["JobState"] == "RUNNING" and found["Restarts"] == str(restarts)

    wait_until(runs_again, f"the second start: {job(launcher, run)}", 60)


def check_continued(run: runs.Run, last: int, *causes: str) -> list[dict[str, Any]]:
    """The run's attempts ended so, and each began where something was saved: nothing announced was lost."""
    records = [ended(run, number) for number in range(1, len(causes) + 1)]
    assert [record["cause"] for record in records] == list(causes), [record["reason"] for record in records]
    assert len(run.attempts()) == len(causes)
    assert steps_of(run)[-1] == last
    for record in records[1:]:
        assert started_from(run, record["attempt"]) == record["saved_in"]
        assert record["saved_in"] > 0
    for number, step in enumerate(range(1, last + 1), start=1):
        assert step in steps_of(run), f"step {number} was skipped"
    return records


@pytest.fixture
def own_box(launcher: Launcher) -> Iterator[tuple[Launcher, boxes.Box]]:
    """A box whose daemons a test may kill."""
    name = f"fragile-{os.getpid()}"
    made = boxes.up(nodes=3, name=name, gpus=0)
    try:
        environment = {**launcher.environment, **boxes.environment(made), "LAUNCHER_BOX": name}
        yield dataclasses.replace(launcher, environment=environment), made
    finally:
        boxes.down(name)


def test_before_the_time_limit_the_ranks_save_and_the_job_is_requeued(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", "time=1", steps=450, **STEPS)
    causes = []
    while (record := ended(run, len(causes) + 1))["cause"] == "time_limit":
        causes.append("time_limit")
        assert (record["action"], record["exit_code"]) == ("requeued", 75)
        assert record["saved_out"] == record["step_out"], "the last step was not saved"
        start_now(launcher, run, restarts=len(causes))
    check_continued(run, 450, *causes, "done")
    assert causes, "the limit did not strike"
    assert job(launcher, run)["Restarts"] == str(len(causes))
    assert len(run.jobs()) == 1


def test_scontrol_requeue_in_the_middle_of_a_step(launcher: Launcher) -> None:
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", steps=60, **STEPS)
    after_step(run, 12)
    launcher.slurm("scontrol", "requeue", run.jobs()[-1]["job_id"])
    start_now(launcher, run)
    first, _ = check_continued(run, 60, "requeued", "done")
    assert first["saved_out"] >= 12
    assert job(launcher, run)["Restarts"] == "1"


def test_a_job_of_higher_priority_takes_the_nodes_and_gives_them_back(
    own_box: tuple[Launcher, boxes.Box],
) -> None:
    launcher, _ = own_box
    words = ["nodes=3", "tasks_per_node=1", "sbatch.exclusive="]
    run = submit_entrypoint(launcher, *words, steps=120, **STEPS)
    after_step(run, 12)
    launcher.slurm(
        "sbatch", "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 2"
    )
    first = ended(run)
    assert (first["cause"], first["action"], first["exit_code"]) == ("preemption", "requeued", 75)
    assert first["saved_out"] == first["step_out"]
    start_now(launcher, run)
    check_continued(run, 120, "preemption", "done")


def test_after_the_kill_of_one_rank_the_tasks_start_again_in_the_same_job(launcher: Launcher) -> None:
    run = submit_entrypoint(
        launcher, "nodes=2", "tasks_per_node=1", steps=40, fault="kill", rank=1, step=12, **STEPS
    )
    first, second = check_continued(run, 40, "unknown", "done")
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
    run = submit_entrypoint(launcher, "nodes=1", "tasks_per_node=1", steps=80, **STEPS)
    after_step(run, 7)
    first_job = run.jobs()[-1]["job_id"]
    launcher.slurm("scontrol", "update", f"jobid={first_job}", "requeue=0")
    wait_until(lambda: job(launcher, run)["Requeue"] == "0", "requeue=0")
    launcher.slurm("scancel", "--batch", "--signal=USR1", first_job)
    first, second = check_continued(run, 80, "preemption", "done")
    assert first["action"] == "successor"
    assert [line["job_id"] for line in run.jobs()] == [first["job_id"], second["job_id"]]
    assert run.jobs()[1]["after"] == first_job
    assert second["job_id"] != first_job


def test_without_slurmctld_the_requeue_is_tried_until_it_is_back(own_box: tuple[Launcher, boxes.Box]) -> None:
    launcher, box = own_box
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", steps=80, **STEPS)
    after_step(run, 12)
    pid = int((box.state_dir / "run" / "slurmctld.pid").read_text())
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    environment = dict(
        line.split(b"=", 1) for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in line
    )
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid), "the end of slurmctld")
    os.kill(int(shell_of(run)), signal.SIGUSR1)
    first = ended(run)
    assert (first["cause"], first["action"]) == ("preemption", "requeued")
    wait_until(lambda: "scontrol requeue is tried again" in runs_log(run), "a requeue in vain", 40)
    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: answers(launcher), "slurmctld")
    # Slurm's own daemons need another minute or two until they have told it that the old step is over.
    wait_until(lambda: job(launcher, run)["Restarts"] == "1", "the requeue")
    assert job(launcher, run)["JobState"] in ("COMPLETING", "PENDING", "RUNNING")
    assert first["saved_out"] == first["step_out"] >= 12
    assert json.loads(launcher("status", run.id, "--json").stdout)["state"] not in ("preempted", "failed")


def test_a_rank_that_hangs_is_named_with_what_the_others_wait_in(launcher: Launcher) -> None:
    run = submit_entrypoint(
        launcher, "nodes=2", "tasks_per_node=1", "env.HANG_SECONDS=4",
        steps=30, fault="hang", rank=1, step=12, barrier=1, **STEPS,
    )  # fmt: skip
    first, _ = check_continued(run, 30, "hang", "done")
    assert (first["rank"], first["action"]) == (1, "restarted")
    assert "stands in stuck_in_a_loader (steps.py:" in first["reason"]
    assert "while the others wait in barrier" in first["reason"]
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


def test_a_spare_takes_the_place_of_a_node_that_died(own_box: tuple[Launcher, boxes.Box]) -> None:
    launcher, box = own_box
    run = submit_entrypoint(launcher, "nodes=2", "spares=1", "tasks_per_node=1", steps=300, **STEPS)
    after_step(run, 12)
    victim = json.loads((run.path / "attempt-01" / "attempt.json").read_text())["nodes"][1]
    kill_node(box, victim)
    first, second = check_continued(run, 300, "node_failure", "done")
    assert first["action"] == "restarted"
    assert victim in first["nodes"]
    assert victim in first["excluded"]
    assert victim not in second["nodes"]
    assert second["job_id"] == first["job_id"]
    assert job(launcher, run)["Restarts"] == "0"


# --- helpers ------------------------------------------------------------------------------------------------------


def runs_log(run: runs.Run) -> str:
    return (run.submitit_folder / f"{run.jobs()[0]['job_id']}_0_log.out").read_text()


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def shell_of(run: runs.Run) -> str:
    """The batch shell: the controller's parent."""
    return Path(f"/proc/{run.state()['pid']}/stat").read_text().rpartition(")")[2].split()[1]


def answers(launcher: Launcher) -> bool:
    command = ["scontrol", "ping"]
    done = subprocess.run(
        command, env=launcher.environment, capture_output=True, text=True, check=False, timeout=60
    )
    return "is UP" in done.stdout


def kill_node(box: boxes.Box, node: str) -> None:
    """End a node's slurmd, its slurmstepds and their tasks without a word, as a power cut does."""
    os.kill(int((box.state_dir / "run" / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
    wanted = {f"SLURMD_NODENAME={node}", f"BOX_JOB={box.slurm_conf}"}
    tasks = [
        process
        for process in psutil.process_iter()
        if wanted <= {f"{name}={value}" for name, value in environment_of(process).items()}
    ]
    above = {
        parent for task in tasks for parent in [task.parent()] if parent and "slurmstepd" in parent.name()
    }
    for process in [*above, *tasks]:
        process.kill()


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
