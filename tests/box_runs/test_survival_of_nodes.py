"""A run outlives its nodes: those that die, the batch node among them, and those that it must leave behind."""

from __future__ import annotations

import json

from launcher import box as boxes
from launcher import runs
from tests.box_runs.nodes import kill_node
from tests.box_runs.support import Launcher, ended, submit_entrypoint, wait_until
from tests.box_runs.survival import STEPS, after_step, check_continued, job, runs_log, start_now


def nodes_of(run: runs.Run, attempt: int = 1) -> list[str]:
    about = json.loads((run.path / f"attempt-{attempt:02d}" / "attempt.json").read_text())
    return [str(node) for node in about["nodes"]]


def back_in_the_queue(launcher: Launcher, run: runs.Run) -> None:
    wait_until(lambda: job(launcher, run)["Restarts"] == "1", "the requeue", 90)
    # The surviving node's daemon tries for up to two minutes to tell the dead one that the step is over.
    wait_until(lambda: job(launcher, run)["JobState"] != "COMPLETING", "the end of the first start", 180)
    start_now(launcher, run)


def test_without_a_spare_the_job_goes_on_elsewhere_when_a_node_dies(
    own_box: tuple[Launcher, boxes.Box],
) -> None:
    launcher, box = own_box
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", steps=150, barrier=1, **STEPS)
    after_step(run, 12)
    first_nodes = nodes_of(run)
    kill_node(box, first_nodes[1])
    back_in_the_queue(launcher, run)
    first, second = check_continued(run, 150, "node_failure", "done")
    assert first["action"] == "requeued"
    assert first["reason"] == "a node of the job failed", (
        "the controller has to say it, before Slurm ends it too"
    )
    assert first["nodes"] == first_nodes
    assert first_nodes[1] not in second["nodes"]
    assert second["job_id"] == first["job_id"] == run.jobs()[-1]["job_id"]


def test_when_the_batch_node_dies_the_next_controller_says_so(own_box: tuple[Launcher, boxes.Box]) -> None:
    """Shell, controller, srun and ranks of that node go at once; only Slurm is left to requeue the job."""
    launcher, box = own_box
    run = submit_entrypoint(launcher, "nodes=2", "tasks_per_node=1", steps=150, barrier=1, **STEPS)
    after_step(run, 12)
    batch_node = nodes_of(run)[0]
    assert job(launcher, run)["BatchHost"] == batch_node
    kill_node(box, batch_node)
    back_in_the_queue(launcher, run)
    first, second = check_continued(run, 150, "node_failure", "done")
    assert first["reason"] == f"node {batch_node} failed, with the controller on it"
    assert first["action"] == "requeued"
    assert batch_node not in second["nodes"]


def broken_card(launcher: Launcher, nodes: int) -> tuple[runs.Run, str]:
    """A run whose rank 1 loses its GPU after step 12, back in the queue; and that rank's node."""
    run = submit_entrypoint(
        launcher, f"nodes={nodes}", "tasks_per_node=1", steps=40, fault="xid", rank=1, step=12, **STEPS
    )
    ended(run)
    back_in_the_queue(launcher, run)
    return run, nodes_of(run)[1]


def test_a_node_with_a_broken_card_is_left_behind(launcher: Launcher) -> None:
    run, broken = broken_card(launcher, nodes=2)
    first, second = check_continued(run, 40, "hardware", "done")
    assert (first["action"], first["excluded"]) == ("requeued", [broken])
    assert broken not in second["nodes"]
    assert job(launcher, run)["ExcNodeList"] == broken


def test_a_node_that_the_job_cannot_do_without_is_not_excluded(launcher: Launcher) -> None:
    """The box has four nodes: without one of them a job of four would wait for ever."""
    run, broken = broken_card(launcher, nodes=4)
    first, second = check_continued(run, 40, "hardware", "done")
    said = f"{broken} cannot be excluded: the job needs 4 nodes, and partition main would have 3 left"
    assert (first["action"], first["excluded"]) == ("requeued", [])
    assert first["decision"] == f"the job goes back into the queue; {said}"
    assert said in runs_log(run)
    assert broken in second["nodes"]
    assert job(launcher, run)["ExcNodeList"] == "(null)"
