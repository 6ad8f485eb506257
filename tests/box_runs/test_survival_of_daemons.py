"""A run outlives the end of Slurm's own daemons, and of a node; each test has a box of its own to break."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher import box as boxes
from launcher import runs
from tests.box_runs.support import Launcher, ended, submit_entrypoint, wait_until
from tests.box_runs.survival import STEPS, after_step, check_continued, job, runs_log, start_now


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
