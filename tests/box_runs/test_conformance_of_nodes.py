"""A training run survives the end of nodes and of Slurm's own daemons; each test has a box of its own to break."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launcher import box as boxes
from tests.box_runs.conformance import Started, check, frozen, in_a_step, losses_by_step, start
from tests.box_runs.daemons import answers, end_slurmctld, kill_node, shell_of
from tests.box_runs.support import Launcher, ended, wait_until

Losses = dict[int, float]
AWAY_SECONDS = 60.0


def nodes_of(started: Started) -> list[str]:
    """The nodes of the first attempt, the batch node first."""
    about = json.loads((started.run.path / "attempt-01" / "attempt.json").read_text())
    return list(about["nodes"])


def test_a_job_of_higher_priority(
    own_box: tuple[Launcher, boxes.Box], tmp_path: Path, undisturbed: Losses
) -> None:
    launcher, _ = own_box
    started = start(launcher, tmp_path / "job", flags=["--exclusive"])
    with frozen(started, in_a_step(started)):
        launcher.slurm(
            "sbatch", "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 2"
        )
        wait_until(lambda: (started.run.path / "attempt-01" / "stop.json").exists(), "the request to stop")
    first = ended(started.run)
    started.goes_on()
    check(started, undisturbed, ["preemption", "done"])
    assert (first["action"], first["exit_code"]) == ("requeued", 75)
    assert first["saved_out"] == first["step_out"]


def test_without_slurmctld_the_requeue_is_tried_until_it_is_back(
    own_box: tuple[Launcher, boxes.Box], tmp_path: Path, undisturbed: Losses
) -> None:
    launcher, box = own_box
    started = start(launcher, tmp_path / "job")
    with frozen(started, in_a_step(started)):
        start_again = end_slurmctld(box)
        away_since = time.monotonic()
        os.kill(shell_of(started.run), signal.SIGUSR1)
        wait_until(lambda: (started.run.path / "attempt-01" / "stop.json").exists(), "the request to stop")
    first = ended(started.run)
    wait_until(lambda: "scontrol requeue is tried again" in started.log.read_text(), "a requeue in vain")
    while time.monotonic() - away_since < AWAY_SECONDS:
        assert not answers(launcher)
        time.sleep(1.0)
    start_again()
    wait_until(lambda: answers(launcher), "slurmctld")
    # Its slurmds need up to two minutes until they have told it that the old step is over.
    started.goes_on()
    check(started, undisturbed, ["preemption", "done"])
    assert first["action"] == "requeued"


def test_a_run_that_ends_without_slurmctld_is_done(
    own_box: tuple[Launcher, boxes.Box], tmp_path: Path, undisturbed: Losses
) -> None:
    launcher, box = own_box
    started = start(launcher, tmp_path / "job")
    with frozen(started, in_a_step(started)):
        start_again = end_slurmctld(box)
        assert not answers(launcher)
    record = ended(started.run)
    assert (record["cause"], record["action"]) == ("done", "done")
    assert losses_by_step(started.run) == undisturbed
    start_again()
    wait_until(lambda: answers(launcher), "slurmctld")
    assert json.loads(launcher("status", started.run.id, "--json").stdout)["state"] == "done"


def test_a_spare_takes_the_place_of_a_node_that_died(
    own_box: tuple[Launcher, boxes.Box], tmp_path: Path, undisturbed: Losses
) -> None:
    launcher, box = own_box
    started = start(launcher, tmp_path / "job", "spares=1", nodes=3)
    with frozen(started, in_a_step(started)):
        victim = nodes_of(started)[1]
        kill_node(box, victim)
    first, second = check(started, undisturbed, ["node_failure", "done"])
    assert first["action"] == "restarted"
    assert victim in first["nodes"]
    assert victim in first["excluded"]
    assert victim not in second["nodes"]
    assert second["job_id"] == first["job_id"]
    assert started.job()["Restarts"] == "0"


@pytest.mark.parametrize("which", [0, 1], ids=["the batch node", "another node"])
def test_a_node_that_died_without_a_spare(
    own_box: tuple[Launcher, boxes.Box], tmp_path: Path, undisturbed: Losses, which: int
) -> None:
    launcher, box = own_box
    started = start(launcher, tmp_path / "job")
    with frozen(started, in_a_step(started)):
        victim = nodes_of(started)[which]
        kill_node(box, victim)
    wait_until(lambda: started.job()["Restarts"] == "1", "the requeue")
    started.goes_on()
    _, second = check(started, undisturbed, ["node_failure", "done"])
    assert victim not in second["nodes"]
